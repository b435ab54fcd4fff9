"""The command line: fast help, official flag names, one-line errors, results on disk and on screen."""

from __future__ import annotations

import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.engine import checkpoint
from fastdino.evaluation import evaluate
from fastdino.evaluation.__main__ import PROTOCOLS, main
from fastdino.evaluation.features import list_images, name_below
from fastdino.models import VisionTransformer

OFFICIAL = """
--arch --patch_size --pretrained_weights --checkpoint_key --num_workers --data_path --batch_size_per_gpu
--nb_knn --temperature --use_cuda --dump_features --load_features
--n_last_blocks --avgpool_patchtokens --epochs --lr --val_freq --output_dir --num_labels --evaluate
--dataset --multiscale --imsize --whitening_path --distractors_path
--n_last_frames --size_mask_neighborhood --topk --bs
--image_path --image_size --threshold --input_path --output_path --resize --video_only --fps --video_format
"""
"""Flags of the official scripts, but --dist_url and --local_rank, which are taken and not shown."""

SMALL = ["--weights", "random", "--arch", "vit_tiny", "--device", "cpu"]


@pytest.fixture
def dataset(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name, color in (("dark", 40), ("light", 200)):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = (color + rng.integers(-20, 20, (24, 24, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return tmp_path


def test_help_needs_no_torch():
    code = (
        "import sys, fastdino.evaluation.__main__ as m\n"
        "for words in ([], *([name] for name in m.PROTOCOLS)):\n"
        "    try: m.main([*words, '--help'])\n"
        "    except SystemExit as e: assert e.code == 0, words\n"
        "heavy = {'torch', 'numpy', 'PIL', 'matplotlib', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for protocol in PROTOCOLS:
        assert f"usage: python -m fastdino.evaluation {protocol} " in done.stdout
    for flag in OFFICIAL.split():
        assert f" {flag} " in done.stdout.replace(",", " ").replace("[", " "), flag


def test_knn_on_fewer_images_than_neighbours_and_features_on_disk(dataset, capsys):
    features = dataset / "features"
    line = ["knn", *SMALL, "--data_path", str(dataset), "--nb_knn", "5", "200", "--image_size", "32"]
    assert main([*line, "--use_cuda", "false", "--dump_features", str(features), "--local_rank=0"]) == 0
    first = capsys.readouterr().out
    assert "12 images in the memory bank, 4 held-out images, 2 classes" in first
    assert "5-NN classifier result: Top1: 100.00, Top5: 100.00" in first and "200-NN" in first
    bank = torch.load(features / "trainfeat.pth", weights_only=True)
    assert bank.shape == (12, 192) and torch.allclose(bank.norm(dim=1), torch.ones(12))
    assert main(["knn", "--load_features", str(features), "--nb_knn", "5", "200"]) == 0
    assert capsys.readouterr().out == first


def test_attention_of_a_folder_and_of_one_file(dataset, capsys):
    out = dataset / "out"
    line = ["attention", *SMALL, "--image_size", "32", "--threshold", "0.6", "--output_dir", str(out)]
    assert main([*line, "--data_path", str(dataset / "val")]) == 0
    assert sorted(p.relative_to(out).as_posix() for p in out.glob("*/*/attention.png")) == [
        f"{name}/{i}.jpg/attention.png" for name in ("dark", "light") for i in range(2)
    ]
    assert main([*line, "--image_path", str(dataset / "val" / "dark" / "0.jpg")]) == 0
    assert Image.open(out / "attn-head2.png").size == (32, 32)

    bad = dataset / "val" / "dark" / "bad\nname.jpg"
    bad.write_bytes(b"no image")
    capsys.readouterr()
    assert main([*line, "--data_path", str(dataset / "val")]) == 0
    shown = capsys.readouterr()
    assert "4 images" in shown.out and len(shown.err.splitlines()) == 1 and r"bad\nname.jpg" in shown.err
    assert main([*line, "--data_path", str(bad)]) == 2


def test_jaccard(dataset, capsys):
    masks = dataset / "masks"
    for name in ("dark", "light"):
        (masks / name).mkdir(parents=True)
        pixels = np.zeros((24, 24), np.uint8)
        pixels[:, 12:] = 255
        Image.fromarray(pixels).save(masks / name / "1.png")
    line = ["jaccard", *SMALL, "--image_size", "32", "--data_path", str(dataset / "val")]
    assert main([*line, "--mask_path", str(masks), "--threshold", "1"]) == 0
    # all patches hold all of the mass: half of the image is the object
    assert (
        "Jaccard of attention masks: 50.00 (best head per object, 2 images, 1 of the mass)"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["knn", "--weights", "random"], "--data_path"),
        (["knn", "--weights", "random", "--data_path", "/nowhere"], "DIR/train/<class>/*.jpg"),
        (["knn", "--load_features", "/nowhere"], "/nowhere/trainfeat.pth"),
        (["attention", "--weights", "random", "--data_path", "/nowhere"], "/nowhere"),
        (["attention", *SMALL, "--data_path", __file__, "--image_size", "1", "2", "3"], "--image_size"),
        (["attention", *SMALL, "--data_path", __file__], "test_main.py"),
        (["attention", "--data_path", __file__], "--weights"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_bad_flag_values(capsys):
    for words in (
        ["knn", "--nb_knn", "0"],
        ["jaccard", "--threshold", "1.5"],
        ["knn", "--use_cuda", "maybe"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2


@pytest.mark.filterwarnings("ignore:DAMAGED")
def test_weights_from_files(dataset, capsys):
    torch.manual_seed(0)
    backbone = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1)
    official = {f"module.backbone.{name}": value for name, value in backbone.state_dict().items()}
    torch.save({"teacher": official}, dataset / "official.pth")
    line = ["knn", "--data_path", str(dataset), "--nb_knn", "3", "--image_size", "32", "--device", "cpu"]
    assert main([*line, "--pretrained_weights", str(dataset / "official.pth"), "--patch_size", "8"]) == 0
    first = capsys.readouterr().out
    assert "3-NN classifier result: Top1: 100.00" in first

    model = {f"teacher.backbone.{name}": value for name, value in backbone.state_dict().items()}
    run = dataset / "run"
    checkpoint.save(
        run / "checkpoints", 7, model, {}, {"config": {"model": {"arch": "vit_tiny", "num_heads": 1}}}
    )
    assert main([*line, "--weights", str(run)]) == 0
    assert capsys.readouterr().out == first

    next(run.glob("checkpoints/*/model.safetensors")).write_bytes(b"damaged")
    (dataset / "broken.pth").write_bytes(b"PK\x03\x04 not a checkpoint")
    for name, words in (
        ("broken.pth", []),
        ("run", []),
        ("run/checkpoints/step-00000007", []),
        ("nowhere", []),
        ("official.pth", ["--patch_size", "16"]),
    ):
        assert main([*line, "--weights", str(dataset / name), *words]) == 2
        assert name in capsys.readouterr().err
    assert main([*line, "--weights", str(dataset / "official.pth"), "--checkpoint_key", "best"]) == 2


def test_the_same_from_python(dataset):
    torch.manual_seed(0)
    backbone = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1).train()
    flags = {"data_path": dataset, "nb_knn": [3, 5], "image_size": 32, "device": "cpu", "subset": None}
    result = evaluate("knn", backbone, **flags)
    assert result.figures["top1_k3"] == 100.0 and "top1_k20" not in result.figures
    assert backbone.training and all(p.requires_grad for p in backbone.parameters())
    few = {"data_path": dataset, "image_size": 32, "undivided": True, "device": "cpu"}
    assert evaluate("logistic", backbone, **few).settings["undivided"]
    assert evaluate("throughput", "random", arch="vit_tiny", image_size=32, warmup=1, passes=1).figures
    for name, flags, message in (
        ("knn", {"neighbours": 3}, "knn: no flag --neighbours"),
        ("knn", {"nb_knn": 0}, "knn: .*--nb_knn.*positive"),
        ("jaccard", {}, "jaccard: .*required.*--data_path"),
        ("nearest", {}, "protocol: expected one of knn, linear"),
        ("report", {}, "protocol"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(name, backbone, **flags)


def test_images_in_containers(dataset):
    shards = dataset / "shards"
    shards.mkdir()
    with tarfile.open(shards / "0.tar", "w") as file:
        for i, path in enumerate(sorted((dataset / "val").rglob("*.jpg"))):
            file.add(path, f"{i}.jpg")
    root, paths = list_images(shards)
    assert (
        root == str(shards) and len(paths) == 4 and all(path.startswith(f"{shards}/0.tar/") for path in paths)
    )
    assert list_images(shards / "0.tar")[1] == paths
    network = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1)
    out = dataset / "out"
    for protocol, more in (("attention", {}), ("pca", {}), ("neighbours", {"k": 2})):
        flags = {"data_path": shards, "image_size": 32, "device": "cpu", "output_dir": out} | more
        assert evaluate(protocol, network, **flags).pictures
    assert len(list(out.glob("0.tar/*/attention.png"))) == 4


def test_names_of_images_stay_below_the_output(tmp_path):
    assert name_below(tmp_path, tmp_path / "a" / "b.jpg").as_posix() == "a/b.jpg"
    for path in (f"{tmp_path}/x.tar/../../b.jpg", "/elsewhere/b.jpg", "../b.jpg"):
        name = name_below(tmp_path, path)
        assert not name.is_absolute() and ".." not in name.parts and name.name == "b.jpg"


def test_what_is_not_shared_is_done_once(dataset, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    for protocol in ("attention", "jaccard", "pca"):
        assert main([protocol, *SMALL, "--data_path", "/nowhere"]) == 0
    assert main(["knn", *SMALL, "--data_path", "/nowhere"]) == 2  # shared: every process works on it
