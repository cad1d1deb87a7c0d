"""A segmentation as an image that others can read."""

import io

import numpy as np
import pytest
from PIL import Image

from vitrail_runtime.drawing import colour_of
from vitrail_runtime.errors import InputError
from vitrail_runtime.prediction import Prediction


def stored(segmentation: np.ndarray, count: int) -> Image.Image:
    names = tuple(map(str, range(count)))
    nothing = np.zeros(0)
    p = Prediction(nothing, nothing, [], segmentation=segmentation, classes=names)
    buffer = io.BytesIO()
    p.class_map().save(buffer, "PNG")
    return Image.open(buffer)


def test_pixels_are_indices_of_classes_and_255_where_there_is_none():
    segmentation = np.array([[0, 1, 254], [-1, 7, 0]])
    image = stored(segmentation, 255)
    assert (image.format, image.mode, image.size) == ("PNG", "P", (3, 2))
    assert np.array(image).tolist() == [[0, 1, 254], [255, 7, 0]]
    colours = np.array(image.convert("RGB")).tolist()
    assert colours[0] == [list(colour_of(k)) for k in (0, 1, 254)]
    assert colours[1] == [[0, 0, 0], list(colour_of(7)), list(colour_of(0))]


def test_what_is_no_segmentation_or_has_too_many_classes_is_refused():
    with pytest.raises(InputError, match="at most 255 classes, but there are 256"):
        stored(np.zeros((2, 2), int), 256)
    with pytest.raises(InputError, match="has no segmentation"):
        stored(None, 3)
