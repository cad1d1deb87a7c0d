"""A view shows an image and its class map alike, and knows where it lies on the original."""

from fractions import Fraction
from math import ceil, floor

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors
from torchvision.transforms import v2

from vitrail.data import rle
from vitrail.data.augment import Augmentation, generator
from vitrail.data.view import NO_CLASS, View, draw_view
from vitrail_runtime.errors import InputError

COLOURS = np.array([(r, g, b) for r in (0, 255) for g in (0, 255) for b in (0, 255)], np.uint8)
AUGMENTATIONS = {
    "random_resized": Augmentation(),
    "small parts": Augmentation(scale=(0.05, 0.2)),
    "simple": Augmentation(crop="simple"),
    "simple, padded by 7": Augmentation(crop="simple", padding=7, interpolation="bilinear"),
    "simple, unpadded": Augmentation(crop="simple", padding=0),
    "whole": Augmentation(crop="whole"),
}
sides = st.integers(1, 60)
keys = st.tuples(st.integers(0, 99), st.integers(0, 9), st.integers(0, 999))


def drawn(name: str, original: tuple[int, int], size: tuple[int, int], key) -> View:
    return draw_view(*original, size, AUGMENTATIONS[name], generator(key))


def numbered(height: int, width: int) -> np.ndarray:
    """A class map that tells every pixel from its neighbours and from no class."""
    return (np.arange(height * width).reshape(height, width) * 7 % 251).astype(np.uint8)


def regions(height: int, width: int, seed: int) -> np.ndarray:
    """(height, width) of 0 to 7: a few rectangles of one class each."""
    rng = np.random.default_rng(seed)
    ids = np.full((height, width), rng.integers(8), np.uint8)
    for _ in range(5):
        top, bottom = sorted(rng.integers(0, height + 1, 2))
        left, right = sorted(rng.integers(0, width + 1, 2))
        ids[top:bottom, left:right] = rng.integers(8)
    return ids


def sources(start: Fraction, step: Fraction, count: int, full: int) -> list[set[int] | None]:
    """Which pixels of an axis each of `count` may show; two where it lies midway; None for none.

    start: where the first one begins on the axis of `full` pixels. step: how many pixels each covers.
    """
    out: list[set[int] | None] = []
    for k in range(count):
        centre = start + (k + Fraction(1, 2)) * step
        if not 0 <= centre < full:
            out.append(None)
            continue
        near = {floor(centre)} | ({int(centre) - 1} if centre.denominator == 1 else set())
        out.append({i for i in near if 0 <= i < full})
    return out


def expected_sources(view: View) -> list[list[set[int] | None]]:
    """The rows and the columns of the original that a view shows, in exact numbers, from what was drawn."""
    found = []
    if view.cut is None:
        for axis in (0, 1):
            start, length = view.crop[axis], view.crop[2 + axis]
            step = Fraction(length, view.size[axis])
            found.append(sources(Fraction(start), step, view.size[axis], view.original[axis]))
    else:
        short = max(view.size[axis] / view.original[axis] for axis in (0, 1))
        covering = [max(s, round(o * short)) for s, o in zip(view.size, view.original, strict=True)]
        long = covering[0] * covering[1] > 8 * view.size[0] * view.size[1]
        pad = max(0, min(view.padding, min(covering) - 1))
        for axis in (0, 1):
            size, full = view.size[axis], view.original[axis]
            if long:
                kept = min(full, ceil(size / short))
                start = Fraction(int(view.cut[axis] * (full - kept + 1)))
                step = Fraction(kept, size)
            else:
                step = Fraction(full, covering[axis])
                place = int(view.cut[axis] * (covering[axis] + 2 * pad - size + 1)) - pad
                start = place * step
            found.append(sources(start, step, size, full))
    if view.flip:
        found[1].reverse()
    return found


def agrees(view: View, ids: np.ndarray) -> None:
    """Every pixel of the class map is that of the nearest pixel, or none where there is none."""
    rows, columns = expected_sources(view)
    seen = view.class_map(ids)
    assert seen.shape == view.size
    assert seen.dtype == ids.dtype
    for r, row in enumerate(rows):
        for c, column in enumerate(columns):
            if row is None or column is None:
                assert seen[r, c] == NO_CLASS
            else:
                assert seen[r, c] in {ids[i, j] for i in row for j in column}


@pytest.mark.parametrize("name", AUGMENTATIONS)
@settings(max_examples=40)
@given(sides, sides, st.tuples(st.integers(1, 24), st.integers(1, 24)), keys)
@example(1, 60, (8, 8), (0, 0, 1))
@example(60, 1, (8, 9), (0, 0, 1))
@example(24, 24, (24, 24), (0, 0, 1))
def test_a_class_map_is_what_nearest_picking_gives(name, height, width, size, key):
    agrees(drawn(name, (height, width), size, key), numbered(height, width))


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("original", [(48, 64), (90, 40), (20, 24), (16, 300), (300, 16)])
def test_a_class_map_shows_what_its_image_shows(name, original):
    """The eight colours lie at the corners of the cube: between two regions there is no third one."""
    size, flips, compared = (32, 40), set(), 0
    for number in range(12):
        view = drawn(name, original, size, (0, 0, number))
        ids = regions(*original, number)
        image = view.image(COLOURS[ids]).permute(1, 2, 0).numpy()
        seen = view.class_map(ids)
        inside = seen != NO_CLASS
        pure = inside & ((image == 0) | (image == 255)).all(2)
        assert np.array_equal(image[pure], COLOURS[seen[pure]])
        assert inside.any()
        flips.add(view.flip)
        compared += pure.sum() / inside.sum()
    assert flips == {False, True}
    assert compared / 12 > 0.6, "most of an image is not a border between regions"


def test_a_mirrored_view_shows_the_mirror_image_of_both():
    for crop, cut in (((3, 5, 20, 24), None), ((0, 0, 30, 44), (0.3, 0.9))):
        plain = View((30, 44), (17, 13), crop, cut, False, padding=4)
        mirrored = View((30, 44), (17, 13), crop, cut, True, padding=4)
        ids = numbered(30, 44)
        np.testing.assert_array_equal(mirrored.class_map(ids), plain.class_map(ids)[:, ::-1])
        pixels = np.repeat(ids[:, :, None], 3, 2)
        assert torch.equal(mirrored.image(pixels), plain.image(pixels).flip(2))
        assert mirrored.geometry == plain.geometry, "where it lies before it is mirrored"
        assert mirrored.class_map(ids).flags.c_contiguous


@pytest.mark.parametrize(
    ("cut", "rows", "columns"),
    [  # 24 x 24 padded by 4 to 32 x 32: nine places on each axis
        ((0.0, 0.0), (4, 0), (4, 0)),
        ((0.99, 0.99), (0, 4), (0, 4)),
        ((0.5, 0.5), (0, 0), (0, 0)),
        ((0.2, 0.8), (3, 0), (0, 3)),
    ],
)
def test_what_is_padded_has_no_class(cut, rows, columns):
    ids = numbered(24, 24)
    view = View((24, 24), (24, 24), (0, 0, 24, 24), cut, False, padding=4)
    (above, below), (left, right) = rows, columns
    part = ids[below : 24 - above, right : 24 - left]
    expected = np.pad(part, (rows, columns), constant_values=255)
    np.testing.assert_array_equal(view.class_map(ids), expected)
    # The image is reflected there, as it is trained on.
    pixels = np.repeat(ids[:, :, None], 3, 2)
    padded = np.pad(ids, 4, mode="reflect")
    top, left = 4 - above + below, 4 - left + right
    shown = view.image(pixels)[0].numpy()
    np.testing.assert_array_equal(shown, padded[top : top + 24, left : left + 24])


@pytest.mark.parametrize("original", [(20, 162), (162, 20), (1, 500), (3000, 2)])
def test_of_an_elongated_image_a_part_is_shown_and_nothing_is_padded(original):
    size, long = (10, 10), int(original[1] > original[0])
    short = min(original)
    for u in (0.0, 0.4, 0.999):
        cut = (*(0.5, 0.5)[:long], u, *(0.5,)[long:])
        view = View(original, size, (0, 0, *original), cut, False, padding=4)
        ids = numbered(*original)
        seen = view.class_map(ids)
        agrees(view, ids)
        start = int(u * (max(original) - short + 1))
        part = ids[start : start + short] if long == 0 else ids[:, start : start + short]
        assert not (seen == NO_CLASS).any()
        assert seen[0, 0] in part
        assert seen[-1, -1] in part
    eight = View((10, 80), size, (0, 0, 10, 80), (0.0, 0.0), False, padding=4)
    assert (eight.class_map(numbered(10, 80)) == NO_CLASS).any(), "resized whole, and padded"


@pytest.mark.parametrize("name", AUGMENTATIONS)
@given(sides, sides, st.tuples(st.integers(1, 40), st.integers(1, 40)), keys)
@example(height=6, width=15, size=(1, 22), key=(0, 0, 0))  # 22 / (22 / 15) is a little over 15
def test_the_geometry_maps_the_corners_of_a_view_back_to_its_part(name, height, width, size, key):
    view = drawn(name, (height, width), size, key)
    found = view.geometry
    assert found.original == (height, width)
    corners = np.array([[0, 0, size[1], size[0]]])
    if view.cut is None:
        top, left, crop_h, crop_w = view.crop
        expected = [left, top, left + crop_w, top + crop_h]
        np.testing.assert_allclose(found.boxes_to_original(corners)[0], expected, atol=1e-4)
    else:
        # Unclipped: what is padded lies outside of the original.
        (sy, sx), (oy, ox) = found.scale, found.offset
        centre = (size[1] / 2 + ox) / sx, (size[0] / 2 + oy) / sy
        assert 0 <= centre[0] <= width or view.padding > size[1] / 2
        assert 0 <= centre[1] <= height or view.padding > size[0] / 2
        assert oy >= -view.padding
        assert ox >= -view.padding
        assert size[0] + oy <= height * sy + view.padding + 1e-6
        assert size[1] + ox <= width * sx + view.padding + 1e-6
    box = np.array([[0.25 * width, 0.5 * height, 0.75 * width, 0.875 * height]])
    back = found.boxes_to_original(found.boxes_to_input(box))
    np.testing.assert_allclose(back, box, rtol=1e-4, atol=1e-3)


def test_the_corners_of_a_simple_crop_lie_where_it_was_cut():
    view = View((40, 80), (20, 20), (0, 0, 40, 80), (0.0, 0.5), False, padding=4)
    # Covering 20 x 40, padded 28 x 48: 9 and 29 places; cut at 0 and 14, that is -4 and 10 of the image.
    found = view.geometry
    assert (found.scale, found.offset) == ((0.5, 0.5), (-4, 10))
    corners = np.array([[0, 0, 20, 20]])
    assert found.boxes_to_original(corners)[0].tolist() == [20, 0, 60, 32]  # clipped at the top
    elongated = View((20, 162), (10, 10), (0, 0, 20, 162), (0.0, 0.5), False, padding=4)
    assert elongated.geometry.boxes_to_original(np.array([[0, 0, 10, 10]]))[0].tolist() == [
        71, 0, 91, 20,
    ]  # fmt: skip


@pytest.mark.parametrize(("height", "width"), [(1, 1), (24, 37), (50, 8)])
def test_the_whole_view_at_the_same_size_is_the_identity(height, width):
    ids = numbered(height, width)
    pixels = np.stack([ids, ids // 2, 255 - ids], 2)
    view = View((height, width), (height, width), (0, 0, height, width), None, False)
    np.testing.assert_array_equal(view.class_map(ids), ids)
    np.testing.assert_array_equal(view.image(pixels).permute(1, 2, 0), pixels)
    assert (view.geometry.scale, view.geometry.offset) == ((1, 1), (0, 0))
    assert view.needed() == (height, width)


def test_maps_of_any_integers_keep_their_type():
    view = View((24, 24), (24, 24), (0, 0, 24, 24), (0.0, 0.0), True, padding=4)
    ids = np.arange(576).reshape(24, 24) + 1000
    for dtype in (np.int64, np.int32, np.uint16):
        seen = view.class_map(ids.astype(dtype))
        assert seen.dtype == dtype
        assert set(np.unique(seen)) - {NO_CLASS} <= set(range(1000, 1576))


@pytest.mark.parametrize("name", ["random_resized", "simple, unpadded", "whole"])
def test_an_image_decoded_reduced_shows_the_regions_of_the_whole_class_map(name):
    """Away from borders between regions: of a reduced image a part begins at a whole pixel."""
    wrong = total = 0
    for number in range(10):
        view = drawn(name, (480, 640), (32, 40), (0, 0, number))
        ids = regions(480, 640, number)
        least = view.needed()
        factor = min(480 // least[0], 640 // least[1], 4)
        reduced = COLOURS[ids][factor // 2 :: factor, factor // 2 :: factor]
        image = view.image(reduced).permute(1, 2, 0).numpy()
        seen = view.class_map(ids)
        pure = ((image == 0) | (image == 255)).all(2)
        wrong += (image[pure] != COLOURS[seen[pure]]).any(1).sum()
        total += pure.sum()
    assert total > 0.5 * 10 * 32 * 40
    assert wrong <= 0.01 * total


# --- Boxes and masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_go_where_torchvisions_transforms_take_them(flip):
    rng = np.random.default_rng(5)
    corners = rng.uniform(0, 1, (40, 2, 2)) * (53, 31)
    boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
    view = View((31, 53), (40, 24), (4, 7, 20, 33), None, flip)
    seen, kept = view.boxes(boxes)
    theirs = tv_tensors.BoundingBoxes(torch.tensor(boxes), format="XYXY", canvas_size=(31, 53))
    theirs = v2.functional.resized_crop(theirs, 4, 7, 20, 33, [40, 24])
    theirs = v2.functional.horizontal_flip(theirs) if flip else theirs
    np.testing.assert_allclose(seen, theirs.numpy(), atol=1e-4)
    assert seen.dtype == np.float32
    assert 5 < kept.sum() < 35


@pytest.mark.parametrize("name", AUGMENTATIONS)
@settings(max_examples=30)
@given(sides, sides, st.tuples(st.integers(1, 24), st.integers(1, 24)), keys)
def test_a_box_goes_where_the_geometry_says(name, height, width, size, key):
    view = drawn(name, (height, width), size, key)
    box = np.array([[0.25 * width, 0.1 * height, 0.9 * width, 0.8 * height]])
    (seen,), _ = view.boxes(box)
    (moved,) = view.geometry.boxes_to_input(box)
    if view.flip:
        moved = np.array([size[1] - moved[2], moved[1], size[1] - moved[0], moved[3]])
    np.testing.assert_allclose(seen, moved.clip(0, [size[1], size[0]] * 2), atol=1e-4)


def test_a_box_is_left_where_a_quarter_of_it_is_seen_and_a_pixel_each_way():
    view = View((40, 40), (20, 20), (10, 10, 20, 20), None, False)
    boxes = np.array(
        [
            (8, 12, 18, 22),  # four fifths
            (0, 12, 13.3, 22),  # 3.3 / 13.3 < a quarter
            (0, 12, 13.4, 22),  # 3.4 / 13.4 > a quarter
            (0, 0, 20, 20),  # a quarter
            (0, 0, 19.9, 20),
            (12, 12, 12.9, 20),  # less than a pixel wide
            (12, 12, 20, 12.9),
            (12, 12, 13, 13),  # a pixel
            (0, 0, 10, 10),  # beside it
            (32, 32, 40, 40),
        ]
    )
    seen, kept = view.boxes(boxes)
    assert kept.tolist() == [True, False, True, True, False, False, False, True, False, False]
    assert seen[0].tolist() == [0, 2, 8, 12]
    seen, kept = view.boxes(np.zeros((0, 4), np.float32))
    assert (seen.shape, kept.shape) == ((0, 4), (0,))


@pytest.mark.parametrize("name", AUGMENTATIONS)
@settings(max_examples=40)
@given(sides, sides, st.tuples(st.integers(1, 24), st.integers(1, 24)), keys)
@example(5, 60, (20, 20), (0, 0, 3))
def test_masks_show_what_their_class_map_shows(name, height, width, size, key):
    ids = regions(height, width, key[2])
    view = drawn(name, (height, width), size, key)
    shown = view.masks([rle.from_mask(ids == k) for k in range(8)])
    assert (shown.shape, shown.dtype) == ((8, *size), np.uint8)
    seen = view.class_map(ids)
    for k in range(8):
        assert np.array_equal(shown[k], seen == k)


# --- Scale jitter ------------------------------------------------------------------------------------------


def jittered(factors, key, original=(100, 160), size=(50, 80), flip=0.5) -> View:
    how = Augmentation(crop="whole", scale_jitter=factors, flip=flip)
    return draw_view(*original, size, how, generator(key))


def test_a_jitter_below_one_shows_the_whole_smaller_and_above_one_a_part_as_large():
    smaller = larger = 0
    factors = []
    for position in range(400):
        view = jittered((0.5, 2.0), (0, 0, position))
        top, left, height, width = view.crop
        assert 0 <= top <= 100 - height
        assert 0 <= left <= 160 - width
        if view.size != (50, 80):
            smaller += 1
            assert view.crop == (0, 0, 100, 160)
            assert 25 <= view.size[0] < 50
            assert abs(view.size[1] - 1.6 * view.size[0]) <= 1.4
            factors.append(view.size[1] / 80)
        else:
            larger += 1
            assert abs(width - 1.6 * height) <= 1.4
            factors.append(160 / width)
    assert 0.5 <= min(factors) < 0.52
    assert 1.95 < max(factors) <= 2.02
    assert abs(np.mean(factors) - 1.25) < 0.06  # uniform
    assert 100 < smaller < 170  # a third


def test_a_jittered_part_lies_anywhere_within():
    views = [jittered((2.0, 2.0), (0, 1, position)) for position in range(300)]
    assert {view.crop[2:] for view in views} == {(50, 80)}
    tops, lefts = ([view.crop[axis] for view in views] for axis in (0, 1))
    assert (min(tops), max(tops)) == (0, 50)
    assert (min(lefts), max(lefts)) == (0, 80)
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < 0.2


def test_without_jitter_nothing_is_drawn_for_it():
    plain = draw_view(20, 30, (10, 10), Augmentation(crop="whole"), generator((0, 0, 5)))
    assert jittered((1.0, 1.0), (0, 0, 5), (20, 30), (10, 10)) == plain


@pytest.mark.parametrize("factors", [(0.01, 0.02), (50.0, 90.0)])
def test_a_jitter_leaves_a_pixel_at_least(factors):
    view = jittered(factors, (0, 0, 1), (3, 2), (4, 3))
    assert min(*view.size, *view.crop[2:]) >= 1
    assert view.image(np.zeros((3, 2, 3), np.uint8)).shape == (3, *view.size)


def test_jittered_boxes_lie_on_their_objects():
    pixels = np.zeros((100, 160, 3), np.uint8)
    pixels[30:70, 60:120] = 255
    for position in range(20):
        view = jittered((0.6, 1.3), (3, 0, position))
        (box,), _ = view.boxes(np.array([[60, 30, 120, 70]]))
        shown = view.image(pixels)[0] > 127
        rows, columns = torch.nonzero(shown.any(1))[:, 0], torch.nonzero(shown.any(0))[:, 0]
        around = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
        np.testing.assert_allclose(box, [int(v) for v in around], atol=1.01)


@pytest.mark.parametrize("factors", [(0.0, 1.0), (2.0, 1.0), (0.5, float("inf"))])
def test_a_jitter_that_cannot_be_is_refused(factors):
    with pytest.raises(InputError, match="scale_jitter must be 0 < low <= high"):
        Augmentation(crop="whole", scale_jitter=factors)


def test_a_jitter_takes_the_whole_image():
    with pytest.raises(InputError, match="crop must be 'whole', but is 'random_resized'"):
        Augmentation(scale_jitter=(0.5, 1.0))
