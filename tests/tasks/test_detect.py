"""The task of detection: its scores, what it says of each image, its settings."""

import math
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from vitrail.data.batch import Dense
from vitrail.data.mosaic import mosaic
from vitrail.tasks.detect import TASK, Settings, scores_of
from vitrail.tasks.task import TASKS, task_of
from vitrail_runtime.errors import InputError, NotFinite
from vitrail_runtime.preprocess import Geometry
from vitrail_runtime.rle import encode_mask

CLASSES = ("cell", "plate", "debris")
THEIRS = ("debris", "cell")  # the data's: in another order, and without one
HALF = Geometry((40, 60), (0.5, 0.5), (0, 0))


class Model(nn.Module):
    """Knows its answers."""

    task = "detect"
    classes = CLASSES

    def __init__(self, has_masks: bool = False) -> None:
        super().__init__()
        self.has_masks = has_masks
        self.weight = nn.Parameter(torch.zeros(1))


def objects(*rows, crowd=(), masks=False):
    """(x0, y0, x1, y1, label of THEIRS) of the original."""
    boxes = np.array([r[:4] for r in rows], np.float32).reshape(-1, 4)
    labels = np.array([r[4] for r in rows], np.int64)
    full = []
    for x0, y0, x1, y1 in boxes.astype(int):
        mask = np.zeros((40, 60), bool)
        mask[y0:y1, x0:x1] = True
        full.append(encode_mask(mask))
    return SimpleNamespace(
        boxes=boxes,
        labels=labels,
        crowd=np.isin(np.arange(len(rows)), crowd),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        ids=np.arange(len(rows)),
        masks=full if masks else None,
    )


def answers(*images, crops=None, rows=4):
    """Of each image (x0, y0, x1, y1, label of CLASSES, score) in pixels of the input."""
    out = {
        "boxes": torch.zeros(len(images), rows, 4),
        "scores": torch.zeros(len(images), rows),
        "labels": torch.zeros(len(images), rows, dtype=torch.int64),
        "count": torch.tensor([len(image) for image in images]),
    }
    for i, image in enumerate(images):
        for j, said in enumerate(image):
            out["boxes"][i, j] = torch.tensor(said[:4])
            out["labels"][i, j], out["scores"][i, j] = said[4], said[5]
    if crops is not None:
        out["mask_crops"] = torch.full((len(images), rows, 4, 4), crops)
    return out


def data_of(count=3, has_masks=False, image_ids=None):
    truth = SimpleNamespace(has_masks=has_masks, image_ids=np.array(image_ids or range(count)))
    return SimpleNamespace(classes=THEIRS, truth=truth)


def batch_of(indices, truths):
    return SimpleNamespace(
        targets=tuple(truths),
        geometries=(HALF,) * len(indices),
        indices=torch.tensor(indices),
    )


def evaluated(**how):
    """Three images: one right and one missed; a wrong class and a doubtful answer; none of either."""
    evaluator = TASK.evaluator(Model(how.get("has_masks", False)), data_of(**how))
    masks = how.get("has_masks", False)
    first = objects((4, 4, 20, 20, 1), (30, 10, 50, 30, 0), masks=masks)
    second = objects((0, 0, 10, 30, 0), (40, 0, 60, 40, 0), crowd=[1], masks=masks)
    crops = 0.9 if masks else None
    said = answers(
        [(0, 0, 5, 15, 0, 0.8), (20, 15, 25, 20, 2, 0.4)], [(2, 2, 10, 10, 0, 0.9)], crops=crops
    )
    evaluator.update(said, batch_of([2, 0], [second, first]))
    evaluator.update(answers([], crops=crops), batch_of([1], [objects(masks=masks)]))
    return evaluator


def test_it_is_a_task_by_its_name():
    assert TASKS["detect"] == "vitrail.tasks.detect"
    assert task_of("detect") is TASK
    assert (TASK.name, TASK.truth, TASK.headline) == ("detect", "boxes", "AP")
    assert TASK.options(Settings()) == {}
    assert TASK.multiple(Settings()) == 1


def test_mosaics_are_off_by_default_and_made_of_four_of_a_share():
    images = torch.rand(8, 3, 12, 16)
    targets = ({"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([0])},) * 8
    batch = Dense(images, targets, torch.arange(8))
    assert TASK.prepare(batch, (0, 0, 0), Settings(), 3) is batch
    made = TASK.prepare(batch, (0, 1, 2), Settings(mosaic=1.0), 3)
    want = mosaic(batch, (0, 1, 2), 1.0)
    assert torch.equal(made.images, want.images)
    assert not torch.equal(made.images, images)
    assert TASK.multiple(Settings(mosaic=0.1)) == 4
    for wrong in (-0.1, 1.5):
        with pytest.raises(InputError, match="mosaic"):
            Settings(mosaic=wrong)


def test_scores_are_of_boxes_in_the_original_and_of_classes_by_name():
    scores = evaluated().compute()
    assert scores["num_images"] == 3
    # cell: one object, found; debris: two objects, neither found; plate: none.
    assert scores["AP"] == pytest.approx(0.5)
    assert scores.best == scores["AP"]
    assert scores["AR"] == pytest.approx(0.5)
    per_class = scores["per_class"]
    assert per_class["cell"] == {"objects": 1, "AP": 1, "AP50": 1, "AP75": 1, "AR": 1}
    assert per_class["debris"] == {"objects": 2, "AP": 0, "AP50": 0, "AP75": 0, "AR": 0}
    assert per_class["plate"] == {"objects": 0, "AP": None, "AP50": None, "AP75": None, "AR": None}
    assert scores["classes"] == list(CLASSES)
    assert scores["max_detections"] == 100
    assert scores["errors"]["classification"]["count"] == 1
    assert scores["errors"]["missed"]["count"] == 1
    assert "APl" not in scores.values, "no object is as large"
    assert "mask_AP" not in scores.values
    assert scores["AP_by_iou"] == pytest.approx([0.5] * 10)
    assert len(scores["precision"]["0.50"]) == 101


def test_what_was_said_of_each_image_counts_answers_that_are_sure():
    said = evaluated().said()
    order = np.argsort(said["indices"])
    assert said["indices"][order].tolist() == [0, 1, 2]
    assert said["objects"][order].tolist() == [2, 0, 1]
    assert said["found"][order].tolist() == [1, 0, 0]
    assert said["wrong"][order].tolist() == [0, 0, 1]  # the doubtful one does not count
    assert said["F1"][order].tolist() == pytest.approx([2 / 3, math.nan, 0], nan_ok=True)
    assert TASK.evaluator(Model(), data_of()).said() == {}


def test_an_answer_in_a_crowd_is_not_wrong():
    evaluator = TASK.evaluator(Model(), data_of())
    said = answers([(20, 5, 29, 15, 2, 0.9), (2, 2, 8, 8, 0, 0.5), (9, 9, 13, 15, 0, 0.49)])
    evaluator.update(said, batch_of([1], [objects((40, 0, 60, 40, 0), crowd=[0])]))
    assert [evaluator.said()[k].tolist() for k in ("objects", "found", "wrong")] == [[0], [0], [1]]


def test_masks_are_compared_where_model_and_data_have_them():
    scores = evaluated(has_masks=True).compute()
    assert scores["mask_AP"] == pytest.approx(0.5)
    assert scores["per_class"]["cell"]["mask_AP"] == 1
    assert scores["per_class"]["plate"]["mask_AR"] is None
    assert list(scores.values)[:3] == ["AP", "AP50", "AP75"]
    assert len(scores["mask_AP_by_iou"]) == 10
    header = scores.tables[0].header
    assert header == ("class", "objects", "AP", "AP50", "AP75", "AR", "mask AP", "mask AP50")
    for model, data in ((True, False), (False, True)):
        evaluator = TASK.evaluator(Model(model), data_of(has_masks=data))
        truth = objects((4, 4, 20, 20, 1), masks=data)
        said = answers([(2, 2, 10, 10, 0, 0.9)], crops=0.9 if model else None)
        evaluator.update(said, batch_of([0], [truth]))
        assert "mask_AP" not in evaluator.compute().values


@pytest.mark.slow
def test_an_evaluation_holds_no_masks_but_runs():
    """Of 100 objects at 512 x 512, each larger than half of the image: their masks would be 26 MB an image,
    one of them with what pastes it takes 4."""
    rng = np.random.default_rng(0)
    side, number = 512, 100
    corner = rng.integers(0, 100, (number, 2))
    boxes = np.concatenate([corner, corner + rng.integers(400, 412, (number, 2))], 1)
    masks = []
    for x0, y0, x1, y1 in boxes.tolist():
        mask = np.zeros((side, side), bool)
        mask[y0:y1, x0:x1] = True
        masks.append(encode_mask(mask))
    boxes = boxes.astype(np.float32)
    truth = SimpleNamespace(
        boxes=boxes,
        labels=np.zeros(number, np.int64),
        crowd=np.zeros(number, bool),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(1),
        masks=masks,
    )
    said = answers(*[[(*box, 2, 0.9) for box in boxes.tolist()]] * 2, rows=number)
    said["mask_crops"] = torch.full((2, number, 28, 28), 0.9)
    evaluator = TASK.evaluator(Model(True), data_of(has_masks=True))
    where = (Geometry((side, side), (1.0, 1.0), (0, 0)),) * 2
    batch = SimpleNamespace(targets=(truth,) * 2, geometries=where, indices=torch.tensor([0, 1]))
    tracemalloc.start()
    evaluator.update(said, batch)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6  # 3.0e6
    assert held < 1e6  # 0.3e6
    assert evaluator.compute()["mask_AP50"] > 0.99


def test_tables_and_notes_tell_what_counts():
    scores = evaluated().compute()
    classes, mistakes = scores.tables
    assert classes.header == ("class", "objects", "AP", "AP50", "AP75", "AR")
    assert classes.rows[1] == ("plate", 0, "none", "none", "none", "none")
    assert classes.rows[0] == ("cell", 1, 1, 1, 1, 1)
    costs = [row[2] for row in mistakes.rows]
    assert costs == sorted(costs, reverse=True)
    assert {row[0]: row[1] for row in mistakes.rows}["classification"] == 1
    assert any("without an object here: plate" in note for note in scores.notes)
    assert any("no object is medium or large" in note for note in scores.notes)
    assert not any("AP_100" in note for note in scores.notes)


def test_more_than_a_hundred_answers_are_told_apart():
    evaluator = TASK.evaluator(Model(), data_of())
    wrong = [(20, 5, 29, 15, 0, 0.9)] * 100
    said = answers([*wrong, (2, 2, 10, 10, 0, 0.5)], rows=150)
    evaluator.update(said, batch_of([0], [objects((4, 4, 20, 20, 1))]))
    scores = evaluator.compute()
    assert scores["AR"] == 1
    assert scores["AR_100"] == scores["AP_100"] == 0
    assert scores["max_detections"] == 101
    assert any("AP_100 and AR_100" in note for note in scores.notes)


def test_equal_ids_of_two_splits_are_two_images():
    scores = evaluated(image_ids=[5, 9, 5]).compute()
    assert scores["num_images"] == 3


def test_numbers_that_are_none_are_an_error_that_counts_the_images():
    evaluator = evaluated()
    said = answers([(2, 2, 10, 10, 0, math.nan)], [(2, 2, math.inf, 10, 0, 0.4)])
    evaluator.update(said, batch_of([1, 2], [objects(), objects()]))
    with pytest.raises(NotFinite, match=r"not finite .* on 2 of 5 images"):
        evaluator.compute()


def test_without_any_object_nothing_can_be_measured():
    evaluator = TASK.evaluator(Model(), data_of())
    evaluator.update(answers([], []), batch_of([0, 1], [objects(), objects()]))
    with pytest.raises(InputError, match="none of the 2 images has an object"):
        evaluator.compute()


def test_classes_that_the_model_does_not_know_are_an_error_with_both_lists():
    data = data_of()
    data.classes = ("debris", "leaf")
    with pytest.raises(InputError, match=r"leaf\n.*cell, plate, debris\n.*debris, leaf"):
        TASK.evaluator(Model(), data)


def test_values_are_plain_numbers_for_json():
    scores = evaluated().compute()
    assert all(isinstance(value, float | int) for value in scores.values.values())
    assert "NaN" not in repr(scores.to_dict())
    assert callable(scores_of)
