"""Networks without a [CLS] token, and broken ones: every protocol works on them, or says what it lacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.evaluation import evaluate
from fastdino.models import ResNet, SwinTransformer, VisionTransformer
from tests.evaluation.test_copy_detection import copies  # noqa: F401
from tests.evaluation.test_davis import videos  # noqa: F401
from tests.evaluation.test_retrieval import landmarks  # noqa: F401

FLAGS = {"device": "cpu", "image_size": 32, "precision": "fp32"}


@pytest.fixture(scope="module", params=["resnet", "swin"])
def network(request):
    torch.manual_seed(0)
    if request.param == "resnet":
        return ResNet(width=8, blocks=(1, 1, 1, 1))
    return SwinTransformer(width=16, depths=(1, 1, 2, 1), window=4, num_heads=(1, 1, 2, 2), img_size=32)


@pytest.fixture(scope="module")
def shades(tmp_path_factory):
    """Three classes of grey, train/ and val/."""
    root = tmp_path_factory.mktemp("shades")
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name, level in (("black", 20), ("grey", 120), ("white", 230)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = (level + rng.integers(-15, 15, (36, 40, 3))).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def test_classification(network, shades):
    flags = {**FLAGS, "data_path": shades}
    assert evaluate("knn", network, nb_knn=3, **flags).figures["top1_k3"] > 60
    assert evaluate("logistic", network, **flags).figures["top1"] > 60
    assert evaluate("linear", network, lr=[1.0, 10.0], epochs=10, **flags).figures["top1"] > 60
    tuned = evaluate("finetune", network, epochs=2, drop_path=0, batch_size_per_gpu=6, **flags)
    assert 0 <= tuned.figures["top1"] <= 100


def test_pictures_and_speed(network, shades, tmp_path):
    flags = {**FLAGS, "data_path": shades / "val", "output_dir": tmp_path}
    evaluate("tsne", network, iterations=250, **flags)
    result = evaluate("neighbours", network, k=100, **flags)
    assert result.settings["k"] == 8  # all others
    assert (tmp_path / "tsne.png").exists() and (tmp_path / "neighbours.png").exists()
    rates = evaluate("throughput", network, device="cpu", image_size=32, warmup=1, passes=1).figures
    assert all(rate > 0 for rate in rates.values())


def test_retrieval(network, landmarks):  # noqa: F811
    flags = {"device": "cpu", "precision": "fp32", "data_path": landmarks, "imsize": 48}
    assert evaluate("retrieval", network, **flags).figures["mAP_medium"] > 50


def test_what_needs_patch_tokens_says_so(network, shades, copies, videos, tmp_path):  # noqa: F811
    image = shades / "val" / "grey"
    for protocol, flags in (
        ("attention", {"data_path": image}),
        ("pca", {"data_path": image}),
        ("jaccard", {"data_path": image, "mask_path": image}),
        ("copydetection", {"data_path": copies}),
        ("davis", {"data_path": videos, "output_dir": tmp_path}),
    ):
        with pytest.raises(ValueError, match="expected a vision transformer, whose .*, got (res|sw)"):
            evaluate(protocol, network, device="cpu", **flags)


@pytest.mark.parametrize("protocol", ["attention", "jaccard", "pca", "davis"])
def test_what_is_not_finite_is_refused(protocol, shades, videos, tmp_path):  # noqa: F811
    network = VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=1)
    network.blocks[1].attn.qkv.weight.data[0] = torch.nan
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.fromarray(np.full((36, 40), 1, np.uint8)).save(masks / "0.png")
    flags = {
        "attention": {"data_path": shades / "val" / "grey", "image_size": 32},
        "jaccard": {"data_path": shades / "val" / "grey", "mask_path": masks, "image_size": 32},
        "pca": {"data_path": shades / "val" / "grey", "image_size": 32},
        "davis": {"data_path": videos, "short_side": 64},
    }[protocol]
    with pytest.raises(ValueError, match="not finite"):
        evaluate(protocol, network, device="cpu", output_dir=tmp_path / "out", **flags)
