"""From masks of queries to segments of the original image, against transformers; drawn, told and in COCO's
form."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DetrImageProcessor
from transformers.models.detr.modeling_detr import DetrSegmentationOutput

from vitrail_runtime import FINISH, Geometry, Prediction, Preprocessing, finish_panoptic, prepare
from vitrail_runtime.coco import CocoIds, CocoResults, CocoSegments, coco_form
from vitrail_runtime.drawing import colour_of
from vitrail_runtime.errors import InputError, NotFinite
from vitrail_runtime.panoptic import ids_of

CLASSES = ("cell", "dot", "sky")


def outputs_of(seed=0, queries=6, size=(9, 12), input_size=(36, 48), stuff=(), **changed):
    generator = torch.Generator().manual_seed(seed)
    coarse = 4 * torch.randn(1, queries, 3, 4, generator=generator)
    masks = torch.nn.functional.interpolate(coarse, size, mode="bicubic").sigmoid()
    scores = (torch.rand(1, queries, generator=generator) * 0.5 + 0.5).sort(descending=True)[0]
    found = {
        "masks": masks.numpy(),
        "scores": scores.numpy(),
        "labels": torch.randint(0, 3, (1, queries), generator=generator).numpy(),
        "count": np.array([queries]),
        "stuff": np.isin(np.arange(3), stuff)[None],
        "input_size": np.array([input_size]),
    }
    return found | changed


def whole(original, input_size=(36, 48)):
    scale = (input_size[0] / original[0], input_size[1] / original[1])
    return Geometry(original, scale, (0, 0))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("original", [(36, 48), (20, 27), (50, 90)], ids=str)
def test_segments_are_those_of_transformers_on_the_original(original, seed):
    """Of things alone: theirs gives ids of stuff that it meets again twice."""
    found = outputs_of(seed)
    logits = torch.full((1, 6, 4), -20.0)
    for q, (label, score) in enumerate(zip(found["labels"][0], found["scores"][0], strict=True)):
        logits[0, q, label] = float(np.log(score))
        logits[0, q, 3] = float(np.log(1 - score + 1e-9))
    given = DetrSegmentationOutput(
        logits=logits, pred_masks=torch.from_numpy(found["masks"]).logit().float()
    )
    how = {"threshold": 0.0, "label_ids_to_fuse": set(), "target_sizes": [original]}
    sure = found["scores"][0] > 0.5  # else "no object" is the more probable
    assert sure.all()
    (want,) = DetrImageProcessor().post_process_panoptic_segmentation(given, **how)
    (got,) = finish_panoptic(found, [whole(original)], CLASSES)
    assert got.segments.shape == got.size == original
    theirs = want["segmentation"].numpy()
    labels = {s["id"]: s["label_id"] for s in want["segments_info"]}
    of_theirs = np.vectorize(lambda i: labels.get(i, -1))(theirs)
    of_ours = np.append(-1, got.labels)[got.segments]
    assert (of_ours == of_theirs).mean() > 0.995  # rounding, where two are equally probable
    assert sorted(got.labels.tolist()) == sorted(labels.values())
    assert got.scores.tolist() == sorted(got.scores.tolist(), reverse=True)
    scores = sorted((s["score"] for s in want["segments_info"]), reverse=True)
    assert got.scores.tolist() == pytest.approx(scores, abs=1e-5)


def two_halves(**changed):
    """A query for the left half of the image and a surer one for the right."""
    masks = np.full((1, 3, 4, 8), 0.001, np.float32)
    masks[0, 1, :, :4] = masks[0, 0, :, 4:] = 0.999
    masks[0, 2] = 1.0
    found = {
        "masks": masks,
        "scores": np.array([[0.99, 0.9, 0.99]], np.float32),
        "labels": np.array([[1, 2, 0]]),
        "count": np.array([2.0]),  # the third is none
        "stuff": np.array([[0.0, 0.0, 1.0]]),
        "input_size": np.array([[16.0, 32.0]]),
    }
    return found | changed


def test_only_as_many_answers_count_as_the_model_says():
    (got,) = FINISH["panoptic"](two_halves(), [whole((8, 16), (16, 32))], CLASSES, 5)
    assert (got.labels.tolist(), got.names, got.stuff) == ([1, 2], ["dot", "sky"], (2,))
    assert got.segments.tolist() == [[2] * 8 + [1] * 8] * 8
    assert got.scores.tolist() == pytest.approx([0.99, 0.9])
    assert (got.several, got.boxes, got.classes) == (True, None, CLASSES)
    (got,) = finish_panoptic(two_halves(count=np.array([0])), [whole((8, 16), (16, 32))], CLASSES)
    assert (len(got.labels), got.segments.any(), got.segments.shape) == (0, False, (8, 16))


def test_the_first_answer_is_the_surest_and_stuff_is_one():
    scores = np.array([[0.9, 0.95, 0.99]], np.float32)
    masks = two_halves()["masks"].copy()
    masks[0, 2] = 0.0
    masks[0, 2, :2] = 1.0
    found = two_halves(scores=scores, masks=masks, count=np.array([2]))
    (got,) = finish_panoptic(found, [whole((8, 16), (16, 32))], CLASSES)
    assert got.segments[0].tolist() == [1] * 8 + [2] * 8
    assert got.labels.tolist() == [2, 1]
    found["labels"] = np.array([[2, 2, 0]])
    (got,) = finish_panoptic(found, [whole((8, 16), (16, 32))], CLASSES)
    assert (got.labels.tolist(), got.segments.min()) == ([2], 1)


def test_pixels_outside_a_central_crop_are_of_no_segment():
    image = np.zeros((40, 100, 3), np.uint8)
    _, geometry = prepare(image, Preprocessing(size=(16, 16), crop_pct=0.8))  # 20 x 50, cut to 16
    masks = np.zeros((1, 2, 4, 4), np.float32)
    masks[0, 0, :, :2], masks[0, 1, :, 2:] = 1, 1
    found = two_halves(
        masks=masks,
        scores=np.array([[0.99, 0.9]]),
        labels=np.array([[0, 1]]),
        input_size=np.array([[16, 16]]),
    )
    (got,) = finish_panoptic(found, [geometry], CLASSES)
    rows, columns = np.nonzero(got.segments)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (4, 35, 34, 65)
    assert (got.segments[4:36, 34:46] == 1).all()
    assert (got.segments[4:36, 54:66] == 2).all()


@pytest.mark.parametrize("name", ["scores", "masks"])
def test_what_is_not_finite_is_refused(name):
    found = two_halves()
    found[name] = found[name].copy()
    found[name][0, 1] = np.nan
    with pytest.raises(NotFinite, match="masks that are not finite; its weights are damaged"):
        finish_panoptic(found, [whole((8, 16), (16, 32))], CLASSES)


def test_scores_that_are_no_numbers_are_told_though_nothing_is_above_them():
    found = two_halves(scores=np.full((1, 3), np.nan), count=np.array([0]))
    with pytest.raises(NotFinite):
        finish_panoptic(found, [whole((8, 16), (16, 32))], CLASSES)


def test_a_model_of_other_classes_is_refused():
    with pytest.raises(
        InputError, match="says of 3 classes whether they are stuff, but there are 2"
    ):
        finish_panoptic(two_halves(), [whole((8, 16), (16, 32))], CLASSES[:2])


def said() -> Prediction:
    segments = np.full((40, 60), 3, np.int32)
    segments[4:14, 5:17], segments[20:35, 30:50], segments[0] = 1, 2, 0
    return Prediction(
        labels=np.array([0, 0, 2]),
        scores=np.array([0.99, 0.95, 0.9], np.float32),
        names=["cell", "cell", "sky"],
        segments=segments,
        stuff=(2,),
        classes=CLASSES,
        size=(40, 60),
        source="a.png",
    )


def test_answers_of_a_low_score_leave_their_pixels():
    kept = said().above(0.93)
    assert kept.names == ["cell", "cell"]
    assert np.array_equal(kept.segments, np.where(said().segments == 3, 0, said().segments))
    kept = said().above(0.97)
    assert (kept.segments == (said().segments == 1)).all()


def test_segments_are_told_with_their_areas():
    told = said().to_dict()
    rows = [(e["label"], e["score"], e["area"], e["thing"]) for e in told["top"]]
    rest = 40 * 60 - 60 - 120 - 300
    assert rows == [
        ("cell", 0.99, 120, True),
        ("cell", 0.95, 300, True),
        ("sky", 0.9, rest, False),
    ]
    json.dumps(told)


def test_segments_are_drawn_where_they_are_with_the_names_of_things():
    image = Image.fromarray(np.full((400, 600, 3), 128, np.uint8))
    given = said()
    given.segments = given.segments.repeat(10, 0).repeat(10, 1)
    given.size = (400, 600)
    shown = np.asarray(given.draw(image), int)
    assert shown.shape[0] > 400  # and a bar with the classes
    for (y, x), label in (((100, 150), 0), ((300, 400), 0), ((380, 100), 2)):
        want = 128 + 0.5 * (np.array(colour_of(label)) - 128)
        assert np.abs(shown[y, x] - want).max() <= 1
    assert (shown[3, 3] == 128).all()
    assert (shown[40, 50] == colour_of(0)).all()  # its line
    assert (shown[200:340, 299] == colour_of(2)).all()  # beside the second one's
    without = said()
    without.segments, without.size = given.segments, given.size
    without.stuff = (0, 2)
    plain = np.asarray(without.draw(image), int)
    differs = np.flatnonzero((plain != shown)[:400].any((1, 2)))
    assert 15 <= differs.min() < 45  # the names stand above the things
    assert 160 <= differs.max() < 215


def test_coco_form_holds_what_was_said(tmp_path):
    given = said()
    assert coco_form(given) is CocoSegments
    assert coco_form(Prediction(given.labels, given.scores, given.names)) is None
    boxed = Prediction(given.labels, given.scores, given.names, boxes=np.zeros((3, 4)))
    assert coco_form(boxed) is CocoResults
    about = {
        "images": [{"id": 31, "file_name": "a.png"}],
        "categories": [{"id": 7 + k, "name": name} for k, name in enumerate(CLASSES)],
    }
    results = CocoSegments(tmp_path, CocoIds(["a.png"], CLASSES, about))
    results.add(given)
    results.close()
    told = json.loads((tmp_path / "coco_panoptic.json").read_text())
    path = Path("a.png").absolute().as_posix()
    assert told["images"] == [{"id": 31, "file_name": path, "height": 40, "width": 60}]
    assert told["categories"] == [
        {"id": 7, "name": "cell", "isthing": 1},
        {"id": 8, "name": "dot", "isthing": 1},
        {"id": 9, "name": "sky", "isthing": 0},
    ]
    ((annotation),) = told["annotations"]
    assert (annotation["image_id"], annotation["file_name"]) == (31, "000000000031.png")
    image = Image.open(tmp_path / "coco_panoptic" / annotation["file_name"])
    assert np.array_equal(ids_of(np.asarray(image)), given.segments)
    first, _, third = annotation["segments_info"]
    assert (first["id"], first["category_id"], first["score"]) == (1, 7, 0.99)
    assert (first["bbox"], first["area"]) == ([5, 4, 12, 10], 120)
    assert (third["id"], third["category_id"], third["iscrowd"]) == (3, 9, 0)
