"""The README's flag table lists exactly the flags there are, with their defaults."""

import dataclasses
import re
from pathlib import Path

from fastdino.config import Config

README = (Path(__file__).parents[1] / "README.md").read_text()


def shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(shown(v) for v in value)
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def test_flag_table_is_complete_and_true():
    table = dict(re.findall(r"^\| `--(\w+)` \| `([^`]*)` \|", README, re.M))
    flags = {
        flag.name: shown(getattr(getattr(Config(), section.name), flag.name))
        for section in dataclasses.fields(Config)
        for flag in dataclasses.fields(getattr(Config(), section.name))
    }
    assert table == flags


def test_files_the_readme_names_exist():
    root = Path(__file__).parents[1]
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert pictures
    for name in [*pictures, *re.findall(r"\]\((?!http)([^)#]+)\)", README)]:
        assert (root / name).is_file(), name


def test_both_commands_are_there():
    assert re.search(r"^make train", README, re.M) and re.search(r"^make test", README, re.M)
