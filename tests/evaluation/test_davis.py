"""Labels carried through videos: the windowed form against the dense one, the command on moving squares."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdino.evaluation import davis
from fastdino.evaluation.__main__ import main
from fastdino.evaluation.davis import (
    Propagation,
    carry,
    davis_videos,
    frame_size,
    hard_labels,
    load_frame,
    one_hot,
    propagate,
    read_labels,
    resize_bilinear,
    segment,
    write_labels,
)

SMALL = ["--weights", "random", "--arch", "vit_tiny", "--device", "cpu"]


def features(*shape, seed=0):
    torch.manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape), dim=-1)


def dense(queries, keys, labels, radius, topk):
    """The whole affinity of all patches to all patches, as the official script has it."""
    h, w, d = queries.shape
    affinity = (keys.reshape(-1, d) @ queries.reshape(-1, d).T / 0.1).exp()  # [F * N keys, N queries]
    row, column = torch.arange(h * w) // w, torch.arange(h * w) % w
    near = ((row[:, None] - row).abs() <= radius) & ((column[:, None] - column).abs() <= radius)
    if radius:
        affinity = affinity * near.repeat(len(keys), 1)
    least = affinity.sort(0, descending=True).values[topk - 1]
    affinity = torch.where(affinity < least, 0, affinity)
    affinity = affinity / affinity.sum(0)
    return (labels.transpose(0, 1).flatten(1) @ affinity).view(-1, h, w)


@pytest.mark.parametrize("radius", [0, 1, 4, 100])
@pytest.mark.parametrize("shape", [(7, 9), (17, 40), (33, 5)])
def test_windows_equal_the_dense_form(radius, shape):
    queries, keys = features(*shape, 8), features(3, *shape, 8, seed=1)
    labels = torch.rand(3, 2, *shape)
    for topk in (1, 5, 11):
        expected = dense(queries, keys, labels, radius, topk)
        assert torch.allclose(propagate(queries, keys, labels, radius, topk), expected, atol=1e-5)
    # the first frame alone: a corner has four neighbours, fewer than five
    expected = dense(queries, keys[:1], labels[:1], radius, 5)
    assert torch.allclose(propagate(queries, keys[:1], labels[:1], radius, 5), expected, atol=1e-5)


def test_similarities_are_held_tile_by_tile(monkeypatch):
    sizes = []

    def record(queries, keys, near, topk):
        sizes.append(queries[..., 0].numel() * keys[..., 0].numel())
        return affinity(queries, keys, near, topk)

    affinity = davis._affinity
    monkeypatch.setattr(davis, "_affinity", record)
    queries, keys, labels = features(30, 52, 4), features(8, 30, 52, 4), torch.rand(8, 2, 30, 52)
    propagate(queries, keys, labels, 3, 5)
    # never more than 16 x 16 queries and the 22 x 22 patches around them, of 30 x 52 patches each way
    assert max(sizes) <= 16**2 * 8 * 22**2 and len(sizes) == 8


def test_all_patches_may_count():
    queries, labels = features(2, 2, 4), torch.rand(1, 3, 2, 2)
    result = propagate(queries, queries[None], labels, 0, 99)
    weights = ((queries.view(4, 4) @ queries.view(4, 4).T) / 0.1).softmax(1)
    assert torch.allclose(result.flatten(1), labels[0].flatten(1) @ weights.T, atol=1e-5)


def test_labels_by_hand():
    # one row of three patches; the query equals the first patch, then the third, then neither
    keys = torch.eye(4)[None, None, :3]
    queries = torch.eye(4)[[0, 2, 3]][None]
    labels = torch.tensor([[[[1.0, 0, 0]], [[0, 1, 1]]]])
    result = propagate(queries, keys, labels, radius=0, topk=1)
    # equal similarities all count: the third patch sees three of exp(0)
    assert torch.allclose(result[:, 0], torch.tensor([[1.0, 0, 1 / 3], [0, 1, 2 / 3]]))
    result = propagate(queries, keys, labels, radius=0, topk=2)
    share = np.exp(10) / (np.exp(10) + 2)  # the second largest, exp(0), stands twice
    assert torch.allclose(result[0, 0], torch.tensor([share, 1 / (np.exp(10) + 2), 1 / 3]).float())
    # a window of one patch hides the first from the third
    result = propagate(queries, keys, labels, radius=1, topk=1)
    assert torch.allclose(result[:, 0], torch.tensor([[1.0, 0, 0], [0, 1, 1]]))


def test_identical_frames_return_the_mask():
    feature = features(12, 20, 64)
    mask = torch.zeros(2, 12, 20)
    mask[1, 3:8, 4:11] = 1
    mask[0] = 1 - mask[1]
    for soft in carry([feature] * 4, mask, Propagation(radius=3, topk=1)):
        assert torch.equal(soft.argmax(0), mask.argmax(0))
        assert torch.allclose(soft, mask)


def test_context_is_the_first_frame_and_the_last_few(monkeypatch):
    seen = []

    def record(query, keys, labels, radius, topk):
        seen.append((keys[:, 0, 0, 0].tolist(), labels[:, 0, 0, 0].tolist()))
        return torch.full((1, 1, 1), float(query[0, 0, 0]) / 8)

    monkeypatch.setattr(davis, "propagate", record)
    frames = [torch.full((1, 1, 1), float(i)) for i in range(6)]
    assert len(list(carry(frames, torch.full((1, 1, 1), -1.0), Propagation(n_last_frames=2)))) == 5
    assert [keys for keys, _ in seen] == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4]]
    assert seen[-1][1] == [-1, 0.375, 0.5]  # soft labels as they were
    seen.clear()
    list(carry(frames[:3], torch.full((1, 1, 1), -1.0), Propagation(n_last_frames=0)))
    assert [keys for keys, _ in seen] == [[0], [0]]


def test_sizes_of_frames():
    assert frame_size(480, 854, 480) == (480, 832)
    assert frame_size(480, 910, 480) == (480, 896)
    assert frame_size(1080, 1920, 480) == (480, 832)
    assert frame_size(854, 480, 480) == (832, 480)
    assert frame_size(100, 100, 480) == (480, 448)


def test_resize_keeps_or_interpolates():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (30, 41, 3)).astype(np.uint8)
    assert np.array_equal(resize_bilinear(pixels, 30, 41), pixels)
    for size in ((30, 32), (17, 64), (61, 20), (15, 20), (7, 9)):
        exact = torch.nn.functional.interpolate(
            torch.from_numpy(pixels).permute(2, 0, 1)[None].double(),
            size,
            mode="bilinear",
            align_corners=False,
        )[0].permute(1, 2, 0)
        assert np.abs(resize_bilinear(pixels, *size) - exact.numpy()).max() < 1.1
    # 2 -> 4 columns: places -0.25, 0.25, 0.75, 1.25
    row = np.repeat(np.array([[[0], [200]]], np.uint8), 3, 2)
    assert resize_bilinear(row, 1, 4)[0, :, 0].tolist() == [0, 50, 150, 200]
    # halving is the mean of four, half up
    square = np.repeat(np.array([[[1], [2]], [[3], [4]]], np.uint8), 3, 2)
    assert resize_bilinear(square, 1, 1)[0, 0].tolist() == [3, 3, 3]


def test_one_hot_labels_and_back():
    labels = np.zeros((32, 48), np.uint8)
    labels[8:24, 16:32] = 2
    soft = one_hot(labels, (4, 6))
    assert soft.shape == (3, 4, 6)
    assert soft.argmax(0).tolist() == [[0] * 6, [0, 0, 2, 2, 0, 0], [0, 0, 2, 2, 0, 0], [0] * 6]
    result = hard_labels(soft, 8, (32, 48))
    assert result.dtype == np.uint8 and set(np.unique(result)) == {0, 2}
    # between patches the larger share wins; only corners become round
    assert result[6:10, 20].tolist() == [0, 0, 2, 2] and result[20, 14:18].tolist() == [0, 0, 2, 2]
    assert 0 < (result != labels).sum() <= 4 * 6 and (result <= labels).all()
    # each channel is stretched to [0, 1], so a faint object wins where it is strongest
    assert set(np.unique(hard_labels(0.1 * soft + torch.tensor([0.5, 0, 0]).view(3, 1, 1), 8, (64, 96)))) == {
        0,
        2,
    }
    # a constant channel stays as it is
    assert not hard_labels(one_hot(labels * 0, (4, 6)), 8, (32, 48)).any()
    everywhere = torch.zeros(3, 4, 6)
    everywhere[2] = 1
    assert (hard_labels(everywhere, 8, (5, 5)) == 2).all()


def test_masks_on_disk(tmp_path):
    labels = np.array([[0, 1, 2], [3, 255, 20]], np.uint8)
    write_labels(tmp_path / "a.png", labels)
    assert np.array_equal(read_labels(tmp_path / "a.png"), labels)
    assert read_labels(tmp_path / "a.png", void=True).tolist() == [[0, 1, 2], [3, 0, 20]]
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "P"
        # PASCAL VOC: background, aeroplane, bicycle, bird, void, tv monitor
        colors = [image.getpalette()[3 * i : 3 * i + 3] for i in (0, 1, 2, 3, 255, 20)]
    assert colors == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0], [224, 224, 192], [0, 64, 128]]
    Image.new("RGB", (2, 2)).save(tmp_path / "rgb.png")
    with pytest.raises(ValueError, match="rgb.png.*mode RGB"):
        read_labels(tmp_path / "rgb.png")
    with pytest.raises(FileNotFoundError, match="absent.png"):
        read_labels(tmp_path / "absent.png")


def test_frames_are_normalised_with_the_official_deviation(tmp_path):
    Image.new("RGB", (64, 32), (255, 128, 0)).save(tmp_path / "a.png")
    frame = load_frame(tmp_path / "a.png", Propagation(short_side=32), (32, 64))
    assert frame.shape == (3, 32, 64)
    expected = [(1 - 0.485) / 0.228, (128 / 255 - 0.456) / 0.224, -0.406 / 0.225]
    assert frame[:, 5, 7].tolist() == pytest.approx(expected)
    with pytest.raises(ValueError, match="a.png.*first mask"):
        load_frame(tmp_path / "a.png", Propagation(), (32, 63))


# ----------------------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A red square that moves right; a blue and a yellow one that move apart."""
    root = tmp_path_factory.mktemp("DAVIS")
    (root / "ImageSets" / "2017").mkdir(parents=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("one\ntwo\n")
    ground = np.random.default_rng(0).integers(90, 110, (64, 128, 3))
    objects = {
        "one": [((220, 30, 30), lambda i: (20, 16 + 4 * i))],
        "two": [((30, 30, 220), lambda i: (8, 60 - 4 * i)), ((230, 220, 30), lambda i: (34, 60 + 4 * i))],
    }
    for name, squares in objects.items():
        frames, masks = root / "JPEGImages" / "480p" / name, root / "Annotations" / "480p" / name
        frames.mkdir(parents=True)
        masks.mkdir(parents=True)
        for i in range(5):
            pixels, labels = ground.astype(np.uint8), np.zeros((64, 128), np.uint8)
            for number, (color, place) in enumerate(squares, 1):
                y, x = place(i)
                pixels[y : y + 24, x : x + 24] = color
                labels[y : y + 24, x : x + 24] = number
            Image.fromarray(pixels).save(frames / f"{i:05d}.jpg", quality=95)
            write_labels(masks / f"{i:05d}.png", labels)
    return root


class Colors(torch.nn.Module):
    """Patch tokens that are the mean colours of 4 x 4 patches."""

    patch_size = 4

    def get_intermediate_layers(self, images, n):
        tokens = torch.nn.functional.avg_pool2d(images, 4).flatten(2).transpose(1, 2)
        return [torch.cat([tokens.mean(1, keepdim=True), tokens], 1)]


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_colours_carry_the_squares(videos, batch_size):
    seen = []
    for video in davis_videos(videos):
        masks = segment(
            Colors(),
            video,
            Propagation(short_side=64),
            batch_size=batch_size,
            progress=lambda *x: seen.append(x),
        )
        for mask, path in zip(masks, video.masks, strict=True):
            assert (mask == read_labels(path)).mean() > 0.98
        assert seen[-1] == (5, 5)


def test_command(videos, tmp_path, capsys):
    line = ["davis", *SMALL, "--data_path", str(videos), "--output_dir", str(tmp_path), "--short_side", "128"]
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert "(3 objects in 2 sequences)" in shown
    record = json.loads((tmp_path / "davis.json").read_text())
    figures, sequences = record["figures"], record["details"]["sequences"]
    assert list(figures) == ["JF", "J", "F"] and [len(scores) for scores in sequences.values()] == [1, 2]
    # a mean over objects, not over sequences
    assert figures["J"] == pytest.approx(np.mean([o["J"] for scores in sequences.values() for o in scores]))
    assert figures["JF"] == pytest.approx((figures["J"] + figures["F"]) / 2)
    assert figures["J"] > 30  # untrained, but patches of one colour look alike
    assert record["settings"]["n_last_frames"] == 7
    for name in ("one", "two"):
        assert len(list((tmp_path / name).glob("*.png"))) == 5
        assert Image.open(tmp_path / "sheets" / f"{name}.png").width > 500
        assert f"sheets/{name}.png" in record["pictures"]

    again = tmp_path / "again"
    line = ["davis", "--data_path", str(videos), "--evaluate_only", str(tmp_path), "--output_dir", str(again)]
    assert main(line) == 0
    assert capsys.readouterr().out == shown
    assert json.loads((again / "davis.json").read_text())["figures"] == figures


def test_the_truth_scores_100(videos, tmp_path, capsys):
    truth = videos / "Annotations" / "480p"
    line = ["davis", "--data_path", str(videos), "--evaluate_only", str(truth), "--output_dir", str(tmp_path)]
    assert main(line) == 0
    assert "J&F 100.00, J 100.00, F 100.00" in capsys.readouterr().out


def test_first_and_last_frame_do_not_count(videos, tmp_path):
    masks = tmp_path / "masks"
    for video in davis_videos(videos):
        (masks / video.name).mkdir(parents=True)
        for i, path in enumerate(video.masks):
            labels = read_labels(path)
            write_labels(masks / video.name / path.name, labels * 0 if i in (0, 4) else labels)
    line = ["davis", "--data_path", str(videos), "--evaluate_only", str(masks), "--output_dir", str(tmp_path)]
    assert main(line) == 0
    assert json.loads((tmp_path / "davis.json").read_text())["figures"]["JF"] == 100.0

    write_labels(masks / "one" / "00002.png", read_labels(masks / "two" / "00002.png"))
    assert main(line) == 2
    (masks / "one" / "00002.png").unlink()
    assert main(line) == 2


def test_errors(videos, tmp_path, capsys):
    line = ["davis", *SMALL, "--data_path"]
    assert main([*line, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "val.txt" in error and "Annotations/480p/<sequence>/*.png" in error
    (tmp_path / "ImageSets" / "2017").mkdir(parents=True)
    (tmp_path / "ImageSets" / "2017" / "val.txt").write_text("one\n")
    assert main([*line, str(tmp_path)]) == 2
    assert "sequence one has 0 frames" in capsys.readouterr().err
    (tmp_path / "JPEGImages").symlink_to(videos / "JPEGImages")
    assert main([*line, str(tmp_path)]) == 2
    assert "5 of 5 masks of one are missing" in capsys.readouterr().err
    assert main([*line, str(videos), "--n_last_frames", "-1"]) == 2
    assert "--n_last_frames" in capsys.readouterr().err
    assert main([*line, str(videos), "--short_side", "8", "--output_dir", str(tmp_path)]) == 2
    assert "--short_side 8" in capsys.readouterr().err
