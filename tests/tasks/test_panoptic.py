"""The panoptic task: segments against the paper's formula, memory, and what its report says."""

import itertools
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.data.panoptics import IDS, maps, panoptic_set
from vitrail.data import open_data
from vitrail.data.batch import Dense
from vitrail.data.panoptic import Segments
from vitrail.metrics.panoptic import PanopticMetrics, counted
from vitrail.tasks.panoptic import TASK, Evaluator, scores_of
from vitrail.tasks.panoptic_report import advice, class_table, sections, worst_images
from vitrail.tasks.section import Found
from vitrail.tasks.task import fitting, task_of, task_of_model
from vitrail_runtime.errors import InputError, NotFinite
from vitrail_runtime.preprocess import Geometry, Preprocessing

CLASSES = ("sky", "dot", "cell")  # of the model; the data has dot, cell, sky
SIZES = ((20, 30), (24, 18), (20, 30))


class Model(torch.nn.Module):
    """Says of every image the masks (S, h, w) that it is given, in the order in which it is asked."""

    task = "panoptic"
    classes = CLASSES
    stuff = (0,)
    preprocessing = Preprocessing(size=(20, 20), mode="squash")

    def __init__(self, answers=()):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.answers = itertools.cycle(answers) if answers else None

    def forward_tensors(self, images):
        rows = [next(self.answers) for _ in images]
        return {k: torch.cat([row[k] for row in rows]) for k in rows[0]}


def answer(masks, labels, scores=None, stuff=(0,), size=(20, 20)):
    n = len(labels)
    return {
        "masks": torch.as_tensor(np.asarray(masks), dtype=torch.float32)[None],
        "labels": torch.tensor([labels]),
        "scores": torch.tensor([scores or [0.99 - 0.01 * i for i in range(n)]]),
        "count": torch.tensor([n]),
        "stuff": torch.tensor([[k in stuff for k in range(3)]]),
        "input_size": torch.tensor([size]),
    }


def evaluated(root, answers, model=None):
    """Masks of the original's size, which the model sees as it is."""
    data = open_data(root, "all")
    model = model or Model()
    evaluator = TASK.evaluator(model, data)
    for i, one in enumerate(answers):
        size = SIZES[i]
        one["input_size"] = torch.tensor([size])
        batch = Dense(
            torch.zeros(1, 3, *size),
            (data.truth.target(i, None),),
            torch.tensor([i]),
            geometries=(Geometry(size, (1.0, 1.0), (0, 0)),),
        )
        evaluator.update(one, batch)
    return evaluator


def shapes():
    """What is true, as masks by name; and a cell that lies a column too far right."""
    first, second, third = maps()
    moved = np.roll(first == IDS["one"], 1, 1)
    return first, second, third, moved


def test_quality_is_the_papers_by_class_and_for_things_and_stuff(tmp_path):
    first, second, third, moved = shapes()
    dot = np.roll(first == IDS["two"], 3, 1)
    sky = (first == IDS["sky"]) & ~moved & ~dot
    answers = [
        answer([sky | (first == IDS["crowd"]), moved, dot], [0, 2, 1]),
        answer([second > 0], [0]),
        answer([third > 0, third == 0], [2, 0]),  # a dot is taken for a cell
    ]
    got = evaluated(panoptic_set(tmp_path), answers).compute()
    cell = 15 / 25  # four columns of five rows, one of them beside
    # What nobody says goes to the first answer: what cell and dot have left. That of the crowd is no matter.
    left = ((first == IDS["one"]) & ~moved) | ((first == IDS["two"]) & ~dot)
    sky_sq = (sky.sum() / ((first == IDS["sky"]) | left).sum() + 1) / 2
    assert got.headline == "PQ"
    assert got["PQ_stuff"] == got["SQ_stuff"] == pytest.approx(sky_sq)
    per_class = got["per_class"]
    assert list(per_class) == list(CLASSES)
    # Cell: one found, one wrong; dot: two missed and one wrong.
    rq = 1 / (1 + 0.5)
    want = {"segments": 1, "found": 1, "wrong": 1, "PQ": cell * rq, "SQ": cell, "RQ": rq}
    assert per_class["cell"] == pytest.approx(want)
    none = {"segments": 2, "found": 0, "wrong": 1, "PQ": 0, "SQ": 0, "RQ": 0}
    assert per_class["dot"] == pytest.approx(none)
    assert per_class["sky"]["found"] == per_class["sky"]["segments"] == 2
    assert got["PQ_things"] == pytest.approx(cell * rq / 2)
    assert got["PQ"] == pytest.approx((per_class["sky"]["PQ"] + cell * rq) / 3)
    assert (got["num_images"], got["stuff"]) == (3, ["sky"])
    table = got.tables[0]
    assert [row[:5] for row in table.rows] == [
        ("sky", "stuff", 2, 2, 0),
        ("dot", "thing", 2, 0, 1),
        ("cell", "thing", 1, 1, 1),
    ]


def test_what_is_said_of_crowds_and_of_pixels_of_no_segment_does_not_count(tmp_path):
    first, second, third, _ = shapes()
    own = [first == IDS[name] for name in ("sky", "one", "two")]
    beside = [first == IDS["crowd"], first == 0]
    answers = [
        answer([*own, *beside], [0, 2, 1, 2, 1]),
        answer([second > 0], [0]),
        answer([third > 0, third == 0], [1, 2]),
    ]
    evaluator = evaluated(panoptic_set(tmp_path), answers)
    got = evaluator.compute()
    assert (got["PQ"], got["SQ"], got["RQ"]) == (1, 1, 1)
    said = evaluator.said()
    assert said["indices"].tolist() == [0, 1, 2]
    assert said["segments"].tolist() == said["found"].tolist() == [3, 1, 1]
    assert said["wrong"].tolist() == [0, 0, 0]
    assert said["PQ"].tolist() == [1, 1, 1]


def segments(seed, shape=(14, 17), number=7):
    rng = np.random.default_rng(seed)
    ids = np.zeros(shape, np.int32)
    for k in range(1, number + 1):
        y, x = rng.integers(0, shape[0] - 3), rng.integers(0, shape[1] - 3)
        ids[y : y + rng.integers(3, 8), x : x + rng.integers(3, 9)] = k
    return ids, rng.integers(0, 2, number)


@pytest.mark.parametrize("seed", range(6))
def test_an_image_alone_is_counted_as_the_metric_counts_it(seed):
    """Against torchmetrics on one image, its classes put together."""
    truth, true_labels = segments(seed)
    said, said_labels = np.roll(truth, 1, seed % 2), true_labels.copy()
    said_labels[seed] = 1 - said_labels[seed]
    said[said == 2] = 0
    got = counted(said, said_labels, truth, true_labels)
    metrics = PanopticMetrics(2, ())
    for_pixels = [
        (torch.from_numpy(np.append(-1, labels)[ids]), torch.from_numpy(ids))
        for ids, labels in ((said, said_labels), (truth, true_labels))
    ]
    metrics.update(*for_pixels)
    counts = np.array(metrics.compute()["counts"])
    found, wrong, missed = counts.sum(0).tolist()
    assert (got.found, got.wrong, got.segments) == (found, wrong, found + missed)
    assert 0 < found < got.segments
    iou = metrics.metric.iou_sum.sum().item()
    assert pytest.approx(iou / (found + (wrong + missed) / 2)) == got.PQ


def test_of_an_image_without_segments_and_answers_nothing_is_said():
    none = np.zeros((4, 5), np.int32)
    assert np.isnan(counted(none, np.zeros(0, int), none, np.zeros(0, int)).PQ)
    whole = np.ones((4, 5), np.int32)
    missed = counted(none, np.zeros(0, int), whole, np.zeros(1, int))
    assert missed == (1, 0, 0, 0.0)
    beside = counted(whole, np.zeros(1, int), none, np.zeros(0, int))
    assert beside[:3] == (0, 0, 0)  # where nothing is known no answer is wrong


def test_masks_that_are_no_numbers_are_told_and_not_scored(tmp_path):
    first, second, third, _ = shapes()
    answers = [answer([m > 0], [0]) for m in (first, second, third)]
    answers[1]["masks"][0, 0, 0, 0] = torch.nan
    with pytest.raises(NotFinite, match=r"not finite \(NaN or infinite\) on 1 of 3 images"):
        evaluated(panoptic_set(tmp_path), answers).compute()


def test_images_without_any_segment_cannot_be_measured(tmp_path):
    first, *_ = shapes()
    evaluator = evaluated(panoptic_set(tmp_path), [])
    target = Segments(np.zeros((20, 30), np.int32), np.zeros(0, int), np.zeros(0, bool))
    one = answer([first > 0], [0], size=(20, 30))
    geometry = (Geometry((20, 30), (1.0, 1.0), (0, 0)),)
    batch = Dense(torch.zeros(1, 3, 20, 30), (target,), torch.tensor([0]), geometries=geometry)
    evaluator.update(one, batch)
    with pytest.raises(InputError, match="none of the 1 images has a segment, so nothing can"):
        evaluator.compute()


def test_model_and_data_must_agree_what_is_stuff(tmp_path):
    data = open_data(panoptic_set(tmp_path), "all")
    model = Model()
    model.stuff = (0, 1)
    with pytest.raises(InputError, match="do not agree whether 'dot' are things or stuff; the mod"):
        Evaluator(model, data)
    model.classes, model.stuff = (*CLASSES, "new"), (0, 3)
    Evaluator(model, data)  # of a class that the data has not it says nothing
    Evaluator(model, open_data(tmp_path, "all", classes=model.classes))
    model.classes = ("sky", "dot", "other")
    with pytest.raises(InputError, match="classes that the model does not know: cell"):
        Evaluator(model, data)


@pytest.mark.slow
def test_an_evaluation_holds_no_more_than_a_map_or_two_of_a_hundred_instances(tmp_path):
    """At 512 x 512 their masks would be 105 MB; what is measured is NumPy's memory while one image after
    another of a batch is compared."""
    rng = np.random.default_rng(0)
    side, number = 512, 100
    ids = (np.arange(side)[:, None] // 52 * 10 + np.arange(side)[None] // 52 + 1).astype(np.int32)
    labels = rng.integers(0, 2, number)  # of the data: dots and cells
    truth = Segments(ids, labels, np.zeros(number, bool))
    coarse = ids[2::4, 2::4]
    masks = (coarse == np.arange(1, number + 1)[:, None, None]).astype(np.float32)
    found = answer(masks, (labels + 1).tolist(), size=(side, side), scores=[0.9] * number)
    found = {name: value.repeat(2, *[1] * (value.ndim - 1)) for name, value in found.items()}
    evaluator = Evaluator(Model(), open_data(panoptic_set(tmp_path), "all"))
    geometries = (Geometry((side, side), (1.0, 1.0), (0, 0)),) * 2
    batch = Dense(
        torch.zeros(2, 3, 1, 1), (truth,) * 2, torch.tensor([0, 1]), geometries=geometries
    )
    tracemalloc.start()
    evaluator.update(found, batch)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 25e6  # a coarse copy of an image's masks is 6.6 MB, a map of its pixels 1 to 2 MB
    got = evaluator.compute()
    assert got["RQ_things"] == 1
    assert got["num_images"] == 2


def test_data_with_segments_teaches_detectors_their_boxes_and_no_others(tmp_path):
    data = open_data(panoptic_set(tmp_path), "all")
    assert fitting(TASK, data, "m") is data
    boxes = fitting(task_of("detect"), data, "m")
    assert boxes.truth.kind == "boxes"
    assert boxes.truth.target(0, None).labels.tolist() == [0, 2, 1, 1]
    assert boxes.truth.target(0, None).boxes[2].tolist() == [5, 4, 9, 9]
    assert boxes.classes == data.classes
    with pytest.raises(InputError, match="holds segments, for the task 'panoptic'"):
        fitting(task_of("segment"), data, "m")
    assert task_of_model("detr_panoptic/resnet18") is TASK
    assert TASK.model_options(None, data.truth) == {
        "stuff": [2],
        "category_ids": [3, 7, 9],
    }


def test_images_of_more_objects_than_queries_are_told_before_training(tmp_path):
    """The first image has three segments and a crowd, which is none; the others one each."""
    data = open_data(panoptic_set(tmp_path), "all")
    detect = task_of("detect")
    for queries, images in ((4, 0), (3, 0), (2, 1), (1, 1)):
        model = SimpleNamespace(config=SimpleNamespace(num_queries=queries))
        said = TASK.notes(model, data.truth)
        assert detect.notes(model, data.truth.told) == said
        assert len(said) == images
        for note in said:
            assert f"1 of 3 images have more objects than the model has queries ({queries})" in note
            assert note.endswith(
                "the most 3; the first batch that shows so many of one ends the "
                + "training: --head-fields num_queries=3"
            )
    assert detect.notes(SimpleNamespace(config=SimpleNamespace()), data.truth.told) == []


def found_of(tmp_path):
    first, second, third, moved = shapes()
    sky = (first == IDS["sky"]) & ~moved
    answers = [answer([sky, moved], [0, 2]), answer([second > 0], [0])]
    answers.append(answer([third > 0, third == 0], [2, 0]))
    evaluator = evaluated(panoptic_set(tmp_path), answers)
    scores, said = evaluator.compute(), evaluator.said()
    model = Model(answers)
    model.info = type("Info", (), {"name": "m"})()
    data = open_data(tmp_path, "all")
    return Found(model, data, said, "val", explain=None, scores=scores.to_dict())


def test_a_report_shows_the_worst_images_and_what_to_look_at(tmp_path):
    found = found_of(tmp_path)
    told = sections(found)
    assert [s.title for s in told] == [
        "",
        "What to look at first",
        "Per class",
        "Found, and how well",
        "Worst images",
        "Images of val",
    ]
    assert told[0].blocks[0].items[0] == (f"{found.scores['PQ']:.3f}", "panoptic quality")
    names = [what for _, what in told[0].blocks[0].items]
    assert names[1:3] == ["PQ of things", "PQ of stuff"]
    rows = class_table(found.scores, CLASSES).rows
    assert [row[:2] for row in rows] == [("dot", "thing"), ("cell", "thing"), ("sky", "stuff")]
    said = " ".join(advice(found.scores, CLASSES))
    assert "Weakest class: 'dot' with a PQ of 0.00 (0 of 2 found, 0 answers wrong)" in said
    assert "Never found: 'dot'." in said
    images = worst_images(found)
    captions = [caption.split("\n") for _, caption in images]
    # The image whose only segment is taken for another's class, then the first; the second has no mistake.
    assert [c[0] for c in captions[::3]] == ["PQ 0.00", f"PQ {found.said['PQ'][0]:.2f}"]
    assert captions[0][1].endswith("c.png")
    assert captions[2] == ["answers: 0 of 1 found, 1 wrong"]
    assert len({image.size for image, _ in images[:3]}) == 1
    with pytest.raises(InputError, match="are not known"):
        sections(Found(found.model, found.data, found.said, "val", explain=None, scores={"PQ": 1}))


def test_scores_leave_out_what_cannot_be_told():
    metrics = PanopticMetrics(2, ())
    whole = torch.zeros(4, 4, dtype=torch.long)
    metrics.update((whole, whole), (whole, whole))
    got = scores_of(metrics.compute() | {"num_images": 1}, ("a", "b"), ())
    assert set(got.values) == {
        "PQ",
        "SQ",
        "RQ",
        "PQ_things",
        "SQ_things",
        "RQ_things",
        "num_images",
    }
    assert got["per_class"]["b"] == {
        "segments": 0,
        "found": 0,
        "wrong": 0,
        "PQ": None,
        "SQ": None,
        "RQ": None,
    }
    assert got.notes == ("left out of the means, neither there nor said: b",)
    assert got.tables[0].rows[1][-3:] == ("none",) * 3
