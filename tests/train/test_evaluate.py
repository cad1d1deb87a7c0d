"""Evaluation equals a plain loop over files, with torchvision's transforms and scikit-learn's scores."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
)
from torch import nn
from torchvision import transforms

from tests.train.children import evaluate_many
from vitrail.classifiers import Classifier
from vitrail.data import open_data
from vitrail.models import ModelInfo, describe
from vitrail.tasks.task import Scores, label_map
from vitrail.train import evaluate as evaluation
from vitrail.train.evaluate import evaluate
from vitrail_runtime.errors import InputError, NotFinite
from vitrail_runtime.preprocess import Preprocessing

CLASSES = ("zebra", "ant", "yak", "bee", "cat")  # the model's: not in the order of folders
COUNTS = {"ant": 1, "bee": 7, "cat": 2, "zebra": 4}  # the data's: unbalanced, and no yak
CROP = Preprocessing(
    size=(20, 24),
    crop_pct=0.8,
    interpolation="bilinear",
    mean=(0.4, 0.5, 0.6),
    std=(0.3, 0.2, 0.25),
)
FIT = dataclasses.replace(CROP, size=(24, 24), mode="fit", mean=(0.1, 0.2, 0.3))


class Net(nn.Module):
    """Running statistics and dropout, which show the mode, and a mean over space, which shows the size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.sizes: list[tuple[int, ...]] = []

    def forward(self, images, record=None):
        self.sizes.append(tuple(images.shape))
        x = self.norm(self.conv(images)).relu()
        return self.drop(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))


def net() -> Classifier:
    torch.manual_seed(0)
    model = Classifier(Net(), nn.Linear(12, len(CLASSES)))
    model.backbone.norm.running_mean.uniform_(-0.5, 0.5)
    model.backbone.norm.running_var.uniform_(0.5, 2)
    model.head.weight.data *= 6
    describe(model, ModelInfo("net", {}, CLASSES, CROP))
    return model.train()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "set"
    rng, number = np.random.default_rng(0), 0
    for name, count in COUNTS.items():
        (root / "val" / name).mkdir(parents=True)
        for i in range(count):
            size = [(40, 30), (30, 40), (33, 33), (25, 50)][number % 4]
            low = rng.integers(0, 200)
            pixels = rng.integers(low, low + 55, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "val" / name / f"{i}.png")
            number += 1
    return root


def by_hand(folder, p: Preprocessing) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Keys, labels and float64 probabilities: each image alone, in the order of folders and files."""
    model = net().eval()
    normalise = transforms.Normalize(p.mean, p.std)
    keys, labels, rows = [], [], []
    for path in sorted((folder / "val").rglob("*.png")):
        image = Image.open(path)
        width, height = image.size
        if p.mode == "crop":  # as timm: the scale at which the image just covers size / crop_pct
            scale = max(
                math.floor(s / 0.8) / n for s, n in zip(p.size, (height, width), strict=True)
            )
            image = image.resize((round(width * scale), round(height * scale)), Image.BILINEAR)
            image = transforms.functional.center_crop(image, list(p.size))
        else:
            scale = 24 / max(width, height)
            image = image.resize((round(width * scale), round(height * scale)), Image.BILINEAR)
        with torch.no_grad():
            logits = model(normalise(transforms.functional.to_tensor(image))[None])
        rows.append(logits[0].double().softmax(0).numpy())
        keys.append(path.relative_to(folder).as_posix())
        labels.append(CLASSES.index(path.parent.name))
    return keys, np.array(labels), np.stack(rows)


def assert_equals_by_hand(scores: dict, folder, p: Preprocessing) -> None:
    keys, labels, probabilities = by_hand(folder, p)
    predicted, every = probabilities.argmax(1), range(len(CLASSES))
    assert 0 < accuracy_score(labels, predicted) < 1
    seen = scores.said
    assert list(seen["keys"]) == keys
    assert seen["labels"].tolist() == labels.tolist()
    assert seen["predicted"].tolist() == predicted.tolist()
    assert seen["probabilities"].dtype == np.float16
    np.testing.assert_allclose(seen["probabilities"], probabilities, rtol=1e-3, atol=1e-6)
    assert scores["confusion"] == confusion_matrix(labels, predicted, labels=every).tolist()
    assert scores["top1"] == pytest.approx(accuracy_score(labels, predicted))
    assert scores["top5"] == 1
    assert scores["num_images"] == len(labels) == sum(COUNTS.values())
    assert scores["loss"] == pytest.approx(log_loss(labels, probabilities, labels=every), abs=2e-6)
    assert scores["classes"] == list(scores["per_class"]) == list(CLASSES)
    theirs = precision_recall_fscore_support(labels, predicted, labels=every, zero_division=0)
    for name, *figures in zip(CLASSES, *theirs, strict=True):
        of = scores["per_class"][name]
        got = [of["precision"], of["recall"], of["f1"], of["support"]]
        assert got == pytest.approx(figures)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_scores_and_predictions_are_those_of_a_plain_loop_over_the_files(
    folder, batch_size, workers
):
    if workers and batch_size != 3:
        pytest.skip("one batch size is enough")
    model, data = net(), open_data(folder, "val")
    assert data.classes == tuple(COUNTS)
    scores = evaluate(model, data, batch_size=batch_size, workers=workers, predictions=True)
    assert_equals_by_hand(scores, folder, CROP)
    assert max(size[0] for size in model.backbone.sizes) == min(batch_size, 14)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_images_that_come_out_in_several_sizes_are_scored_each_as_if_alone(folder, batch_size):
    model = net()
    scores = evaluate(model, open_data(folder, "val"), FIT, batch_size=batch_size, predictions=True)
    assert_equals_by_hand(scores, folder, FIT)
    assert len({size[2:] for size in model.backbone.sizes}) == 4


def test_evaluation_is_in_full_precision_and_leaves_the_model_as_it_was(folder):
    model = net()
    model.backbone.norm.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modes = {name: m.training for name, m in model.named_modules()}
    types = set()
    model.head.register_forward_hook(lambda _, inputs, out: types.add((inputs[0].dtype, out.dtype)))
    scores = evaluate(model, open_data(folder, "val"), batch_size=5)
    assert types == {(torch.float32, torch.float32)}
    assert {name: m.training for name, m in model.named_modules()} == modes
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in model.parameters())
    assert scores.said is None


def test_two_processes_give_what_one_gives(folder, tmp_path):
    assert evaluate_many(net, folder, (None, FIT), 2, tmp_path / "scores") == [0, 0]
    for rank in range(2):
        rows = json.loads((tmp_path / f"scores-{rank}").read_text())
        for row, preprocessing in zip(rows, (CROP, FIT), strict=True):
            said = {name: np.array(v, kind) for name, (kind, v) in row["said"].items()}
            scores = Scores(row["values"], "top1", details=row["details"], said=said)
            assert_equals_by_hand(scores, folder, preprocessing)


def test_the_best_class_is_that_of_the_logits_where_half_precision_knows_no_difference(folder):
    model = net()
    model.head.weight.data.zero_()
    model.head.bias.data = torch.tensor([1.0, 1.00001, 0.0, 0.0, 1.000005])
    seen = evaluate(model, open_data(folder, "val"), predictions=True).said
    assert (seen["probabilities"][:, 0] == seen["probabilities"][:, 1]).all()
    assert (seen["predicted"] == 1).all()


def test_answers_that_are_no_numbers_are_refused(folder):
    model = net()
    model.head.bias.data[2] = math.nan
    with pytest.raises(NotFinite, match="on 14 of 14 images"):
        evaluate(model, open_data(folder, "val"))
    assert model.training


def test_labels_are_mapped_by_name():
    assert label_map(("b", "a"), ("a", "c", "b")) == [2, 0]


def test_classes_that_the_model_does_not_know_are_shown_with_both_lists():
    ours, theirs = [f"a{i}" for i in range(20)], [f"b{i}" for i in range(21)]
    with pytest.raises(InputError) as error:
        label_map([*ours[:2], "x", "y"], ours)
    first, model, data, todo = str(error.value).splitlines()
    assert first == "the data has classes that the model does not know: x, y"
    assert model == f"  the model's 20: {', '.join(ours)}"
    assert data == "  the data's 4: a0, a1, x, y"
    assert "rename the folders" in todo
    with pytest.raises(InputError, match=r"21: b0, .*, b19, \.\.\. \(21 in all\)"):
        label_map(theirs, ours)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_with_sharded_weights_every_process_runs_as_many_forwards(folder, monkeypatch, rank):
    """Three processes share 14 images in batches of 2: shares of 5, 5 and 4, so 3, 3 and 2 batches."""
    monkeypatch.setattr("torch.distributed.tensor.DTensor", nn.Parameter)
    model, data = net(), open_data(folder, "val")
    scores = evaluate(model, data, batch_size=2, rank=rank, world=3)
    assert scores["num_images"] == (5, 5, 4)[rank]
    counts = [size[0] for size in model.backbone.sizes]
    assert counts == [[2, 2, 1], [2, 2, 1], [2, 2, 1]][rank]
    assert {size[1:] for size in model.backbone.sizes} == {(3, 20, 24)}
    model.backbone.sizes.clear()
    monkeypatch.setattr("torch.distributed.tensor.DTensor", type(None))
    evaluate(model, data, batch_size=2, rank=rank, world=3)
    assert len(model.backbone.sizes) == (3, 3, 2)[rank]


def test_of_two_processes_with_sharded_weights_the_one_with_fewer_images_goes_along(
    folder, monkeypatch
):
    monkeypatch.setattr("torch.distributed.tensor.DTensor", nn.Parameter)
    model, data = net(), open_data(folder, "val").subset(range(9))  # shares of 5 and 4
    for rank in range(2):
        model.backbone.sizes.clear()
        evaluate(model, data, batch_size=2, rank=rank, world=2)
        assert len(model.backbone.sizes) == 3


def test_how_images_are_read_is_passed_on(folder, monkeypatch):
    seen = []

    def eval_batches(data, preprocessing, batch_size, **how):
        seen.append((batch_size, how))
        raise KeyError

    monkeypatch.setattr(evaluation, "eval_batches", eval_batches)
    model, data = net(), open_data(folder, "val")
    for how in ({}, {"batch_size": 7, "rank": 1, "world": 3, "workers": 2}):
        with pytest.raises(KeyError):
            evaluate(model, data, **how)
    assert seen == [
        (64, {"rank": 0, "world": 1, "workers": 0}),
        (7, {"rank": 1, "world": 3, "workers": 2}),
    ]
