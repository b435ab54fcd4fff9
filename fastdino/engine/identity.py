"""What a run and its continuation must have in common: every flag that changes what is computed, and the
data. A flag that nobody has listed here as free counts: a new one is refused until somebody thinks of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from fastdino.config import Config, as_flags
from fastdino.data import runlist
from fastdino.data.manifest import Manifest

FREE = frozenset(
    # where things are, and how fast they are read: the list of images is compared instead
    "data_path num_workers prescan cache_decoded augment_on "
    # the global batch is compared instead, and the type that was chosen
    "batch_size batch_size_per_gpu use_fp16 precision "
    # speed, memory and scale
    "attention compile cuda_graph activation_checkpointing mesh device "
    # when to stop, what to write and to watch
    "max_steps max_bad_steps output_dir saveckp_freq save_every resume overwrite allow_changes logger "
    "log_every report hang_timeout verify_every eval_every eval_data_path nb_knn eval_bank_size "
    "eval_image_size "
    # without effect
    "dist_url local_rank".split()
)
"""Flags that a continuation may change."""

# What checkpoints of earlier releases do not tell, and what to do when it differs.
_ADVICE = {
    "augmentation version": "crops would be made in another way; continue with the release that began it",
    "DALI version": "images may be decoded to other pixels; install the one that began the run",
    "compute type": "--precision chooses it",
}


# Decided by these flags, which --allow_changes names.
_CHOSEN_BY = {
    "compute type": ("precision", "use_fp16"),
    "global batch": ("batch_size", "batch_size_per_gpu"),
    "images in a pass": ("batch_size", "batch_size_per_gpu"),
    "list of images": ("data_path",),
}


def mixes_images(method: nn.Module, config: Config) -> bool:
    """Whether an image's output depends on those that go through the networks with it."""
    norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in method.modules())
    return norms or config.method.method == "swav" or config.method.teacher_op != "center"


def identity(config: Config, manifest: Manifest, global_batch: int, dtype: torch.dtype) -> dict[str, Any]:
    """Of a run, for its checkpoints; covers every image, so make it once."""
    names = "\0".join(runlist.names(manifest))
    digest = hashlib.sha256(names.encode("utf-8", "surrogateescape"))
    return {
        **{f"--{name}": value for name, value in as_flags(config).items() if name not in FREE},
        "global batch": global_batch,
        "compute type": str(dtype).removeprefix("torch."),
        "list of images": digest.hexdigest()[:16],
    }


def differences(ours: Mapping[str, Any], meta: Mapping[str, Any], allowed: Collection[str] = ()) -> list[str]:
    """One line for each thing that differs between a run and the ``meta`` of a checkpoint, but for the flags
    ``allowed``. What the checkpoint's release did not have counts as its default now; what an imported one
    does not tell is not compared.
    """
    ours, told = json.loads(json.dumps(ours)), meta["identity"]
    theirs = dict(told)
    if not ("official" in meta or "began_with" in meta):
        sections = meta.get("config", {}).values()
        stored = {f"--{name}": value for section in sections for name, value in section.items()}
        defaults = {f"--{name}": value for name, value in as_flags(Config()).items()}
        theirs = {**json.loads(json.dumps(defaults)), **stored, **told}
    return [
        f"{name}: checkpoint {theirs[name]!r}, now {value!r}"
        + (f" ({_ADVICE[name]})" if name in _ADVICE else "")
        for name, value in ours.items()
        if name in theirs
        and theirs[name] != value
        and not {name.removeprefix("--"), *_CHOSEN_BY.get(name, ())} & set(allowed)
    ]
