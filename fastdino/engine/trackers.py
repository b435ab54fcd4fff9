"""Mirrors of metrics.jsonl for those who watch runs elsewhere: TensorBoard, Weights & Biases, trackio.

The files of the run are complete without them. None talks to the network unless its own settings say so.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

_log = logging.getLogger(__name__)
_PROJECT = "fastdino"
_ID = "tracker_id"  # file that names the run to trackers, so that a continued run stays one


class _Tracker(NamedTuple):
    add: Callable[[Mapping[str, float], int], Any]
    close: Callable[[], Any]


class Curves:
    """Scalars for the trackers ``kinds``, whose files lie in ``directory``; "none" writes nothing.

    ``step`` is that after which the run continues, 0 for a new one. A tracker that fails later is given up
    with a warning: training does not depend on it.
    """

    def __init__(self, kinds: Sequence[str], directory: Path, config: Mapping[str, Any], step: int):
        opened = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}
        self.trackers = {
            kind: opened[kind](directory, dict(config), step)
            for kind in dict.fromkeys(kinds)
            if kind != "none"
        }

    def add(self, scalars: Mapping[str, float], step: int) -> None:
        for kind, tracker in list(self.trackers.items()):
            try:
                tracker.add(scalars, step)
            except Exception as error:
                _log.warning("--logger %s failed, the run goes on without it: %s", kind, error)
                del self.trackers[kind]

    def close(self) -> None:
        for kind, tracker in self.trackers.items():
            try:
                tracker.close()
            except Exception as error:
                _log.warning("--logger %s could not be closed: %s", kind, error)


def _tensorboard(directory: Path, config: dict[str, Any], step: int) -> _Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(directory / "tb"), purge_step=step)

    def add(scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            writer.add_scalar(name, value, step)

    return _Tracker(add, writer.close)


def _wandb(directory: Path, config: dict[str, Any], step: int) -> _Tracker:
    import wandb

    run = wandb.init(
        project=_PROJECT,
        name=directory.resolve().name,
        id=_run_id(directory, step),
        resume="allow",
        dir=str(directory),
        config=config,
        mode=os.environ.get("WANDB_MODE", "offline"),
    )
    return _Tracker(lambda scalars, step: run.log(dict(scalars), step=step), run.finish)


def _trackio(directory: Path, config: dict[str, Any], step: int) -> _Tracker:
    import trackio

    name = f"{directory.resolve().name}-{_run_id(directory, step)}"
    run = trackio.init(project=_PROJECT, name=name, config=config, resume="allow", embed=False)
    return _Tracker(lambda scalars, step: run.log(dict(scalars), step=step), run.finish)


def _run_id(directory: Path, step: int) -> str:
    """Of the run in ``directory``; another one for a run that begins there."""
    path = directory / _ID
    if step == 0 or not path.exists():
        path.write_text(uuid.uuid4().hex[:8] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
