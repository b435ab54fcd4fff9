"""The ONNX file against our model, against the official interpolation, and as a user gets it."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdino.interop import onnx as exporter
from fastdino.models import ResNet, VisionTransformer
from fastdino.models.swin import SwinTransformer

pytest.importorskip("onnxscript", reason="needs fastdino[export]")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs fastdino[export]")

PATCH = 8
# Training's grid, larger, smaller, a single patch, and two that are not square, one of them with as many
# patches as training's grid.
SIZES = [(1, 32, 32), (2, 48, 48), (1, 24, 24), (3, 8, 8), (1, 64, 16), (2, 40, 56)]


def vit(width: int = 24, heads: int = 3) -> VisionTransformer:
    """Every parameter counts: none is zero or one."""
    torch.manual_seed(0)
    model = VisionTransformer(img_size=32, patch_size=PATCH, embed_dim=width, depth=1, num_heads=heads)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.pos_embed.data.normal_()
    return model.eval()


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    return vit()


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "vit.onnx"
    difference = exporter.export_onnx(model, path, metadata={"fastdino.source": "here"})
    assert difference is not None and difference <= 1e-5
    return path


def session(path: Path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def outputs(path: Path, images: Tensor) -> list[Tensor]:
    found = session(path).run(["features", "tokens"], {"pixel_values": images.numpy()})
    return [torch.from_numpy(values) for values in found]


def official_positions(learned: Tensor, height: int, width: int) -> Tensor:
    """The rule of the official code in PyTorch's own bicubic interpolation."""
    side = math.isqrt(learned.shape[1] - 1)
    h, w = height // PATCH, width // PATCH
    if h * w == side**2 and height == width:
        return learned
    grid = learned[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, scale_factor=((h + 0.1) / side, (w + 0.1) / side), mode="bicubic")
    assert grid.shape[2:] == (h, w)
    return torch.cat((learned[:, :1], grid.permute(0, 2, 3, 1).reshape(1, h * w, -1)), 1)


@pytest.mark.parametrize("size", SIZES)
def test_any_batch_and_size(model, exported, size, monkeypatch) -> None:
    images = torch.randn(size[0], 3, *size[1:], generator=torch.Generator().manual_seed(1))
    features, tokens = outputs(exported, images)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(features, model(images), rtol=0, atol=1e-5)
            torch.testing.assert_close(tokens, model.get_intermediate_layers(images, 1)[0], rtol=0, atol=1e-5)
            monkeypatch.setattr(
                model, "interpolate_pos_encoding", lambda h, w: official_positions(model.pos_embed, h, w)
            )
    assert torch.equal(features, tokens[:, 0])


def test_the_matrix_of_the_native_grid_is_the_identity() -> None:
    assert torch.equal(exporter.cubic_matrix(14, 14, torch.tensor(1.0)), torch.eye(14))
    moved = exporter.cubic_matrix(14, 14, 14 / torch.tensor(14.1))
    assert (moved - torch.eye(14)).abs().max() > 0.05
    torch.testing.assert_close(moved.sum(1), torch.ones(14))


def test_one_file_that_tells_what_it_is(exported) -> None:
    import onnx

    assert [path.name for path in exported.parent.iterdir()] == ["vit.onnx"]
    onnx.checker.check_model(str(exported), full_check=True)
    opened = session(exported)
    assert [(value.name, value.shape[0], value.shape[1]) for value in opened.get_inputs()] == [
        ("pixel_values", "batch", 3)
    ]
    assert [value.name for value in opened.get_outputs()] == ["features", "tokens"]
    told = opened.get_modelmeta()
    assert told.producer_name == "fastdino"
    assert told.custom_metadata_map["fastdino.image_size"] == "multiples of 8"
    assert told.custom_metadata_map["fastdino.image_mean"] == "[0.485, 0.456, 0.406]"
    assert told.custom_metadata_map["fastdino.source"] == "here"


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 33, 32), "image_sides_must_be_multiples_of_8"),
        ((1, 3, 32, 36), "image_sides_must_be_multiples_of_8"),
        ((1, 1, 32, 32), "Got: 1 Expected: 3"),
        ((3, 32, 32), "Got: 3 Expected: 4"),
    ],
)
def test_wrong_images_are_refused(exported, shape, message) -> None:
    with pytest.raises(Exception, match=message):
        session(exported).run(None, {"pixel_values": np.zeros(shape, np.float32)})


def test_command_line_and_a_fixed_size(tmp_path, capsys) -> None:
    model = vit(64, 1)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    parser = argparse.ArgumentParser()
    exporter.add_arguments(parser)
    target = tmp_path / "out" / "fixed.onnx"
    words = [str(tmp_path / "weights.pth"), str(target), "--image_size", "32", "16"]
    assert exporter.run(parser.parse_args(words)) == 0
    line = capsys.readouterr().out
    assert "pixel_values -> features, tokens; images of 32 x 16 pixels" in line
    assert "differs from PyTorch by at most" in line and line.count("\n") == 1
    images = torch.randn(4, 3, 32, 16)
    with torch.no_grad():
        torch.testing.assert_close(outputs(target, images)[0], model(images), rtol=0, atol=1e-5)
    with pytest.raises(Exception, match="index: 3 Got: 32 Expected: 16"):
        outputs(target, torch.zeros(1, 3, 32, 32))


def test_resnet(tmp_path) -> None:
    torch.manual_seed(0)
    model = ResNet(4, blocks=(1, 1, 1, 1)).eval()
    assert exporter.export_onnx(model, tmp_path / "resnet.onnx") is not None
    for shape in ((1, 3, 64, 96), (3, 3, 20, 31)):
        images = torch.randn(shape)
        features, tokens = outputs(tmp_path / "resnet.onnx", images)
        with torch.no_grad():
            expected, (regions,) = model.forward_regions([images])
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tokens, regions, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_exported_is_refused_and_leaves_nothing(model, tmp_path, monkeypatch) -> None:
    path = tmp_path / "x.onnx"
    with pytest.raises(ValueError, match="expected a ViT or a ResNet, got a SwinTransformer"):
        exporter.export_onnx(SwinTransformer(8, (1, 1, 1, 1), 2, num_heads=(1, 1, 1, 1)), path)
    with pytest.raises(
        ValueError, match="image_size: expected multiples of the patch .8 pixels., got 32 x 30"
    ):
        exporter.export_onnx(model, path, image_size=(32, 30))
    model.train()
    monkeypatch.setattr(
        exporter, "_outputs", lambda model, images: (torch.ones(1, 24), torch.ones(1, 17, 24))
    )
    with pytest.raises(ValueError, match="onnxruntime differs from PyTorch by .* nothing was written"):
        exporter.export_onnx(model, path, image_size=(32, 32))
    assert model.training and list(tmp_path.iterdir()) == []
    model.eval()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs onnx and onnxscript: pip install 'fastdino\[export\]'"):
        exporter.export_onnx(model, path)
