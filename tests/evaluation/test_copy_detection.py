"""Copy detection: descriptors and whitening by formula, scores by hand, the command on drawn images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from fastdino.evaluation import copy_detection
from fastdino.evaluation.__main__ import main
from fastdino.evaluation.copy_detection import (
    copy_descriptors,
    copy_scores,
    copydays,
    learn_whitening,
    load_square,
)

SMALL = ["--weights", "random", "--arch", "vit_tiny", "--device", "cpu", "--precision", "fp32"]


def test_descriptor_is_cls_beside_pooled_patches():
    class Fixed:
        def get_intermediate_layers(self, images, n):
            assert n == 1
            tokens = torch.tensor([[[5.0, -6.0], [1.0, -1.0], [2.0, -3.0], [0.0, 2.0]]])
            return [tokens.expand(len(images), -1, -1)]

    result = copy_descriptors(Fixed(), torch.zeros(2, 3, 4, 4))
    # negative values count as 1e-6, whose fourth power is nothing
    expected = [5.0, -6.0, (17 / 3) ** 0.25, (16 / 3) ** 0.25]
    assert torch.allclose(result, torch.tensor(expected).expand(2, 4))


def test_whitening_gives_identity_covariance():
    torch.manual_seed(0)
    x = torch.randn(500, 6) @ torch.randn(6, 6) + torch.arange(6.0)
    centered = learn_whitening(x, center_covariance=True)
    assert torch.allclose(torch.cov(centered(x).double().T, correction=0), torch.eye(6).double(), atol=1e-4)
    assert torch.allclose(centered(x).mean(0), torch.zeros(6), atol=1e-5)
    # official: the second moment, not the covariance, becomes the identity; the mean is subtracted too
    official = learn_whitening(x)
    moment = official.matrix @ (x.double().T @ x.double() / 500) @ official.matrix.T
    assert torch.allclose(moment, torch.eye(6).double(), atol=1e-8)
    assert torch.equal(official.mean, x.double().mean(0))
    assert not torch.allclose(torch.cov(official(x).T, correction=0), torch.eye(6), atol=0.1)
    assert torch.allclose(official(x).mean(0), torch.zeros(6), atol=1e-5)


def test_whitening_raises_small_eigenvalues():
    x = torch.zeros(4, 3)
    x[:, 0], x[:, 1] = torch.tensor([2.0, -2.0, 2.0, -2.0]), torch.tensor([1e-4, 1e-4, -1e-4, -1e-4])
    whitening = learn_whitening(x)
    # second moments 4, 1e-8, 0: the last two are raised to 4e-5
    scales = (whitening.matrix.T @ whitening.matrix).diagonal()
    assert torch.allclose(scales, torch.tensor([1 / 4, 1 / 4e-5, 1 / 4e-5]).double())
    for bad in (torch.zeros(5, 2), torch.zeros(0, 2), torch.zeros(3)):
        with pytest.raises(ValueError, match="learn_whitening"):
            learn_whitening(bad)


def test_scores_count_the_first_twenty():
    # originals at angles 0, 1, ...; the query's cosine falls with the angle
    angles = torch.arange(30.0) / 20
    database = torch.stack([angles.cos(), angles.sin()], 1)
    names = [f"{2000 + i}00.jpg" for i in range(30)]

    def ap(of):
        return copy_scores(torch.tensor([[1.0, 0.0]]), [of], database, names).per_query

    assert ap("200099.png") == [100.0]
    assert ap("200213.jpg") == [pytest.approx(100 * (0 + 1 / 3) / 2)]
    assert ap("201900.jpg") == [pytest.approx(100 * (0 + 1 / 20) / 2)]
    assert ap("202000.jpg") == [0.0]  # rank 21
    # two originals of one picture, at ranks 0 and 2
    scores = copy_scores(torch.tensor([[1.0, 0.0]]), ["2000.jpg"], database[:3], ["2000a", "2001a", "2000b"])
    assert scores.mean_ap == pytest.approx(79.1667, abs=1e-3)
    # distractors stand behind the originals and are never positive
    assert (
        copy_scores(torch.tensor([[1.0, 0.0]]), ["2005.jpg"], database.flip(0), ["2005.jpg"]).mean_ap == 0.0
    )
    with pytest.raises(ValueError, match="positive"):
        ap("9999.jpg")


def test_images_become_square(tmp_path):
    Image.linear_gradient("L").resize((60, 20)).convert("RGB").save(tmp_path / "a.png")
    assert load_square(tmp_path / "a.png", 32).shape == (32, 32, 3)


@pytest.fixture
def copies(tmp_path):
    """Five originals of random blobs, strong copies (blurred and cropped), light ones, other images."""
    rng = np.random.default_rng(0)

    def blobs():
        coarse = rng.integers(0, 255, (4, 4, 3)).astype(np.uint8)
        return Image.fromarray(coarse).resize((64, 48), Image.Resampling.BICUBIC)

    for folder in ("original", "strong", "jpegqual/3", "others/deep"):
        (tmp_path / folder).mkdir(parents=True)
    for i in range(5):
        original = blobs()
        original.save(tmp_path / "original" / f"{2000 + i}00.jpg", quality=95)
        original.save(tmp_path / "jpegqual" / "3" / f"{2000 + i}00.jpg", quality=3)
        for j in (1, 2):
            copy = original.crop((3 * j, 2 * j, 64, 48)).filter(ImageFilter.GaussianBlur(j))
            copy.save(tmp_path / "strong" / f"{2000 + i}0{j}.jpg", quality=50)
    for i in range(8):
        blobs().save(tmp_path / "others" / "deep" / f"{i}.png")
    return tmp_path


def test_blocks_of_a_folder(copies):
    originals, blocks = copydays(copies)
    assert [path.name for path in originals] == [f"{2000 + i}00.jpg" for i in range(5)]
    assert {name: len(files) for name, files in blocks.items()} == {
        "jpegqual/3": 5,
        "others/deep": 8,
        "strong": 10,
    }


def test_command(copies, capsys, monkeypatch):
    out = copies / "out"
    line = ["copydetection", *SMALL, "--data_path", str(copies), "--imsize", "32", "--output_dir", str(out)]
    line += ["--distractors_path", str(copies / "others"), "--batch_size_per_gpu", "4"]
    assert main([*line, "--blocks", "strong", "jpegqual/3"]) == 0
    shown = capsys.readouterr().out
    assert "5 originals, 8 distractors" in shown and "(10 queries)" in shown
    record = json.loads((out / "copydetection.json").read_text())
    figures = record["figures"]
    assert list(figures) == ["mAP", "mAP_jpegqual/3", "mAP_strong"]
    assert figures["mAP"] == figures["mAP_strong"] > 50  # by chance below 25
    aps = record["details"]["average_precision"]["strong"]
    assert len(aps) == 10 and np.mean(list(aps.values())) == pytest.approx(figures["mAP"])
    assert record["settings"]["whitening"] == 0

    whitened = [*line, "--blocks", "strong", "--whitening_path", str(copies / "others")]
    learned = []

    def spy(descriptors, center):
        learned.append((descriptors.shape, center))
        return learn_whitening(descriptors, center)

    monkeypatch.setattr(copy_detection, "learn_whitening", spy)
    for words in ([], ["--center_covariance", "true"]):
        assert main([*whitened, *words]) == 0
        assert json.loads((out / "copydetection.json").read_text())["settings"]["whitening"] == 8
    assert learned == [((8, 2 * 192), False), ((8, 2 * 192), True)]


def test_queries_without_an_original(copies, capsys):
    line = ["copydetection", *SMALL, "--data_path", str(copies), "--imsize", "32"]
    (copies / "original" / "200000.jpg").unlink()
    assert main([*line, "--blocks", "strong"]) == 0
    assert "(10 queries, 2 without an original left out)" in capsys.readouterr().out
    assert main(line) == 2
    assert "block others/deep: none of 8 queries has a positive image" in capsys.readouterr().err


def test_missing_folders_show_the_layout(copies, tmp_path, capsys):
    line = ["copydetection", *SMALL, "--data_path"]
    assert main([*line, str(copies / "strong")]) == 2
    error = capsys.readouterr().err
    assert "no originals there" in error and "jpegqual/<n>/" in error
    assert main([*line, str(copies), "--blocks", "weak"]) == 2
    assert "--blocks: expected some of jpegqual/3, others/deep, strong, got weak" in capsys.readouterr().err
    assert main([*line, str(copies), "--whitening_path", str(copies / "nowhere")]) == 2
    assert "--whitening_path: no images in" in capsys.readouterr().err
