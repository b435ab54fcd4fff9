"""timm itself opens the folders that are written for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import timm_library
from fastdino.interop.source import Source, _at_size
from fastdino.interop.timm import export_timm, timm_config
from fastdino.interop.weights import load_backbone
from fastdino.models import ResNet, VisionTransformer, vit_base, vit_small, vit_tiny


@pytest.fixture(scope="module")
def timm() -> Iterator[Any]:
    with timm_library.opened() as library:
        yield library


def perturbed(model: Any) -> Any:
    """Without zeros and ones that would hide a term."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.eval()


def written(model: Any, folder: Path, size: int | None = None) -> Path:
    export_timm(Source(folder, model, _at_size(model, size), {"fastdino.source": "here"}, None), folder)
    return folder


@pytest.mark.parametrize("size", [None, 48])
@pytest.mark.parametrize(
    "sizes",
    [
        {"embed_dim": 64, "num_heads": 1},
        {"embed_dim": 40, "num_heads": 5, "mlp_ratio": 2.0},
        {"embed_dim": 64, "num_heads": 2, "in_chans": 4},
    ],
)
def test_vit(tmp_path, timm, sizes, size) -> None:
    torch.manual_seed(0)
    model = perturbed(VisionTransformer(32, 8, depth=2, **sizes))
    images = torch.randn(2, model.in_chans, size or 32, size or 32)
    with torch.no_grad():
        features, tokens = model(images), model.get_intermediate_layers(images, 2)
        folder = written(model, tmp_path / "timm", size)
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        torch.testing.assert_close(theirs(images), features, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.forward_features(images), tokens[1], rtol=1e-5, atol=1e-5)
        layers = theirs.get_intermediate_layers(images, n=2, norm=True)
        torch.testing.assert_close(layers[0], tokens[0][:, 1:], rtol=1e-5, atol=1e-5)
        assert theirs.num_classes == 0 and theirs.num_features == model.embed_dim
        torch.testing.assert_close(load_backbone(folder)(images), features)


def test_resnet(tmp_path, timm) -> None:
    torch.manual_seed(0)
    model = ResNet().train()
    with torch.no_grad():
        model(torch.randn(8, 3, 64, 64))  # moves the running statistics
        images = torch.randn(1, 3, 64, 96)
        theirs = timm.create_model(f"local-dir:{written(model.eval(), tmp_path / 'timm')}", pretrained=True)
        torch.testing.assert_close(theirs.eval()(images), model(images), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(load_backbone(tmp_path / "timm")(images), model(images))


def test_transformers_opens_it_too(tmp_path, timm) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not transformers.utils.is_timm_available():
        pytest.skip("transformers opens folders of timm only beside torchvision")
    model = perturbed(VisionTransformer(32, 8, 3, 64, 2, 1))
    images = torch.randn(1, 3, 32, 32)
    theirs = transformers.AutoModel.from_pretrained(written(model, tmp_path / "timm")).eval()
    assert type(theirs).__name__ == "TimmWrapperModel"
    with torch.no_grad():
        torch.testing.assert_close(theirs(images).pooler_output, model(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "name", "arguments"),
    [
        (lambda: vit_tiny(16), "vit_tiny_patch16_224", None),
        (lambda: vit_small(8), "vit_small_patch8_224", None),
        (lambda: vit_base(8), "vit_base_patch8_224", None),
        (lambda: vit_tiny(8), "vit_tiny_patch16_224", {"patch_size": 8}),
        (lambda: vit_small(16, img_size=96), "vit_small_patch16_224", {"img_size": 96}),
    ],
)
def test_names_of_models(build, name, arguments) -> None:
    with torch.device("meta"):
        model = build()
    config = timm_config(Source(Path("."), model, _at_size(model, None), {}, None), None)
    assert config["architecture"] == name
    given = config.get("model_args")
    assert given is None if arguments is None else arguments.items() <= given.items()


def test_settings_of_the_view() -> None:
    """timm resizes to floor(size / crop_pct): what the evaluation resizes to."""
    with torch.device("meta"):
        model = vit_tiny(16)
    for size in range(32, 520, 16):
        config = timm_config(Source(Path("."), model, size, {}, None), "mit")["pretrained_cfg"]
        assert int(size / config["crop_pct"]) == round(size * 256 / 224)
        assert json.dumps(config) and config["license"] == "mit"
    assert timm_config(Source(Path("."), model, 224, {}, None), None)["pretrained_cfg"]["crop_pct"] == 0.875
