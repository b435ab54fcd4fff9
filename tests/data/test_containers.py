"""Containers: what is found in them, in which files, and what is said where nothing is."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdino.data import containers
from fastdino.data.containers import find
from fastdino.data.formats import tfrecord
from fastdino.data.formats.window import Malformed
from fastdino.data.manifest import build_manifest
from fastdino.data.samples import Member, read

KINDS = {"tar": "a.tar", "tfrecord": "a.tfrecord", "recordio": "a.rec", "lmdb": "a_lmdb"}


def jpeg(seed: int, size: tuple[int, int] = (20, 16)) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


IMAGES = [jpeg(i) for i in range(5)]
LABELS = [3, 0, 1, 3, 200]


def tar_of(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            file.addfile(header, io.BytesIO(content))
    return path


# ---------------------------------------------------------------------------------------------- what is found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [None, LABELS])
def test_every_image_is_read_as_it_was_written(writers, tmp_path, kind, labels):
    path = getattr(writers, kind)(tmp_path / KINDS[kind], IMAGES, labels)
    manifest = build_manifest(path)
    assert [read(name) for name in manifest.paths] == IMAGES
    if labels is None and kind != "recordio":  # which has a label in every header
        assert manifest.labels is None and manifest.class_names == []
    elif labels is not None:
        assert manifest.labels.tolist() == labels and manifest.labels.dtype == np.int64
        assert manifest.class_names == [str(i) for i in range(201)]
    part = manifest.subset(np.array([4, 1]))
    assert [read(name) for name in part.paths] == [IMAGES[4], IMAGES[1]]


@pytest.mark.parametrize("kind", ["tar", "tfrecord", "recordio"])
def test_several_shards_by_folder_and_pattern(writers, tmp_path, kind):
    suffix = KINDS[kind][1:]
    for i, chunk in enumerate((IMAGES[:2], IMAGES[2:3], IMAGES[3:])):
        getattr(writers, kind)(tmp_path / f"s-{i:03}{suffix}", chunk, LABELS[: len(chunk)])
    whole = build_manifest(tmp_path)
    assert [read(name) for name in whole.paths] == IMAGES
    for pattern in (f"s-{{000..002}}{suffix}", f"s-*{suffix}", f"s-00{{0,1,2}}{suffix}", f"s-00?{suffix}"):
        assert build_manifest(tmp_path / pattern).paths == whole.paths
    two = build_manifest(tmp_path / f"s-{{001..002}}{suffix}")
    assert [read(name) for name in two.paths] == IMAGES[2:]
    with pytest.raises(FileNotFoundError, match=r"--data_path: 2 of the 5 shards .*; the first .*s-003"):
        build_manifest(tmp_path / f"s-{{000..004}}{suffix}")


def test_members_behave_like_paths(writers, tmp_path):
    manifest = build_manifest(writers.tar(tmp_path / "a.tar", IMAGES))
    member = manifest.paths[1]
    assert isinstance(member, Member) and member == f"{tmp_path}/a.tar/0001.jpg"
    assert os.path.basename(member) == "0001.jpg" and [*manifest.paths][1] == member
    assert manifest.paths[1:3] == [member, manifest.paths[2]] and manifest.paths[-1] == manifest.paths[4]
    with pytest.raises(NotADirectoryError):
        open(member)
    import pickle

    assert read(pickle.loads(pickle.dumps(member))) == IMAGES[1]


def test_dali_reads_the_same_bytes(writers, tmp_path):
    """The containers of these tests are what the formats' own readers take."""
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali import tfrecord as tf

    tar = writers.tar(tmp_path / "a.tar", IMAGES, LABELS)
    rec = writers.recordio(tmp_path / "a.rec", IMAGES, LABELS)
    record = writers.tfrecord(tmp_path / "a.tfrecord", IMAGES, LABELS)
    offset, lines = 0, []
    for size in _record_sizes(record.read_bytes()):
        lines.append(f"{offset} {size}\n")
        offset += size
    (tmp_path / "a.idx2").write_text("".join(lines))

    @pipeline_def(batch_size=5, num_threads=1, device_id=None)
    def graph():
        features = {
            "image/encoded": tf.FixedLenFeature((), tf.string, ""),
            "image/class/label": tf.FixedLenFeature([1], tf.int64, -1),
        }
        image, label = fn.readers.mxnet(path=[str(rec)], index_path=[str(rec.with_suffix(".idx"))])
        found = fn.readers.tfrecord(
            path=[str(record)], index_path=[str(tmp_path / "a.idx2")], features=features
        )
        member, text = fn.readers.webdataset(
            paths=[str(tar)], ext=["jpg", "cls"], missing_component_behavior="error"
        )
        return image, label, found["image/encoded"], found["image/class/label"], member, text

    outputs = graph().run()
    for images in (outputs[0], outputs[2], outputs[4]):
        assert [bytes(np.asarray(image)) for image in images] == IMAGES
    for labels in (outputs[1], outputs[3]):
        assert [int(np.asarray(label).item()) for label in labels] == LABELS
    assert [int(bytes(np.asarray(text))) for text in outputs[5]] == LABELS
    for path in (tar, rec, record):
        assert build_manifest(path).labels.tolist() == LABELS


def _record_sizes(content: bytes) -> list[int]:
    sizes, position = [], 0
    while position < len(content):
        sizes.append(struct.unpack_from("<Q", content, position)[0] + 16)
        position += sizes[-1]
    return sizes


def test_the_checksum_is_castagnolis():
    assert tfrecord.crc32c(b"123456789") == 0xE3069283  # the check value of RFC 3720


def test_recordio_in_parts_and_without_its_idx(writers, tmp_path):
    magic = struct.pack("<I", 0xCED7230A)
    tricky = [IMAGES[0] + bytes(-len(IMAGES[0]) % 4) + magic + b"abc" + magic, magic + magic, IMAGES[1]]
    path = writers.recordio(tmp_path / "a.rec", tricky, [1, 2, 3])
    with_idx = build_manifest(path)
    (tmp_path / "a.idx").unlink()
    without = build_manifest(tmp_path / "*.rec")
    for manifest in (with_idx, without):
        assert [read(name) for name in manifest.paths] == tricky and manifest.labels.tolist() == [1, 2, 3]


def test_recordio_with_several_labels_and_a_record_of_labels_alone(tmp_path):
    def record(flag: int, label: float, content: bytes) -> bytes:
        body = struct.pack("<IfQQ", flag, label, 0, 0) + content
        return struct.pack("<II", 0xCED7230A, len(body)) + body + bytes(-len(body) % 4)

    labels = struct.pack("<ff", 7.0, 9.0)
    (tmp_path / "a.rec").write_bytes(record(2, 0.0, labels) + record(2, 0.0, labels + IMAGES[0]))
    manifest = build_manifest(tmp_path / "a.rec")
    assert [read(name) for name in manifest.paths] == [IMAGES[0]] and manifest.labels.tolist() == [7]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_webdataset_members_labels_and_what_is_passed_over(tmp_path, form):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=form) as file:

        def add(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            header = tarfile.TarInfo(name)
            header.size, header.type, header.linkname = len(content), kind, link
            file.addfile(header, io.BytesIO(content))

        add("x/" + "long" * 60 + ".JPG", IMAGES[0])
        add("x/" + "long" * 60 + ".cls", b" cat\n")
        add("été.png", IMAGES[1])
        add("été.json", json.dumps({"label": "dog", "label2": 3}).encode())
        add("b.json", b'{"label": "x"}')
        add("b.cls", b"cat")
        add("b.seg.png", IMAGES[2])
        add("b.webp", IMAGES[2])
        add("b.txt", b"caption")
        add("._b.jpg", b"mac")
        add("../../up.jpg", IMAGES[3])
        add("../../up.cls", b"dog")
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            add("link.jpg", kind=kind, link="/etc/passwd")
    manifest = build_manifest(path)
    assert [read(name) for name in manifest.paths] == IMAGES[:4]
    assert manifest.class_names == ["cat", "dog"] and manifest.labels.tolist() == [0, 1, 0, 1]
    assert manifest.paths[1].endswith("a.tar/été.png")


@pytest.mark.parametrize("kind", ["old", "pax"])
def test_sparse_members_are_passed_over_though_they_claim_more_than_the_file_holds(tmp_path, kind):
    """512 bytes are there, of a mebibyte."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as file:
        if kind == "pax":
            sparse = tarfile.TarInfo("hole.jpg")
            sparse.pax_headers = {"GNU.sparse.size": str(1 << 20), "GNU.sparse.map": "0,512"}
            sparse.size = 512
            file.addfile(sparse, io.BytesIO(bytes(512)))
        else:
            header = bytearray(tarfile.TarInfo("hole.jpg").tobuf(tarfile.GNU_FORMAT))
            header[124:136], header[156:157] = b"%011o\0" % 512, tarfile.GNUTYPE_SPARSE
            header[386:410] = b"%011o\0" % 0 + b"%011o\0" % 512
            header[483:495] = b"%011o\0" % (1 << 20)
            header[148:156] = b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            file.fileobj.write(bytes(header) + bytes(512))
            file.offset += 1024
        image = tarfile.TarInfo("b.jpg")
        image.size = len(IMAGES[0])
        file.addfile(image, io.BytesIO(IMAGES[0]))
    with tarfile.open(path) as file:
        assert file.getmembers()[0].issparse() and file.getmembers()[0].size == 1 << 20
    assert [read(name) for name in build_manifest(path).paths] == [IMAGES[0]]


def test_lmdb_values_without_an_image_are_named(writers, tmp_path, caplog):
    import lmdb

    path = writers.lmdb(tmp_path / "db", IMAGES)
    with lmdb.open(str(path), map_size=1 << 24) as database, database.begin(write=True) as transaction:
        transaction.put(b"__len__", b"5")
        transaction.put(b"\0bin\xff", IMAGES[0])
    manifest = build_manifest(path)
    assert [read(name) for name in manifest.paths] == [IMAGES[0], *IMAGES]
    assert "passed over 1 values that hold no encoded image, the first one at key b'__len__'" in caplog.text
    assert build_manifest(path / "data.mdb").paths == manifest.paths
    bare = bytes([1 << 3, 3, 2 << 3, 2, 3 << 3, 2, 4 << 3 | 2, 12]) + bytes(12)
    with lmdb.open(str(tmp_path / "raw"), map_size=1 << 20) as database, database.begin(write=True) as change:
        change.put(b"0", bare)
    with pytest.raises(Malformed, match=r"key b'0': expected an encoded image, got a Datum of bare pixels"):
        build_manifest(tmp_path / "raw")


# ------------------------------------------------------------------------------------------------ which files


def test_what_counts_as_a_container(writers, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    writers.tar(folder / "a.tar", IMAGES)
    assert find(str(folder)) == ("tar", [str(folder / "a.tar")])
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden").mkdir()
    assert find(str(folder)) is not None
    (folder / "class").mkdir()  # class folders with an archive beside them stay class folders
    (folder / "class/a.jpg").write_bytes(IMAGES[0])
    assert find(str(folder)) is None and len(build_manifest(folder)) == 1
    for name in ("train-00000-of-00002", "x.tfrecord-00001-of-00002", "a.TFRECORDS"):
        assert containers.kind_of(name) == "tfrecord"
    assert containers.kind_of("list.txt") is None and containers.kind_of("tar") is None


def test_shards_that_do_not_belong_together_are_refused(writers, tmp_path, monkeypatch):
    writers.tar(tmp_path / "train-000.tar", IMAGES)
    writers.tar(tmp_path / "val-000.tar", IMAGES)
    with pytest.raises(ValueError, match=r"--data_path: .* holds shards of train, val: expected one of them"):
        build_manifest(tmp_path)
    assert len(build_manifest(tmp_path / "train-*")) == 5
    writers.recordio(tmp_path / "train-001.rec", IMAGES)
    with pytest.raises(ValueError, match="expected shards of one kind .*, found recordio, tar"):
        build_manifest(tmp_path / "train-*[ct]*")
    with pytest.raises(ValueError, match=r"expected shards of one kind .*, found other files"):
        build_manifest(tmp_path / "*.idx")
    with pytest.raises(FileNotFoundError, match="--data_path: 0 of the 0 shards"):
        build_manifest(tmp_path / "nothing-*.tar")
    with pytest.raises(ValueError, match="expected 1 to 1000000 shards, got 1000000001 from {0..1000000000}"):
        build_manifest(tmp_path / "{0..1000000000}.tar")
    monkeypatch.setattr(containers, "MAX_SHARDS", 50)
    with pytest.raises(ValueError, match="expected at most 50 shards"):
        build_manifest(tmp_path / "{0..9}{0..9}.tar")


@pytest.mark.parametrize(
    ("labels", "class_names", "expected"),
    [
        (["dog", "cat"], ["cat", "dog"], [1, 0]),
        (["10", "9"], [str(i) for i in range(11)], [10, 9]),
        (["5000000", "123456789"], ["5000000", "123456789"], [0, 1]),
        (["-1", "-2"], ["-2", "-1"], [1, 0]),
    ],
)
def test_labels(tmp_path, labels, class_names, expected):
    members = {f"{i}.jpg": IMAGES[i] for i in range(2)} | {f"{i}.cls": labels[i].encode() for i in range(2)}
    manifest = build_manifest(tar_of(tmp_path / "a.tar", members))
    assert manifest.class_names == class_names and manifest.labels.tolist() == expected


def test_names_of_classes_beside_the_shards(writers, tmp_path):
    writers.tar(tmp_path / "a.tar", IMAGES[:2], [1, 0])
    (tmp_path / "classes.txt").write_text("cat\nold dog\n\u00e9\n")
    assert build_manifest(tmp_path).class_names == ["cat", "old dog", "é"]


def test_labels_on_some_images_only_are_refused(tmp_path):
    path = tar_of(tmp_path / "a.tar", {"0.jpg": IMAGES[0], "0.cls": b"1", "1.jpg": IMAGES[1]})
    with pytest.raises(
        ValueError, match=r"expected a label for every image or for none, got none for .*1\.jpg"
    ):
        build_manifest(path)


@pytest.mark.parametrize("kind", KINDS)
def test_no_image_in_the_shards_is_an_error(writers, tmp_path, kind):
    path = getattr(writers, kind)(tmp_path / KINDS[kind], [])
    with pytest.raises(ValueError, match="--data_path: no images in the 1 shards of .*; expected "):
        build_manifest(path)
