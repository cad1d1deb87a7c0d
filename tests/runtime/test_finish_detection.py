"""Boxes from the input back to the original, masks as run lengths, and what is written of them."""

import json

import numpy as np
import pytest

from vitrail_runtime import FINISH, Geometry, Prediction, finish_detection
from vitrail_runtime.errors import InputError, NotFinite
from vitrail_runtime.rle import decode_mask

CLASSES = ("cell", "plate", "debris")
HALVED = Geometry((40, 80), (0.5, 0.5), (0, 0))
MOVED = Geometry((30, 20), (2.0, 3.0), (8, 6))  # (sy, sx), (top, left): a central crop


def outputs_of(count=(2, 1), **changes):
    boxes = np.zeros((2, 3, 4), np.float32)
    boxes[0, 0], boxes[0, 1] = (1, 2, 11, 12), (0, 0, 40, 20)
    boxes[1, 0] = (3, 4, 9, 16)
    out = {
        "boxes": boxes,
        "scores": np.array([[0.9, 0.3, 0], [0.6, 0, 0]], np.float32),
        "labels": np.array(
            [[2, 0, 0], [1, 0, 0]], np.float32
        ),  # as floats, which all outputs may be
        "count": np.array(count, np.float32),
    }
    return out | changes


def test_boxes_come_back_in_pixels_of_the_original():
    first, second = finish_detection(outputs_of(), [HALVED, MOVED], CLASSES)
    assert first.boxes.tolist() == [[2, 4, 22, 24], [0, 0, 80, 40]]
    assert first.labels.tolist() == [2, 0]
    assert first.names == ["debris", "cell"]
    assert first.scores.tolist() == pytest.approx([0.9, 0.3])
    assert (first.size, first.mask_crops, first.segmentation) == ((40, 80), None, None)
    # x: (3 + 6) / 3 and (9 + 6) / 3; y: (4 + 8) / 2 and (16 + 8) / 2
    assert second.boxes.tolist() == [[3, 6, 5, 12]]
    assert second.boxes.dtype == np.float32
    assert second.labels.dtype == np.int64
    assert FINISH["detect"](outputs_of(), [HALVED, MOVED], CLASSES, 1)[0].names == first.names


def test_rows_behind_the_count_are_no_answers_whatever_they_hold():
    outputs = outputs_of(count=(1, 0))
    outputs["scores"][0, 1] = np.nan
    outputs["labels"][1] = 77
    first, second = finish_detection(outputs, [HALVED, MOVED], CLASSES)
    assert (len(first.boxes), first.names) == (1, ["debris"])
    assert (second.boxes.shape, second.names, len(second.scores)) == ((0, 4), [], 0)


def test_what_lies_outside_the_original_is_cut_or_left_out():
    boxes = np.array([[[-4, 3, 6, 9], [45, 2, 60, 9], [38, 18, 44, 22]]], np.float32)
    outputs = {
        "boxes": boxes,
        "scores": np.array([[0.9, 0.8, 0.7]]),
        "labels": np.array([[0, 1, 2]]),
        "count": np.array([3]),
    }
    outputs["mask_crops"] = np.arange(3)[None, :, None, None] * np.ones((1, 3, 2, 2)) / 4
    (found,) = finish_detection(outputs, [HALVED], CLASSES)
    assert found.boxes.tolist() == [[0, 6, 12, 18], [76, 36, 80, 40]]
    assert found.names == ["cell", "debris"]
    assert found.mask_crops[:, 0, 0].tolist() == [0, 0.5]


def test_a_wrong_shape_label_or_number_is_refused():
    with pytest.raises(InputError, match=r"boxes \(2, 3, 4\), scores \(2, 3\) and labels \(2, 2\)"):
        finish_detection(outputs_of(labels=np.zeros((2, 2))), [HALVED, MOVED], CLASSES)
    with pytest.raises(InputError, match="labels from 0 to 2, but has 2 classes"):
        finish_detection(outputs_of(), [HALVED, MOVED], CLASSES[:2])
    assert finish_detection(outputs_of(), [HALVED, MOVED], CLASSES)[0].labels.max() == 2
    labels = np.array([[-1, 0, 0], [0, 0, 0]])
    with pytest.raises(InputError, match="labels from -1 to 0"):
        finish_detection(outputs_of(labels=labels), [HALVED, MOVED], CLASSES)
    for name in ("boxes", "scores"):
        outputs = outputs_of()
        outputs[name][0, 1] = np.inf
        with pytest.raises(NotFinite, match="not finite"):
            finish_detection(outputs, [HALVED, MOVED], CLASSES)


@pytest.fixture
def prediction():
    crops = np.random.default_rng(0).random((2, 4, 4)).astype(np.float32)
    boxes = np.array([[2.25, 3, 14.5, 11], [10, 5, 30, 18]], np.float32)
    return Prediction(
        labels=np.array([2, 0]),
        scores=np.array([0.75, 0.5], np.float32),
        names=["debris", "cell"],
        boxes=boxes,
        mask_crops=crops,
        source="a.png",
        size=(20, 32),
    )


def test_run_lengths_are_of_the_pasted_masks(prediction):
    assert prediction.masks.any((1, 2)).all()
    for mask, rle in zip(prediction.masks, prediction.rles, strict=True):
        assert (decode_mask(rle) == mask).all()
    prediction.boxes[0] = (40, 3, 50, 9)  # outside
    assert not decode_mask(prediction.rles[0]).any()
    prediction.mask_crops = None
    assert prediction.rles is None


def test_answers_below_a_score_are_left_out_with_all_that_belongs_to_them(prediction):
    kept = prediction.above(0.6)
    assert (kept.names, kept.labels.tolist(), kept.scores.tolist()) == (["debris"], [2], [0.75])
    assert kept.boxes.tolist() == prediction.boxes[:1].tolist()
    assert (kept.mask_crops == prediction.mask_crops[:1]).all()
    assert (kept.source, kept.size) == ("a.png", (20, 32))
    assert prediction.above(0.5).names == prediction.names == ["debris", "cell"]
    plain = Prediction(np.array([1]), np.array([0.4]), ["plate"])
    assert (plain.above(0.4).names, plain.above(0.41).names) == (["plate"], [])


def test_masks_are_told_where_asked_for(prediction):
    assert all("mask" not in entry for entry in prediction.to_dict()["top"])
    told = json.loads(json.dumps(prediction.to_dict(masks=True)))
    for entry, mask in zip(told["top"], prediction.masks, strict=True):
        assert (decode_mask(entry["mask"]) == mask).all()
    assert told["top"][0]["box"] == [2.25, 3, 14.5, 11]


def test_coco_results_have_the_ids_that_are_asked_for(prediction):
    found = json.loads(json.dumps(prediction.to_coco(42, category_ids=[7, 90, 3])))
    assert [entry["image_id"] for entry in found] == [42, 42]
    assert [entry["category_id"] for entry in found] == [3, 7]
    assert [entry["bbox"] for entry in found] == [[2.25, 3, 12.25, 8], [10, 5, 20, 13]]
    assert [entry["score"] for entry in found] == [0.75, 0.5]
    for entry, mask in zip(found, prediction.masks, strict=True):
        assert (decode_mask(entry["segmentation"]) == mask).all()
    assert [e["category_id"] for e in prediction.to_coco(1)] == [3, 1]
    prediction.mask_crops = None
    assert "segmentation" not in prediction.to_coco(1)[0]


def test_coco_results_are_refused_without_boxes_or_ids(prediction):
    with pytest.raises(
        InputError, match="there are 2 category ids, but the prediction has class 2"
    ):
        prediction.to_coco(1, [5, 6])
    with pytest.raises(InputError, match="has no boxes"):
        Prediction(np.array([1]), np.array([0.4]), ["plate"]).to_coco(1)
