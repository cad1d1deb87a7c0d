"""Predictions as pictures, and the masks on them."""

import numpy as np
import pytest
import torch
from matplotlib.colors import hsv_to_rgb
from PIL import Image, ImageDraw
from scipy import ndimage

from vitrail_runtime.drawing import _eroded, colour_of
from vitrail_runtime.errors import InputError
from vitrail_runtime.prediction import Prediction, paste_mask


def prediction(names=("cat", "dog"), scores=(0.75, 0.25), **fields):
    labels = np.arange(len(names))
    return Prediction(labels, np.array(scores, np.float32), list(names), **fields)


def grey(height, width):
    return np.full((height, width, 3), 128, np.uint8)


@pytest.mark.parametrize(
    "shape", [(1, 1), (28, 28), (40, 200), (300, 200), (700, 900), (1, 3000), (3000, 1)]
)
def test_the_bar_of_scores_is_legible_at_any_size_of_picture(shape):
    drawn = prediction(size=shape).draw(grey(*shape))
    assert 240 <= drawn.width <= 1280
    bar = np.asarray(drawn)[-160:]
    assert (bar == 245).any()  # words
    assert (bar == colour_of(0)).all(2).any()  # and how sure


def test_small_pictures_keep_their_pixels_as_squares():
    image = np.zeros((2, 4, 3), np.uint8)
    image[0, 1] = (255, 0, 0)
    drawn = np.asarray(prediction().draw(image))
    assert drawn.shape[1] == 320
    assert (drawn[:80, 80:160] == (255, 0, 0)).all()
    assert (drawn[80:160, :] == 0).all()


def test_the_file_of_a_prediction_is_read_again_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "a.jpg"
    Image.fromarray(grey(400, 600)).save(path, exif=exif)
    assert prediction(source=str(path), size=(600, 400)).draw().width == 400


def test_long_names_and_other_scripts_are_drawn():
    names = (
        "a name that is much longer than any picture is wide " * 3,
        "Größe",
        "中文",
        "\U0001f984",
    )
    drawn = prediction(names=names, scores=(0.5, 0.3, 0.1, 0.0001)).draw(grey(100, 100))
    assert drawn.width == 320


def test_boxes_are_drawn_in_their_class_s_colour_where_they_are():
    p = prediction(
        boxes=np.array([[100, 50, 300, 250], [-20, -20, 60, 60]], np.float32), size=(400, 500)
    )
    drawn = np.asarray(p.draw(grey(400, 500)))
    assert drawn.shape == (400, 500, 3)
    for x, y in [(100, 200), (300, 200), (200, 50), (200, 250)]:
        assert tuple(drawn[y, x]) == colour_of(0)
    assert tuple(drawn[30, 60]) == colour_of(1)
    assert (drawn[100:240, 120:290] == 128).all()


def test_masks_are_laid_over_their_boxes_and_nothing_else():
    boxes = np.array([[100, 50, 300, 250]], np.float32)
    p = prediction(("cat",), (0.9,), boxes=boxes, mask_crops=np.ones((1, 14, 14)), size=(400, 500))
    assert p.masks.shape == (1, 400, 500)
    drawn = np.asarray(p.draw(grey(400, 500)))
    np.testing.assert_allclose(drawn[200, 200], (np.array(colour_of(0)) + 128) / 2, atol=1)
    assert (drawn[260:, :] == 128).all()


def test_a_segmentation_is_coloured_named_and_open_where_nothing_is_said():
    segmentation = np.zeros((400, 500), np.int64)
    segmentation[:, :100] = -1
    segmentation[:, 400:] = 7
    p = prediction((), (), segmentation=segmentation, classes=("sky",), size=(400, 500))
    drawn = np.asarray(p.draw(grey(400, 500)))
    assert (drawn[:400, :100] == 128).all()
    np.testing.assert_allclose(drawn[10, 200], (np.array(colour_of(0)) + 128) / 2, atol=2)
    np.testing.assert_allclose(drawn[10, 450], (np.array(colour_of(7)) + 128) / 2, atol=2)
    assert drawn.shape[0] > 400


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"boxes": np.zeros((0, 4), np.float32)},
        {"boxes": np.zeros((0, 4), np.float32), "mask_crops": np.zeros((0, 7, 7), np.float32)},
        {"segmentation": np.full((400, 500), -1)},
    ],
)
def test_an_image_on_which_nothing_was_found_is_drawn_as_it_is(fields):
    p = prediction((), (), size=(400, 500), **fields)
    np.testing.assert_array_equal(np.asarray(p.draw(grey(400, 500))), grey(400, 500))
    assert p.to_dict() == {"path": None, "size": [400, 500], "top": []}


def test_masks_are_pasted_as_grid_sample_does_in_mask_rcnns_official_code():
    rng = np.random.default_rng(0)
    for box in [(3, 4, 40, 30), (10, 2, 13, 36), (0, 0, 50, 40)]:
        crop = rng.random((14, 14), dtype=np.float32)
        seen = paste_mask(crop, np.array(box), (40, 50))
        x0, y0, x1, y1 = box
        theirs = torch.nn.functional.grid_sample(
            torch.from_numpy(crop)[None, None],
            torch.stack(
                torch.meshgrid(
                    (torch.arange(50) + 0.5 - x0) / (x1 - x0) * 2 - 1,
                    (torch.arange(40) + 0.5 - y0) / (y1 - y0) * 2 - 1,
                    indexing="xy",
                ),
                dim=-1,
            )[None],
            align_corners=False,
        )
        np.testing.assert_array_equal(seen, theirs[0, 0].numpy() >= 0.5)


@pytest.mark.parametrize("box", [(5, 5, 5, 9), (60, 3, 70, 9), (-20, -9, -10, -5), (9, 9, 3, 3)])
def test_a_mask_whose_box_is_empty_or_outside_is_empty(box):
    assert not paste_mask(np.ones((7, 7)), np.array(box), (40, 50)).any()


def test_a_picture_of_another_size_or_none_is_refused():
    with pytest.raises(InputError, match=r"10 x 20 .* the prediction is of a picture of 20 x 10"):
        prediction(size=(20, 10)).draw(grey(10, 20))
    with pytest.raises(InputError, match=r"draw\(image\)"):
        prediction().draw()


# ---- where and how large things are drawn


@pytest.mark.parametrize(
    ("size", "long_side", "shown"),
    [
        ((28, 28), 1280, (308, 308)),  # by whole factors up to 96 pixels
        ((96, 48), 1280, (288, 144)),
        ((48, 97), 1280, (158, 320)),
        ((200, 319), 1280, (201, 320)),
        ((200, 320), 1280, (200, 320)),
        ((1280, 700), 1280, (1280, 700)),
        ((1000, 2560), 1280, (500, 1280)),
        ((1, 3000), 1280, (1, 1280)),
        ((400, 200), 330, (330, 165)),
    ],
)
def test_a_picture_is_shown_at_a_size_that_words_can_be_read_on(size, long_side, shown):
    boxes = np.zeros((0, 4), np.float32)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    drawn = prediction((), (), boxes=boxes).draw(pixels, long_side=long_side)
    smooth = Image.Resampling.LANCZOS if max(size) > 96 else Image.Resampling.NEAREST
    expected = Image.fromarray(pixels).resize((shown[1], shown[0]), smooth)
    assert drawn.size == (shown[1], shown[0])
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(expected))


def test_neighbouring_classes_have_colours_far_apart_and_each_always_its_own():
    # Hue by the golden ratio from 0.58 on; three kinds of brightness and strength in turn.
    for label in (0, 1, 2, 3, 50):
        value, strength = ((1.0, 0.75), (0.85, 0.6), (0.95, 0.9))[label % 3]
        hsv = ((0.58 + label * (5**0.5 - 1) / 2) % 1, strength, value)
        expected = np.rint(np.array(hsv_to_rgb(hsv)) * 255)
        np.testing.assert_allclose(colour_of(label), expected, atol=1)
    assert len({colour_of(label) for label in range(200)}) == 200


@pytest.fixture
def words(monkeypatch):
    """What is written: place, text, colour, size of the letters."""
    found = []
    write = ImageDraw.ImageDraw.text

    def text(self, xy, text, fill=None, font=None, **more):
        found.append((tuple(xy), text, fill, font))
        write(self, xy, text, fill=fill, font=font, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return found


BRIGHT, MUTED, DARK, TRACK = (245, 246, 248), (166, 172, 184), (22, 24, 29), (52, 56, 66)


def test_the_bar_shows_the_best_three_each_with_its_score_and_how_much(words):
    scores = (0.75, 0.2, 0.0004, 0.0003)
    p = prediction(("cat", "dog", "emu", "fox"), scores)
    drawn = np.asarray(p.draw(grey(320, 330)))
    # Letters of 330 / 22 = 15 pixels, a margin of 12, lines of 3, and 32 pixels from row to row.
    assert drawn.shape == (320 + 12 + 3 * 32 - 8 + 12, 330, 3)
    assert (drawn[:320] == 128).all()
    assert (drawn[320:332] == DARK).all()
    assert [(text, fill) for _, text, fill, _ in words] == [
        ("cat", BRIGHT), ("75.0%", BRIGHT),
        ("dog", MUTED), ("20.0%", MUTED),
        ("emu", MUTED), ("< 0.1%", MUTED),
    ]  # fmt: skip
    for i in range(3):
        (left, top), (right, same), font = words[2 * i][0], words[2 * i + 1][0], words[2 * i][3]
        assert (left, top, same) == (12, 332 + 32 * i, 332 + 32 * i)
        assert right + round(font.getlength(words[2 * i + 1][1])) == 330 - 12
        middle = drawn[332 + 32 * i + 21 + 1]
        filled = np.flatnonzero((middle == colour_of(i)).all(1))
        end = 12 + max(3, round((330 - 24) * scores[i]))
        assert filled.min() in (12, 13)
        assert abs(filled.max() - end) <= 1
        track = np.flatnonzero((middle == TRACK).all(1))
        assert abs(track.max() - (330 - 12)) <= 1
        assert (drawn[332 + 32 * i + 20] == DARK).all()
        assert (drawn[332 + 32 * i + 21 + 3 + 2] == DARK).all()


@pytest.mark.parametrize(
    # Letters of a 22nd of the width, 14 to 28; a margin of 0.8 of them, a bar of a fifth.
    ("width", "letters", "margin", "bar", "panel"),
    [(320, 14, 11, 3, 45), (500, 22, 18, 4, 71), (700, 28, 22, 5, 88), (1200, 28, 22, 5, 88)],
)
def test_the_bar_grows_with_the_picture(width, letters, margin, bar, panel, words):
    drawn = np.asarray(prediction(("cat",), (0.5,)).draw(grey(320, width)))
    assert drawn.shape == (320 + panel, width, 3)
    assert words[0][3].size == letters
    assert words[0][0] == (margin, 320 + margin)
    top = 320 + margin + round(1.4 * letters)
    coloured = (drawn[:, width // 4] == colour_of(0)).all(1)
    assert np.flatnonzero(coloured).tolist() == list(range(top, top + bar + 1))


@pytest.mark.parametrize(
    ("width", "letters", "line"), [(320, 12, 2), (432, 12, 2), (900, 25, 2), (1280, 26, 4)]
)
def test_lines_and_labels_of_boxes_grow_with_the_picture(width, letters, line, words):
    boxes = np.array([[100, 100, 300, 250]], np.float32)
    drawn = np.asarray(prediction(("cat",), (0.5,), boxes=boxes).draw(grey(300, width)))
    assert words[0][3].size == letters
    row = (drawn[200] == colour_of(0)).all(1)
    assert np.flatnonzero(row[:200]).tolist() == list(range(100, 100 + line))
    field = round(words[0][3].getlength("cat 50%") + letters * 0.6), round(letters * 1.35)
    beside = drawn[100 - field[1] : 98, 100 + field[0] + 2 :]
    assert (beside == 128).all()  # the words stay on their field


@pytest.mark.parametrize(
    ("share", "text"),
    [(0.0, "0.0%"), (0.0005, "< 0.1%"), (0.001, "0.1%"), (0.756, "75.6%"), (1.0, "100.0%")],
)
def test_shares_are_told_in_per_cent(share, text, words):
    drawn = np.asarray(prediction(("cat",), (share,)).draw(grey(320, 330)))
    assert words[1][1] == text
    coloured = (drawn == colour_of(0)).all(2).any()
    assert coloured == (share > 0)


def test_narrow_pictures_stand_in_the_middle_above_a_bar_that_can_be_read():
    drawn = np.asarray(prediction(("cat",), (0.5,)).draw(grey(400, 101)))
    assert drawn.shape[1] == 240
    assert (drawn[:400, 69:170] == 128).all()
    assert (drawn[:400, :69] == DARK).all()
    assert (drawn[:400, 170:] == DARK).all()


def test_nothing_to_say_leaves_the_picture_alone():
    nothing = np.full((400, 500), -1)
    drawn = prediction((), (), segmentation=nothing, classes=("sky",)).draw(grey(400, 500))
    assert (np.asarray(drawn) == 128).all()
    assert drawn.size == (500, 400)


def test_the_largest_areas_of_a_segmentation_are_named_up_to_eight(words):
    segmentation = np.zeros((400, 500), np.int64)
    areas = {-1: 100, 3: 120, 0: 60, 12: 50, 4: 40, 5: 30, 6: 20, 7: 18, 8: 14, 9: 10}
    start = 0
    for value, columns in areas.items():
        segmentation[:, start : start + columns] = value
        start += columns
    segmentation[:, start:] = 2  # 38 columns
    names = [f"name {i}" for i in range(10)]
    prediction((), (), segmentation=segmentation, classes=names).draw(grey(400, 500))
    assert [text for _, text, _, _ in words] == [
        "name 3", "24.0%", "name 0", "12.0%", "class 12", "10.0%", "name 4", "8.0%",
        "name 2", "7.6%", "name 5", "6.0%", "name 6", "4.0%", "name 7", "3.6%",
    ]  # fmt: skip


def test_a_name_is_cut_to_the_longest_start_that_fits(words):
    name = "abcdefghij" * 10
    prediction((name,), (0.5,)).draw(grey(320, 330))
    shown, font = words[0][1], words[0][3]
    room = 330 - 2 * 12 - round(font.getlength("50.0%")) - 15
    assert shown.endswith("…")
    assert name.startswith(shown[:-1])
    assert font.getlength(shown) <= room < font.getlength(name[: len(shown)] + "…")


def test_boxes_are_drawn_at_the_scale_of_the_picture_with_a_dark_rim():
    boxes = np.array([[10, 20, 60, 40]], np.float32)
    drawn = np.asarray(prediction(("cat",), (0.5,), boxes=boxes).draw(grey(80, 64)))
    assert drawn.shape[:2] == (320, 256)  # four times
    colour = colour_of(0)
    dark = tuple(c // 4 for c in colour)
    row = drawn[120]
    assert [x for x in range(256) if tuple(row[x]) == colour] == [40, 41, 239, 240]
    assert [x for x in range(256) if tuple(row[x]) == dark] == [39, 42, 238, 241]
    column = drawn[:, 150]
    assert [y for y in range(90, 320) if tuple(column[y]) == colour] == [159, 160]
    assert tuple(column[161]) == tuple(column[158]) == dark
    assert (drawn[165:] == 128).all()


def test_a_label_stands_above_its_box_or_inside_it_and_never_outside_the_picture(words):
    boxes = np.array(
        [[100, 50, 300, 250], [450, 5, 499, 300], [-30, 390, 20, 399], [200, 300, 260, 390]],
        np.float32,
    )
    p = prediction(("a", "b", "c", "d"), (0.904, 0.5, 0.26, 0.1), boxes=boxes)
    drawn = np.asarray(p.draw(grey(400, 500)))
    # Letters of 500 // 36 = 13 pixels on a field of 18; the best is drawn last.
    assert [text for _, text, _, _ in words] == ["d 10%", "c 26%", "b 50%", "a 90%"]
    for (middle, text, fill, font), label in zip(words, (3, 2, 1, 0), strict=True):
        x0, y0 = boxes[label, :2]
        width = round(font.getlength(text) + 13 * 0.6)
        left = min(max(0, x0), 500 - width)
        top = y0 - 18 if y0 >= 18 else y0
        assert middle == (left + width / 2, top + 9)
        light = np.dot(colour_of(label), (0.299, 0.587, 0.114))
        assert fill == ((16, 18, 22) if light > 140 else (255, 255, 255))
        corner = drawn[int(top) + 1, int(left) + 1]
        assert tuple(corner) == colour_of(label)
    assert {words[i][2] for i in range(4)} == {(16, 18, 22), (255, 255, 255)}


def test_of_boxes_that_overlap_the_best_is_on_top_and_its_label_over_all_lines():
    boxes = np.array([[100, 100, 300, 300], [100, 60, 300, 300]], np.float32)
    drawn = np.asarray(prediction(boxes=boxes).draw(grey(400, 500)))
    assert tuple(drawn[200, 100]) == colour_of(0)
    assert tuple(drawn[75, 100]) == colour_of(1)
    assert tuple(drawn[90, 101]) == colour_of(0)  # the label's field over the second box's line


def test_masks_are_half_open_with_a_rim_and_the_best_is_on_top():
    boxes = np.array([[100, 50, 300, 250], [200, 150, 400, 350]], np.float32)
    p = prediction(boxes=boxes, mask_crops=np.ones((2, 14, 14)), size=(400, 500))
    drawn = np.asarray(p.draw(grey(400, 500))).astype(int)
    one, other = np.array(colour_of(0)), np.array(colour_of(1))
    np.testing.assert_allclose(drawn[100, 150], (128 + one) / 2, atol=1)
    np.testing.assert_allclose(drawn[300, 350], (128 + other) / 2, atol=1)
    np.testing.assert_allclose(drawn[200, 250], ((128 + other) / 2 + one) / 2, atol=1)


def test_a_masks_rim_is_as_wide_as_the_picture_is_large():
    """Against scipy's erosion: along the picture's border a mask has no rim."""
    rng = np.random.default_rng(0)
    mask = ndimage.gaussian_filter(rng.random((60, 80)), 4) > 0.5
    for by in (1, 2, 3):
        expected = ndimage.binary_erosion(mask, iterations=by, border_value=1)
        np.testing.assert_array_equal(_eroded(mask, by), expected)
    boxes = np.array([[-500, 300, 700, 900]], np.float32)
    p = prediction(
        ("cat",), (0.9,), boxes=boxes, mask_crops=np.ones((1, 14, 14)), size=(1200, 1000)
    )
    drawn = np.asarray(p.draw(grey(1200, 1000)))
    column = [tuple(v) for v in drawn[:, 500]]
    first = np.flatnonzero(p.masks[0, :, 500])[0]
    inside = tuple(drawn[600, 500])
    # The longer side is 1200: a rim of two pixels; the box's line of three lies beside it.
    assert column[first : first + 2] == [colour_of(0)] * 2
    assert inside != colour_of(0)
    assert tuple(drawn[600, 0]) == inside


def test_a_segmentation_is_laid_over_pixel_for_pixel():
    segmentation = np.zeros((40, 60), np.int64)
    segmentation[10:20, 30:45] = 3
    segmentation[25:, :10] = -1
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    drawn = np.asarray(prediction((), (), segmentation=segmentation).draw(image))[:200]
    large, shown = image.repeat(5, 0).repeat(5, 1), segmentation.repeat(5, 0).repeat(5, 1)
    colours = np.array([colour_of(0), (0, 0, 0), (0, 0, 0), colour_of(3)])
    expected = np.where(shown[..., None] < 0, large, (colours[shown] + large.astype(int)) / 2)
    np.testing.assert_allclose(drawn, expected, atol=1.5)
