"""fastdino/FLAGS.md lists exactly the flags there are, with defaults and help; this file, run, writes it."""

import ast
import dataclasses
from pathlib import Path

from fastdino import config

DOCUMENT = Path(config.__file__).with_name("FLAGS.md")
HEAD = """# Flags of train.py

Order of precedence: `--preset`, then `--config run.yaml`, then flags. Besides those below: `--list_presets`,
`--print_config`, `--dry_run`, `--preview_crops N`. `train.py --help` prints this list. All flags of the
official `main_dino.py` are among them, with its names, types and defaults.
"""


def shown(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(shown(v) for v in value)
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def described() -> dict[str, str]:
    """Section class -> its docstring, and flag -> the string below it, from the source."""
    found = {}
    for section in ast.parse(Path(config.__file__).read_text()).body:
        if isinstance(section, ast.ClassDef):
            found[section.name] = (ast.get_docstring(section) or "").rstrip(".")
            for flag, text in zip(section.body, section.body[1:], strict=False):
                if isinstance(flag, ast.AnnAssign) and isinstance(text, ast.Expr):
                    found[flag.target.id] = ast.literal_eval(text.value)
    return found


def document() -> str:
    texts, parts = described(), [HEAD]
    for section in dataclasses.fields(config.Config):
        values = getattr(config.Config(), section.name)
        rows = [
            f"| `--{f.name}` | `{shown(getattr(values, f.name))}` | {texts[f.name]} |"
            for f in dataclasses.fields(values)
        ]
        parts.append(
            f"## {texts[type(values).__name__]}\n\n| flag | default | |\n|---|---|---|\n"
            + "\n".join(rows)
            + "\n"
        )
    return "\n".join(parts)


def test_the_document_is_complete_and_true() -> None:
    assert DOCUMENT.read_text() == document(), "python tests/test_flags_doc.py writes it"


if __name__ == "__main__":
    DOCUMENT.write_text(document())
