"""The report of detection: what it says of scores and mistakes, the stages of a cascade, the worst images."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.tasks.test_detect import CLASSES, HALF, THEIRS, Model, answers, batch_of, objects
from vitrail.analysis import page
from vitrail.tasks.detect import TASK
from vitrail.tasks.detect_report import (
    advice,
    ask,
    class_table,
    few,
    headlines,
    means,
    overlaps,
    sections,
    stage_ious,
    worst_images,
)
from vitrail.tasks.section import Found, Images
from vitrail_runtime.drawing import colour_of
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

TRUTHS = [
    objects((4, 4, 20, 20, 1), (30, 10, 50, 30, 0)),
    objects(),
    objects((0, 0, 10, 30, 0), (40, 0, 60, 40, 0), crowd=[1]),
    objects((10, 10, 30, 30, 1)),
]
SAID = [  # in pixels of an input of half the size
    [(2, 2, 10, 10, 0, 0.9)],
    [],
    [(0, 0, 5, 15, 0, 0.8), (20, 15, 25, 20, 2, 0.4)],
    [(5, 5, 15, 15, 0, 0.7)],
]


class Finder(Model):
    """A cascade of two stages, which knows the images by their brightness."""

    preprocessing = Preprocessing(size=(20, 30), mode="squash", mean=(0.0,) * 3, std=(1.0,) * 3)

    def __init__(self, stages: int = 2) -> None:
        super().__init__()
        self.stages = stages
        self.info = SimpleNamespace(name="cascade_rcnn/x")
        self.body = nn.Linear(10, 100)

    def forward_tensors(self, images, record=None):
        which = int(images[0].mean() * 255 / 40 + 0.5) - 1
        if record is not None:
            box = torch.tensor([[0.0, 0, 8, 8], [2, 2, 10, 6], [0, 0, 0, 0]])
            record["proposals"] = box[None]
            for i in range(self.stages):
                record[f"stages.{i}.boxes"] = box[None] + i + 1
        return answers(SAID[which])


def found(model=None, **changes):
    model = model or Finder()
    pixels = [np.full((40, 60, 3), 40 * (i + 1), np.uint8) for i in range(4)]
    truth = SimpleNamespace(
        has_masks=False, image_ids=np.arange(4), target=lambda i, view: TRUTHS[i]
    )
    data = DataOf(
        classes=THEIRS,
        truth=truth,
        images=SimpleNamespace(read=lambda i: pixels[i], sizes=np.array([[40, 60]] * 4)),
        keys=[f"val/{i}.png" for i in range(4)],
        broken=(),
        content_hash="f" * 64,
    )
    evaluator = TASK.evaluator(model, data)
    for i in range(4):
        evaluator.update(answers(SAID[i]), batch_of([i], [TRUTHS[i]]))
    scores, said = evaluator.compute(), evaluator.said()
    how = {"said": said, "split": "val", "explain": None, "scores": scores.to_dict()}
    return Found(model, data, **(how | changes))


class DataOf(SimpleNamespace):
    def __len__(self) -> int:
        return 4


def test_the_page_says_scores_mistakes_stages_and_the_worst_images():
    made = sections(found())
    titles = [section.title for section in made]
    assert titles == [
        "",
        "What to look at first",
        "Per class",
        "Overlap, precision and recall",
        "Mistakes",
        "What each stage does to boxes",
        "Worst images",
        "Images of val",
    ]
    out = page.Page("x")
    for section in made:
        out.add(section)
    text = "".join(out.parts)
    assert "<svg" in text
    assert f"{found().scores['AP']:.3f}" in text
    for name in (*CLASSES, "classification", "background", "stage 2"):
        assert name in text
    assert "images without objects</td><td>1<" in text
    one = [section.title for section in sections(found(Finder(stages=1)))]
    assert "What each stage does to boxes" not in one


def test_scores_that_are_gone_are_an_error_that_says_what_to_do():
    with pytest.raises(InputError, match="vitrail eval RUN --data DATA --report FILE"):
        sections(found(scores={}))


def test_headlines_are_of_masks_too_where_there_are_any():
    assert [key for key, _ in headlines({"AP": 1})] == ["AP", "AP50", "AP75", "AR"]
    keys = [key for key, _ in headlines({"AP": 1, "mask_AP": 0.5})]
    assert keys == ["AP", "AP50", "mask_AP", "mask_AP50"]


def scores_with(costs, per_class, **sizes):
    errors = {kind: {"count": 3, "dAP50": cost} for kind, cost in costs.items()}
    each = {n: {"AP": ap, "objects": k} for n, (ap, k) in per_class.items()}
    return {"errors": errors, "per_class": each, **sizes}


def test_advice_names_what_costs_most_the_weakest_class_and_sizes():
    costs = {"missed": 0.1, "duplicate": 0.3, "both": 0.0}
    per_class = {"a": (0.5, 10), "b": (0.2, 7), "c": (None, 0)}
    said = advice(scores_with(costs, per_class, APs=0.1, APl=0.6), ["a", "b", "c"])
    assert said[0].startswith("Most costly mistakes: duplicate (0.300 of AP50)")
    assert "--head-fields nms=" in said[0]
    assert said[1] == "Weakest class: 'b' with an AP of 0.20 (7 objects)."
    assert said[2] == "Objects that are small are found worse (0.10) than large ones (0.60)."
    assert said[3] == "Not measured: no object of 'c' in this split."
    little = scores_with({"missed": 0.01}, {"a": (0.9, 10)}, APs=0.5, APl=0.6)
    assert advice(little, ["a"]) == []


def test_the_table_has_the_lowest_first_and_what_cannot_be_told_last():
    keys = ("AP", "AP50", "AP75", "AR")
    rows = {"a": 0.5, "b": None, "c": 0.25}
    scores = {"per_class": {n: {"objects": 4} | dict.fromkeys(keys, v) for n, v in rows.items()}}
    table = class_table(scores, ["a", "b", "c"])
    assert [row[0] for row in table.rows] == ["c", "a", "b"]
    assert table.rows[2][2:] == ("none",) * 4
    assert table.header == ("class", "objects", *keys)


def test_overlaps_before_and_behind_are_with_the_object_that_a_box_touched_most():
    given = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 0, 0], [18, 0, 28, 10]])
    made = torch.tensor([[0.0, 0, 10, 20], [0, 0, 10, 10], [0, 0, 10, 10], [20, 0, 30, 10]])
    truth = torch.tensor([[0.0, 0, 10, 20], [20, 0, 30, 10]])
    before, after = overlaps(given, made, truth)
    assert before.tolist() == pytest.approx([0.5, 8 / 12])
    assert after.tolist() == pytest.approx([1, 1])
    assert [len(v) for v in overlaps(given, made, truth[:0])] == [0, 0]


def test_a_stage_is_given_what_the_one_before_it_made():
    first, second = stage_ious(found())
    truth = [t.boxes[~t.crowd] / 2 for t in TRUTHS]  # the input is half as large
    box = torch.tensor([[0.0, 0, 8, 8], [2, 2, 10, 6], [0, 0, 0, 0]])
    for number, (before, after) in enumerate((first, second)):
        pairs = [overlaps(box + number, box + number + 1, torch.from_numpy(t)) for t in truth]
        # A row of zeros is moved by the stand-in, and then has no area either.
        assert before.tolist() == pytest.approx(np.concatenate([p[0] for p in pairs]).tolist())
        assert after.tolist() == pytest.approx(np.concatenate([p[1] for p in pairs]).tolist())
    assert stage_ious(found(Finder(stages=1))) == []


def test_bins_with_too_few_boxes_are_left_out():
    before = np.array([0.31] * 5 + [0.52] * 4 + [0.2] * 9)
    x, y = means(before, before + 0.1, np.array([0.3, 0.5, 0.7]))
    assert x.tolist() == pytest.approx([0.31])
    assert y.tolist() == pytest.approx([0.41])


def test_the_worst_images_are_those_with_the_lowest_f1_and_most_mistakes():
    shown = worst_images(found())
    captions = [caption for _, caption in shown]
    # Of image 2 nothing is found and one answer wrong, of image 0 half; 1 and 3 are without a mistake.
    assert captions[::3] == ["F1 0.00\nval/2.png", "F1 0.67\nval/0.png"]
    assert captions[1::3] == ["truth", "truth"]
    assert captions[2] == "answers: 0 of 1 found, 1 wrong"
    plain, truth, said = (np.asarray(image) for image, _ in shown[:3])
    assert plain.shape == truth.shape == said.shape
    debris, cell = (np.array(colour_of(CLASSES.index(name))) for name in ("debris", "cell"))
    assert (truth == debris).all(-1).any()
    assert not (truth == cell).all(-1).any()
    assert (said == cell).all(-1).any()
    assert not (said == debris).all(-1).any(), "the doubtful answer is not drawn"
    assert len(worst_images(found(), count=1)) == 3


def test_many_names_are_left_out():
    assert few(["a"] * 40) == ["a"] * 40
    assert few(["a"] * 41) == [""] * 41


def test_a_model_is_asked_for_boxes_of_the_original():
    said, geometry = ask(Finder(), np.full((40, 60, 3), 40, np.uint8))
    assert said.boxes.tolist() == [[4, 4, 20, 20]]
    assert geometry == HALF
    assert isinstance(Images([(Image.new("RGB", (2, 2)), "")]), Images)
