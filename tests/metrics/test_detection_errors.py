"""Kinds of mistakes against cases laid out by hand; their cost against COCO's AP50 of repaired answers."""

import numpy as np
import pytest

from tests.metrics.detections import corpus
from vitrail.metrics.detection import Annotated, DetectionMetrics, Found
from vitrail.metrics.detection_errors import IGNORED, KINDS, RIGHT, error_breakdown, mistakes

CLASS, PLACE, BOTH, DOUBLE, BACK = (
    KINDS.index(k) for k in ("classification", "localisation", "both", "duplicate", "background")
)


def truth_of(*objects, crowd=()):
    """(x, label): boxes of 10 x 10 at x."""
    boxes = np.array([[x, 0, x + 10, 10] for x, _ in objects], np.float32).reshape(-1, 4)
    labels = np.array([label for _, label in objects], np.int64)
    flags = np.isin(np.arange(len(objects)), crowd)
    return Annotated(boxes, labels, flags, np.full(len(objects), 100.0))


def answers(*said):
    boxes = np.array([[x, 0, x + 10, 10] for x, _ in said], np.float32).reshape(-1, 4)
    return boxes, np.array([label for _, label in said], np.int64)


# Boxes of 10 pixels, shifted by s, overlap by (10 - s) / (10 + s): 7/13 at 3, 1/3 at 5, 1/9 at 8, 1/19 at 9.
@pytest.mark.parametrize(
    ("said", "kind", "target"),
    [
        ((0, 0), RIGHT, 0),
        ((3, 0), RIGHT, 0),
        ((5, 0), PLACE, 0),
        ((8, 0), PLACE, 0),  # 1/9: more than background
        ((9, 0), BACK, -1),  # 1/19
        ((60, 0), BACK, -1),
        ((0, 1), CLASS, 0),
        ((3, 1), CLASS, 0),
        ((5, 1), BOTH, -1),
        ((8, 1), BOTH, -1),
        ((9, 1), BACK, -1),
    ],
)
def test_one_answer_beside_one_object(said, kind, target):
    kinds, targets = mistakes(*answers(said), truth_of((0, 0)))
    assert (kinds.tolist(), targets.tolist()) == ([kind], [target])


def test_of_two_answers_on_an_object_the_better_one_is_right_and_the_other_a_duplicate():
    kinds, targets = mistakes(*answers((3, 0), (0, 0), (5, 0)), truth_of((0, 0)))
    assert kinds.tolist() == [RIGHT, DOUBLE, PLACE]
    assert targets.tolist() == [0, -1, -1]  # nobody can find it again


def test_an_answer_takes_the_object_that_it_overlaps_most_and_that_is_free():
    kinds, targets = mistakes(*answers((2, 0), (1, 0)), truth_of((0, 0), (3, 0)))
    assert kinds.tolist() == [RIGHT, RIGHT]
    assert targets.tolist() == [1, 0]


def test_a_wrong_place_comes_before_a_wrong_class():
    """It overlaps an object of its class somewhat, and one of another class well."""
    kinds, targets = mistakes(*answers((5, 0)), truth_of((0, 0), (5, 1)))
    assert (kinds.tolist(), targets.tolist()) == ([PLACE], [0])


def test_a_duplicate_comes_before_a_wrong_class():
    kinds, _ = mistakes(*answers((0, 0), (0, 0)), truth_of((0, 0), (0, 1)))
    assert kinds.tolist() == [RIGHT, DOUBLE]


def test_within_a_crowd_of_its_class_an_answer_is_no_mistake_and_finds_nothing():
    truth = truth_of((0, 0), (40, 0), crowd=[1])
    kinds, targets = mistakes(*answers((45, 0), (46, 0), (45, 1), (0, 0)), truth)
    assert kinds.tolist() == [IGNORED, BACK, BACK, RIGHT]  # half of it inside, less, another class
    assert targets.tolist() == [-1, -1, -1, 0]


def test_without_objects_all_is_background_and_without_answers_there_is_no_mistake():
    kinds, targets = mistakes(*answers((0, 0), (5, 1)), truth_of())
    assert (kinds.tolist(), targets.tolist()) == ([BACK, BACK], [-1, -1])
    assert len(mistakes(*answers(), truth_of((0, 0)))[0]) == 0


def test_an_object_is_missed_unless_a_wrong_class_or_place_would_have_found_it():
    truth = truth_of((0, 0), (100, 0), (200, 1), (300, 1), (400, 0), crowd=[4])
    boxes, labels = answers((0, 0), (105, 0), (200, 0), (500, 0))
    found = Found(boxes, np.array([0.9, 0.8, 0.7, 0.6]), labels)
    errors = error_breakdown([(found, truth)], 2, 100)
    assert {kind: of["count"] for kind, of in errors.items()} == {
        "classification": 1,
        "localisation": 1,
        "both": 0,
        "duplicate": 0,
        "background": 1,
        "missed": 1,
    }
    # Class 0: right, wrong, wrong, wrong of 2 objects. Class 1: nothing of 2 objects.
    half = 51 / 101  # recalls 0 to 0.5
    now = half / 2
    put_right = {
        "classification": (half + half) / 2,
        "localisation": 1 / 2,
        "background": now,
        "missed": (half + 0) / 2,
    }
    for kind, ap in put_right.items():
        assert errors[kind]["dAP50"] == pytest.approx(ap - now), kind


def test_missed_objects_cost_the_recall_that_they_take():
    boxes, labels = answers((0, 0))
    found = Found(boxes, np.array([0.9]), labels)
    errors = error_breakdown([(found, truth_of((0, 0), (100, 0)))], 1, 100)
    assert errors["missed"] == {"count": 1, "dAP50": pytest.approx(1 - 51 / 101)}


def test_of_two_that_could_be_put_right_the_better_one_finds_the_object_and_the_other_goes():
    boxes, labels = answers((5, 0), (0, 1), (4, 0))
    for scores in ([0.9, 0.8, 0.7], [0.7, 0.8, 0.9]):
        found = Found(boxes, np.array(scores), labels)
        errors = error_breakdown([(found, truth_of((0, 0)))], 2, 100)
        assert errors["localisation"]["count"] == 2
        assert errors["localisation"]["dAP50"] == pytest.approx(1)
        assert errors["classification"]["dAP50"] == 0  # another answer is better
        assert errors["missed"]["count"] == 0
    better = Found(boxes, np.array([0.7, 0.9, 0.8]), labels)
    errors = error_breakdown([(better, truth_of((0, 0)))], 2, 100)
    assert errors["classification"]["dAP50"] == pytest.approx(1)
    assert errors["localisation"]["dAP50"] == 0


def test_only_so_many_answers_of_an_image_count():
    boxes, labels = answers((50, 0), (0, 0), (70, 0))
    found = Found(boxes, np.array([0.5, 0.9, 0.7]), labels)
    counts = [
        error_breakdown([(found, truth_of((0, 0)))], 1, cap)["background"]["count"]
        for cap in (1, 2, 3)
    ]
    assert counts == [0, 1, 2]


def test_costs_are_differences_of_the_ap50_that_coco_gives():
    """Answers put right one kind at a time, and measured by the library."""
    rows = corpus(11, images=20, objects=14, answers=40)
    errors = DetectionMetrics(4)
    for image, row in rows.items():
        errors.update(image, *row)
    measured = errors.compute()
    for name in KINDS[:-1]:
        repaired = DetectionMetrics(4)
        for image, (found, truth) in rows.items():
            repaired.update(image, put_right(found, truth, KINDS.index(name)), truth)
        ap = repaired.compute()["box"]["AP50"]
        cost = measured["errors"][name]["dAP50"]
        assert cost == pytest.approx(ap - measured["box"]["AP50"], abs=1e-6), name
    assert sum(measured["errors"][name]["count"] > 2 for name in KINDS) >= 5


def put_right(found, truth, number):
    """The answers once an oracle corrected those of one kind: gone, or on their object with its class."""
    order = np.argsort(-found.scores, kind="stable")
    boxes, labels = found.boxes[order].copy(), found.labels[order].copy()
    kinds, targets = mistakes(boxes, labels, truth)
    keep, seen = np.ones(len(order), bool), set()
    for i, (kind, target) in enumerate(zip(kinds, targets, strict=True)):
        first = kind >= 0 and target >= 0 and target not in seen
        if kind >= 0 and target >= 0:
            seen.add(target)
        if kind == number:
            keep[i] = first
            if first:
                boxes[i], labels[i] = truth.boxes[target], truth.labels[target]
    return Found(boxes[keep], found.scores[order][keep], labels[keep])
