"""Goal 10: checkpoints that earlier releases wrote load, and the next step from them is the recorded one.

Every folder of ``golden`` holds step 4 of a run with a few kilobytes of weights as some release wrote it, and
``next.json``: the state after step 5. A release adds a folder with ``python tests/reliability/test_golden.py
NAME``; where kernels round differently on purpose, ``--again`` records step 5 of all folders anew."""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdino.config import Config, config_from_dict, config_from_flags, config_to_dict
from fastdino.data.loader import Crops
from fastdino.engine import checkpoint, parallel
from fastdino.engine.build import Engine, build
from fastdino.engine.checkpoint import Piece
from fastdino.engine.logs import environment
from fastdino.engine.schedules import Schedule
from reliability.promises import promise

GOLDEN = Path(__file__).parent / "golden"
BATCH, LOCAL, STEP = 4, 2, 4
FLAGS = {
    **{"arch": "vit_tiny", "embed_dim": 8, "depth": 1, "num_heads": 1, "patch_size": 4, "out_dim": 16},
    **{"head_hidden_dim": 8, "bottleneck_dim": 8, "global_crops_size": 16, "local_crops_size": 8},
    **{"local_crops_number": LOCAL, "batch_size_per_gpu": BATCH, "epochs": 2, "warmup_epochs": 1, "lr": 0.01},
    **{"drop_path_rate": 0.0, "device": "cpu", "precision": "fp32", "data_path": "x", "output_dir": "y"},
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def crops(step: int) -> Crops:
    """Pixels from whole numbers: the same on every machine."""

    def pixels(count: int, side: int) -> torch.Tensor:
        numbers = torch.arange(count * 3 * side * side) * 7919 + step * 104729
        return ((numbers % 1009).float() / 504 - 1).reshape(count, 3, side, side)

    return Crops(pixels(2 * BATCH, 16), pixels(LOCAL * BATCH, 8), np.arange(BATCH))


def train(engine: Engine, config: Config, first: int, last: int) -> float:
    """Steps ``first`` to ``last``; the loss of the last."""
    schedule = Schedule(config, 10, BATCH)
    for step in range(first, last + 1):
        result = engine.step.run(iter([crops(step)]), schedule(step - 1))
        assert not result.skipped
    return result.loss


def begin(config: Config) -> Engine:
    return build(config, parallel.World(0, 1, torch.device("cpu")))


def tensors(engine: Engine) -> dict[str, torch.Tensor]:
    state = {f"model {k}": v for k, v in engine.method.state_dict().items()}
    state |= {f"optimizer {k}": v for k, v in engine.updater.state().items()}
    return {name: state[name].detach().double() for name in sorted(state)}


def digest(engine: Engine) -> str:
    parts = (name.encode() + value.numpy().tobytes() for name, value in tensors(engine).items())
    return hashlib.sha256(b"".join(parts)).hexdigest()


def machine() -> dict[str, str]:
    facts = environment(1, torch.device("cpu"))
    cpu = f"{facts['device'].rpartition(',')[0]}, {torch.backends.cpu.get_cpu_capability()}"
    return {"torch": facts["packages"]["torch"], "cpu": cpu}


def after_step_5(folder: Path) -> dict:
    """What is recorded of a golden checkpoint and of the step after it."""
    model, optimizer, meta = checkpoint.load(folder / f"step-{STEP:08d}")
    config = config_from_dict(meta["config"])
    engine = begin(config)
    engine.load_state(model)
    engine.updater.load_state(optimizer)
    loaded = digest(engine)
    loss = train(engine, config, STEP + 1, STEP + 1)
    sizes = {name: float(value.norm()) for name, value in tensors(engine).items()}
    return {"loaded": loaded, "machine": machine(), "sha256": digest(engine), "loss": loss, "norms": sizes}


@pytest.mark.parametrize("name", sorted(path.name for path in GOLDEN.glob("*")))
def test_a_checkpoint_of_an_earlier_release_continues_as_it_did(name):
    recorded = json.loads((GOLDEN / name / "next.json").read_text())
    found = after_step_5(GOLDEN / name)
    with promise(10, "golden checkpoints continue as recorded") as cases:
        with cases.case(f"{name}: what is loaded"):
            assert found["loaded"] == recorded["loaded"]
        with cases.case(f"{name}: the next step"):
            assert found["loss"] == pytest.approx(recorded["loss"], rel=1e-5)
            for of in recorded["norms"]:
                if not of.endswith("qkv.bias"):  # the keys' bias has no gradient but rounding noise
                    assert found["norms"][of] == pytest.approx(recorded["norms"][of], rel=1e-4, abs=1e-7), of
            assert found["norms"].keys() == recorded["norms"].keys()
            if found["machine"] == recorded["machine"]:  # elsewhere sums round differently
                assert found["sha256"] == recorded["sha256"], "kernels round differently; on purpose? --again"


def test_the_first_release_of_the_format_loads():
    golden = Path(__file__).parents[1] / "engine" / "format1"
    with promise(10, "the first checkpoint of format 1 verifies") as cases, cases.case("format1"):
        (path,) = golden.iterdir()
        assert checkpoint.latest(golden) == path
        assert checkpoint.read_meta(path)["step"] == 7


def write(folder: Path) -> None:
    """Train to step 4 and save: whole, or where the folder's name says so the pieces of two processes."""
    config = config_from_flags(**FLAGS)
    engine = begin(config)
    train(engine, config, 1, STEP)
    meta = {"config": config_to_dict(config)}
    if "pieces" not in folder.name:
        checkpoint.save(folder, STEP, engine.state(), engine.updater.state(), meta)
        return
    for rank in (1, 0):
        states = [
            {name: _piece(value, rank) for name, value in state.items()}
            for state in (engine.method.state_dict(), engine.updater.state())
        ]
        checkpoint.save(folder, STEP, *states, meta, rank=rank, world_size=2, attempt="golden", timeout=0)


def _piece(value: torch.Tensor, rank: int) -> torch.Tensor | Piece:
    if value.ndim == 0:
        return value
    half = (len(value) + 1) // 2
    return Piece(value[:half] if rank == 0 else value[half:], rank * half, len(value))


if __name__ == "__main__":
    torch.set_num_threads(1)
    chosen = GOLDEN.iterdir() if sys.argv[1] == "--again" else [GOLDEN / name for name in sys.argv[1:]]
    for each in chosen:
        if not each.exists():
            write(each)
        (each / "next.json").write_text(json.dumps(after_step_5(each), indent=1, sort_keys=True) + "\n")
