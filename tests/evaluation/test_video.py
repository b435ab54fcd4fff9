"""Frames survive being written and read, in every format; what is missing or no video is said."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from PIL import Image

from fastdino.evaluation.video import Clip, write_video


def frames(count=5, size=(24, 32)):
    """Dark frames with a bright column that moves."""
    out = [np.full((*size, 3), 20, np.uint8) for _ in range(count)]
    for i, frame in enumerate(out):
        frame[:, 6 * i : 6 * i + 6] = 230
    return out


def column(frame):
    return int(np.asarray(frame, float).sum((0, 2)).argmax()) // 6


@pytest.mark.parametrize("kind", ["mp4", "avi", "gif", "frames"])
def test_round_trip(tmp_path, kind):
    if kind in ("mp4", "avi"):
        pytest.importorskip("av")
    path = tmp_path / "deep" / ("clip" if kind == "frames" else f"clip.{kind}")
    assert write_video(iter(frames()), path, 10) == 5
    clip = Clip(path)
    assert clip.frames == 5 and (clip.fps is None if kind == "frames" else clip.fps == pytest.approx(10))
    for _ in range(2):  # a clip can be read again
        seen = list(clip)
        assert [column(frame) for frame in seen] == [0, 1, 2, 3, 4]
        assert {frame.size for frame in seen} == {(32, 24)}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_odd_sizes_are_padded_for_h264(tmp_path):
    pytest.importorskip("av")
    write_video(frames(2, (23, 31)), tmp_path / "clip.mp4", 29.97)
    assert next(iter(Clip(tmp_path / "clip.mp4"))).size == (32, 24)
    assert Clip(tmp_path / "clip.mp4").fps == pytest.approx(29.97, abs=1e-3)


def test_frames_of_a_folder_are_in_the_order_of_their_numbers(tmp_path):
    for i in (10, 9, 1):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"frame{i}.png")
    assert [frame.getpixel((0, 0))[0] for frame in Clip(tmp_path)] == [1, 9, 10]


def test_nothing_is_left_of_a_video_that_fails(tmp_path):
    def broken():
        yield frames()[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_video(broken(), tmp_path / "clip.gif", 10)
    assert write_video([], tmp_path / "clip.gif", 10) == 0
    assert not list(tmp_path.iterdir())


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="absent.mp4"):
        Clip(tmp_path / "absent.mp4")
    with pytest.raises(ValueError, match="--fps"):
        write_video(frames(), tmp_path / "clip.gif", 0)
    with pytest.raises(ValueError, match="clip.xyz"):
        write_video(frames(), tmp_path / "clip.xyz", 10)
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "text.gif").write_text("no video")
    with pytest.raises(ValueError, match="text.gif"):
        Clip(tmp_path / "text.gif")
    if "av" in sys.modules or pytest.importorskip("av"):
        with pytest.raises(ValueError, match="text.mp4"):
            Clip(tmp_path / "text.mp4")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=r"fastdino\[video\]"):
        Clip(tmp_path / "text.mp4")
