"""Attention maps: what they are, minimal masks, files on disk."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.evaluation.attention import attention_maps, mass_masks, write_attention
from fastdino.models import VisionTransformer


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3)


def test_maps_are_the_cls_row_without_cls(backbone):
    images = torch.randn(2, 3, 16, 24)
    backbone.train()
    maps = attention_maps(backbone, images)
    assert backbone.training
    whole = backbone.eval().get_last_selfattention(images)
    assert maps.shape == (2, 3, 2, 3)
    assert torch.allclose(maps.flatten(2), whole[:, :, 0, 1:])
    with pytest.raises(ValueError, match="multiples of the patch size 8"):
        attention_maps(backbone, torch.randn(1, 3, 16, 20))


def test_mask_by_hand():
    map_ = torch.tensor([[0.1, 0.4], [0.2, 0.3]])
    assert mass_masks(map_, 0.4).tolist() == [[False, True], [False, False]]
    assert mass_masks(map_, 0.6).tolist() == [[False, True], [False, True]]
    assert mass_masks(map_, 0.7).tolist() == [[False, True], [False, True]]
    assert mass_masks(map_, 0.71).tolist() == [[False, True], [True, True]]
    assert mass_masks(map_, 1.0).all()
    # equal values in reading order; a map need not sum to one
    assert mass_masks(torch.full((2, 2), 3.0), 0.5).tolist() == [[True, True], [False, False]]
    with pytest.raises(ValueError, match="threshold"):
        mass_masks(map_, 0.0)


@pytest.mark.parametrize("threshold", [0.2, 0.6, 0.8])
def test_mask_is_the_smallest_set_with_the_mass(threshold):
    for seed in range(5):
        map_ = torch.rand(2, 5, generator=torch.Generator().manual_seed(seed)).double() ** 3
        kept = mass_masks(map_, threshold)
        wanted = threshold * map_.sum()
        assert map_[kept].sum() >= wanted
        smaller = itertools.combinations(map_.flatten().tolist(), int(kept.sum()) - 1)
        assert all(sum(subset) < wanted for subset in smaller)


def test_files(backbone, tmp_path):
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(photo)
    files = write_attention(backbone, photo, tmp_path / "out", image_size=(35, 48), threshold=0.6)
    names = [f"attn-head{i}.png" for i in range(3)] + [f"mask_th0.6_head{i}.png" for i in range(3)]
    assert [f.name for f in files] == ["img.png", *names, "attention.png"]
    assert all(Image.open(f).size == (48, 32) for f in files[:-1])
    assert Image.open(files[-1]).size == (5 * 56 - 8, 2 * 40 - 8)
    with pytest.raises(ValueError, match="at least one patch"):
        write_attention(backbone, photo, tmp_path / "out", image_size=(7, 48))
