"""transformers itself opens the folders that are written for it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from fastdino.evaluation.features import center_crop, center_view, normalize
from fastdino.interop.__main__ import main
from fastdino.interop.hf import export_hf, processor_config
from fastdino.interop.source import Source, _at_size
from fastdino.interop.weights import load_backbone
from fastdino.models import VisionTransformer


@pytest.fixture(scope="module")
def transformers() -> Iterator[object]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield pytest.importorskip("transformers", reason="transformers is not installed")


def vit(heads: int = 2, side: int = 32, **sizes: float) -> VisionTransformer:
    """Two blocks without zeros and ones that would hide a term."""
    torch.manual_seed(0)
    model = VisionTransformer(side, 8, 3, 64, 2, heads, **sizes).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def written(model: VisionTransformer, folder: Path, size: int | None = None) -> Path:
    source = Source(folder, model, _at_size(model, size), {"fastdino.source": "here"}, None)
    export_hf(source, folder)
    return folder


def plain_forward(vit: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and last attention map by the operations of the official forward pass, one by one."""
    batch, dim, heads = len(images), vit.embed_dim, vit.num_heads
    projection = vit.patch_embed.proj
    x = F.conv2d(images, projection.weight, projection.bias, projection.stride).flatten(2).transpose(1, 2)
    x = torch.cat((vit.cls_token.expand(batch, -1, -1), x), 1) + vit.pos_embed
    for block in vit.blocks:
        y = F.layer_norm(x, (dim,), block.norm1.weight, block.norm1.bias, 1e-6)
        qkv = F.linear(y, block.attn.qkv.weight, block.attn.qkv.bias)
        q, k, v = qkv.reshape(batch, -1, 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        attention = ((q @ k.transpose(-2, -1)) * (dim // heads) ** -0.5).softmax(-1)
        y = (attention @ v).transpose(1, 2).reshape(batch, -1, dim)
        x = x + F.linear(y, block.attn.proj.weight, block.attn.proj.bias)
        y = F.layer_norm(x, (dim,), block.norm2.weight, block.norm2.bias, 1e-6)
        y = F.gelu(F.linear(y, block.mlp.fc1.weight, block.mlp.fc1.bias))
        x = x + F.linear(y, block.mlp.fc2.weight, block.mlp.fc2.bias)
    return F.layer_norm(x, (dim,), vit.norm.weight, vit.norm.bias, 1e-6), attention


@pytest.mark.parametrize(("heads", "sizes"), [(1, {}), (4, {"mlp_ratio": 2.0})])
def test_model(tmp_path, transformers, heads, sizes) -> None:
    model = vit(heads, **sizes)
    folder = written(model, tmp_path / "hf")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens, attention = plain_forward(model, images)
        for kind in ("eager", "sdpa"):
            theirs, info = transformers.AutoModel.from_pretrained(
                folder, attn_implementation=kind, output_loading_info=True
            )
            assert type(theirs) is transformers.ViTModel
            assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
            out = theirs.eval()(images, output_attentions=kind == "eager")
            assert torch.equal(out.pooler_output, out.last_hidden_state[:, 0])
            torch.testing.assert_close(out.pooler_output, model(images))
            torch.testing.assert_close(out.last_hidden_state, model.get_intermediate_layers(images)[0])
            if kind == "eager":  # the same products and sums, but for how a processor splits them
                torch.testing.assert_close(out.last_hidden_state, tokens, rtol=0, atol=1e-6)
                torch.testing.assert_close(out.attentions[-1], attention, rtol=0, atol=1e-7)


def test_what_transformers_saves_comes_back(tmp_path, transformers) -> None:
    model = vit(1)
    theirs = transformers.ViTModel.from_pretrained(written(model, tmp_path / "hf"))
    theirs.save_pretrained(tmp_path / "again")
    back = load_backbone(tmp_path / "again").state_dict()
    assert all(torch.equal(value, back[name]) for name, value in model.state_dict().items())
    labelled = transformers.ViTForImageClassification(theirs.config)
    labelled.save_pretrained(tmp_path / "labelled")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        tokens = labelled.eval().vit(images).last_hidden_state
        torch.testing.assert_close(load_backbone(tmp_path / "labelled")(images), tokens[:, 0])


def test_another_size_is_exact_where_interpolation_is_not(tmp_path, transformers) -> None:
    model = vit()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        wanted = model(images)
        native = transformers.AutoModel.from_pretrained(written(model, tmp_path / "native")).eval()
        other = native(images, interpolate_pos_encoding=True).pooler_output
        assert (other - wanted).norm() > 0.001 * wanted.norm()
        exact = transformers.AutoModel.from_pretrained(written(model, tmp_path / "48", size=48)).eval()
        torch.testing.assert_close(exact(images).pooler_output, wanted)


def test_pipeline_gives_the_features(tmp_path, transformers) -> None:
    model = vit()
    pipeline = transformers.pipeline(
        "image-feature-extraction", str(written(model, tmp_path / "hf")), pool=True
    )
    image = Image.fromarray(np.full((40, 40, 3), 99, np.uint8))
    with torch.no_grad():
        expected = model(normalize(torch.from_numpy(center_crop(image, 32))[None]))
    torch.testing.assert_close(torch.tensor(pipeline(image)), expected)


@pytest.mark.parametrize("side", [224, 96])
def test_processor_is_the_evaluation_transform(tmp_path, transformers, side) -> None:
    """But for a shift of a pixel where one rounds up and the other down."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor_config(side)))
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    rng = np.random.default_rng(0)
    exact = shifted = 0
    for _ in range(24):
        height, width = rng.integers(60, 400, 2)
        noise = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image = noise.filter(ImageFilter.GaussianBlur(2))
        ours = normalize(torch.from_numpy(center_crop(image, side))[None])[0]
        theirs = torch.from_numpy(np.asarray(processor(image, return_tensors="np")["pixel_values"][0]))
        if (max(center_view(height, width, side)[0]) - side) % 4 == 3:
            shifted += 1
        else:
            exact += 1
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    assert exact > shifted > 0


def test_command_writes_such_a_folder(tmp_path, transformers) -> None:
    model = vit(1)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    assert main(["hf", "export", str(tmp_path / "a.pth"), str(tmp_path / "hf"), "--license", "mit"]) == 0
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.model_type, config.hidden_size, config.image_size) == ("vit", 64, 32)
    assert config.layer_norm_eps == 1e-6 and math.isclose(config.intermediate_size, 256)
