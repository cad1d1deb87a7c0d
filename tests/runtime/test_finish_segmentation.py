"""The class of every pixel, against torch's resize of the logits and against places reckoned by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vitrail_runtime import FINISH, Geometry, Preprocessing, finish_segmentation, prepare
from vitrail_runtime.errors import InputError, NotFinite

CLASSES = ("sky", "road", "tree")


def logits_of(height, width, seed=0):
    return np.random.default_rng(seed).normal(size=(1, 3, height, width)).astype(np.float32)


@pytest.mark.parametrize("original", [(20, 27), (9, 12), (5, 3), (1, 1)], ids=str)
def test_the_logits_are_resized_to_the_original_and_the_highest_wins(original):
    logits = logits_of(9, 12)
    geometry = Geometry(original, (9 / original[0], 12 / original[1]), (0, 0))
    (p,) = finish_segmentation(logits, [geometry], CLASSES)
    scores = torch.from_numpy(logits).double()
    want = F.interpolate(scores, original, mode="bilinear", antialias=True)[0]
    clear = want.sort(0).values
    sure = (clear[-1] - clear[-2] > 1e-5).numpy()
    assert sure.mean() > 0.9
    assert (p.segmentation == want.argmax(0).numpy())[sure].all()
    assert p.size == original == p.segmentation.shape


def test_labels_are_the_classes_that_occur_by_their_share_of_the_image():
    logits = np.full((1, 3, 2, 4), -1.0, np.float32)
    logits[0, 2, :, :3] = 1
    logits[0, 0, :, 3] = 1
    outputs = {"logits": logits}
    (p,) = FINISH["segment"](outputs, [Geometry((2, 4), (1.0, 1.0), (0, 0))], CLASSES, 1)
    assert p.segmentation.tolist() == [[2, 2, 2, 0]] * 2
    assert (p.labels.tolist(), p.names) == ([2, 0], ["tree", "sky"])
    assert p.scores.tolist() == [0.75, 0.25]
    assert p.classes == CLASSES


def test_pixels_outside_a_central_crop_have_no_class():
    image = np.zeros((40, 100, 3), np.uint8)
    _, geometry = prepare(image, Preprocessing(size=(16, 16), crop_pct=0.8))  # 20 x 50, cut to 16
    assert (geometry.scale, geometry.offset) == ((0.5, 0.5), (2, 17))
    logits = np.zeros((1, 3, 16, 16), np.float32)
    logits[0, 1, :, :8] = 1  # the left half is road
    (p,) = finish_segmentation(logits, [geometry], CLASSES)
    rows, columns = np.nonzero(p.segmentation >= 0)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 35, 34, 65)
    assert (p.segmentation[4:36, 34:49] == 1).all()
    assert (p.segmentation[4:36, 51:66] == 0).all()
    assert p.scores.sum() == pytest.approx(32 * 32 / 4000)


def test_logits_that_do_not_fit_or_are_no_numbers_are_refused():
    geometry = [Geometry((2, 2), (1.0, 1.0), (0, 0))]
    with pytest.raises(InputError, match=r"\(1, 3, 2, 2\) do not fit 2 classes"):
        finish_segmentation(np.zeros((1, 3, 2, 2)), geometry, CLASSES[:2])
    bad = np.zeros((1, 3, 2, 2))
    bad[0, 1, 0, 0] = np.nan
    with pytest.raises(NotFinite, match="not finite"):
        finish_segmentation(bad, geometry, CLASSES)
