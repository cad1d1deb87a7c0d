"""The task of segmentation: its scores against loops over pixels, its settings, its report."""

import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from tests.metrics.maps import by_loop
from vitrail.analysis import page
from vitrail.analysis.report import read_scores
from vitrail.data.legend import IGNORE
from vitrail.data.masks import class_weights
from vitrail.models import ModelInfo
from vitrail.tasks import section as blocks
from vitrail.tasks.section import Found, Images
from vitrail.tasks.segment import TASK, Settings, class_lookup, scores_of, seen
from vitrail.tasks.segment_report import CONFUSION as REMARK
from vitrail.tasks.segment_report import advice, class_table, sections
from vitrail_runtime.drawing import colour_of, overlay
from vitrail_runtime.errors import InputError, NotFinite
from vitrail_runtime.finish import finish_segmentation
from vitrail_runtime.preprocess import Geometry, Preprocessing, prepare

CLASSES = ("road", "sky", "tree", "car")
THEIRS = ("tree", "road", "car")  # the data's: in another order, and no sky
SIZES = [(12, 20), (9, 15), (30, 22)]  # of the originals
FIT = Preprocessing(size=(16, 24), mode="fit", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


class Model(nn.Module):
    """Classes by brightness."""

    task = "segment"
    classes = CLASSES
    preprocessing = FIT

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.info = ModelInfo("linear/x", {}, CLASSES, FIT)

    def forward_tensors(self, images):
        return {"logits": self.conv(images)}


class Truth:
    def __init__(self, maps: list[np.ndarray]) -> None:
        self.maps = maps

    def target(self, i, view):
        assert view is None
        return self.maps[i]


def examples(seed: int = 0) -> SimpleNamespace:
    rng = np.random.default_rng(seed)
    pixels = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    maps = [rng.choice([0, 1, 2, IGNORE], size, p=(0.5, 0.3, 0.1, 0.1)) for size in SIZES]
    maps = [m.astype(np.uint8) for m in maps]
    images = SimpleNamespace(read=lambda i: pixels[i], sizes=np.array(SIZES))
    keys = [f"val/{i}.png" for i in range(len(SIZES))]
    return SimpleNamespace(
        classes=THEIRS,
        images=images,
        truth=Truth(maps),
        keys=keys,
        broken=(),
        content_hash="f" * 64,
    )


class Counted(SimpleNamespace):
    def __len__(self) -> int:
        return len(SIZES)


def batches(data: SimpleNamespace, p: Preprocessing = FIT):
    """One image each, the last one first: whatever the order, rows tell where they belong."""
    for i in (2, 0, 1):
        values, geometry = prepare(data.images.read(i), p)
        yield SimpleNamespace(
            images=torch.from_numpy(values)[None],
            targets=(data.truth.maps[i],),
            indices=torch.tensor([i]),
            geometries=(geometry,),
        )


def evaluated(model: Model, data: SimpleNamespace, p: Preprocessing = FIT):
    evaluator = TASK.evaluator(model, data)
    with torch.no_grad():
        for batch in batches(data, p):
            evaluator.update(model.forward_tensors(batch.images), batch)
    return evaluator


def to_ours(ids: np.ndarray) -> np.ndarray:
    table = {0: 2, 1: 0, 2: 3, IGNORE: IGNORE}  # tree, road, car
    return np.vectorize(table.__getitem__)(ids)


def answers(model: Model, data: SimpleNamespace, p: Preprocessing = FIT):
    """(predicted, truth) at the original's size, and the mean loss at the model's, by plain loops."""
    pairs, loss, pixels = [], 0.0, 0
    for i in range(len(SIZES)):
        values, geometry = prepare(data.images.read(i), p)
        with torch.no_grad():
            logits = model.forward_tensors(torch.from_numpy(values)[None])["logits"]
        (found,) = finish_segmentation(logits.numpy(), [geometry], CLASSES)
        truth = to_ours(data.truth.maps[i])
        pairs.append((torch.from_numpy(found.segmentation), torch.from_numpy(truth)))
        log = F.log_softmax(logits[0].double(), 0)
        for y in range(logits.shape[2]):
            for x in range(logits.shape[3]):
                row = math.floor((y + 0.5 + geometry.offset[0]) / geometry.scale[0])
                column = math.floor((x + 0.5 + geometry.offset[1]) / geometry.scale[1])
                row, column = min(row, SIZES[i][0] - 1), min(column, SIZES[i][1] - 1)
                label = truth[row, column]
                if label != IGNORE:
                    loss, pixels = loss - float(log[label, y, x]), pixels + 1
    return pairs, loss / pixels


@pytest.mark.parametrize("mode", ["fit", "crop", "squash"])
def test_scores_are_those_of_the_maps_at_the_size_of_the_originals(mode):
    p = Preprocessing(size=(16, 24), mode=mode, crop_pct=0.8)
    model, data = Model(), examples()
    evaluator = evaluated(model, data, p)
    scores, (pairs, loss) = evaluator.compute(), answers(model, data, p)
    want = by_loop(pairs, num_classes=4)
    assert list(scores.values) == ["mIoU", "pixel_accuracy", "mean_accuracy", "loss", "num_images"]
    assert (scores.headline, scores.best) == ("mIoU", scores.values["mIoU"])
    for key in ("mIoU", "pixel_accuracy", "mean_accuracy"):
        assert scores.values[key] == pytest.approx(want[key], abs=1e-12)
    assert scores.values["loss"] == pytest.approx(loss, rel=1e-5)
    assert scores.values["num_images"] == 3
    assert scores.details["confusion"] == want["confusion"]
    assert scores.details["classes"] == list(CLASSES)
    for name, of in zip(CLASSES, want["per_class"], strict=True):
        told = {k: None if math.isnan(v) else v for k, v in of.items()}
        assert scores.details["per_class"][name] == pytest.approx(told)
    assert scores.details["per_class"]["sky"]["accuracy"] is None
    (table,) = scores.tables
    assert table.header == ("class", "pixels", "IoU", "accuracy")
    assert [row[0] for row in table.rows] == list(CLASSES)
    assert table.rows[0][1:] == tuple(
        want["per_class"][0][k] for k in ("pixels", "iou", "accuracy")
    )
    assert table.rows[1][3] == "none"
    said = evaluator.said()
    assert said["indices"].tolist() == [2, 0, 1]
    for row, i in enumerate(said["indices"]):
        alone = by_loop([pairs[i]], num_classes=4)
        assert said["mIoU"][row] == pytest.approx(alone["mIoU"])
        assert said["pixel_accuracy"][row] == pytest.approx(alone["pixel_accuracy"])


def test_a_batch_of_several_images_counts_each_with_its_own_geometry_and_map():
    model, data = Model(), examples()
    p = Preprocessing(size=(16, 24), mode="squash")
    parts = list(batches(data, p))
    whole = SimpleNamespace(
        images=torch.cat([b.images for b in parts]),
        targets=tuple(b.targets[0] for b in parts),
        indices=torch.cat([b.indices for b in parts]),
        geometries=tuple(b.geometries[0] for b in parts),
    )
    evaluator = TASK.evaluator(model, data)
    with torch.no_grad():
        evaluator.update(model.forward_tensors(whole.images), whole)
    alone = evaluated(model, data, p)
    one, other = evaluator.compute(), alone.compute()
    assert one.values == pytest.approx(other.values)
    assert one.details == other.details
    for key, values in alone.said().items():
        np.testing.assert_array_equal(evaluator.said()[key], values)


def test_notes_tell_the_commonest_confusions_and_what_is_left_out_of_the_mean():
    model, data = Model(), examples()
    with torch.no_grad():
        model.conv.bias[1] = -1e4  # sky is never said
    scores = evaluated(model, data).compute()
    assert scores.notes[-1] == "left out of the mean, neither in the masks nor predicted: sky"
    confusion = np.array(scores.details["confusion"])
    worst = max(
        (confusion[t, p], CLASSES[t], CLASSES[p]) for t in range(4) for p in range(4) if t != p
    )
    assert scores.notes[0] == f"{worst[1]} taken for {worst[2]}: {worst[0]:,} pixels"
    assert scores.details["per_class"]["sky"] == {"iou": None, "accuracy": None, "pixels": 0}


def test_a_class_that_is_only_predicted_stays_in_the_mean_and_what_is_right_is_no_confusion():
    truth = torch.tensor([0] * 9 + [3])
    said = torch.tensor([0] * 8 + [1, 3])
    found = by_loop([(said, truth)], num_classes=4) | {"loss": 0.5, "num_images": 1}
    scores = scores_of(found, CLASSES)
    assert scores.notes == (
        "road taken for sky: 1 pixels",
        "left out of the mean, neither in the masks nor predicted: tree",
    )
    assert scores.details["per_class"]["sky"] == {"iou": 0.0, "accuracy": None, "pixels": 0}
    assert advice(scores.to_dict(), np.array(found["confusion"]), CLASSES)[2] == (
        "Not measured: no pixel of 'sky', 'tree' in this split."
    )


def test_an_image_that_is_all_ignored_counts_as_an_image_and_in_no_score():
    model, data = Model(), examples()
    data.truth.maps[1][:] = IGNORE
    evaluator = evaluated(model, data)
    scores, (pairs, loss) = evaluator.compute(), answers(model, data)
    assert scores["mIoU"] == pytest.approx(by_loop(pairs, num_classes=4)["mIoU"])
    assert (scores["num_images"], scores["loss"]) == (3, pytest.approx(loss, rel=1e-5))
    assert np.isnan(evaluator.said()["mIoU"]).tolist() == [False, False, True]
    for m in data.truth.maps:
        m[:] = IGNORE
    with pytest.raises(
        InputError, match=r"none of the 3 images has a pixel with a class.*data show"
    ):
        evaluated(model, data).compute()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_answers_that_are_no_numbers_are_refused_with_how_many_images_have_them(bad):
    model, data = Model(), examples()
    evaluator = TASK.evaluator(model, data)
    for batch in batches(data):
        logits = model.forward_tensors(batch.images)["logits"].detach()
        if batch.indices[0] == 0:
            logits[0, 1, 2, 3] = bad
        evaluator.update({"logits": logits}, batch)
    with pytest.raises(NotFinite, match=r"not finite .* on 1 of 3 images; .*--lr"):
        evaluator.compute()


def test_classes_are_matched_by_name_and_strangers_shown():
    lookup = class_lookup(THEIRS, CLASSES)
    assert (lookup[:3].tolist(), lookup[IGNORE]) == ([2, 0, 3], IGNORE)
    with pytest.raises(InputError, match=r"does not know: lake\n.*4: road"):
        class_lookup(("road", "lake"), CLASSES)


def test_the_input_shows_the_nearest_pixel_of_the_original():
    truth = np.arange(24, dtype=np.uint8).reshape(4, 6)
    assert seen(truth, Geometry((4, 6), (1, 1), (0, 0)), (4, 6)).tolist() == truth.tolist()
    twice = seen(truth, Geometry((4, 6), (2, 2), (0, 0)), (8, 12))
    assert twice.tolist() == truth.repeat(2, 0).repeat(2, 1).tolist()
    half = seen(truth, Geometry((4, 6), (0.5, 0.5), (0, 0)), (2, 3))
    assert half.tolist() == truth[1::2, 1::2].tolist()
    cut = seen(truth, Geometry((4, 6), (1, 1), (1, 2)), (2, 3))
    assert cut.tolist() == truth[1:3, 2:5].tolist()


def test_weights_of_classes_reach_the_model_where_they_are_asked_for():
    truth = SimpleNamespace(counts=np.array([[90, 10, 0], [50, 0, 0]]))
    assert TASK.model_options(Settings(), truth) == {"class_weights": None}
    told = TASK.model_options(Settings(class_weights="balanced"), truth)["class_weights"]
    assert told == tuple(class_weights(truth.counts).tolist())
    assert told[1] > told[0] > told[2] == 0
    with pytest.raises(InputError, match="balance"):
        Settings(class_weights="balance")
    assert (TASK.name, TASK.truth, TASK.headline) == ("segment", "class maps", "mIoU")
    assert TASK.options(Settings()) == {}
    assert TASK.multiple(Settings()) == 1
    assert TASK.weights(Settings(), truth) is None
    batch = object()
    assert TASK.prepare(batch, (0, 0, 0), Settings(), 3) is batch


def found(model: Model, data: SimpleNamespace) -> Found:
    evaluator = evaluated(model, data)
    said = evaluator.said()
    order = np.argsort(said["indices"])
    rows = {k: v[order] for k, v in said.items() if k != "indices"}
    counted = Counted(**vars(data))

    def explain(pixels, label):
        raise AssertionError("a segmenter's report asks the model itself")

    scores = evaluator.compute().to_dict()
    return Found(model, counted, rows, "test", explain, scores, advice=("said of the curves",))


def test_the_report_shows_scores_by_class_confusions_and_the_worst_images():
    model, data = Model(), examples()
    data.truth.maps[1][:] = IGNORE
    about = found(model, data)
    got = sections(about)
    assert [(s.title, s.opening) for s in got] == [
        ("", True),
        ("What to look at first", True),
        ("Per class", False),
        ("Confusion of classes", False),
        ("Worst images", False),
        ("Images of test", False),
    ]
    size = sum(p.numel() for p in model.parameters()) / 1e6
    assert list(got[0].blocks[0].items) == [
        (f"{about.scores['mIoU']:.3f}", "mean IoU"),
        (f"{about.scores['pixel_accuracy']:.3f}", "pixel accuracy"),
        (f"{about.scores['mean_accuracy']:.3f}", "mean accuracy of classes"),
        (f"{size:.2f} M", "parameters"),
    ]
    assert got[1].blocks[0].items[-1] == "said of the curves"
    images = got[4].blocks[-1]
    assert isinstance(images, Images)
    assert images.columns == 3
    order = [i for i in np.argsort(about.said["mIoU"]) if i != 1]  # that has no score
    assert len(images.pairs) == 6
    for n, i in enumerate(order):
        (image, caption), (truth, said_truth), (said, said_said) = images.pairs[3 * n : 3 * n + 3]
        assert caption == f"mean IoU {about.said['mIoU'][i]:.2f}\nval/{i}.png"
        assert (said_truth, said_said) == ("truth", "prediction")
        pixels = data.images.read(i)
        assert np.array_equal(np.asarray(image), pixels)
        predicted, true = answers(model, data)[0][i]
        assert np.array_equal(np.asarray(said), np.asarray(overlay(image, predicted.numpy())))
        true = true.numpy().astype(int)
        shown = np.asarray(truth)
        assert np.array_equal(shown[true == IGNORE], pixels[true == IGNORE]), "nothing to say there"
        assert np.array_equal(shown, np.asarray(overlay(image, np.where(true == IGNORE, -1, true))))
    labelled = sum(int((m != IGNORE).sum()) for m in data.truth.maps)
    text = "".join(page.render(b) for s in got for b in s.blocks)
    assert f"<td>labelled pixels</td><td>{labelled:,}</td>" in text
    assert ">sky</text>" in text, "the legend names every colour"


def test_a_report_without_scores_says_how_to_get_them():
    about = replace(found(Model(), examples()), scores={"mIoU": 0.5})
    for without in (about, replace(about, scores=None)):
        with pytest.raises(
            InputError, match=r"scores of linear/x on test are not known.*vitrail eval"
        ):
            sections(without)


def test_scores_of_a_model_folder_are_read_and_nothing_of_a_damaged_file(tmp_path):
    path = tmp_path / "metrics.json"
    assert read_scores(path) == {}
    for text, expected in (('{"mIoU": 0.5}', {"mIoU": 0.5}), ('{"mIoU": 0.', {}), ("[1]", {})):
        path.write_text(text)
        assert read_scores(path) == expected


def test_an_overlay_mixes_the_colour_of_the_class_half_and_half():
    image = Image.new("RGB", (3, 1), (100, 50, 200))
    drawn = np.asarray(overlay(image, np.array([[0, -1, 5]])), int)
    for x, label in ((0, 0), (2, 5)):
        want = (np.array([100, 50, 200]) + colour_of(label)) / 2
        assert abs(drawn[0, x] - want).max() <= 1
    assert drawn[0, 1].tolist() == [100, 50, 200]


def scores_by(confusion: list[list[int]], names=CLASSES) -> dict:
    counts = np.array(confusion)
    hits, truth = counts.diagonal(), counts.sum(1)
    union = truth + counts.sum(0) - hits
    per_class = {
        name: {
            "iou": hits[k] / union[k] if union[k] else None,
            "accuracy": hits[k] / truth[k] if truth[k] else None,
            "pixels": int(truth[k]),
        }
        for k, name in enumerate(names)
    }
    return {"per_class": per_class, "mIoU": 0.5, "pixel_accuracy": 0.6}


CONFUSION = [[900, 0, 100, 0], [0, 0, 0, 0], [50, 0, 50, 0], [300, 0, 0, 100]]


def test_the_advice_names_the_weakest_class_the_confusion_and_what_was_not_measured():
    scores = scores_by(CONFUSION)
    said = advice(scores, np.array(CONFUSION), CLASSES)
    assert said == [
        "Weakest class: 'tree' with an IoU of 0.25 (100 pixels).",
        "Most confused: 'car' taken for 'road', 300 pixels, 75% of the class.",
        "Not measured: no pixel of 'sky' in this split.",
    ]
    assert (
        "rare classes are missed"
        in advice(scores | {"pixel_accuracy": 0.71}, np.array(CONFUSION), CLASSES)[-1]
    )
    right = np.diag([5, 5, 5, 5])
    (only,) = advice(scores_by(right.tolist()), right, CLASSES)
    assert only.startswith("Weakest class: 'road' with an IoU of 1.00")


def test_the_table_has_the_weakest_class_first_and_the_unmeasured_last():
    rows = class_table(scores_by(CONFUSION), CLASSES).rows
    assert [row[0] for row in rows] == ["tree", "car", "road", "sky"]
    assert rows[0] == ("tree", 100, "6.7%", 0.25, 0.5)
    assert rows[2] == ("road", 1000, "66.7%", pytest.approx(900 / 1350), 0.9)
    assert rows[3] == ("sky", 0, "0.0%", "none", "none")


def confusion_section(confusion, names):
    return blocks.confusion_section("Confusion of classes", confusion, names, "pixels", REMARK)


def test_a_confusion_of_classes_is_told_in_per_cent_and_of_many_by_the_worst(monkeypatch):
    figures = []
    monkeypatch.setattr(page, "svg", lambda fig: figures.append(fig) or "<svg>")
    section = confusion_section(np.array(CONFUSION), CLASSES)
    for block in section.blocks:
        page.render(block)
    (axes,) = figures[0].axes
    assert {t.get_position(): t.get_text() for t in axes.texts} == {
        (0, 0): "90",
        (2, 0): "10",
        (0, 2): "50",
        (2, 2): "50",
        (0, 3): "75",
        (3, 3): "25",
    }
    count = 31
    many = np.eye(count, dtype=int)
    many[4, 7] = 1234
    section = confusion_section(many, tuple(f"c{i}" for i in range(count)))
    assert section.title == "Most frequent confusions"
    cells = re.findall("<td.*?>(.*?)</td>", page.render(section.blocks[0]))
    assert cells == ["c4", "c7", "1,234"]
    assert confusion_section(np.eye(30), tuple(map(str, range(30)))).title == "Confusion of classes"
