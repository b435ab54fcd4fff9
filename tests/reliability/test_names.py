"""File names keep their bytes from the disk to the report, and none writes a line of its own."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import markupsafe
import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.config import config_from_flags
from fastdino.data import runlist
from fastdino.data.manifest import build_manifest, one_line, printable
from fastdino.data.prescan import prescan
from fastdino.engine.trainer import Trainer
from fastdino.models import VisionTransformer
from fastdino.report import write_report
from reliability.hostile_names import FORGED, NAMES, original
from reliability.promises import promise
from runs import FLAGS

BAD = 7  # every so many files is no image


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every name as a file in every second class, whose folders have names of the same kind."""
    root = tmp_path_factory.mktemp("photos")
    for i, name in enumerate(NAMES):
        folder = root / ("end of a tag <" if name.startswith("script>") else NAMES[i % 10])
        folder.mkdir(exist_ok=True)
        path = folder / f"{name}.jpg"
        if i % BAD == BAD - 1:
            path.write_bytes(b"no image")
        else:
            picture(i).save(path, "PNG")
    return root


@pytest.fixture(scope="module")
def on_disk(photos: Path) -> set[bytes]:
    top = os.fsencode(photos)
    return {os.path.join(folder, name) for folder, _, names in os.walk(top) for name in names}


def test_names_reach_the_manifest_and_the_list_of_the_run_as_they_are(
    photos: Path, on_disk: set[bytes], tmp_path: Path
) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, name in enumerate(NAMES):
        picture(i).save(flat / f"{name}.jpg", "PNG")
    listing = tmp_path / "list.txt"
    whole_lines = [
        path for path in on_disk if not {b"\n", b"\t"} & {path[i : i + 1] for i in range(len(path))}
    ]
    listing.write_bytes(b"\n".join(whole_lines) + b"\n")
    found = {
        kind: build_manifest(path) for kind, path in (("folders", photos), ("flat", flat), ("list", listing))
    }
    with promise(22, "hostile name from the disk to the manifest and back from the list of a run") as cases:
        for path in sorted(on_disk):
            with cases.case(f"{path!r} in a folder"):
                assert (os.fsdecode(path) in found["folders"].paths) is True
        for name in NAMES:
            with cases.case(f"{name!r} in a flat folder"):
                assert (str(flat / f"{name}.jpg") in found["flat"].paths) is True
        for path in whole_lines:
            with cases.case(f"{path!r} in a list"):
                assert (os.fsdecode(path) in found["list"].paths) is True
        for name in NAMES[:10]:
            with cases.case(f"{name!r} as a class"):
                assert name in found["folders"].class_names
        saved = tmp_path / "images.json"
        for kind, manifest in found.items():
            saved.write_text(runlist.write(manifest), encoding="utf-8")
            fewer = manifest.subset(np.arange(1, len(manifest)))  # the first one has gone
            whole = runlist.reconcile(fewer, saved)
            for path, again in zip(manifest.paths, whole.paths, strict=True):
                with cases.case(f"{path!r} from the list of a run on {kind}"):
                    assert os.fsencode(again) == os.fsencode(path)
            with cases.case(f"classes of a run on {kind}"):
                assert whole.class_names == manifest.class_names


def test_what_is_shown_of_a_name_tells_its_bytes_on_one_line(
    photos: Path, on_disk: set[bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "fastdino"):
        usable = prescan(build_manifest(photos), tmp_path, num_threads=1, progress=False)
    listed = (tmp_path / "bad_files.txt").read_text("utf-8").split("\n")[:-1]
    warning = caplog.messages[-1].split("\n")
    with promise(22, "hostile name in messages and lists: one line that tells its bytes") as cases:
        for name in NAMES:
            with cases.case(f"{name!r} shown"):
                shown = printable(name)
                assert shown.isprintable() and original(shown) == name and one_line(shown) == shown
        for line in listed:
            path = os.fsencode(original(line.rpartition(": not an image")[0]))
            with cases.case(f"{path!r} listed"):
                assert path in on_disk and Path(os.fsdecode(path)).read_bytes() == b"no image"
        with cases.case("as many lines as bad files"):
            assert len(listed) == len(NAMES) // BAD == len(NAMES) - len(usable)
        with cases.case("the warning has a line for each"):
            assert warning[1:] == [f"  {line}" for line in listed]


def test_a_run_on_hostile_names_continues_and_reports(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pairs = {FLAGS[i].removeprefix("--"): FLAGS[i + 1] for i in range(0, len(FLAGS), 2)}
    pairs |= {"data_path": str(photos), "output_dir": str(out), "max_steps": "2", "report": "true"}
    pairs |= {"eval_data_path": str(photos), "prescan": "off", "warmup_epochs": "0"}
    run = Trainer(config_from_flags(**pairs))
    names = [os.fsencode(path) for path in run.manifest.paths]
    run.fit()
    again = Trainer(config_from_flags(**pairs))
    with promise(22, "hostile names through a run, its files and its continuation") as cases:
        with cases.case("continued with the same images"):
            assert again.step == 2 and [os.fsencode(path) for path in again.manifest.paths] == names
        for file in sorted(path for path in out.rglob("*") if path.is_file() and path.suffix in TEXTS):
            content = file.read_text("utf-8")
            for i, line in enumerate(content.split("\n")):
                with cases.case(f"line {i} of {file.name}"):
                    assert not line.startswith(FORGED)
                    assert line.isprintable()
        for file in (out / "metrics.jsonl", out / "images.json"):
            with cases.case(f"{file.name} is JSON"):
                assert all(json.loads(line) for line in file.read_text("utf-8").splitlines())


TEXTS = (".txt", ".log", ".json", ".jsonl", ".yaml", ".html")


def test_a_report_shows_names_that_tell_their_bytes(
    photos: Path, on_disk: set[bytes], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    backbone = VisionTransformer(img_size=32, patch_size=16, embed_dim=12, depth=1, num_heads=1)
    paths = sorted(on_disk)
    with promise(22, "hostile name in the report") as cases:
        for begin in range(0, len(paths), 8):
            part = [Path(os.fsdecode(path)) for path in paths[begin : begin + 8]]
            page = write_report(tmp_path, backbone=backbone, image_paths=part).read_text("utf-8")
            for path in part:
                with cases.case(f"{path.name!r}"):
                    shown = str(markupsafe.escape(printable(path.name)))
                    assert (shown in page) is True
