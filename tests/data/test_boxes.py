"""The truth of detection: what is kept of a data set's objects, and what of them a view shows."""

import numpy as np
import pytest
import torch

from tests.data.scenes import random_mask
from vitrail.data import boxes as module
from vitrail.data import rle
from vitrail.data.boxes import Boxes, Found, collect
from vitrail.data.view import View
from vitrail_runtime.errors import InputError

SIZES = np.array([(20, 30), (24, 18), (20, 30), (10, 10)])


def gathered(found, **given) -> Boxes:
    how = {
        "classes": ("dot", "cell", "rod"),
        "sizes": SIZES,
        "category_ids": [3, 7, 9],
        "image_ids": [11, 12, 13, 14],
        "source": "x.json",
        "where": lambda i: f"image {i}",
    }
    return collect(found, **{**how, **given})


def some_objects(masks: bool = False) -> list[Found]:
    """In an order that is not that of the images; the second image has none."""
    rows = [
        (2, 0, (0.0, 0.0, 30.0, 20.0), False),
        (0, 1, (2.0, 3.0, 12.0, 11.0), False),
        (3, 1, (1.0, 1.0, 9.0, 9.0), False),
        (0, 0, (20.5, 1.0, 24.5, 7.0), False),
        (0, 1, (1.0, 10.0, 21.0, 19.0), True),
    ]
    found = []
    for n, (image, label, box, crowd) in enumerate(rows):
        height, width = SIZES[image].tolist()
        mask = np.zeros((height, width), bool)
        x1, y1, x2, y2 = (int(v) for v in box)
        mask[y1:y2, x1:x2] = True
        mask[y1, x1] = False
        given = {"size": [height, width], "counts": rle.from_mask(mask).decode()}
        found.append(
            Found(
                image,
                f"annotation {n}",
                label,
                box,
                crowd,
                id=50 + n,
                mask=given if masks else None,
            )
        )
    return found


def test_objects_stand_in_the_order_of_their_images():
    truth = gathered(some_objects())
    assert truth.starts.tolist() == [0, 3, 3, 4, 5]
    assert truth.labels.tolist() == [1, 0, 1, 0, 1]
    assert truth.crowd.tolist() == [False, False, True, False, False]
    assert truth.ids.tolist() == [51, 53, 54, 50, 52]
    assert truth.boxes.tolist()[:2] == [[2, 3, 12, 11], [20.5, 1, 24.5, 7]]
    assert truth.areas.tolist() == [80, 24, 180, 600, 64]
    assert (truth.boxes.dtype, truth.areas.dtype) == (np.float32, np.float32)
    assert (len(truth), truth.has_masks, truth.masks) == (4, False, None)
    assert truth.missing() == ["rod"]
    assert truth.image_ids.tolist() == [11, 12, 13, 14]
    assert truth.category_ids.tolist() == [3, 7, 9]
    assert (truth.bad, truth.problems, truth.notes) == ((), {}, ())


def test_a_class_that_is_in_crowds_alone_is_missing():
    truth = gathered([Found(0, "", 0, (1, 1, 5, 5), crowd=True), Found(0, "", 1, (1, 1, 5, 5))])
    assert truth.missing() == ["dot", "rod"]


@pytest.mark.parametrize("masks", [False, True])
def test_a_selection_holds_the_objects_of_its_images(masks):
    truth = gathered(some_objects(masks))
    part = truth.select([3, 1, 0, 3])
    for new, old in enumerate([3, 1, 0, 3]):
        ours, theirs = part.target(new, None), truth.target(old, None)
        for name in ("boxes", "labels", "crowd", "areas", "ids"):
            assert getattr(ours, name).tolist() == getattr(theirs, name).tolist()
        assert ours.masks == theirs.masks
        assert part.digest(new) == truth.digest(old)
    assert part.image_ids.tolist() == [14, 12, 11, 14]
    assert part.sizes.tolist() == [[10, 10], [24, 18], [20, 30], [10, 10]]


@pytest.mark.parametrize("masks", [False, True])
def test_parts_that_are_joined_are_the_whole(masks):
    truth = gathered(some_objects(masks))
    again = truth.select([0, 1]).joined([truth.select([2]), truth.select([3])])
    for name in ("starts", "boxes", "labels", "crowd", "areas", "ids", "sizes", "image_ids"):
        assert np.array_equal(getattr(again, name), getattr(truth, name)), name
    assert [again.digest(i) for i in range(4)] == [truth.digest(i) for i in range(4)]
    twice = truth.joined([truth])
    assert twice.image_ids.tolist() == list(range(1, 9))
    assert twice.ids.tolist() == list(range(1, 11))
    assert twice.digest(6) == truth.digest(2)


def test_masks_of_some_parts_alone_are_not_those_of_the_whole():
    with_masks, without = gathered(some_objects(True)), gathered(some_objects())
    assert with_masks.joined([without]).masks is None
    assert without.joined([with_masks]).masks is None


def test_a_stratum_is_the_class_that_the_fewest_images_have():
    rows = [(0, 0), (0, 0), (0, 1), (1, 1), (2, 2), (2, 1), (3, 1)]
    found = [Found(i, "", label, (1, 1, 5, 5)) for i, label in rows]
    sizes = np.array([(20, 20)] * 5)
    truth = gathered(found, sizes=sizes, image_ids=range(5))
    # dot is in one image, though twice; rod in one as well; cell in four.
    assert truth.counts().tolist() == [[2, 1, 0], [0, 1, 0], [0, 1, 1], [0, 1, 0], [0, 0, 0]]
    assert truth.strata().tolist() == [0, 1, 2, 1, 3]


@pytest.mark.parametrize(
    "change",
    [
        {"box": (2.0, 3.0, 12.0, 11.5)},
        {"label": 2},
        {"crowd": True},
        {"area": 79.0},
    ],
)
def test_the_digest_changes_with_every_fact_and_of_its_image_alone(change):
    found = some_objects()
    truth = gathered(found)
    found[1] = found[1]._replace(**change)
    other = gathered(found)
    assert [truth.digest(i) == other.digest(i) for i in range(4)] == [False, True, True, True]


def test_the_digest_changes_with_a_mask():
    def digest(mask):
        runs = {"size": [20, 30], "counts": rle.from_mask(mask).decode()}
        return gathered([Found(0, "", 0, (1, 1, 9, 9), area=5, mask=runs)]).digest(0)

    assert digest(random_mask(1, 20, 30)) != digest(random_mask(2, 20, 30))
    assert digest(random_mask(1, 20, 30)) == digest(random_mask(1, 20, 30))


# --- What cannot be used -----------------------------------------------------------------------------------


def bad_of(*found: Found, **given) -> tuple[Boxes, list[str]]:
    fine = Found(1, "fine", 0, (1, 1, 5, 5), id=1)
    truth = gathered([fine, *found], **given)
    return truth, [f"{name} {what}" for name, what in truth.bad]


@pytest.mark.parametrize(
    ("box", "what"),
    [
        ((30.0, 5.0, 35.0, 9.0), "lies outside of its image of 30 x 20 pixels"),
        ((5.0, 20.0, 9.0, 25.0), "lies outside"),
        ((-9.0, 5.0, 0.0, 9.0), "lies outside"),
        ((5.0, -9.0, 9.0, 0.0), "lies outside"),
        ((5.0, 5.0, 5.0, 9.0), "has no area: it is 0 wide and 4 high"),
        ((5.0, 5.0, 9.0, 5.0), "has no area: it is 4 wide and 0 high"),
        ((9.0, 5.0, 5.0, 9.0), "has no area: it is -4 wide"),
        ((float("nan"), 5.0, 9.0, 9.0), "is not finite"),
        ((5.0, 5.0, 9.0, float("inf")), "is not finite"),
        (None, "has neither a box nor a mask"),
    ],
)
def test_a_box_that_cannot_be_is_named_and_left_out(box, what):
    truth, bad = bad_of(Found(0, "the bad one", 0, box))
    assert len(bad) == 1
    assert bad[0].startswith("the bad one ")
    assert what in bad[0]
    assert len(truth.labels) == 1


@pytest.mark.parametrize(
    ("box", "cut"),
    [
        ((-2.0, 1.0, 9.0, 9.0), (0, 1, 9, 9)),
        ((1.0, -2.0, 9.0, 9.0), (1, 0, 9, 9)),
        ((1.0, 1.0, 32.0, 9.0), (1, 1, 30, 9)),
        ((1.0, 1.0, 9.0, 22.0), (1, 1, 9, 20)),
    ],
)
def test_a_box_that_reaches_two_pixels_out_is_cut_and_one_that_reaches_further_is_named_too(
    box, cut
):
    truth, bad = bad_of(Found(0, "one", 0, box))
    assert (bad, truth.boxes[0].tolist()) == ([], list(cut))
    x1, y1, x2, y2 = (v + 0.5 * ((v > 20) - (v < 0)) for v in box)
    truth, (bad,) = bad_of(Found(0, "one", 0, (x1, y1, x2, y2)))
    assert "reaches 2.5 pixels outside of its image of 30 x 20" in bad
    assert truth.boxes[0].tolist() == list(cut)
    assert truth.areas[0] == (cut[2] - cut[0]) * (cut[3] - cut[1])


def test_an_id_is_given_once_and_what_has_none_gets_one():
    a, b = Found(0, "a", 0, (1, 1, 9, 9), id=2), Found(2, "b", 1, (1, 1, 9, 9), id=2)
    truth, bad = bad_of(a, b, Found(2, "c", 1, (1, 1, 9, 9)))
    assert bad == ["b its id 2 stands twice; an id is given once"]
    assert truth.ids.tolist() == [2, 1, 3]


def test_an_annotation_that_was_refused_does_not_take_its_id():
    wrong = Found(0, "wrong", 0, (9, 9, 9, 9), id=5)
    truth, bad = bad_of(wrong, wrong._replace(name="right", box=(1, 1, 9, 9)))
    assert len(bad) == 1
    assert 5 in truth.ids


@pytest.mark.parametrize("area", [float("nan"), float("inf"), -1.0])
def test_an_area_that_cannot_be_is_named(area):
    _, (bad,) = bad_of(Found(0, "one", 0, (1, 1, 9, 9), area=area))
    assert "its area is" in bad


def runs(counts, size=(20, 30)) -> dict:
    return {"size": list(size), "counts": counts}


@pytest.mark.parametrize(
    ("mask", "what"),
    [
        (runs([600], (30, 20)), "its mask says the size [30, 20], but its image is [20, 30]"),
        (runs([5, 5]), "the runs of its mask cover 10 pixels, but its image has 600"),
        (runs([5, 596]), "cover 601 pixels"),
        (runs("\x01"), "no packed runs"),
        (runs("é"), "no packed runs"),
        (runs("55"), "cover 10 pixels"),
        (runs([5, -5, 600]), "neither a string nor a list of whole numbers"),
        (runs([600.5]), "neither a string nor a list of whole numbers"),
        (runs([float("nan"), 600]), "neither a string nor a list of whole numbers"),
        (runs([10**30]), "neither a string nor a list of whole numbers"),
        (runs(None), "neither a string nor a list"),
        ({"counts": [600]}, "its mask says the size None"),
        ({"size": 5, "counts": [600]}, "its mask says the size 5"),
        (runs([600]), "its mask covers no pixel"),
        ("text", "neither a list of polygons nor runs"),
        ([1, 2, 3, 4, 5, 6], "not a list of polygons [x, y"),
        ([["a"] * 6], "not a list of polygons"),
        ([[1, 1, 5, 5]], "has 4 numbers; three points or more"),
        ([[1, 1, 5, 5, 9, 9, 3]], "has 7 numbers"),
        ([[1, 1, 5, float("nan"), 9, 9]], "is not finite"),
        ([[31, 1, 35, 5, 39, 9]], "lies outside its image of 30 x 20"),
        ([[1, 21, 5, 25, 9, 29]], "lies outside"),
        ([[-9, 1, -5, 5, -1, 9]], "lies outside"),
        ([[1, -9, 5, -5, 9, -1]], "lies outside"),
    ],
)
def test_a_mask_that_cannot_be_is_named(mask, what):
    _, (bad,) = bad_of(Found(0, "one", 0, (1, 1, 9, 9), mask=mask))
    assert what in bad


def test_a_mask_gives_the_box_and_the_area_that_are_not_given():
    mask = random_mask(4, 20, 30)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    truth = gathered([Found(0, "", 0, mask=runs(rle.from_mask(mask).decode()))])
    box = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    assert truth.boxes.tolist() == [box]
    assert truth.areas.tolist() == [mask.sum()]


def test_a_polygon_far_beyond_its_image_costs_no_more_than_one_within():
    """COCO's reader walks edges in fifths of a pixel: a corner at 10^12 would take forever."""
    truth = gathered([Found(0, "", 0, (5, 5, 30, 20), mask=[[5, 5, 1e12, 5, 1e12, 1e12, 5, 1e12]])])
    assert truth.areas.tolist() == [25 * 15]


def test_masks_of_some_objects_alone_are_not_used_and_told():
    found = some_objects(masks=True)
    found[1] = found[1]._replace(mask=None)
    truth = gathered(found)
    assert truth.masks is None
    (note,) = truth.notes
    assert "1 of 5 objects of x.json have no mask" in note


def test_no_annotation_at_all_is_an_error_and_none_that_can_be_used_too():
    with pytest.raises(
        InputError, match=r"x\.json has no annotation at all; images without objects are fine"
    ):
        gathered([])
    with pytest.raises(
        InputError, match=r"none of the annotations of x\.json can be used; the first: b: its"
    ):
        gathered([Found(0, "b", 0, (5, 5, 5, 5))])


def test_annotations_of_an_image_that_cannot_be_read_are_passed_over():
    sizes = np.where(np.arange(4)[:, None] == 0, 0, SIZES)
    truth = gathered(some_objects(), sizes=sizes)
    assert truth.starts.tolist() == [0, 0, 0, 1, 2]
    assert truth.bad == ()


def test_an_annotation_of_no_image_is_named():
    _, bad = bad_of(Found(None, "lost", problem="its image_id 5 is not among the images"))
    assert bad == ["lost its image_id 5 is not among the images"]


# --- What a view shows -------------------------------------------------------------------------------------


def view_of(crop, size, flip=False, original=(20, 30)) -> View:
    return View(original, size, crop, None, flip)


def test_without_a_view_everything_is_told_as_it_stands():
    truth = gathered(some_objects(masks=True))
    told = truth.target(0, None)
    assert truth.notes == ()
    assert len(told) == 3
    assert told.labels.tolist() == [1, 0, 1]
    assert told.crowd.tolist() == [False, False, True]
    assert told.areas.tolist() == [79, 23, 179]
    assert [m["size"] for m in told.masks] == [[20, 30]] * 3
    assert rle.box_and_area(told.masks[1]["counts"], 20) == ((20, 1, 24, 7), 23)
    assert len(truth.target(1, None)) == 0
    assert truth.target(1, None).boxes.shape == (0, 4)


def test_a_view_teaches_what_it_shows_without_crowds():
    truth = gathered(some_objects(masks=True))
    target = truth.target(0, view_of((0, 0, 20, 30), (40, 60)))
    assert target.keys() == {"boxes", "labels", "masks"}
    assert target["boxes"].tolist() == [[4, 6, 24, 22], [41, 2, 49, 14]]
    assert target["labels"].tolist() == [1, 0]
    assert target["masks"].shape == (2, 40, 60)
    assert target["masks"].dtype == np.uint8
    assert target["masks"].sum((1, 2)).tolist() == [4 * 79, 4 * 23]
    dtypes = [target[k].dtype for k in ("boxes", "labels")]
    assert dtypes == [np.float32, np.int64]
    empty = truth.target(1, view_of((0, 0, 24, 18), (12, 9), original=(24, 18)))
    assert [v.shape for v in empty.values()] == [(0, 4), (0,), (0, 12, 9)]
    assert "masks" not in gathered(some_objects()).target(0, view_of((0, 0, 20, 30), (40, 60)))


def test_an_object_of_which_the_view_shows_no_pixel_is_left_out():
    """Its box is large, but of its mask only a pixel stands where none is picked."""
    mask = np.zeros((20, 30), bool)
    mask[0, 0] = True
    given = runs(rle.from_mask(mask).decode())
    fine = runs(rle.from_mask(~mask).decode())
    found = [
        Found(0, "", 0, (0, 0, 20, 20), mask=given),
        Found(0, "", 1, (0, 0, 30, 20), mask=fine),
    ]
    target = gathered(found).target(0, view_of((0, 0, 20, 30), (5, 7)))
    assert target["labels"].tolist() == [1]
    assert [len(v) for v in target.values()] == [1, 1, 1]


def test_of_too_many_objects_the_largest_are_taught_and_the_number_is_told(monkeypatch):
    monkeypatch.setattr(module, "MOST_OBJECTS", 3)
    rows = [(5, 0), (9, 1), (2, 2), (7, 0), (9, 2)]
    found = [Found(0, "", label, (1.0, 1.0, 1.0 + side, 6.0)) for side, label in rows]
    found += [Found(2, "", 0, (1, 1, 5, 5))] * 3 + [Found(2, "", 0, (1, 1, 5, 5), crowd=True)]
    truth = gathered(found)
    target = truth.target(0, view_of((0, 0, 20, 30), (20, 30)))
    assert (target["boxes"][:, 2] - target["boxes"][:, 0]).tolist() == [9, 7, 9]
    assert target["labels"].tolist() == [1, 0, 2]
    assert len(truth.target(0, None)) == 5
    assert truth.notes == (
        "1 of 4 images have more than 3 objects, the most 5 (image 0); training takes the 3 largest of a "
        "view, evaluation all",
    )
    assert module.MOST_OBJECTS == 3


def test_the_cap_lies_above_every_image_of_common_data_sets():
    """COCO has 93 objects in an image at most, cells of a slide several hundred."""
    assert module.MOST_OBJECTS == 500


def test_targets_become_tensors_one_dict_for_each_image():
    from vitrail.data.loader import _stacked

    truth = gathered(some_objects(masks=True))
    views = [view_of((0, 0, h, w), (10, 15), original=(h, w)) for h, w in SIZES[:2].tolist()]
    stacked = _stacked([truth.target(i, view) for i, view in enumerate(views)])
    assert isinstance(stacked, tuple)
    assert [t["boxes"].shape for t in stacked] == [(2, 4), (0, 4)]
    assert [t["masks"].dtype for t in stacked] == [torch.uint8] * 2
    assert stacked[0]["labels"].tolist() == [1, 0]
