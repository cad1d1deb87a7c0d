"""Scores of boxes and masks against plain loops and pycocotools; merging over processes; memory."""

from functools import cache

import numpy as np
import pytest
import torch

from tests.metrics.detections import IOUS, by_loop, by_pycocotools, corpus, of_rank, row
from tests.train.children import CONTEXT
from vitrail.metrics.detection import Annotated, DetectionMetrics, Found

CASES = {  # seed, corpus, kind
    "boxes": (0, {}, "box"),
    "large": (1, {"images": 8, "scale": 5.0}, "box"),
    "many": (2, {"images": 3, "classes": 2, "objects": 40, "answers": 450}, "box"),
    "masks": (3, {"images": 7, "masks": True, "largest": 4.0}, "mask"),
}


@cache
def measured(case):
    seed, how, kind = CASES[case]
    rows, classes = corpus(seed, **how), how.get("classes", 4)
    metrics = DetectionMetrics(classes, kinds=(kind,))
    for image in reversed(rows):  # whatever the order
        metrics.update(image, *rows[image])
    return rows, classes, kind, metrics.compute()


def mean(values):
    values = np.asarray(values)
    return values[~np.isnan(values)].mean() if (~np.isnan(values)).any() else np.nan


def assert_equal(found, want, cap):
    """want: {"AP": (K, T), ...} at `cap`."""
    ap, ar = want["AP"], want["AR"]
    assert found["AP"] == pytest.approx(mean(ap), abs=1e-6)
    assert found["AP50"] == pytest.approx(mean(ap[:, 0]), abs=1e-6)
    assert found["AP75"] == pytest.approx(mean(ap[:, 5]), abs=1e-6)
    assert found["AR"] == pytest.approx(mean(ar), abs=1e-6)
    for size in "sml":
        for name in (f"AP{size}", f"AR{size}"):
            assert found[name] == pytest.approx(mean(want[name]), abs=1e-6, nan_ok=True), name
    assert found["by_iou"] == pytest.approx([mean(ap[:, t]) for t in range(10)], abs=1e-6)
    for k, of in enumerate(found["per_class"]):
        each = [of[name] for name in ("AP", "AP50", "AP75", "AR")]
        wanted = [ap[k].mean(), ap[k, 0], ap[k, 5], ar[k].mean()]
        assert each == pytest.approx(wanted, abs=1e-6, nan_ok=True), k
    assert found["max_detections"] == cap


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_plain_loops_over_answers_and_objects(case):
    rows, classes, kind, found = measured(case)
    cap = max(100, *(len(f.scores) for f, _ in rows.values()))
    assert (cap > 100) == (case == "many")
    assert_equal(found[kind], by_loop(rows, classes, kind, cap), cap)
    for name, few in (("AR1", 1), ("AR10", 10)):
        want = by_loop(rows, classes, kind, few)["AR"]
        assert found[kind][name] == pytest.approx(mean(want), abs=1e-6)
    if case == "many":
        want = by_loop(rows, classes, kind, 100)
        assert found[kind]["AP_100"] == pytest.approx(mean(want["AP"]), abs=1e-6)
        assert found[kind]["AR_100"] == pytest.approx(mean(want["AR"]), abs=1e-6)
        assert found[kind]["AR"] > found[kind]["AR_100"] > found[kind]["AR10"]
    else:
        assert "AP_100" not in found[kind]
        assert "AR_100" not in found[kind]


@pytest.mark.parametrize("case", CASES)
def test_scores_are_those_of_pycocotools(case):
    pytest.importorskip("pycocotools")
    rows, classes, kind, found = measured(case)
    cap = max(100, *(len(f.scores) for f, _ in rows.values()))
    assert_equal(found[kind], by_pycocotools(rows, classes, kind, cap), cap)


def test_chunks_of_images_are_counted_together(monkeypatch):
    rows, classes, kind, found = measured("boxes")
    monkeypatch.setattr("vitrail.metrics.detection.CHUNK", 3)
    metrics = DetectionMetrics(classes, kinds=(kind,))
    for image, row_ in rows.items():
        metrics.update(image, *row_)
    assert repr(metrics.compute()) == repr(found)


def test_the_corpus_has_what_is_easily_counted_wrongly():
    rows, *_ = measured("boxes")
    assert any(len(t.labels) == 0 < len(f.labels) for f, t in rows.values())
    assert any(len(f.labels) == 0 < len(t.labels) for f, t in rows.values())
    assert sum(t.crowd.sum() for _, t in rows.values()) >= 3
    scores = np.concatenate([f.scores for f, _ in rows.values()])
    assert len(np.unique(scores)) < len(scores) / 5
    large = measured("large")[3]["box"]
    assert min(large[f"AP{size}"] for size in "sml") > 0
    assert 0.1 < measured("boxes")[3]["box"]["AP"] < 0.9


def test_precision_at_each_recall_gives_the_average_precision_back():
    found = measured("boxes")[3]["box"]
    for iou, name in (("0.50", "AP50"), ("0.75", "AP75")):
        assert len(found["precision"][iou]) == 101
        assert np.mean(found["precision"][iou]) == pytest.approx(found[name], abs=1e-9)
        assert (np.diff(found["precision"][iou]) <= 1e-12).all()
    assert found["by_iou"][IOUS.index(0.75)] == found["AP75"]


def test_objects_and_images_are_counted_without_crowds():
    rows, _, _, found = measured("boxes")
    assert found["num_images"] == len(rows) == 12
    want = [
        sum(int(((t.labels == k) & ~t.crowd).sum()) for _, t in rows.values()) for k in range(4)
    ]
    assert found["num_objects"] == want
    assert want[-1] == 0


def test_of_nothing_there_is_nothing_to_tell():
    found = DetectionMetrics(2).compute()
    assert np.isnan(found["box"]["AP"])
    assert np.isnan(found["box"]["by_iou"]).all()
    assert (found["num_images"], found["num_objects"]) == (0, [0, 0])
    crowd = Annotated(np.ones((1, 4)), np.array([1]), np.array([True]), np.ones(1))
    metrics = DetectionMetrics(2)
    metrics.update(3, Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int)), crowd)
    assert np.isnan(metrics.compute()["box"]["AP"])


def test_a_perfect_answer_has_every_score_one_and_boxes_and_masks_are_told_apart():
    rows = corpus(5, images=4, masks=True)
    metrics = DetectionMetrics(4, kinds=("box", "mask"))
    for image, (_, t) in rows.items():
        crowd = np.zeros(len(t.labels), bool)
        truth = Annotated(t.boxes, t.labels, crowd, t.areas, t.masks)
        scores = np.linspace(1, 0.5, len(t.labels))
        turned = t.masks[:1] * len(t.labels)  # boxes right, masks wrong
        metrics.update(image, Found(t.boxes, scores, t.labels, turned), truth)
    found = metrics.compute()
    assert found["box"]["AP"] == found["box"]["AR"] == pytest.approx(1)
    assert found["mask"]["AP"] < 0.7


def test_an_image_that_two_processes_had_counts_once(tmp_path):
    how = (str(tmp_path / "store"), str(tmp_path / "found"))
    children = [CONTEXT.Process(target=of_rank, args=(rank, *how)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    first, second = (torch.load(f"{tmp_path}/found.{r}", weights_only=False) for r in (0, 1))
    assert repr(first) == repr(second)
    assert first["num_images"] == 3
    assert first["num_objects"] == [3]
    assert first["box"]["AR"] == pytest.approx(2 / 3)


def test_images_are_ordered_by_their_names_where_scores_are_equal():
    """A wrong answer and a right one of one score: whoever comes first decides the precision."""
    found, truth = row(0, 0.5)
    wrong = Found(found.boxes + 50, found.scores, found.labels)
    nothing = Annotated(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0, bool), np.zeros(0))
    for right_one, ap in ((1, 1.0), (9, 0.5)):
        metrics = DetectionMetrics(1)
        metrics.update(5, wrong, nothing)
        metrics.update(right_one, found, truth)
        assert metrics.compute()["box"]["AP"] == pytest.approx(ap)
