"""Goal 4: whatever happens to the bytes or the files of a checkpoint, no tensor of it is used; the one before
is, and the damaged one is kept under another name."""

import itertools
import random
import shutil
import warnings
from pathlib import Path

import pytest
import torch

from fastdino.engine import stored
from fastdino.engine.checkpoint import CheckpointError, Piece, latest, load, save, step_of
from reliability.promises import cases_of, promise

PAGE = 4096


@pytest.fixture(params=["one process", "two processes"])
def root(request, memory):
    """Steps 1 and 2, files of some pages without two that are equal."""
    for step in (1, 2):
        tensors = torch.randn(2, 40, 101, generator=torch.Generator().manual_seed(step))
        if request.param == "one process":
            save(memory, step, {"w": tensors[0]}, {"m": tensors[1]}, {})
            continue
        for rank in (1, 0):
            w, m = (Piece(tensor[rank * 20 :][:20], rank * 20, 40) for tensor in tensors)
            save(memory, step, {"w": w}, {"m": m}, {}, rank=rank, world_size=2, attempt="a", timeout=0)
    return memory


@pytest.fixture
def made(monkeypatch):
    """Files of which tensors were made."""
    files = []
    real = stored._tensors

    def noted(path, data):
        files.append(path)
        return real(path, data)

    monkeypatch.setattr(stored, "_tensors", noted)
    return files


def check_detected(root: Path, newest: Path, made: list[Path], damaged: Path | None = None) -> None:
    """``newest`` is refused, and no tensor of a ``damaged`` file is made."""
    made.clear()
    with pytest.raises(CheckpointError) as caught:
        load(newest)
    assert damaged is None or damaged not in made
    assert str(newest) in str(caught.value), caught.value


def check_fallback(root: Path, newest: Path) -> None:
    """The run that owns ``root`` goes on with step 1; every file of the damaged one is kept."""
    before = {path.name: path.read_bytes() for path in newest.iterdir()}
    with pytest.warns(UserWarning, match="DAMAGED CHECKPOINT.*kept as damaged-step-00000002"):
        found = latest(root, quarantine=True)
    assert found is not None and step_of(found) == 1
    kept = root / "damaged-step-00000002"
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before and not newest.exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert latest(root) == found  # told once
    kept.rename(newest)


def check_mutants(goal_of: str, root: Path, made: list[Path], mutants) -> None:
    """``mutants``: (name, file, its bytes) each."""
    newest = root / "step-00000002"
    with promise(4, goal_of) as cases:
        for number, (name, file, data) in enumerate(mutants):
            original = file.read_bytes()
            assert data != original
            with cases.case(f"{file.name}: {name}"):
                file.write_bytes(data)
                check_detected(root, newest, made, file)
                if number % 25 == 0:
                    check_fallback(root, newest)
            file.write_bytes(original)
    load(newest)


def test_bit_flips(root, made):
    dice = random.Random(4)
    files = sorted((root / "step-00000002").iterdir())

    def flips():
        for _ in range(cases_of(ci=250, nightly=5000)):
            file = dice.choice(files)
            data = bytearray(file.read_bytes())
            bit = dice.randrange(8 * len(data))
            data[bit // 8] ^= 1 << bit % 8
            yield f"bit {bit}", file, bytes(data)

    check_mutants("bit flips", root, made, flips())


def test_zeroed_pages(root, made):
    def zeroed():
        for file in sorted((root / "step-00000002").iterdir()):
            data = file.read_bytes()
            for start in range(0, len(data), PAGE):
                size = len(data[start : start + PAGE])
                yield f"page at {start}", file, data[:start] + bytes(size) + data[start + size :]

    check_mutants("zeroed pages", root, made, zeroed())


def test_truncations(root, made):
    dice = random.Random(5)
    files = sorted((root / "step-00000002").iterdir())

    def cut():
        for _ in range(cases_of(ci=50, nightly=500)):
            file = dice.choice(files)
            data = file.read_bytes()
            yield "cut", file, data[: dice.choice([0, len(data) - 1, dice.randrange(len(data))])]
        for file in files:
            yield "longer", file, file.read_bytes() + b"\0"

    check_mutants("truncations", root, made, cut())


def test_files_at_the_wrong_place(root, made, tmp_path):
    newest, older = root / "step-00000002", root / "step-00000001"
    names = sorted(path.name for path in newest.iterdir())
    intact = tmp_path / "intact"
    shutil.copytree(root, intact)

    def swap(one: Path, two: Path) -> None:
        one.rename(root / "third")
        two.rename(one)
        (root / "third").rename(two)

    wrongs = [(f"{a} and {b} swapped", lambda a=a, b=b: swap(newest / a, newest / b))
              for a, b in itertools.combinations(names, 2)]  # fmt: skip
    for name in names:
        place = newest / name
        wrongs += [
            (f"{name} missing", place.unlink),
            (f"{name} of step 1", lambda p=place: shutil.copy(older / p.name, p)),
            (f"{name} a directory", lambda p=place: (p.unlink(), p.mkdir())),
            (f"{name} a dead link", lambda p=place: (p.unlink(), p.symlink_to("no"))),
        ]
    for extra in ("model-00003-of-00003.safetensors", "rank-00003.json", "model-2.safetensors", "more.json"):
        source = next(name for name in names if name.endswith(Path(extra).suffix))
        wrongs.append((f"{extra} too many", lambda e=extra, s=source: shutil.copy(newest / s, newest / e)))
    wrongs.append(("all of step 1", lambda: (shutil.rmtree(newest), shutil.copytree(older, newest))))
    with promise(4, "files swapped, missing, too many or of another step") as cases:
        for name, wrong in wrongs:
            with cases.case(name):
                wrong()
                check_detected(root, newest, made)
                if "link" not in name and "directory" not in name:
                    check_fallback(root, newest)
                else:
                    with pytest.warns(UserWarning):
                        assert latest(root, quarantine=True) == older
            shutil.rmtree(root)
            shutil.copytree(intact, root)


def test_everything_damaged_is_none_and_kept(root):
    with promise(4, "all checkpoints damaged") as cases, cases.case("manifests cut"):
        for path in root.glob("step-*"):
            (path / "manifest.json").write_bytes(b"{")
        with pytest.warns(UserWarning, match="DAMAGED"):
            assert latest(root, quarantine=True) is None
        assert {path.name for path in root.iterdir()} == {"damaged-step-00000001", "damaged-step-00000002"}


def test_a_later_format_is_no_damage(root):
    with promise(4, "a checkpoint of a later release stays in its place") as cases, cases.case("format 99"):
        manifest = stored.json.loads((root / "step-00000002" / "manifest.json").read_text())
        del manifest["sha256"]
        (root / "step-00000002" / "manifest.json").write_bytes(stored.seal(manifest | {"format": 99}))
        with pytest.warns(UserWarning, match="format 99, this version reads 1 and 2"):
            assert latest(root, quarantine=True) == root / "step-00000001"
        assert (root / "step-00000002").is_dir()
