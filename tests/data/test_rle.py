"""Packed masks are those of COCO's own library, and what is no mask is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.scenes import random_mask, runs_of
from vitrail.data import rle

coco = pytest.importorskip("pycocotools.mask")


def packed_by_coco(mask: np.ndarray) -> bytes:
    return coco.encode(np.asfortranarray(mask, np.uint8))["counts"]


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 300))
def test_runs_are_those_of_the_mask_that_was_packed(seed, height, width):
    mask = random_mask(seed, height, width)
    packed = packed_by_coco(mask)
    assert rle.unpack(packed).tolist() == runs_of(mask)
    assert rle.from_mask(mask) == packed
    assert rle.pack(runs_of(mask), height, width) == packed
    first, part = rle.columns(packed, height)
    there = np.flatnonzero(mask.any(0))
    assert (first, first + part.shape[1]) == (there[0], there[-1] + 1)
    assert np.array_equal(part, mask[:, first : first + part.shape[1]])
    (left, top, wide, high), area = (
        coco.toBbox({"size": [height, width], "counts": packed}),
        mask.sum(),
    )
    assert rle.box_and_area(packed, height) == ((left, top, left + wide, top + high), area)


def test_runs_of_any_length_survive():
    """Up to images of 40,000 x 40,000: runs whose differences are large and of both signs."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        runs = (2.0 ** rng.uniform(0, 25, 9)).astype(int).tolist()
        packed = coco.frPyObjects({"size": [sum(runs), 1], "counts": runs}, sum(runs), 1)["counts"]
        assert rle.unpack(packed).tolist() == runs


def test_a_mask_without_a_pixel_has_no_columns():
    packed = packed_by_coco(np.zeros((4, 5), bool))
    first, part = rle.columns(packed, 4)
    assert (first, part.shape) == (0, (4, 0))
    assert rle.box_and_area(packed, 4) == ((0, 0, 0, 0), 0)
    assert rle.unpack(b"").tolist() == []


@pytest.mark.parametrize("packed", [b"\x01", b"~~", b"0P", b"P", b"0PPPPPPPP0", b"o"])
def test_what_is_no_mask_is_refused(packed):
    """Characters outside of the code, an end within a run, a run too long, a run below zero."""
    with pytest.raises(ValueError, match="is not a packed mask"):
        rle.unpack(packed)


def test_polygons_cover_what_coco_says():
    polygons = [[2, 3, 10.5, 3, 10.5, 12, 2, 12], [15, 1, 19, 1.5, 17, 8]]
    packed = coco.merge(coco.frPyObjects(polygons, 14, 21))["counts"]
    assert rle.from_polygons(polygons, 14, 21) == packed
