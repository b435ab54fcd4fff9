"""Jaccard of attention masks on cases worked out by hand, and the pairing of images with masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.evaluation.jaccard import best_head_jaccard, jaccard, pair_masks, read_mask


def test_best_head_for_each_object_then_mean_over_objects():
    objects = np.array([[1, 1, 0, 2], [1, 1, 0, 2]], np.uint8)
    heads = torch.zeros(2, 2, 4, dtype=torch.bool)
    heads[0, :, :2] = True  # object 1 exactly: 4/4; object 2: 0/6
    heads[1, :, 2:] = True  # object 1: 0/8; object 2: 2/4
    assert best_head_jaccard(heads, objects) == pytest.approx(100 * (1.0 + 0.5) / 2)


def test_void_is_no_object_but_counts_in_the_union():
    objects = np.array([[1, 1, 255, 255]], np.uint8)
    assert best_head_jaccard(torch.ones(1, 1, 4, dtype=torch.bool), objects) == pytest.approx(50.0)
    assert best_head_jaccard(torch.ones(1, 1, 4, dtype=torch.bool), objects * 0) is None


def test_patches_are_enlarged_to_pixels():
    objects = np.zeros((4, 4), np.uint8)
    objects[:2, :3] = 7
    heads = torch.tensor([[[True, False], [False, False]]])  # pixels [:2, :2]
    assert best_head_jaccard(heads, objects) == pytest.approx(100 * 4 / 6)


class Peek(torch.nn.Module):
    """A backbone whose head 0 attends to dark patches, head 1 equally to all."""

    patch_size = 4

    def get_last_selfattention(self, x):
        dark = -torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4).flatten(2)  # [B, 1, N]
        rows = torch.cat([(40 * dark).softmax(-1), torch.full_like(dark, 1 / dark.shape[-1])], 1)
        return torch.nn.functional.pad(rows, (1, 0))[:, :, None].expand(-1, -1, rows.shape[-1] + 1, -1)


def make_pairs(tmp_path, columns):
    """White images 16 x 16 whose first columns are dark, and masks of exactly these columns."""
    images, masks = tmp_path / "images" / "a", tmp_path / "masks" / "a"
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for i, dark in enumerate(columns):
        pixels = np.full((16, 16, 3), 255, np.uint8)
        pixels[:, :dark] = 0
        Image.fromarray(pixels).save(images / f"{i}.jpg", quality=100)
        Image.fromarray((pixels[..., 0] == 0).astype(np.uint8) * 255).save(masks / f"{i}.png")
    return tmp_path / "images", tmp_path / "masks"


def test_folders_end_to_end(tmp_path):
    images, masks = pair_masks(*make_pairs(tmp_path, [4, 8, 0]))
    result = jaccard(Peek(), images, masks, image_size=16, threshold=0.99)
    # 4 dark columns are 4 patches of 16 and need all 4 of them; the empty mask does not count
    assert result.per_image == [pytest.approx(100.0), pytest.approx(100.0), None]
    assert result.mean == pytest.approx(100.0)
    # a quarter of the mass: head 0 keeps 1 of 4 and 2 of 8 patches, head 1 the first 4 of 16 patches
    result = jaccard(Peek(), images, masks, image_size=16, threshold=0.25)
    assert result.per_image[:2] == [pytest.approx(100 / 4), pytest.approx(100 / 4)]
    with pytest.raises(ValueError, match="no.*object|object.*none"):
        jaccard(Peek(), images[2:], masks[2:], image_size=16)


def test_mask_files(tmp_path):
    voc = np.array([[0, 3], [255, 3]], np.uint8)
    palette = Image.fromarray(voc)
    palette.putpalette(bytes(range(256)) * 3)
    palette.save(tmp_path / "palette.png")
    assert read_mask(tmp_path / "palette.png").tolist() == voc.tolist()
    assert read_mask(tmp_path / "palette.png", (4, 4)).tolist() == voc.repeat(2, 0).repeat(2, 1).tolist()
    Image.fromarray(voc == 3).save(tmp_path / "binary.png")
    assert read_mask(tmp_path / "binary.png").tolist() == [[0, 1], [0, 1]]
    Image.fromarray(np.where(voc == 3, 255, 0).astype(np.uint8)).save(tmp_path / "white.png")
    assert read_mask(tmp_path / "white.png").tolist() == [[0, 1], [0, 1]]
    Image.new("RGB", (2, 2)).save(tmp_path / "color.png")
    with pytest.raises(ValueError, match="color.png.*mode RGB"):
        read_mask(tmp_path / "color.png")
    with pytest.raises(FileNotFoundError, match="absent.png"):
        read_mask(tmp_path / "absent.png")


def test_unpaired_masks_are_an_error(tmp_path):
    images, masks = make_pairs(tmp_path, [4, 8])
    (images / "a" / "1.jpg").unlink()
    with pytest.raises(ValueError, match="1.png"):
        pair_masks(images, masks)
