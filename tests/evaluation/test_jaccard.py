"""Jaccard of attention masks on cases worked out by hand, the pairing of images with masks, PASCAL VOC."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.evaluation import sheets
from fastdino.evaluation.__main__ import main
from fastdino.evaluation.jaccard import (
    best_and_worst,
    best_head_jaccard,
    best_heads,
    jaccard,
    jaccard_by_threshold,
    pair_masks,
    read_mask,
    voc_pairs,
)
from fastdino.evaluation.plan import find_voc


def test_best_head_for_each_object_then_mean_over_objects():
    objects = np.array([[1, 1, 0, 2], [1, 1, 0, 2]], np.uint8)
    heads = torch.zeros(2, 2, 4, dtype=torch.bool)
    heads[0, :, :2] = True  # object 1 exactly: 4/4; object 2: 0/6
    heads[1, :, 2:] = True  # object 1: 0/8; object 2: 2/4
    assert best_head_jaccard(heads, objects) == pytest.approx(100 * (1.0 + 0.5) / 2)


def test_best_heads_of_objects():
    objects = np.array([[9, 9, 0, 2], [9, 9, 255, 2]], np.uint8)
    heads = np.zeros((2, 2, 4), bool)
    heads[0, :, :2] = True
    heads[1, :, 2:] = True
    assert best_heads(heads, objects) == {2: (1, 0.5), 9: (0, 1.0)}


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
    both = jaccard_by_threshold(Peek(), images, masks, [0.99, 0.25], image_size=16)
    assert both[0.25] == result and both[0.99].mean == pytest.approx(100.0)
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


def test_sheet_of_the_best_and_the_worst(tmp_path):
    images, masks = pair_masks(*make_pairs(tmp_path, [4, 8, 12, 0]))
    result = jaccard(Peek(), images, masks, image_size=16, threshold=0.25)
    # 1 of 4, 2 of 8 and 3 of 12 patches: the first head's masks
    assert result.per_image == [pytest.approx(25)] * 3 + [None]
    sheet = best_and_worst(Peek(), images, masks, result, threshold=0.25, image_size=16, count=2)
    pixels = np.asarray(sheet)
    tall = (np.abs(pixels - np.array(sheets.color_of(0))) < 40).all(-1).any(1)
    # two rows of masks, one column in the second: every image is shown once
    assert sheet.width == 560 and np.diff(np.flatnonzero(tall)).max() > 216
    single = jaccard(Peek(), images[:1], masks[:1], image_size=16, threshold=0.25)
    few = best_and_worst(Peek(), images[:1], masks[:1], single, threshold=0.25, image_size=16)
    assert few.height < sheet.height


@pytest.fixture
def voc(tmp_path):
    """Two images of 16 x 16 pixels: dark in the left quarter, class 3, of two objects."""
    root = tmp_path / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "SegmentationObject", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    pixels = np.full((16, 16, 3), 255, np.uint8)
    pixels[:, :4] = 0
    classes = np.where(pixels[..., 0] == 0, 3, 0).astype(np.uint8)
    objects = classes // 3
    objects[8:] *= 2
    for name in ("2007_000033", "2007_000042", "2007_000099"):
        Image.fromarray(pixels).save(root / f"JPEGImages/{name}.jpg", quality=100)
    for name in ("2007_000033", "2007_000042"):
        for folder, mask in (("SegmentationClass", classes), ("SegmentationObject", objects)):
            palette = Image.fromarray(mask)
            palette.putpalette(bytes(range(256)) * 3)
            palette.save(root / folder / f"{name}.png")
    (root / "ImageSets/Segmentation/val.txt").write_text("2007_000042\n2007_000033\n")
    return root


def test_voc_is_recognised(voc):
    assert find_voc(voc) == find_voc(voc.parent) == find_voc(voc.parent.parent) == voc
    assert find_voc(voc / "JPEGImages") is None
    images, masks = voc_pairs(voc)
    assert images == [str(voc / f"JPEGImages/2007_0000{i}.jpg") for i in (42, 33)]
    assert masks == [str(voc / f"SegmentationClass/2007_0000{i}.png") for i in (42, 33)]
    # the whole dark part is one object of the class, and two instances of half the size
    score = {
        gt: jaccard(Peek(), *voc_pairs(voc, gt), image_size=16, threshold=0.99).mean
        for gt in ("class", "instance")
    }
    assert score == {"class": pytest.approx(100), "instance": pytest.approx(50)}


def test_incomplete_voc_shows_the_layout(voc):
    (voc / "SegmentationClass" / "2007_000033.png").unlink()
    with pytest.raises(FileNotFoundError, match="1 files.*000033.png(.|\n)*ImageSets/Segmentation/val.txt"):
        voc_pairs(voc)
    (voc / "ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(FileNotFoundError, match="no .*val.txt; expected the layout"):
        voc_pairs(voc, "instance")


def test_command_on_voc(voc, tmp_path, capsys):
    line = ["jaccard", "--weights", "random", "--arch", "vit_tiny", "--device", "cpu", "--image_size", "32"]
    assert main([*line, "--data_path", str(voc.parent), "--output_dir", str(tmp_path / "out")]) == 0
    assert "paper, VOC12 val, vit_small/16: random 22.0" in capsys.readouterr().out
    record = json.loads(next((tmp_path / "out").glob("jaccard*.json")).read_text())
    assert list(record["figures"]) == ["jaccard_60", "jaccard_80"]
    assert record["figures"]["jaccard_80"] > 0 and record["settings"]["gt"] == "class"
    assert (tmp_path / "out" / "jaccard.png").exists() and list(record["pictures"]) == ["jaccard.png"]
    assert main([*line, "--data_path", str(voc / "JPEGImages")]) == 2
    error = capsys.readouterr().err
    assert "--mask_path is required" in error and "ImageSets/Segmentation/val.txt" in error
    assert main([*line, "--data_path", str(voc), "--threshold", "0.7"]) == 0
    assert "0.7 of the mass" in capsys.readouterr().out
