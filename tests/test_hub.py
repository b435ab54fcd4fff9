"""``torch.hub`` builds the official models from this repository."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import hubconf
from fastdino.models import ResNet, VisionTransformer, vit_small

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def served(monkeypatch) -> dict[str, dict]:
    """Address -> what is there; any other is an error."""
    files: dict[str, dict] = {}

    def load(url: str, *, map_location: str, weights_only: bool) -> dict:
        assert map_location == "cpu" and weights_only
        return files[url]

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", load)
    return files


def test_hub_load(served) -> None:
    model = torch.hub.load(str(ROOT), "dino_vits16", source="local", pretrained=False)
    assert isinstance(model, VisionTransformer)
    assert (model.embed_dim, model.depth, model.num_heads, model.patch_size) == (384, 12, 6, 16)


@pytest.mark.parametrize(
    ("name", "shape", "file"),
    [
        ("dino_vits8", (384, 8), "deitsmall8"),
        ("dino_vitb16", (768, 16), "vitbase16"),
        ("dino_vitb8", (768, 8), "vitbase8"),
    ],
)
def test_vits_take_the_official_file(served, name, shape, file) -> None:
    with torch.device("meta"):
        model = getattr(hubconf, name)(pretrained=False, depth=1)
    assert (model.embed_dim, model.patch_size) == shape
    state = {k: torch.zeros(v.shape) for k, v in model.state_dict().items()}
    served[f"https://dl.fbaipublicfiles.com/dino/dino_{file}_pretrain/dino_{file}_pretrain.pth"] = state
    assert not getattr(hubconf, name)(depth=1).norm.weight.any()


def test_a_file_that_does_not_fit_is_refused(served) -> None:
    url = "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"
    state = vit_small(16, depth=1).state_dict()
    for change in ({"norm.bias": torch.zeros(7)}, {"extra": torch.zeros(1)}):
        served[url] = {**state, **change}
        with pytest.raises(RuntimeError, match=next(iter(change))):
            hubconf.dino_vits16(depth=1)


def test_resnet_leaves_the_classifier_out(served) -> None:
    url = "https://dl.fbaipublicfiles.com/dino/dino_resnet50_pretrain/dino_resnet50_pretrain.pth"
    state = ResNet().state_dict()
    served[url] = {**state, "fc.weight": torch.ones(1000, 2048), "fc.bias": torch.ones(1000)}
    model = hubconf.dino_resnet50()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.embed_dim == 2048
