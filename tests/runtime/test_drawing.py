"""Predictions as pictures, and the masks on them."""

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail_runtime.drawing import colour_of
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
