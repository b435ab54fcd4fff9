"""Passwords in the environment, in URLs and in git's settings are in nothing that a run leaves behind."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.config import config_from_flags, config_to_yaml, layered
from reliability.audit import ROOT
from reliability.promises import promise
from runs import FLAGS

pytest.importorskip("fsspec")
ENVIRONMENT = {
    "WANDB_API_KEY": "canary-wandb-4f1d",
    "HF_TOKEN": "hf_canary77aa",
    "GITHUB_TOKEN": "ghp_canary91c2",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+secret=8e",
    "AWS_SESSION_TOKEN": "canary-session-22f0",
    "MY_PASSWORD": "canary-password-6b3e",
    "HTTPS_PROXY": "http://proxyuser:canary-proxy-17d4@127.0.0.1:9",
    # What git would say of a remote, for every repository.
    "GIT_CONFIG_COUNT": "1",
    "GIT_CONFIG_KEY_0": "remote.origin.url",
    "GIT_CONFIG_VALUE_0": "https://bot:canary-git-5c90@127.0.0.1/x.git",
}
CANARIES = [
    *(value for name, value in ENVIRONMENT.items() if "canary" in value and "://" not in value),
    "canary-proxy-17d4", "canary-git-5c90", "canary-user-a1", "canary@pass-b2", "canary-signature-c3",
    "canary-held-d4",
]  # fmt: skip
LOGIN = "canary-user-a1:canary@pass-b2"
URL = f"memory://{LOGIN}@host/photos.tar"
OTHER = "memory://me:canary-held-d4@host/others.tar"
HELD_OUT = "https://me:canary-held-d4@127.0.0.1:9/val"
SIGNED = "https://127.0.0.1:9/photos.tar?X-Amz-Signature=canary-signature-c3&x=1"


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A folder with everything that a number of commands wrote and printed, and their exit codes."""
    root = tmp_path_factory.mktemp("secrets")
    shard = tmp_path_factory.mktemp("data") / "photos.tar"
    with tarfile.open(shard, "w") as file:
        for i in range(24):
            buffer = io.BytesIO()
            noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).save(buffer, "PNG")
            for ending, content in (("png", buffer.getvalue()), ("cls", b"%d" % (i % 2))):
                info = tarfile.TarInfo(f"{i:02}.{ending}")
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    objects = {url.partition("://")[2]: str(shard) for url in (URL, OTHER)}
    child = subprocess.Popen(
        [sys.executable, "-m", "reliability.secret_runs", str(root), json.dumps(objects)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={
            **os.environ,
            **ENVIRONMENT,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "XDG_CACHE_HOME": str(root / "cache"),
            "HOME": str(root / "home"),
            "OMP_NUM_THREADS": "1",
        },
    )
    codes = {}
    with child:
        assert child.stdin is not None and child.stdout is not None
        for name, kind, words in commands(root):
            child.stdin.write(json.dumps([name, kind, words]) + "\n")
            child.stdin.flush()
            codes[name] = int(child.stdout.readline())
        child.stdin.close()
    return root, codes


def commands(root: Path) -> Iterator[tuple[str, str, list[str]]]:
    def flags(out: str, data: str = URL, *more: str) -> list[str]:
        short = ["--max_steps", "2", "--prescan", "on", "--logger", "none", "--warmup_epochs", "0"]
        return ["--data_path", data, "--output_dir", str(root / out), *FLAGS, *short, *more]

    yield "run", "train", flags("run", URL, "--report", "true", "--eval_data_path", OTHER)
    yield "continued", "train", flags("run", URL, "--max_steps", "3")
    yield "crash", "train_and_crash", flags("crash")
    yield "lost-data", "train_and_lose_data", flags("lost")
    yield "abort", "train_and_abort", flags("abort")
    yield "missing", "train", flags("missing", URL.replace("photos", "absent"))
    yield "unreachable", "train", flags("unreachable", HELD_OUT)
    yield "signed", "train", flags("signed", SIGNED)
    yield "ftp", "train", flags("ftp", f"ftp://{LOGIN}@127.0.0.1:9/x.tar")
    yield "no-scheme", "train", flags("nothing", f"nothing://{LOGIN}@host/x.tar")
    yield "bad-flag", "train", flags("flag", URL, "--resume", URL)
    yield "printed", "train", flags("printed", URL, "--print_config", "true")
    yield "dry", "train", flags("dry", URL, "--dry_run", "true")
    yield "previewed", "train", flags("preview", URL, "--preview_crops", "2")
    run = str(root / "run")
    yield "knn", "evaluate", ["knn", "--weights", run, "--data_path", HELD_OUT, "--output_dir", f"{root}/knn"]
    yield "weights", "evaluate", ["knn", "--weights", HELD_OUT, "--data_path", str(root)]
    yield "pca", "evaluate", ["pca", "--weights", run, "--data_path", URL, "--output_dir", f"{root}/pca"]
    yield "packed", "pack", [URL, str(root / "packed")]
    yield "exported", "interop", ["official", "export", run, str(root / "out.pth")]


EXPECTED = {"run": (0,), "continued": (0,), "printed": (0,), "dry": (0,), "previewed": (0,), "missing": (2,)}
EXPECTED |= {
    "crash": (1, 70),
    "lost-data": (66,),
    "abort": (-6,),
    "unreachable": (2,),
    "signed": (2,),
    "ftp": (2,),
}


def test_no_secret_is_left_behind(left_behind: tuple[Path, dict[str, int]]) -> None:
    root, codes = left_behind
    files = [path for path in root.rglob("*") if path.is_file()]
    with promise(
        31, "secret of environment, command line, URL or git in files, output or traceback"
    ) as cases:
        for name, allowed in EXPECTED.items():
            with cases.case(f"{name} ran as meant"):
                assert codes[name] in allowed, (
                    f"exit code {codes[name]}\n{(root / f'{name}.out').read_text()[-800:]}"
                )
        for canary in CANARIES:
            with cases.case(canary):
                hits = [str(p.relative_to(root)) for p in files if canary.encode() in p.read_bytes()]
                hits += [str(p.relative_to(root)) for p in root.rglob("*") if canary in p.name]
                assert not hits
    said = (root / "missing.out").read_text()
    assert "memory://***@host/absent.tar" in said  # the rest of the URL is told
    assert "Traceback" in (root / "crash.out").read_text() and "Fatal" in (root / "abort.out").read_text()


def test_the_configuration_of_a_run_leaves_passwords_out(tmp_path: Path) -> None:
    with promise(31, "URL in a configuration: kept but for its secrets") as cases:
        for given, kept in (
            (f"https://{LOGIN}@host/data/{{000..099}}.tar", "https://***@host/data/{000..099}.tar"),
            (SIGNED, "https://127.0.0.1:9/photos.tar?***"),
            ("s3://bucket/train-{000..099}.tar", "s3://bucket/train-{000..099}.tar"),
            ("/data/odd:/a@b?c", "/data/odd:/a@b?c"),
        ):
            with cases.case(given):
                path = tmp_path / "config.yaml"
                path.write_text(config_to_yaml(config_from_flags(data_path=given)))
                assert layered(None, path).data.data_path == kept
