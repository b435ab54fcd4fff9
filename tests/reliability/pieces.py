"""Pieces of the product as ``audit`` calls them: functions of one text that import what they need."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

logging.disable()  # the child's output is the audit's


def read_pth(path: str) -> Any:
    from fastdino.interop.files import read_pickle

    return sorted(read_pickle(path))


def load_backbone(path: str) -> Any:
    from fastdino.interop.weights import load_backbone

    return type(load_backbone(path)).__name__


def load_directory(path: str) -> Any:
    """The backbone of the directory that ``path`` lies in."""
    return load_backbone(str(Path(path).parent))


def read_features(path: str) -> Any:
    from fastdino.evaluation.feature_file import load_mapped

    return list(load_mapped(Path(path)).shape)


def read_truth(path: str) -> Any:
    from fastdino.evaluation.ground_truth import read_ground_truth

    return len(read_ground_truth(Path(path)).queries)


def read_config(path: str) -> Any:
    from fastdino.config import layered

    return str(layered(None, path).optim.lr)


def read_index(path: str) -> Any:
    """The manifest of the shards beside ``path``, an ``index.npz``."""
    from fastdino.data import indexing
    from fastdino.data.containers import _look_at

    shards = _look_at([str(Path(path).parent / "a.tar")], "tar")
    found = indexing._beside(shards)
    return [len(index.offsets) for index in found.values()]


def read_verdicts(path: str) -> Any:
    from fastdino.data.prescan import _load_cache

    return [verdict is not None for verdict in _load_cache(Path(path), ["/a.jpg"], [(1, 1)])]


def inspect(path: str) -> Any:
    """Height, width and why the image is not used, by nvImageCodec."""
    from fastdino.data import prescan

    return list(prescan.inspect(path))


def read_header(path: str) -> Any:
    """Why an image is refused by its frame alone; empty if it would be decoded."""
    from fastdino.data import prescan

    return prescan.fetch(path)[1]


def read_picture(path: str) -> Any:
    """What the evaluation makes of an image, by Pillow."""
    from fastdino.evaluation.features import read_image

    return list(read_image(path).size)


def batches(request: str) -> Any:
    """Hash of the decoded batches of a list of images, the samples used, why others were not, by DALI."""
    import hashlib
    import json

    import numpy as np

    from fastdino.data.decoding import ImageSource, Replacements
    from fastdino.data.manifest import build_manifest

    options = json.loads(request)
    manifest = build_manifest(options["list"])
    order = np.arange(options["first"], options["last"]).reshape(-1, options["batch"])
    replacements = Replacements(manifest)
    replacements._limit = len(manifest)  # the stop at a tenth is another test's
    source = ImageSource(
        manifest,
        lambda index: order[index % len(order)],
        options["batch"],
        options["threads"],
        replacements=replacements,
    )
    digest, used = hashlib.sha256(), []
    try:
        for _ in order:
            images, ids = source.next()
            for image in images:
                digest.update(np.ascontiguousarray(image).tobytes())
            used += ids.tolist()
    finally:
        source.close()
    return {"hash": digest.hexdigest(), "used": used, "reasons": replacements.reasons}


def read_shards(path: str) -> Any:
    """Names of all images in a shard, each read, and why it would not be used."""
    from fastdino.data.manifest import build_manifest
    from fastdino.data.prescan import fetch

    manifest = build_manifest(path, progress=False)
    return [[name.encode("utf-8", "surrogateescape").hex(), fetch(name)[1]] for name in manifest.paths]


def list_tree(path: str) -> Any:
    """What is listed below a folder, relative to it, and why each image would not be used."""
    import os

    from fastdino.data.manifest import build_manifest
    from fastdino.data.prescan import fetch

    manifest = build_manifest(path, progress=False)
    names = [os.path.relpath(name, path) for name in manifest.paths]
    return [[name, fetch(full)[1]] for name, full in zip(names, manifest.paths, strict=True)]


def count_tree(path: str) -> Any:
    """How many images are listed below a folder, and how many of them are different files."""
    import os

    from fastdino.data.manifest import build_manifest

    paths = build_manifest(path, progress=False).paths
    return [len(paths), len({(status.st_dev, status.st_ino) for status in map(os.stat, paths)})]


def open_large(path: str) -> Any:
    """Seconds of processor time and bytes of memory that a long list takes, step by step."""
    import time

    from fastdino.data import runlist, sampler
    from fastdino.data.manifest import build_manifest

    def resident() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])

    found: dict[str, Any] = {}

    def timed(name: str, begun: float) -> None:
        found[name] = time.process_time() - begun

    names = [f"train/n{i // 1300:08}/n{i // 1300:08}_{i}.JPEG" for i in range(200_000)]

    def yardstick() -> float:
        begun = time.process_time()
        json.loads(json.dumps(names))
        return time.process_time() - begun

    first = yardstick()
    before, begun = resident(), time.process_time()
    manifest = build_manifest(path)
    timed("build", begun)
    found["memory"] = resident() - before
    n = len(manifest)
    begun = time.process_time()
    order = sampler.permutation(0, 0, n)
    timed("permutation", begun)
    begun = time.process_time()
    ids = sampler.step_ids(0, 777_777, n, 1024)
    timed("seek", begun)
    saved = Path(path).with_name("images.json")
    saved.write_text(runlist.write(manifest))
    begun = time.process_time()
    same = runlist.reconcile(manifest, saved) is manifest
    timed("reopen", begun)
    found["yardstick"] = (first + yardstick()) / 2
    found |= {"n": n, "last": manifest.paths[n - 1], "classes": len(manifest.class_names), "same": same}
    return found | {"order": sorted(order[:3].tolist()) != [0, 1, 2], "ids": len(set(ids.tolist()))}
