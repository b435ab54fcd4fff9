"""Outlines worked out by hand, and what a contact sheet has to show."""

from __future__ import annotations

import numpy as np
import pytest

from fastdino.evaluation import sheets


def test_rim_of_a_known_region():
    region = np.array(
        [
            [0, 0, 0, 0, 0, 0],
            [0, 1, 1, 1, 1, 0],
            [0, 1, 1, 1, 1, 0],
            [0, 1, 1, 1, 1, 0],
            [0, 0, 0, 0, 0, 0],
        ],
        bool,
    )
    expected = region.copy()
    expected[2, 2:4] = False
    assert (sheets.rim(region) == expected).all()
    assert (sheets.rim(region, 2) == region).all()
    # at the edge of the picture the outline is closed
    whole = np.ones((3, 4), bool)
    assert sheets.rim(whole).sum() == 10 and not sheets.rim(whole)[1, 1:3].any()


def test_outline_is_drawn_inside_with_a_shadow_outside():
    pixels = np.full((5, 5, 3), 90, np.uint8)
    region = np.zeros((5, 5), bool)
    region[1:4, 1:4] = True
    shown = sheets.outlined(pixels, region, (1, 2, 3), 1)
    assert (shown[1, 1:4] == (1, 2, 3)).all() and (shown[2, 2] == 90).all()
    assert (shown[0, 1:4] == 30).all() and (shown[0, 0] == 90).all()
    assert (pixels == 90).all()


def test_contact_sheet_keeps_the_order_and_cuts_long_captions():
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    cells = [sheets.Cell(np.full((4, 4, 3), color, np.uint8), "x" * 500) for color in colors]
    sheet = np.asarray(sheets.contact_sheet([[cells[0], cells[1]], [None, cells[2]]], "title", side=40))
    found = [np.argwhere((sheet == color).all(-1)) for color in colors]
    assert [len(places) for places in found] == [1600, 1600, 1600]
    (y0, x0), (y1, x1), (y2, x2) = (places[0] for places in found)
    assert y0 == y1 < y2 and x0 < x1 == x2
    # nothing of the long captions lies right of the pictures' column
    assert (sheet[y0:, x1 + 40 :] == sheets.BACKGROUND).all()
    with pytest.raises(ValueError, match="cell"):
        sheets.contact_sheet([[None]], "title")
