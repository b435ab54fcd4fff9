"""Landmark retrieval: the three settings by hand, descriptors of any size, the command on drawn images."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from fastdino.engine.parallel import World
from fastdino.evaluation.__main__ import main
from fastdino.evaluation.descriptors import describe
from fastdino.evaluation.ground_truth import Query
from fastdino.evaluation.retrieval import describer, load_image, retrieval_scores, truncated_images
from runs import spawn

SMALL = ["--weights", "random", "--arch", "vit_tiny", "--device", "cpu", "--precision", "fp32"]


def query(easy, hard, junk, name="q", box=None):
    return Query(name, *(np.array(x, np.int64) for x in (easy, hard, junk)), box)


def test_easy_medium_and_hard():
    order = np.array([[4, 0, 3, 2, 1], [4, 2, 3, 0, 1]])
    scores = retrieval_scores(order, [query(easy=[0], hard=[2], junk=[4])] * 2)
    # without those ignored: easy 0 3 1 and 3 0 1; medium 0 3 2 1 and 2 3 0 1; hard 3 2 1 and 2 3 1
    assert scores["easy"].per_query == pytest.approx([100.0, 25.0])
    assert scores["medium"].per_query == pytest.approx([79.1667, 79.1667], abs=1e-3)
    assert scores["hard"].per_query == pytest.approx([25.0, 100.0])
    assert scores["medium"].mean_precision == pytest.approx({1: 100.0, 5: 200 / 3, 10: 200 / 3})


def test_queries_without_positives_are_left_out_per_setting():
    order = np.array([[0, 1, 2], [0, 1, 2]])
    scores = retrieval_scores(order, [query([0], [], []), query([], [1], [])])
    assert scores["easy"].per_query == [100.0, None]
    assert scores["hard"].per_query == [None, pytest.approx(25.0)]
    assert scores["medium"].mean_ap == pytest.approx((100 + 25) / 2)
    assert list(retrieval_scores(order[:1], [query([0], [], [])])) == ["easy", "medium"]
    with pytest.raises(ValueError, match="positive"):
        retrieval_scores(order[:1], [query([], [], [1])])


def test_images_are_shrunk_only(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (60, 100, 3)).astype(np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    assert np.array_equal(load_image(path, 100), pixels)
    assert np.array_equal(load_image(path, 1000), pixels)
    small = load_image(path, 50)
    assert small.shape == (30, 50, 3)
    assert np.array_equal(small, np.array(Image.fromarray(pixels).resize((50, 30), Image.Resampling.LANCZOS)))
    assert np.array_equal(load_image(path, 1000, (10.4, 20, 29.6, 50)), pixels[20:50, 10:30])


def test_truncated_images_are_read_as_far_as_they_go(tmp_path):
    path = tmp_path / "a.jpg"
    Image.effect_noise((64, 64), 60).convert("RGB").save(path)
    path.write_bytes(path.read_bytes()[:-800])
    with truncated_images():
        assert load_image(path, 64).shape == (64, 64, 3)
    with pytest.raises(ValueError, match="a.jpg"):
        load_image(path, 64)


class Mean(torch.nn.Module):
    """The mean colour times the number of pixels, so that the scales weigh differently."""

    def forward(self, x):
        return x.mean((2, 3)) * x.shape[2] * x.shape[3]


def test_multiscale_adds_features_as_they_are():
    images = torch.ones(2, 3, 64, 48) * torch.tensor([1.0, 2.0, -3.0]).view(3, 1, 1)
    # 64 x 48, floor of the side over sqrt(2): 45 x 33, half: 32 x 24
    expected = torch.tensor([1.0, 2.0, -3.0]) * (64 * 48 + 45 * 33 + 32 * 24) / 3
    assert torch.allclose(describer(Mean(), True)(images), expected.expand(2, 3), rtol=1e-5)
    assert torch.equal(describer(Mean(), False)(images), Mean()(images))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 100])
def test_descriptors_come_in_order_whatever_the_sizes(batch_size, monkeypatch):
    monkeypatch.setattr("fastdino.evaluation.descriptors._WAITING", 2)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 255, (8 + i % 3, 8 + i % 2, 3)).astype(np.uint8) for i in range(29)]
    seen, batches = [], []

    def mean(batch):
        assert not torch.is_grad_enabled()
        batches.append(len(batch))
        return batch.mean((2, 3))

    names = [f"{i}.jpg" for i in range(29)]
    result = describe(
        mean,
        names,
        lambda i: images[i],
        batch_size=batch_size,
        num_threads=2,
        progress=lambda *x: seen.append(x),
    )
    mean_of, std_of = (torch.tensor(x) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = torch.stack(
        [(torch.from_numpy(image).float().mean((0, 1)) / 255 - mean_of) / std_of for image in images]
    )
    assert torch.allclose(result, expected, atol=1e-5)
    assert max(batches) <= batch_size and sum(batches) == 29 and seen[-1] == (29, 29)
    with pytest.raises(ValueError, match="4.jpg is not finite"):
        describe(lambda x: torch.full((len(x), 2), float("nan")), names[4:5], lambda i: images[i])
    with pytest.raises(ValueError, match="empty list"):
        describe(mean, [], lambda i: images[i])


def describe_sizes(world: World | None = None) -> torch.Tensor:
    """Descriptors of five grey images of two sizes, in batches of two."""
    images = [np.full((8, 8 + i % 2, 3), 10 * i, np.uint8) for i in range(5)]
    return describe(
        lambda x: x.mean((2, 3)), [str(i) for i in range(5)], lambda i: images[i], batch_size=2, world=world
    )


def share_work(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    torch.save(describe_sizes(World(rank, size, torch.device("cpu"))), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
def test_processes_share_the_images(tmp_path):
    spawn(share_work, (4, str(tmp_path)), 4)  # one of them gets no batch
    for rank in range(4):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), describe_sizes())


# ----------------------------------------------------------------------------------------------- command line


@pytest.fixture
def landmarks(tmp_path):
    """Buildings are colours: database image i shows building i % 3; queries show 0, 1 and one of no image."""
    folder = tmp_path / "roxford5k"
    (folder / "jpg").mkdir(parents=True)
    rng = np.random.default_rng(0)
    colors = [(220, 40, 40), (40, 220, 40), (40, 40, 220)]

    def draw(name, building, size):
        noise = rng.integers(-30, 30, (*size, 3))
        pixels = np.clip(np.array(colors[building]) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "jpg" / f"{name}.jpg")

    names = [f"im{i}" for i in range(9)]
    for i, name in enumerate(names):
        draw(name, i % 3, (40, 48) if i % 2 else (64, 48))
    for i in range(3):
        draw(f"q{i}", i, (48, 48))
    entries = [
        {
            "easy": np.array([0, 3]),
            "hard": np.array([6]),
            "junk": np.array([1]),
            "bbx": np.array([2, 2, 40.0, 40]),
        },
        {
            "easy": np.array([1, 4]),
            "hard": np.array([7]),
            "junk": np.array([], int),
            "bbx": np.zeros(4) + [0, 0, 9, 9],
        },
        {"easy": np.array([], int), "hard": np.array([], int), "junk": np.array([2]), "bbx": np.arange(4.0)},
    ]
    truth = {"imlist": names, "qimlist": ["q0", "q1", "q2"], "gnd": entries}
    (folder / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth))
    return tmp_path


def test_command(landmarks, capsys):
    out = landmarks / "out"
    line = ["retrieval", *SMALL, "--data_path", str(landmarks), "--imsize", "48", "--output_dir", str(out)]
    assert main([*line, "--batch_size_per_gpu", "2"]) == 0
    shown = capsys.readouterr().out
    assert "roxford5k: 9 images, 3 queries" in shown
    assert "medium: mAP 100.00, mP@1 100.00, mP@5 100.00, mP@10 100.00 (1 queries without positives" in shown
    record = json.loads((out / "retrieval.roxford5k.json").read_text())
    assert set(record["figures"]) == {
        f"{name}_{setting}"
        for setting in ("easy", "medium", "hard")
        for name in ("mAP", "mP1", "mP5", "mP10")
    }
    assert record["settings"] == {
        "dataset": "roxford5k",
        "image_size": 48,
        "precision": record["settings"]["precision"],
        "multiscale": False,
        "crop_queries": False,
    }
    assert record["details"]["average_precision"][2] == {
        "query": "q2",
        "easy": None,
        "medium": None,
        "hard": None,
    }
    assert main([*line, "--use_cuda", "false"]) == 0
    assert capsys.readouterr().out == shown


def test_multiscale_crops_and_json_of_your_own(landmarks, capsys):
    line = ["retrieval", *SMALL, "--data_path", str(landmarks / "roxford5k" / "jpg")]
    truth = {
        "imlist": ["im0.jpg", "im1", "im2"],
        "qimlist": ["q0", "q1.jpg"],
        "gnd": [{"easy": [0], "hard": [], "bbx": [0, 0, 32, 32]}, {"easy": [1], "hard": [], "junk": [2]}],
    }
    path = landmarks / "mine.json"
    path.write_text(json.dumps(truth))
    assert main([*line, "--gnd", str(path), "--multiscale", "true", "--imsize", "64"]) == 0
    shown = capsys.readouterr().out
    assert "mine: 3 images, 2 queries" in shown and "easy: mAP 100.00" in shown and "hard" not in shown
    assert main([*line, "--gnd", str(path), "--crop_queries", "true"]) == 2
    assert "--crop_queries" in capsys.readouterr().err
    truth["gnd"][1]["bbx"] = [1, 1, 40, 30]
    path.write_text(json.dumps(truth))
    assert main([*line, "--gnd", str(path), "--crop_queries", "true"]) == 0
    # at a quarter of the size one half of 20 pixels is less than a patch
    assert main([*line, "--gnd", str(path), "--multiscale", "true", "--imsize", "20"]) == 2
    assert "jpg: images must hold at least one patch" in capsys.readouterr().err


def test_missing_files_show_the_layout(landmarks, capsys):
    line = ["retrieval", *SMALL, "--data_path", str(landmarks)]
    assert main([*line, "--dataset", "rparis6k"]) == 2
    error = capsys.readouterr().err
    assert "no such ground truth" in error and "rparis6k/\n    gnd_rparis6k.pkl" in error and "*.jpg" in error
    (landmarks / "roxford5k" / "jpg" / "im4.jpg").unlink()
    assert main(line) == 2
    error = capsys.readouterr().err
    assert (
        "1 of 12 images are missing, first" in error and "im4.jpg" in error and "gnd_roxford5k.pkl" in error
    )
