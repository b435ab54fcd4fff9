"""What counts as the data set, in every layout and with every oddity a folder may hold."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fastdino.data.manifest import Manifest, build_manifest, printable


def touch(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def relative(manifest: Manifest, root: Path) -> list[str]:
    return [os.path.relpath(path, root) for path in manifest.paths]


def test_class_folders_are_searched_recursively_in_the_order_of_image_folder(tmp_path):
    touch(
        tmp_path, "b/2.png", "b/1.JPG", "a/z/0.jpeg", "a/y.webp", "a/a.tif", "c/deep/er/x.bmp", "c/note.txt"
    )
    manifest = build_manifest(tmp_path)
    assert relative(manifest, tmp_path) == [
        "a/a.tif",
        "a/y.webp",
        "a/z/0.jpeg",
        "b/1.JPG",
        "b/2.png",
        "c/deep/er/x.bmp",
    ]
    assert manifest.class_names == ["a", "b", "c"]
    np.testing.assert_array_equal(manifest.labels, [0, 0, 0, 1, 1, 2])
    assert manifest.labels.dtype == np.int64 and len(manifest) == 6 and manifest.root == str(tmp_path)


def test_an_empty_class_keeps_its_number(tmp_path):
    touch(tmp_path, "a/1.jpg", "c/1.jpg")
    (tmp_path / "b").mkdir()
    manifest = build_manifest(tmp_path)
    assert manifest.class_names == ["a", "b", "c"]
    np.testing.assert_array_equal(manifest.labels, [0, 2])


def test_a_flat_folder_has_no_labels_and_is_searched_recursively(tmp_path):
    touch(tmp_path, "2.jpg", "10.jpg", "more/1.jpg")
    manifest = build_manifest(str(tmp_path))
    assert relative(manifest, tmp_path) == ["10.jpg", "2.jpg", "more/1.jpg"]
    assert manifest.labels is None and manifest.class_names == []


def test_hidden_files_pipes_and_other_endings_are_passed_over(tmp_path):
    touch(tmp_path, "a/1.jpg", "a/.2.jpg", ".hidden/3.jpg", "a/.cache/4.jpg", "a/5.gif", "a/6", "a/._7.jpg")
    os.mkfifo(tmp_path / "a/8.jpg")
    (tmp_path / "a/9.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "a/self.jpg").symlink_to("self.jpg")
    manifest = build_manifest(tmp_path)
    assert relative(manifest, tmp_path) == ["a/1.jpg"] and manifest.class_names == ["a"]


def test_pictures_that_are_not_read_and_splits_taken_for_classes_are_told(tmp_path, caplog):
    touch(tmp_path, "train/1.jpg", "train/a.HEIC", "train/b.heic", "val/2.jpg", "val/c.gif", "val/d.txt")
    caplog.set_level("WARNING", "fastdino.data.manifest")
    build_manifest(tmp_path)
    told = list(caplog.messages)
    assert told[0] == f"{tmp_path}: passed over 1 x .gif, 2 x .heic, which are not read; convert them"
    assert told[1] == f"{tmp_path}: takes train and val for classes; was {tmp_path}/train meant?"
    assert len(told) == 2
    caplog.clear()
    build_manifest(tmp_path / "val")  # a flat folder
    assert caplog.messages == [f"{tmp_path}/val: passed over 1 x .gif, which are not read; convert them"]


def test_links_are_followed_but_no_loop_and_no_folder_twice(tmp_path):
    data, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    touch(data, "a/1.jpg", "a/sub/2.jpg", "b/3.jpg")
    touch(elsewhere, "4.jpg")
    (data / "a/sub/up").symlink_to(data / "a", target_is_directory=True)
    (data / "a/root").symlink_to(data, target_is_directory=True)
    (data / "a/again").symlink_to(data / "a/sub", target_is_directory=True)
    (data / "everything").symlink_to(data, target_is_directory=True)
    (data / "c").symlink_to(elsewhere, target_is_directory=True)
    (data / "b/5.jpg").symlink_to(elsewhere / "4.jpg")
    manifest = build_manifest(data)
    found = {os.path.realpath(path) for path in manifest.paths}
    assert len(manifest) == 5 and found == {
        str(p) for p in (data / "a/1.jpg", data / "a/sub/2.jpg", data / "b/3.jpg", elsewhere / "4.jpg")
    }
    assert manifest.class_names == ["a", "b", "c"]


def test_names_of_any_bytes(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"class \xff")
    os.mkdir(folder)
    names = [b"\xe9t\xe9.jpg", "日本.jpg".encode(), b"new\nline.jpg", b" .jpg", b"tab\t.jpg"]
    for name in names:
        with open(os.path.join(folder, name), "wb") as file:
            file.write(b"x")
    manifest = build_manifest(tmp_path)
    assert {os.path.basename(os.fsencode(path)) for path in manifest.paths} == set(names)
    for path in manifest.paths:
        printable(path).encode("utf-8")
        assert printable(path).isprintable()
    assert printable("été 日本.jpg") == "été 日本.jpg"


def test_list_with_relative_and_absolute_paths(tmp_path):
    touch(tmp_path, "images/a.jpg", "images/b c.jpg", "d.dat")
    listing = tmp_path / "train.txt"
    listing.write_text(f"images/a.jpg\n\n{tmp_path}/images/b c.jpg\r\nd.dat")
    manifest = build_manifest(listing)
    assert relative(manifest, tmp_path) == ["images/a.jpg", "images/b c.jpg", "d.dat"]
    assert manifest.labels is None


@pytest.mark.parametrize(
    ("labels", "class_names", "expected"),
    [
        (["dog", "cat", "dog"], ["cat", "dog"], [1, 0, 1]),
        (["10", "9", "10"], ["9", "10"], [1, 0, 1]),
        (["2", "0", "1"], ["0", "1", "2"], [2, 0, 1]),
    ],
)
def test_list_with_labels(tmp_path, labels, class_names, expected):
    touch(tmp_path, "0.jpg", "1.jpg", "2.jpg")
    (tmp_path / "list").write_text("".join(f"{i}.jpg\t{label}\n" for i, label in enumerate(labels)))
    manifest = build_manifest(tmp_path / "list")
    assert manifest.class_names == class_names
    np.testing.assert_array_equal(manifest.labels, expected)


def test_list_of_undecodable_names(tmp_path):
    name = os.path.join(os.fsencode(tmp_path), b"\xff.jpg")
    with open(name, "wb") as file:
        file.write(b"x")
    (tmp_path / "list.txt").write_bytes(b"\xff.jpg\n")
    assert [os.fsencode(path) for path in build_manifest(tmp_path / "list.txt").paths] == [name]


@pytest.mark.parametrize("content", ["a.jpg\t1\nb.jpg\n", "a.jpg\nb.jpg\t1\n"])
def test_labels_on_some_lines_only_are_refused(tmp_path, content):
    touch(tmp_path, "a.jpg", "b.jpg")
    (tmp_path / "list.txt").write_text(content)
    with pytest.raises(ValueError, match=r"--data_path: .*list\.txt line 2: expected a tab and a label"):
        build_manifest(tmp_path / "list.txt")


def test_errors_name_the_flag_the_place_and_what_was_found(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data_path: no such file or folder: .*nowhere"):
        build_manifest(tmp_path / "nowhere")
    touch(tmp_path, "empty/a/x.gif", "empty/a/y.GIF", "empty/b/.hidden.jpg")
    with pytest.raises(
        ValueError, match=r"no images in .*empty: found 2 folders and passed over 2 x \.gif, 1 x hidden"
    ):
        build_manifest(tmp_path / "empty")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match="found 0 folders and no files; expected files ending in .jpg"):
        build_manifest(tmp_path / "bare")
    (tmp_path / "list.txt").write_text("\n \n")
    with pytest.raises(
        ValueError, match=r"--data_path: expected one image path per line, got an empty list: .*list\.txt"
    ):
        build_manifest(tmp_path / "list.txt")
    (tmp_path / "list.txt").write_text("a.jpg\nb.jpg\n")
    with pytest.raises(
        FileNotFoundError, match="none of the 2 files in the list .* exists; .*looked for at .*/a.jpg"
    ):
        build_manifest(tmp_path / "list.txt")
    touch(tmp_path, "single.jpg")
    with pytest.raises(ValueError, match="got an image: .*single.jpg"):
        build_manifest(tmp_path / "single.jpg")
    (tmp_path / "archive").write_bytes(b"PK\0\0")
    with pytest.raises(ValueError, match="got a binary file: .*archive"):
        build_manifest(tmp_path / "archive")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="got a special file: .*pipe"):
        build_manifest(tmp_path / "pipe")


def test_subset_keeps_everything_aligned():
    sizes = np.arange(8, dtype=np.int32).reshape(4, 2)
    manifest = Manifest(list("abcd"), np.array([0, 1, 0, 1]), ["x", "y"], "root", sizes)
    part = manifest.subset(np.array([3, 0]))
    assert part.paths == ["d", "a"] and part.class_names == ["x", "y"] and part.root == "root"
    np.testing.assert_array_equal(part.labels, [1, 0])
    np.testing.assert_array_equal(part.sizes, sizes[[3, 0]])
