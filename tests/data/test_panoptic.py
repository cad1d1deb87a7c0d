"""COCO's panoptic JSON: the layouts it is found in, what it teaches, and everything that can be wrong."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.data.panoptics import (
    CATEGORIES,
    IDS,
    document,
    lists,
    maps,
    panoptic_set,
    write_ids,
)
from tests.data.scenes import coco_set, write_images
from vitrail.cli import main
from vitrail.data import digits, open_data, panoptic, rle
from vitrail.data.augment import draw
from vitrail.data.augmentation import Augmentation
from vitrail.data.boxes import Boxes
from vitrail.data.coco_panoptic import CocoPanoptic
from vitrail.data.opening import open_source
from vitrail.data.panoptic import facts_of
from vitrail.data.view import View
from vitrail_runtime.coco import CocoIds, CocoSegments
from vitrail_runtime.errors import ImageError, InputError
from vitrail_runtime.panoptic import colours_of, ids_of
from vitrail_runtime.prediction import Prediction


def check_facts(data) -> None:
    truth = data.truth
    assert (truth.kind, data.classes, truth.stuff) == ("segments", ("dot", "cell", "sky"), {2})
    assert (truth.bad, truth.problems, truth.missing()) == ((), {}, [])
    assert truth.told.image_ids.tolist() == [11, 12, 13]
    assert truth.told.category_ids.tolist() == [3, 7, 9]
    first, second, third = (truth.target(i, None) for i in range(3))
    assert first.labels.tolist() == [0, 2, 1, 1]
    assert first.crowd.tolist() == [False, False, False, True]
    names = {"two": 1, "sky": 2, "one": 3, "crowd": 4}
    want = np.zeros(maps()[0].shape, int)
    for name, number in names.items():
        want[maps()[0] == IDS[name]] = number
    assert np.array_equal(first.segments, want)
    assert (second.segments == 1).all()
    assert np.array_equal(third.segments > 0, maps()[2] > 0)
    assert truth.told.areas.tolist() == [40, 460, 20, 20, 432, 20]
    assert truth.told.boxes[2].tolist() == [5, 4, 9, 9]
    assert truth.counts().tolist() == [[1, 2, 1], [0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("file", "images", "ids"),
    [
        ("panoptic_train.json", "images", "panoptic_train"),
        ("annotations/panoptic_train2017.json", "train2017", "annotations/panoptic_train2017"),
        ("annotations/panoptic_train2017.json", "images/train2017", "panoptic/train2017"),
        ("train.json", "images", "panoptic/train"),
        ("train.json", "images/train", "panoptic"),
        ("train/_annotations.coco.json", "train", "train/ids"),
    ],
)
def test_every_layout_gives_the_same_truth(tmp_path, file, images, ids):
    told = document(write_images(tmp_path / images))
    write_ids(tmp_path / ids)
    if ids == "train/ids":
        for annotation in told["annotations"]:
            annotation["file_name"] = f"ids/{annotation['file_name']}"
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(told))
    assert isinstance(open_source(tmp_path), CocoPanoptic)
    check_facts(open_data(tmp_path, "all"))
    check_facts(open_data(tmp_path, "all"))  # from the cache
    check_facts(open_data(path, "all"))


def test_images_may_be_named_by_their_whole_path(tmp_path):
    root = panoptic_set(tmp_path)
    change(
        root,
        lambda told: [
            e.update(file_name=f"{root}/images/{e['file_name']}") for e in told["images"]
        ],
    )
    check_facts(open_data(root, "all"))


def test_what_was_said_of_images_is_read_with_those_images_wherever_they_are(tmp_path, monkeypatch):
    """Beside it stand copies of the same names, as `predict` may have drawn them."""
    out, answer = tmp_path / "seen", np.ones((20, 30), np.int32)
    write_images(tmp_path / "photos")
    write_images(out, [(50, 60)] * 3)
    monkeypatch.chdir(tmp_path / "photos")
    said = Prediction(
        np.array([0]), np.array([0.9]), ["sky"], segments=answer, stuff=(0,), source="a.png"
    )
    written = CocoSegments(out, CocoIds(["a.png"], ["sky"]))
    written.add(said)
    written.close()
    data = open_data(out / "coco_panoptic.json", "all")
    assert data.images.sizes.tolist() == [[20, 30]]
    assert (data.truth.bad, data.truth.read(0).segments.tolist()) == ((), answer.tolist())


def test_where_there_are_boxes_too_they_are_taken(tmp_path):
    panoptic_set(tmp_path)
    coco_set(tmp_path)
    assert open_data(tmp_path, "all").truth.kind == "boxes"
    assert open_data(tmp_path / "panoptic_train.json", "all").truth.kind == "segments"


def packed_boxes(truth) -> Boxes:
    """The same as objects with masks, which another reader shows."""
    read = [truth.read(i) for i in range(len(truth))]
    masks = [rle.from_mask(r.segments == n + 1) for r in read for n in range(len(r))]
    from dataclasses import replace

    from vitrail.data.boxes import Packed

    return replace(truth.told, masks=Packed.of(masks))


@pytest.mark.parametrize("seed", range(6))
def test_a_view_shows_what_masks_show_under_it(tmp_path, seed):
    """Against the reader of instances; but stuff stays however little of it is seen, and boxes lie around
    what is seen."""
    truth = open_data(panoptic_set(tmp_path), "all").truth
    other = packed_boxes(truth)
    augmentation = Augmentation(scale=(0.1, 0.8), flip=0.5)
    for i, size in enumerate(((20, 30), (24, 18), (20, 30))):
        view = draw(*size, (17, 23), augmentation, (seed, 0, i)).view
        got, want = truth.target(i, view), other.target(i, view)
        things = got["labels"] != 2
        order = np.argsort(truth.read(i).labels, kind="stable")
        assert sorted(got["labels"][things]) == sorted(want["labels"][want["labels"] != 2]), order
        shown = {(int(k), m.tobytes()) for k, m in zip(got["labels"], got["masks"], strict=True)}
        known = {(int(k), m.tobytes()) for k, m in zip(want["labels"], want["masks"], strict=True)}
        assert {one for one in shown if one[0] != 2} == {one for one in known if one[0] != 2}
        assert {one for one in known if one[0] == 2} <= shown
        for box, mask in zip(got["boxes"], got["masks"], strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        assert (got["boxes"].dtype, got["masks"].dtype) == (np.float32, np.uint8)


def test_padding_and_what_is_of_no_segment_teach_nothing(tmp_path):
    truth = open_data(panoptic_set(tmp_path), "all").truth
    view = View((24, 18), (24, 18), (0, 0, 24, 18), (0.0, 0.0), False, padding=4)
    shown = truth.target(1, view)
    assert shown["masks"][0, 4:, 4:].all()
    assert shown["masks"].sum() == 20 * 14
    assert shown["boxes"].tolist() == [[4, 4, 18, 24]]
    wide = View((20, 30), (20, 30), (0, 0, 20, 30), None, False)
    shown = truth.target(0, wide)
    assert shown["labels"].tolist() == [0, 2, 1]  # without the crowd
    assert not shown["masks"][:, 15:, 26:].any()
    assert not shown["masks"][:, :2].any()


def test_an_image_without_any_segment_has_none_in_any_view(tmp_path):
    given = [np.zeros_like(ids) if i == 1 else ids for i, ids in enumerate(maps())]
    truth = open_data(
        panoptic_set(tmp_path, [lists()[0], [], lists()[2]], given=given), "all"
    ).truth
    view = View((24, 18), (12, 9), (0, 0, 24, 18), (0.0, 0.0), True, padding=2)
    shown = {name: column.shape for name, column in truth.target(1, view).items()}
    assert shown == {"boxes": (0, 4), "labels": (0,), "masks": (0, 12, 9)}


def test_of_too_many_segments_the_smallest_are_left_out(tmp_path, monkeypatch):
    truth = open_data(panoptic_set(tmp_path), "all").truth
    monkeypatch.setattr(panoptic, "MOST_OBJECTS", 2)
    whole = View((20, 30), (20, 30), (0, 0, 20, 30), None, False)
    assert truth.target(0, whole)["labels"].tolist() == [0, 2]  # not the cell of 20 pixels


def test_things_of_which_too_little_is_seen_are_left_out_and_stuff_is_not(tmp_path):
    truth = open_data(panoptic_set(tmp_path), "all").truth
    corner = View((20, 30), (10, 10), (0, 0, 9, 6), None, False)  # one of four columns of the cell
    assert truth.target(0, corner)["labels"].tolist() == [2, 1]
    corner = View((20, 30), (10, 10), (0, 0, 5, 6), None, False)  # and of five rows one
    assert truth.target(0, corner)["labels"].tolist() == [2]


def test_facts_are_those_of_every_value_alone():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4, (6, 1)).repeat(9, 1) * rng.integers(0, 2, (6, 9)) * 1000
    found = facts_of(values)
    assert found.values.tolist() == np.unique(values).tolist()
    for value, area, box in zip(*found, strict=True):
        mask = values == value
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert area == mask.sum()
        assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]


def test_parts_and_whole_have_their_own_segments(tmp_path):
    root = panoptic_set(tmp_path, splits=("train", "val"))
    whole = open_data(root, "all")
    assert len(whole) == 6
    for i in range(6):
        assert whole.truth.target(i, None).labels.tolist() == [[0, 2, 1, 1], [2], [0]][i % 3]
    part = whole.truth.select([5, 0])
    assert part.target(0, None).labels.tolist() == [0]
    assert part.target(1, None).segments.max() == 4
    assert [whole.truth.digest(i) for i in (0, 1, 2)] == [whole.truth.digest(i) for i in (3, 4, 5)]
    assert whole.truth.strata().tolist() == [1, 2, 0] * 2


def test_of_a_class_of_stuff_an_image_has_one_segment(tmp_path):
    """Two ids of the sky are one segment; two of a thing stay two, and so does a crowd of stuff."""
    ids, told = maps(), lists()
    ids[0][10:13, :4], ids[0][2, 29] = 77, 78
    ids[1][:, 5:] = 9
    told[0][1:1] = [
        {"id": i, "category_id": 9, "iscrowd": crowd} for i, crowd in ((77, 0), (78, 1))
    ]
    told[1].append({"id": 9, "category_id": 9, "iscrowd": 0})
    ids[2][0, 0] = 5
    told[2].append({"id": 5, "category_id": 3})
    data = open_data(panoptic_set(tmp_path, told, ("train", "val"), ids), "all")
    plain = open_data(panoptic_set(tmp_path / "plain"), "all")
    note, _ = data.notes  # of train and of val
    assert (
        "2 of 3 images of ids have several segments of one class of stuff, which are taken" in note
    )
    assert note.endswith("panoptic_train/a.png, " + str(tmp_path / "panoptic_train/b.png"))
    for truth, places in ((data.truth, (0, 1, 2)), (data.truth.select([5, 4, 3]), (2, 1, 0))):
        first, second, third = (truth.target(i, None) for i in places)
        assert first.labels.tolist() == [0, 2, 2, 1, 1]
        assert first.crowd.tolist() == [False, False, True, False, True]
        sky = (maps()[0] == IDS["sky"]) & (ids[0] != 78)
        assert np.array_equal(first.segments == 2, sky)
        assert (ids[0] == 78).sum() == (first.segments == 3).sum() == 1
        assert (second.segments == 1).all()
        assert third.labels.tolist() == [0, 0]
        own = truth.told.target(places[0], None)
        assert own.areas[1] == sky.sum()
        assert own.boxes[1].tolist() == plain.truth.told.boxes[1].tolist()
        assert len(truth.told.target(places[1], None)) == 1
    told[1].pop()
    without = open_data(panoptic_set(tmp_path, told, given=ids), "train", drop_bad=True)
    assert data.truth.digest(1) != without.truth.digest(1)


def test_a_digest_changes_with_what_ids_mean(tmp_path):
    told = [open_data(panoptic_set(tmp_path / "a"), "all").truth.digest(0)]
    other = lists()
    other[0][0]["category_id"] = 7
    told.append(open_data(panoptic_set(tmp_path / "b", other), "all").truth.digest(0))
    thing = [{**c, "isthing": 1} for c in CATEGORIES]
    told.append(open_data(panoptic_set(tmp_path / "c", categories=thing), "all").truth.digest(0))
    moved = maps()
    moved[0] = np.roll(moved[0], 1, 1)
    told.append(open_data(panoptic_set(tmp_path / "d", given=moved), "all").truth.digest(0))
    assert len(set(told)) == 4


def missing_in_list(told, ids):
    told[0] = told[0][1:]
    return "a.png: the ids 70000 stand in the image but not in its list in"


def missing_in_image(told, ids):
    ids[0][ids[0] == IDS["one"]] = IDS["sky"]
    return "a.png: segment 256: its id stands in the list but not in the image; take image and"


def twice(told, ids):
    told[1].append(dict(told[1][0]))
    return "b.png: segment 255: its id stands twice in the list"


def strange_category(told, ids):
    told[0][0]["category_id"] = 4
    return "a.png: segment 70000: its category_id 4 is unknown; known are 3 ('dot'), 7 ('cell'), 9"


def no_id(told, ids):
    told[0].append({"id": 0, "category_id": 3})
    return "a.png: segment 0: its id is 0, expected a whole number from 1 to 16,777,215"


def no_segment(told, ids):
    told[0].append(None)
    return "a.png: segment number 5: is None, expected an object {...}"


FLAWS = (missing_in_list, missing_in_image, twice, strange_category, no_id, no_segment)


@pytest.mark.parametrize("flaw", FLAWS, ids=lambda f: f.__name__)
def test_an_image_of_ids_that_does_not_fit_its_list_is_named_and_can_be_gone_without(
    tmp_path, capsys, flaw
):
    told, ids = lists(), maps()
    message = flaw(told, ids)
    root = panoptic_set(tmp_path, told, given=ids)
    with pytest.raises(InputError) as error:
        open_data(root, "all")
    assert "be used as they stand:" in str(error.value)
    assert message in str(error.value)
    assert "--drop-bad" in str(error.value)
    data = open_data(root, "all", drop_bad=True)
    ((where, what), *more) = data.bad
    assert message in f"{where}: {what}"
    assert not more
    first = data.truth.target(0, None)
    gone = {missing_in_list: [2, 1, 1], strange_category: [2, 1, 1], missing_in_image: [0, 2, 1]}
    assert first.labels.tolist() == gone.get(flaw, [0, 2, 1, 1])
    assert set(np.unique(first.segments)) == {0, *range(1, len(first) + 1)}
    assert main(["data", "check", str(root)]) == 1
    assert message in capsys.readouterr().out
    main(["data", "check", str(root), "--drop-bad"])
    assert "warning: bad annotations: 1" in capsys.readouterr().out


def test_images_of_which_nothing_can_be_said_are_broken(tmp_path):
    root = panoptic_set(tmp_path)
    ids = root / "panoptic_train"
    (ids / "a.png").unlink()
    Image.fromarray(np.zeros((24, 19, 3), np.uint8)).save(ids / "b.png")
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(ids / "c.png")
    with pytest.raises(InputError) as error:
        open_data(root, "all")
    assert "none of the annotations of" not in str(error.value)
    told = json.loads((root / "panoptic_train.json").read_text())
    write_ids(ids)
    for name, damage, message in (
        ("a", lambda f: f.unlink(), "panoptic_train/a.png: No such file or directory"),
        (
            "b",
            lambda f: Image.fromarray(np.zeros((24, 19, 3), np.uint8)).save(f),
            "b.png: is 24 x 19 (height x width), but its image",
        ),
        (
            "c",
            lambda f: Image.fromarray(np.zeros((20, 30), np.uint8)).save(f),
            "c.png: holds no colours; ids of segments are stored as colours",
        ),
    ):
        write_ids(ids)
        damage(ids / f"{name}.png")
        with pytest.raises(InputError) as error:
            open_data(root, "all")
        assert message in str(error.value)
        assert "--skip-broken" in str(error.value)
        assert len(open_data(root, "all", skip_broken=True)) == 2
    write_ids(ids)
    told["annotations"].pop(1)
    (root / "panoptic_train.json").write_text(json.dumps(told))
    with pytest.raises(InputError, match=r"b\.png: has no annotation in .*train\.json"):
        open_data(root, "all")


def change(root, change) -> None:
    told = json.loads((root / "panoptic_train.json").read_text())
    change(told)
    (root / "panoptic_train.json").write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t["categories"][0].pop("isthing"), "things and which are stuff: sky without"),
        (lambda t: t["categories"][0].update(isthing="0"), "which are stuff: sky without an"),
        (lambda t: t["categories"][2].update(isthing=None), "which are stuff: dot without an"),
        (lambda t: t["annotations"][1].update(image_id=5), "number 2: its image_id 5 is not among"),
        (lambda t: t["annotations"].append(t["annotations"][0]), "has an annotation before"),
        (lambda t: t["annotations"][0].update(file_name=3), "its file_name is 3, expected text"),
        (lambda t: t["annotations"][0].update(segments_info={}), "segments_info is {}, not a"),
        (
            lambda t: [a.update(file_name="x/" + a["file_name"]) for a in t["annotations"]],
            r"none of the images of ids that .* names is there, such as x/a\.png; looked in",
        ),
    ],
)
def test_a_json_file_that_cannot_be_is_refused(tmp_path, damage, message):
    root = panoptic_set(tmp_path)
    change(root, damage)
    with pytest.raises(InputError, match=message):
        open_data(root, "all")


def test_an_image_of_ids_that_changed_since_is_refused(tmp_path):
    root = panoptic_set(tmp_path)
    truth = open_data(root, "all").truth
    write_ids(root / "panoptic_train", [np.roll(m, 1) for m in maps()])
    with pytest.raises(ImageError, match="has changed since it was indexed; start again"):
        truth.target(0, None)
    (root / "panoptic_train" / "a.png").unlink()
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        truth.target(0, None)


def test_a_split_of_classes_that_are_not_learnt_is_refused(tmp_path):
    root = panoptic_set(tmp_path)
    with pytest.raises(InputError, match="has classes that are not among those to be learnt: sky"):
        open_data(root, "all", classes=("dot", "cell"))
    other = open_data(root, "all", classes=("sky", "new", "cell", "dot")).truth
    assert (other.stuff, other.missing()) == ({0}, ["new"])
    assert other.target(0, None).labels.tolist() == [3, 0, 2, 2]


def test_check_counts_things_and_stuff_and_show_draws_them(tmp_path, capsys):
    root = panoptic_set(tmp_path / "set", splits=("train", "val"))
    main(["data", "check", str(root)])  # val has the images of train
    out = capsys.readouterr().out
    assert "train: 3 images, 6 segments of things and stuff, 1 of them crowds" in out
    assert "segments: 6 small, 0 medium, 0 large" in out
    assert "    cell                 2 segments in       1 images" in out
    assert "    sky (stuff)          2 segments in       2 images" in out
    sheet = tmp_path / "sheet.png"
    assert main(["data", "show", str(root), "--out", str(sheet)]) == 0
    assert "train: 3 pictures of 3 classes" in capsys.readouterr().out
    assert Image.open(sheet).width == 1600


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits") / "set"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "SHEETS", {"train": 12, "val": 40, "test": 3})
        assert digits.make_digits(folder, task="panoptic") == folder
    return folder


def test_panoptic_digits_are_things_on_paper_on_a_ground(made):
    grounds, empty = set(), 0
    for split, number in (("train", 12), ("val", 40), ("test", 3)):
        data = open_data(made, split)
        assert data.classes == (*"0123456789", "paper", "wood", "tiles")
        assert (len(data), data.truth.stuff, data.notes) == (number, {10, 11, 12}, ()), data.notes
        for i in range(number):
            told = data.truth.target(i, None)
            assert told.segments.min() > 0  # every pixel is of a segment
            labels = told.labels.tolist()
            (ground,) = set(labels) & {11, 12}
            assert labels.count(10) == labels.count(ground) == 1
            grounds.add(ground)
            empty += len(told) == 2
            rim = np.ones(told.segments.shape, bool)
            rim[1:-1, 1:-1] = False
            assert set(told.segments[rim]) == {labels.index(ground) + 1}
            grey = np.asarray(Image.fromarray(data.images.read(i)).convert("L"), float)
            paper = grey[told.segments == labels.index(10) + 1].mean()
            for n, label in enumerate(labels):
                if label < 10:
                    assert grey[told.segments == n + 1].mean() < paper - 20
    assert grounds == {11, 12}
    assert 0 < empty < 10


def test_lists_of_panoptic_digits_have_the_areas_and_boxes_of_their_segments(made):
    told = json.loads((made / "panoptic_test.json").read_text())
    for annotation in told["annotations"]:
        image = Image.open(made / "panoptic_test" / annotation["file_name"])
        ids = ids_of(np.asarray(image))
        assert sorted(np.unique(ids)) == sorted(s["id"] for s in annotation["segments_info"])
        for segment in annotation["segments_info"]:
            mask = ids == segment["id"]
            x, y, width, height = segment["bbox"]
            assert segment["area"] == mask.sum() == mask[y : y + height, x : x + width].sum()
    assert np.array_equal(colours_of(ids), np.asarray(image))


def test_the_same_seed_draws_the_same_segments(made, tmp_path, monkeypatch):
    monkeypatch.setattr(digits, "SHEETS", {"train": 2, "val": 1, "test": 1})
    again = digits.make_digits(tmp_path / "again", task="panoptic")
    other = digits.make_digits(tmp_path / "other", task="panoptic", seed=1)
    for name in ("images/train/0002.jpg", "panoptic_train/0002.png"):
        assert (again / name).read_bytes() == (made / name).read_bytes()
        assert (other / name).read_bytes() != (made / name).read_bytes()
