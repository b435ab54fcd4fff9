"""Feature extraction: the official view of an image to the bit, order, modes, errors that name the file,
features in a file, and several processes.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastdino_kernels import csrc
from PIL import Image

from fastdino.data import prescan
from fastdino.engine import parallel
from fastdino.engine.parallel import World
from fastdino.evaluation import feature_file, features
from fastdino.evaluation.feature_file import digest_of_images, digest_of_weights, load_mapped
from fastdino.evaluation.features import (
    center_crop,
    extract_features,
    normalize,
    raw_pixel_features,
    read_image,
    read_pixels,
    share,
    view,
)
from fastdino.models import VisionTransformer
from runs import free_port, place, spawn


class Mean(torch.nn.Module):
    """Mean colour of the image, with a part that was in eval mode before and must be afterwards."""

    def __init__(self):
        super().__init__()
        self.frozen = torch.nn.BatchNorm2d(3)
        self.live = torch.nn.Dropout(0.5)

    def forward(self, x):
        assert not self.training and not self.live.training
        return self.live(x).mean((2, 3))


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    paths = []
    for i in range(11):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (20 + i, 31 - i, 3), dtype=np.uint8)).save(paths[-1])
    return paths


@pytest.mark.parametrize("batch_size, threads", [(1, 1), (4, 2), (100, 0)])
def test_features_in_order_whatever_the_batches(files, batch_size, threads):
    seen = []
    features = extract_features(
        Mean(),
        files,
        image_size=16,
        batch_size=batch_size,
        num_threads=threads,
        progress=lambda done, total: seen.append((done, total)),
    )
    expected = torch.cat(
        [normalize(torch.from_numpy(center_crop(Image.open(p), 16))[None]).mean((2, 3)) for p in files]
    )
    assert torch.equal(features, expected)
    assert seen[-1] == (11, 11) and len(seen) == -(-11 // batch_size)


@pytest.mark.parametrize("width, height", [(300, 200), (200, 301), (224, 224), (50, 500)])
def test_view_is_resize_then_center_crop(width, height):
    rng = np.random.default_rng(1)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    shorter = min(width, height)
    new = (256 * width // shorter, 256 * height // shorter)
    whole = np.asarray(image.resize(new, Image.Resampling.BICUBIC))
    top, left = round((new[1] - 224) / 2), round((new[0] - 224) / 2)
    assert np.array_equal(center_crop(image, 224), whole[top : top + 224, left : left + 224])


def photo(rng, width, height):
    small = Image.fromarray(rng.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize(
    "name, mode, options",
    [
        ("4:2:0.jpg", "RGB", {"quality": 85}),
        ("4:4:4.JPEG", "RGB", {"quality": 95, "subsampling": 0}),
        ("progressive.jpg", "RGB", {"progressive": True}),
        ("gray.jpg", "L", {}),
        ("cmyk.jpg", "CMYK", {}),
        ("palette.png", "P", {}),
        ("alpha.png", "RGBA", {}),
        ("a photo.bmp", "RGB", {}),
    ],
)
def test_view_equals_pillow_to_the_bit(name, mode, options, library, tmp_path, monkeypatch):
    rng = np.random.default_rng(len(name))
    for i, (width, height) in enumerate([(500, 375), (333, 500), (40, 30)]):
        path = tmp_path / f"{i} {name}"
        image = photo(rng, width, height).convert(mode)
        image.save(path, **options)
        with Image.open(path) as stored:
            expected = center_crop(stored.convert("RGB"), 112)
        if not library:
            monkeypatch.setattr(csrc, "library", lambda: None)
        pixels, floats = torch.zeros(3, 112, 112, dtype=torch.uint8), torch.zeros(3, 112, 112)
        view(path, pixels)
        view(path, floats)
        difference = pixels.permute(1, 2, 0).numpy().astype(int) - expected
        assert int(np.abs(difference).max()) == 0
        assert torch.equal(floats, normalize(torch.from_numpy(expected)[None])[0])


@pytest.mark.parametrize(("name", "dtype"), [("grey.png", np.uint16), ("grey.tif", np.float32)])
def test_grey_of_many_bits_is_what_training_sees(name, dtype, tmp_path):
    ramp = np.linspace(0, 65535 if dtype == np.uint16 else 1, 40 * 30).reshape(30, 40).astype(dtype)
    Image.fromarray(ramp).save(tmp_path / name)
    pixels = read_pixels(tmp_path / name)
    assert np.array_equal(pixels, prescan.decode(str(tmp_path / name)))
    assert pixels.shape == (30, 40, 3) and 120 < pixels.mean() < 135 and pixels.std() > 60


def test_nvimagecodec_decodes_jpegs_and_pillow_what_it_refuses(tmp_path, monkeypatch):
    photo(np.random.default_rng(0), 50, 40).save(tmp_path / "a.jpg")
    photo(np.random.default_rng(1), 50, 40).save(tmp_path / "gif.jpg", format="gif")
    expected = [np.asarray(read_image(tmp_path / name)) for name in ("a.jpg", "gif.jpg")]

    def by_pillow(path):
        opened.append(path.name)
        return read_image(path)

    opened: list[str] = []
    monkeypatch.setattr(features, "read_image", by_pillow)
    found = [read_pixels(tmp_path / name) for name in ("a.jpg", "gif.jpg")]
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert opened == (["gif.jpg"] if features._nvimgcodec_there() else ["a.jpg", "gif.jpg"])
    monkeypatch.setattr(features, "_nvimgcodec_there", lambda: False)
    assert np.array_equal(read_pixels(tmp_path / "a.jpg"), expected[0]) and opened[-1] == "a.jpg"


def test_normalize_uses_imagenet_statistics():
    x = normalize(torch.tensor([[[[255, 0, 128]]]], dtype=torch.uint8))
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, (128 / 255 - 0.406) / 0.225]
    assert x.shape == (1, 3, 1, 1) and x.flatten().tolist() == pytest.approx(expected)


def test_modes_come_back_even_after_an_error(files, tmp_path):
    model = Mean()
    model.frozen.eval()
    (tmp_path / "broken.jpg").write_bytes(b"not an image")
    for paths in (files, [*files, tmp_path / "broken.jpg"]):
        try:
            extract_features(model, paths, image_size=16, batch_size=4)
        except ValueError:
            pass
        assert model.training and model.live.training and not model.frozen.training


def test_errors_name_the_file(files, tmp_path):
    truncated = tmp_path / "half.png"
    truncated.write_bytes(files[0].read_bytes()[:200])
    for bad in (truncated, tmp_path / "nowhere.png"):
        with pytest.raises((ValueError, FileNotFoundError), match=bad.name):
            extract_features(Mean(), [*files, bad], image_size=16, batch_size=4)
    with pytest.raises(ValueError, match="3.png is not finite"):
        extract_features(Poisoned(), files, image_size=16, batch_size=2)
    with pytest.raises(ValueError, match="empty"):
        extract_features(Mean(), [])


class Poisoned(torch.nn.Module):
    """Gives NaN for the fourth image it sees."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def forward(self, x):
        out = x.mean((2, 3))
        for row in out:
            self.count += 1
            if self.count == 4:
                row.fill_(float("nan"))
        return out


def test_raw_pixels(files):
    features = raw_pixel_features(files, 8)
    assert features.shape == (11, 192)
    assert torch.equal(
        features[3], normalize(torch.from_numpy(center_crop(Image.open(files[3]), 8))[None]).flatten()
    )


def test_features_may_be_trained_on_and_are_normalised_on_demand(files):
    plain = extract_features(Mean(), files, image_size=16, batch_size=4)
    assert not plain.is_inference()
    unit = extract_features(Mean(), files, image_size=16, batch_size=4, normalized=True)
    assert torch.equal(unit, torch.nn.functional.normalize(plain, dim=1))


def test_without_the_library_and_in_16_bits(files, monkeypatch):
    torch.manual_seed(0)
    vit = VisionTransformer(img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=2)
    exact = extract_features(vit, files, image_size=16, batch_size=4)
    half = extract_features(vit, files, image_size=16, batch_size=4, dtype=torch.bfloat16)
    assert half.dtype == torch.float32 and not torch.equal(half, exact)
    assert torch.allclose(half, exact, atol=0.1)
    monkeypatch.setattr(csrc, "library", lambda: None)
    assert torch.equal(extract_features(vit, files, image_size=16, batch_size=4), exact)


# --------------------------------------------------------------------------------------- features in a file


class Counting(Mean):
    """Counts the images it sees, and stops the run at a number of them."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.images, self.stop_at = 0, stop_at

    def forward(self, x):
        if self.stop_at is not None and self.images + len(x) > self.stop_at:
            raise KeyboardInterrupt
        self.images += len(x)
        return super().forward(x)


def stored(model, files, path, **changes):
    return extract_features(model, files, **{"image_size": 16, "batch_size": 2, "file": path, **changes})


def test_file_is_one_that_torch_load_reads(files, tmp_path):
    path = tmp_path / "new folder" / "feat.pth"
    expected = extract_features(Mean(), files, image_size=16, batch_size=2)
    found = stored(Mean(), files, path)
    assert torch.equal(found, expected) and not found.is_inference()
    assert torch.equal(torch.load(path, weights_only=True), expected)
    assert torch.equal(torch.load(path, weights_only=True, mmap=True), expected)
    assert sorted(os.listdir(path.parent)) == ["feat.pth", "feat.pth.json"]


def test_interrupted_run_continues_and_finished_one_is_not_done_again(files, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_file, "SECONDS", 0.0)
    path, seen = tmp_path / "feat.pth", []
    with pytest.raises(KeyboardInterrupt):
        stored(Counting(stop_at=7), files, path)
    assert not path.exists()
    model = Counting()
    found = stored(model, files, path, progress=lambda *done: seen.append(done))
    # the last batch of the first run was on its way; one image more tells how wide features are
    assert model.images == 11 - 4 + 1 and seen[0] == (6, 11) and seen[-1] == (11, 11)
    assert torch.equal(found, extract_features(Mean(), files, image_size=16))
    again = Counting()
    assert torch.equal(stored(again, files, path), found) and again.images == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"image_size": 8},
        {"dtype": torch.bfloat16},
        {"normalized": True},
        {"batch_size": 3},
        "weights",
        "list",
    ],
)
def test_file_of_something_else_is_begun_anew(files, tmp_path, changes):
    path = tmp_path / "feat.pth"
    stored(Counting(), files, path)
    model, settings = Counting(), changes if isinstance(changes, dict) else {}
    if changes == "weights":
        model.frozen.running_mean += 1
    chosen = files[::-1] if changes == "list" else files
    found = stored(model, chosen, path, **settings)
    assert model.images == 12
    settings = {"image_size": 16, "batch_size": 2, **settings}
    assert torch.equal(found, extract_features(Counting(), chosen, **settings))


def test_unfinished_file_of_something_else_leaves_the_old_one_until_it_is_done(files, tmp_path):
    path = tmp_path / "feat.pth"
    old = stored(Counting(), files, path)
    with pytest.raises(KeyboardInterrupt):
        stored(Counting(stop_at=5), files, path, image_size=8)
    assert torch.equal(load_mapped(path), old)
    (tmp_path / "feat.pth.json").write_text("{")  # damaged: begun anew
    model = Counting()
    found = stored(model, files, path, image_size=8)
    assert model.images == 12 and torch.equal(found, extract_features(Mean(), files, image_size=8))


def test_digest_of_images(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes(b"12")
    monkeypatch.chdir(tmp_path / "a")
    first = digest_of_images(["x.png"], [0])
    assert first == digest_of_images([tmp_path / "a" / "x.png"], [0])
    assert first != digest_of_images(["x.png"], [1])
    monkeypatch.chdir(tmp_path / "b")
    assert first != digest_of_images(["x.png"], [0])
    monkeypatch.chdir(tmp_path / "a")
    os.utime("x.png", (1e9, 1e9))
    assert first != digest_of_images(["x.png"], [0])


def test_digest_of_weights():
    models = [torch.nn.Linear(2, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    assert digest_of_weights(models[0]) == digest_of_weights(models[1])
    models[1].weight.data[0, 0] += 1e-6
    assert digest_of_weights(models[0]) != digest_of_weights(models[1])
    assert digest_of_weights(torch.nn.ReLU()) != digest_of_weights(torch.nn.GELU())


def test_load_mapped_refuses_what_holds_no_tensor(tmp_path):
    path = tmp_path / "x.pth"
    torch.save(torch.ones(2, 3), path, _use_new_zipfile_serialization=False)
    assert load_mapped(path).shape == (2, 3)
    for content in ({"a": 1}, None):
        if content is None:
            path.write_bytes(b"text")
        else:
            torch.save(content, path)
        with pytest.raises(ValueError, match="x.pth does not hold a tensor"):
            load_mapped(path)


# ---------------------------------------------------------------------------------------- several processes


@pytest.mark.parametrize("n, batch, size", [(11, 2, 2), (11, 4, 3), (1, 5, 3), (12, 3, 4)])
def test_shares_are_whole_batches_in_order(n, batch, size):
    world = World(0, size, torch.device("cpu"))
    shares = [share(n, batch, replace(world, rank=rank)) for rank in range(size)]
    covered = [i for part in shares for i in range(part.start, part.stop)]
    assert covered == list(range(n))
    assert all(part.start % batch == 0 or part.start == n for part in shares)
    lengths = [part.stop - part.start for part in shares]
    assert max(lengths) - min(lengths) <= batch + batch - 1
    assert share(n, batch, None) == slice(0, n)


def network():
    torch.manual_seed(0)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)


def one_of_two(rank, port, paths, folder):
    place(rank, 2, port)
    torch.set_num_threads(1)
    settings = {"image_size": 32, "batch_size": 3, "num_threads": 1, "world": parallel.start("cpu")}
    vit = network()
    found = [extract_features(vit, paths, **settings)]
    found.append(extract_features(vit, paths, file=folder / "feat.pth", **settings))
    found.append(extract_features(vit, paths[:2], **settings))  # fewer batches than processes
    torch.save(found, folder / f"{rank}.pt")
    parallel.stop()


def test_two_processes_give_the_bits_of_one(files, tmp_path, monkeypatch):
    spawn(one_of_two, (free_port(), files, tmp_path), 2)
    alone = [extract_features(network(), paths, image_size=32, batch_size=3) for paths in (files, files[:2])]
    expected = [alone[0], alone[0], alone[1]]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    key = json.loads((tmp_path / "feat.pth.json").read_text())
    assert key["rows"] == 11 and key["width"] == 64 and key["image_size"] == 32
