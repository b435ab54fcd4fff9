"""Attention maps: what they are, minimal masks, reference points, files and videos on disk."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.evaluation import sheets
from fastdino.evaluation.__main__ import main
from fastdino.evaluation.attention import (
    attention_maps,
    attention_rows,
    colorize,
    film,
    frame_size,
    mass_masks,
    patch_at,
    scale_to_unit,
    view,
    write_attention,
)
from fastdino.evaluation.features import normalize
from fastdino.evaluation.video import Clip
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


def test_rows_of_patches(backbone):
    images = torch.randn(1, 3, 16, 24)
    whole = backbone.eval().get_last_selfattention(images)
    rows = attention_rows(backbone, images, [4, 0])
    assert rows.shape == (1, 3, 2, 2, 3)
    assert torch.allclose(rows[:, :, 0].flatten(2), whole[:, :, 4, 1:])
    assert torch.allclose(rows[:, :, 1], attention_maps(backbone, images))


def test_patch_at_a_pixel():
    # an image of 30 x 20 pixels (width x height) in 3 columns and 2 rows of patches
    size, grid = (30, 20), (2, 3)
    places = {(0, 0): 0, (9, 9): 0, (10, 9): 1, (29, 9): 2, (29, 10): 5, (9, 19): 3}
    assert {point: patch_at(point, size, grid) for point in places} == places
    for point in ((30, 0), (0, 20), (-1, 0)):
        with pytest.raises(ValueError, match="--points: .*30 x 20"):
            patch_at(point, size, grid)


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


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


def test_files(backbone, photo, tmp_path):
    files = write_attention(
        backbone, photo, tmp_path / "out", image_size=(35, 48), threshold=0.6, points=[(0, 0), (49, 39)]
    )
    names = [f"attn-head{i}.png" for i in range(3)] + [f"mask_th0.6_head{i}.png" for i in range(3)]
    names += ["contours.png", "point0.png", "point1.png"]
    assert [f.name for f in files] == ["img.png", *names, "attention.png"]
    assert all(Image.open(f).size == (48, 32) for f in files[:-1])
    # image, mean of the heads and three heads of 216 pixels height; maps, masks and two points
    width, height = Image.open(files[-1]).size
    assert width == 2 * 20 + 5 * 324 + 4 * 10 and height > 4 * 216
    with pytest.raises(ValueError, match="at least one patch"):
        write_attention(backbone, photo, tmp_path / "out", image_size=(7, 48))
    with pytest.raises(ValueError, match="--points"):
        write_attention(backbone, photo, tmp_path / "out", points=[(50, 0)])


def test_masks_are_outlined_in_the_heads_colours(backbone, photo):
    image = Image.open(photo)
    seen = view(backbone, image, image_size=(64, 64), threshold=0.6)
    maps = attention_maps(backbone, normalize(torch.from_numpy(seen.image)[None]))[0]
    for i, mask in enumerate(mass_masks(maps, 0.6).numpy()):
        region = mask.repeat(8, 0).repeat(8, 1)
        colored = (seen.masks[i] == sheets.color_of(i)).all(-1)
        assert (colored == sheets.rim(region)).all() and colored.any()
        assert (seen.masks[i][~region] <= seen.image[~region]).all()
        # the head drawn last covers the others
        if i == 2:
            assert ((seen.contours == sheets.color_of(i)).all(-1) == sheets.rim(region)).all()


def test_a_points_map_is_that_of_its_patch(backbone, photo):
    # 50 x 40 pixels become 4 x 4 patches; x = 30 lies in column 2, y = 12 in row 1
    seen = view(backbone, Image.open(photo), image_size=(32, 32), points=[(30, 12)])
    image, mean, heads = seen.points[0]
    pixels = normalize(torch.from_numpy(seen.image)[None])
    rows = attention_rows(backbone, pixels, [1 + 1 * 4 + 2])[0, :, 0]
    shown = colorize(scale_to_unit(rows.mean(0)))
    assert (mean[::8, ::8] == shown).all(-1).sum() >= 15  # the ring may cover the corner of its patch
    assert len(heads) == 3
    changed = np.argwhere((image != seen.image).any(-1))
    assert np.abs(changed.mean(0) - (11.5, 19.5)).max() <= 1


def test_frames(backbone):
    assert frame_size((200, 100), [50]) == (50, 100) and frame_size((200, 100), [30, 40]) == (30, 40)
    frames = [Image.new("RGB", (60, 40), (i, i, i)) for i in range(2)]
    made = list(film(backbone, frames, resize=[20], threshold=0.6))
    assert [frame.shape for frame in made] == [(16, 3 * 24, 3)] * 2
    assert [int(frame[0, 0, 0]) for frame in made] == [0, 1]
    assert next(film(backbone, frames, resize=[20])).shape == (16, 2 * 24, 3)


def test_video_in_and_out(photo, tmp_path, capsys):
    frames = tmp_path / "frames"
    frames.mkdir()
    for i in range(3):
        Image.open(photo).rotate(90 * i).save(frames / f"{i}.png")
    line = ["attention", "--weights", "random", "--arch", "vit_tiny", "--device", "cpu", "--resize", "32"]
    line += ["--output_path", str(tmp_path / "out")]
    assert main([*line, "--input_path", str(frames), "--video_format", "gif", "--fps", "20"]) == 0
    clip = Clip(tmp_path / "out" / "attention.gif")
    assert clip.frames == 3 and clip.fps == pytest.approx(20) and next(iter(clip)).size == (64, 32)
    assert "3 frames at 20 per second" in capsys.readouterr().out
    result = tmp_path / "out" / "attention.gif"
    assert main([*line, "--data_path", str(result), "--video_format", "frames", "--threshold", "0.6"]) == 0
    assert sorted(p.name for p in (tmp_path / "out" / "attention").iterdir())[2] == "frame-000003.png"
    assert Image.open(tmp_path / "out" / "attention.png").width > 560
    joined = ["attention", "--video_only", "--video_format", "gif", "--output_path", str(tmp_path / "joined")]
    assert main([*joined, "--input_path", str(tmp_path / "out" / "attention")]) == 0
    assert Clip(tmp_path / "joined" / "attention.gif").frames == 3
    assert main([*joined, "--input_path", str(result)]) == 2
    assert "--video_only" in capsys.readouterr().err
    assert main([*line, "--input_path", str(result), "--points", "1,1"]) == 2
    assert "--points" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*line, "--data_path", str(photo), "--points", "1;1"])
