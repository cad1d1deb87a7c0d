"""Scores of class maps equal a loop over pixels, torchmetrics' Jaccard index and scikit-learn."""

import json
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score
from torchmetrics.functional.classification import multiclass_jaccard_index

from tests.metrics.maps import IGNORE, K, by_loop, count, maps
from tests.train.children import CONTEXT
from vitrail.metrics import SegmentationMetrics


def computed(*pairs: tuple[torch.Tensor, torch.Tensor], num_classes: int = K) -> dict:
    metrics = SegmentationMetrics(num_classes)
    for predicted, truth in pairs:
        metrics.update(predicted, truth)
    return metrics.compute()


def assert_same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    assert got["confusion"] == want["confusion"]
    for key in ("mIoU", "pixel_accuracy", "mean_accuracy", "num_pixels"):
        assert got[key] == pytest.approx(want[key], abs=1e-12, nan_ok=True), key
    for one, other in zip(got["per_class"], want["per_class"], strict=True):
        assert one == pytest.approx(other, abs=1e-12, nan_ok=True)


def test_scores_are_those_of_a_loop_over_the_pixels_of_all_images():
    pairs = [maps(0), maps(1, (5, 40)), maps(2, (1, 3))]
    got = computed(*pairs)
    assert_same(got, by_loop(pairs))
    assert got["mIoU"] != pytest.approx(np.mean([computed(pair)["mIoU"] for pair in pairs]))


def test_scores_are_torchmetrics_jaccard_and_scikit_learns():
    predicted, truth = maps(3)
    got = computed((predicted, truth))
    keep = truth != IGNORE
    p, t, classes = predicted[keep].numpy(), truth[keep].numpy(), [0, 1, 2, 4, 5]
    iou = np.array([c["iou"] for c in got["per_class"]])
    np.testing.assert_allclose(iou[classes], jaccard_score(t, p, labels=classes, average=None))
    assert np.isnan(iou[3])
    theirs = multiclass_jaccard_index(predicted.long()[keep], truth.long()[keep], K)
    assert got["mIoU"] == pytest.approx(float(theirs), abs=1e-6)
    assert got["pixel_accuracy"] == pytest.approx(accuracy_score(t, p))
    accuracy = [c["accuracy"] for c in got["per_class"]]
    shown = [0, 1, 2, 4]
    recall = np.array([(p == t)[t == k].mean() for k in shown])
    np.testing.assert_allclose([accuracy[k] for k in shown], recall)
    assert got["mean_accuracy"] == pytest.approx(recall.mean())
    assert got["confusion"] == confusion_matrix(t, p, labels=range(K)).tolist()


def test_a_class_counts_in_the_mean_where_it_is_shown_or_predicted_and_else_it_does_not():
    truth = torch.tensor([[0, 0, 1, 1]])
    perfect = computed((truth, truth), num_classes=4)
    assert (perfect["mIoU"], perfect["mean_accuracy"]) == (1.0, 1.0)
    assert [math.isnan(c["iou"]) for c in perfect["per_class"]] == [False, False, True, True]
    said = computed((torch.tensor([[0, 0, 1, 2]]), truth), num_classes=4)
    assert [c["iou"] for c in said["per_class"]][:3] == [1.0, 0.5, 0.0]
    assert said["mIoU"] == pytest.approx(0.5), "a class that is predicted and not there is wrong"
    assert said["mean_accuracy"] == pytest.approx(0.75), "what is not there has no accuracy"
    assert math.isnan(said["per_class"][2]["accuracy"])


def test_what_is_predicted_on_ignored_pixels_does_not_count():
    predicted, truth = maps(4)
    other = predicted.clone()
    other[truth == IGNORE] = 3
    assert_same(computed((other, truth)), computed((predicted, truth)))


def test_a_pixel_that_the_model_did_not_see_is_a_wrong_one_of_no_class():
    predicted, truth = maps(5)
    predicted = predicted.to(torch.int64)
    predicted[:, :4] = -1
    got = computed((predicted, truth))
    assert_same(got, by_loop([(predicted, truth)]))
    assert sum(map(sum, got["confusion"])) < got["num_pixels"]
    one = torch.tensor([[0, -1]]), torch.tensor([[0, 0]])
    assert computed(one)["per_class"][0] == {"iou": 0.5, "accuracy": 0.5, "pixels": 2}


def test_each_image_has_its_own_scores_which_change_nothing_of_the_sum():
    metrics, pairs = SegmentationMetrics(K), [maps(6), maps(7, (2, 50))]
    for pair in pairs:
        assert_same(metrics.update(*pair), by_loop([pair]))
    assert_same(metrics.compute(), by_loop(pairs))


def test_an_image_without_labelled_pixels_adds_nothing():
    nothing = torch.full((3, 4), IGNORE, dtype=torch.uint8)
    said = SegmentationMetrics(K).update(torch.zeros(3, 4), nothing)
    assert said["num_pixels"] == 0
    assert all(math.isnan(said[key]) for key in ("mIoU", "pixel_accuracy", "mean_accuracy"))
    assert_same(computed((torch.zeros(3, 4), nothing), maps(8)), computed(maps(8)))


def test_255_classes_are_counted_beside_the_pixels_that_are_ignored():
    truth = torch.tensor([[0, 254, 254, IGNORE]], dtype=torch.uint8)
    said = torch.tensor([[0, 254, -1, 254]])
    got = computed((said, truth), num_classes=255)
    assert got["num_pixels"] == 3
    assert got["per_class"][254] == {"iou": 0.5, "accuracy": 0.5, "pixels": 2}
    assert got["mIoU"] == pytest.approx(0.75)


def test_more_pixels_than_single_precision_can_count_are_counted():
    metrics = SegmentationMetrics(2)
    metrics.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    metrics.counts.confmat[0, 0] += 2**24  # as after many images
    metrics.update(torch.tensor([0]), torch.tensor([0]))
    assert metrics.compute()["confusion"][0] == [2**24 + 2, 1]


@pytest.mark.parametrize(
    ("predicted", "truth", "said"),
    [
        ([0, 1], [0, 2], r"classes below 2.*\(2,\) with \[0, 2\]"),
        ([0, 1, 1], [0, 1], r"one shape .* \(2,\) .* prediction \(3,\)"),
    ],
)
def test_maps_that_do_not_fit_are_refused(predicted, truth, said):
    with pytest.raises(ValueError, match=said):
        SegmentationMetrics(2).update(torch.tensor(predicted), torch.tensor(truth))
    with pytest.raises(AssertionError):
        SegmentationMetrics(2).update(torch.tensor([2]), torch.tensor([0]))


def test_two_processes_count_what_one_counts(tmp_path):
    how = (str(tmp_path / "store"), str(tmp_path / "out"))
    children = [CONTEXT.Process(target=count, args=(rank, 2, *how)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    pairs = [maps(seed, (7 + seed, 9)) for seed in range(3)]
    for rank in range(2):
        said, got = json.loads((tmp_path / f"out-{rank}").read_text())
        assert_same(got, by_loop(pairs))
        assert len(said) == 2 - rank, "the first has one image more"
        for one, pair in zip(said, pairs[rank::2], strict=True):
            assert_same(one, by_loop([pair]))
