"""The pipelines that `bench.loader` compares, from files to normalised crops, and what is measured of one.

A provider is chosen by its name and described by a `Setting`, so that a fresh process can build it too, in
which its memory is measured: in a shared one the sides cannot be told apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch.utils.data import DataLoader, RandomSampler

from bench import loader_dali, solo_learn
from bench.harness import synchronize
from bench.official_crops import OfficialDataset
from fastdino.config import CropConfig
from fastdino.data.decoding import import_dali
from fastdino.data.loader import MultiCropLoader
from fastdino.data.manifest import Manifest, build_manifest

WARM_UP = 8  # batches: start-up, whatever was loaded ahead meanwhile, and the first use of all buffers

Figures = dict[str, float]
Batches = Iterator[object]


@dataclass(frozen=True)
class Setting:
    """What all providers of a comparison are given."""

    images: str  # folder
    local_crops_number: int
    batch: int
    workers: int  # processes of the official pipeline, threads of the others
    n_batches: int
    solo_learn: str | None = None

    @property
    def crops(self) -> CropConfig:
        return CropConfig((0.25, 1.0), self.local_crops_number, (0.05, 0.25))

    @cached_property
    def manifest(self) -> Manifest:
        return build_manifest(self.images)


@contextmanager
def official(setting: Setting) -> Iterator[Batches]:
    dataset = OfficialDataset(setting.manifest.paths, setting.crops)
    order = RandomSampler(
        dataset, replacement=True, num_samples=(setting.n_batches + WARM_UP) * setting.batch
    )
    loader = DataLoader(dataset, setting.batch, sampler=order, num_workers=setting.workers, drop_last=True)
    yield iter(loader)


@contextmanager
def ours(
    setting: Setting, *, crops: CropConfig | None = None, cache: bool = False, gpu: bool = False
) -> Iterator[MultiCropLoader]:
    with MultiCropLoader(
        setting.manifest,
        crops or setting.crops,
        seed=0,
        global_batch=setting.batch,
        micro_batch=setting.batch,
        num_threads=setting.workers,
        cache_decoded=cache,
        device="cuda" if gpu else "cpu",
        augment_on="gpu" if gpu else "cpu",
    ) as loader:
        yield loader


@contextmanager
def solo(setting: Setting, *, gpu: bool = False) -> Iterator[Batches]:
    """See `solo_learn`. It lists the files of one folder, so it gets one with links."""
    assert setting.solo_learn is not None
    with tempfile.TemporaryDirectory() as folder:
        for i, path in enumerate(setting.manifest.paths):
            os.symlink(Path(path).absolute(), Path(folder) / f"{i:08}{Path(path).suffix}")
        yield solo_learn.batches(
            Path(setting.solo_learn),
            Path(folder),
            setting.crops,
            batch=setting.batch,
            threads=setting.workers,
            gpu=gpu,
        )


PROVIDERS: dict[str, Callable[[Setting], AbstractContextManager[Batches]]] = {
    "official": official,
    "fastdino": ours,
    "fastdino, decoded once": lambda setting: ours(setting, cache=True),
    "DALI's own *": lambda setting: nullcontext(loader_dali.separate(setting, gpu=False)),
    "DALI's own, stacked *": lambda setting: nullcontext(loader_dali.stacked(setting, gpu=False)),
    "solo-learn, DALI *": solo,
    "fastdino, GPU": lambda setting: ours(setting, gpu=True),
    "DALI's own, GPU *": lambda setting: nullcontext(loader_dali.separate(setting, gpu=True)),
    "DALI's own, stacked, GPU *": lambda setting: nullcontext(loader_dali.stacked(setting, gpu=True)),
    "solo-learn, DALI, GPU *": lambda setting: solo(setting, gpu=True),
}
"""The first is what ratios relate to. A star: other crops than the official ones."""


def lacking(name: str, setting: Setting) -> str:
    """Why a provider cannot be measured here; empty if it can."""
    if "GPU" in name and not torch.cuda.is_available():
        return "there is no GPU"
    if name.startswith("solo-learn") and setting.solo_learn is None:
        return "no --solo_learn checkout"
    return ""


# ------------------------------------------------------------------------------------------------ measuring


def measure(name: str, setting: Setting) -> Figures:
    """Images per second, CPU milliseconds per image, the cores that other programs kept busy meanwhile."""
    with PROVIDERS[name](setting) as batches:
        for _ in range(WARM_UP):
            next(batches)
        synchronize()
        busy, own, started = machine_cpu_seconds(), own_cpu_seconds(), time.perf_counter()
        for _ in range(setting.n_batches):
            next(batches)
        synchronize()
        seconds = time.perf_counter() - started
        own, busy = own_cpu_seconds() - own, machine_cpu_seconds() - busy
    n, own = (
        setting.n_batches * setting.batch,
        max(own, 1 / os.sysconf("SC_CLK_TCK")),
    )  # the clock's resolution
    return {
        "images_per_second": n / seconds,
        "cpu_ms_per_image": 1000 * own / n,
        "competing_cores": max(0.0, (busy - own) / seconds),
    }


def machine_cpu_seconds() -> float:
    """CPU time that all programs have used since the machine started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def processes() -> list[Path]:
    """This process and its children, in /proc."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = stat.read_text().rpartition(")")[2].split()[1]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        if os.getpid() in (int(stat.parent.name), int(parent)):
            found.append(stat.parent)
    return found


def own_cpu_seconds() -> float:
    """CPU time of this process and its children, those still running included."""
    ticks = 0
    for process in processes():
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def own_bytes() -> int:
    """Memory of this process and its children, what they share counted once (Linux: Pss)."""
    total = 0
    for process in processes():
        try:
            lines = (process / "smaps_rollup").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def device_bytes() -> int:
    """What is in use on the GPU, by whatever library."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def memory(name: str, setting: Setting) -> dict[str, int]:
    """How far memory grows while batches are loaded, at the most after one of them."""
    import_dali()
    assert len(setting.manifest)  # listed here, so that the list does not count
    synchronize()
    host, device = own_bytes(), device_bytes()
    most = {"host_bytes": 0, "device_bytes": 0}
    with PROVIDERS[name](setting) as batches:
        for _ in range(WARM_UP + min(4, setting.n_batches)):
            next(batches)
            synchronize()
            most["host_bytes"] = max(most["host_bytes"], own_bytes() - host)
            most["device_bytes"] = max(most["device_bytes"], device_bytes() - device)
    return most


def peak(name: str, setting: Setting) -> dict[str, int]:
    """`memory` in a fresh process."""
    words = json.dumps({"name": name, "setting": asdict(setting)})
    command = [sys.executable, "-c", "from bench import loader_providers; loader_providers.child()", words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise SystemExit(f"{name}: its process ended with exit code {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def child() -> None:
    """What the fresh process does."""
    words = json.loads(sys.argv[1])
    print(json.dumps(memory(words["name"], Setting(**words["setting"]))))
