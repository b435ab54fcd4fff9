"""Decoding: every format as Pillow does it, and the list of what cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from fastdino.data.decoding import ImageSource, Listing
from fastdino.data.manifest import Manifest


def save_formats(root: Path) -> list[str]:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (3, 4, 4), dtype=np.uint8), "RGBA")
    rgba = small.resize((40, 30), Image.Resampling.BICUBIC)
    rgb, gray = rgba.convert("RGB"), rgba.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = rgb.quantize(17)
    transparent = rgb.quantize(17)
    transparent.info["transparency"] = 3
    images = {
        "rgb.jpg": (rgb, {}),
        "rgb444.jpg": (rgb, {"subsampling": 0, "quality": 95}),
        "progressive.jpg": (rgb, {"progressive": True}),
        "gray.jpg": (gray, {}),
        "cmyk.jpg": (rgb.convert("CMYK"), {}),
        "exif.jpg": (rgb, {"exif": exif}),
        "rgb.png": (rgb, {}),
        "rgba.png": (rgba, {}),
        "gray.png": (gray, {}),
        "gray_alpha.png": (rgba.convert("LA"), {}),
        "bilevel.png": (gray.convert("1"), {}),
        "palette.png": (palette, {}),
        "transparent_palette.png": (transparent, {"transparency": 3}),
        "lossy.webp": (rgb, {}),
        "lossless.webp": (rgb, {"lossless": True}),
        "alpha.webp": (rgba, {"lossless": True, "exact": True}),
        "rgb.bmp": (rgb, {}),
        "rgb.tif": (rgb, {}),
        "rgb.ppm": (rgb, {}),
        "gray.pgm": (gray, {}),
        "dot.png": (rgb.crop((0, 0, 1, 1)), {}),
        "line.jpg": (rgb.crop((0, 0, 40, 1)), {}),
    }
    for name, (image, options) in images.items():
        image.save(root / name, **options)
    return [str(root / name) for name in images]


def test_every_format_is_decoded_as_pillow_does(tmp_path):
    paths = save_formats(tmp_path)
    source = ImageSource(Manifest(paths, None, [], ""), lambda index: np.arange(len(paths)), len(paths), 2)
    for path, image in zip(paths, source.next()[0], strict=True):
        np.testing.assert_array_equal(image, np.asarray(Image.open(path).convert("RGB")), err_msg=path)


def test_16_bit_gray_is_scaled_to_8_bit(tmp_path):
    """Where Pillow's own conversion would saturate everything above 255."""
    values = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    Image.fromarray(values).save(tmp_path / "a.png")
    source = ImageSource(Manifest([str(tmp_path / "a.png")], None, [], ""), lambda index: np.arange(1), 1, 1)
    ((image,), _) = source.next()
    assert np.abs(image - (values / 257)[..., None]).max() <= 1


def test_a_listing_is_added_to_by_several_and_read_once(tmp_path):
    """Each line is there once, in the order of the first who wrote it."""
    file = tmp_path / "bad.txt"
    file.write_text("from prescan: empty file\n")
    one, two = Listing(file), Listing(file)
    for listing, text in (
        (one, "é: a"),
        (two, "b: b"),
        (two, "é: a"),
        (one, "b: b"),
        (one, "é: a"),
        (one, "c"),
    ):
        listing.add(text)
    two.add("from prescan: empty file")
    assert file.read_text("utf-8").splitlines() == ["from prescan: empty file", "é: a", "b: b", "c"]
    file.write_bytes(file.read_bytes().replace(b"prescan", b"someone"))
    one.add("from prescan: empty file")  # was read before, and is not again
    assert len(file.read_text("utf-8").splitlines()) == 4
