"""COCO's JSON: the layouts it is found in, and everything that can be wrong with it."""

import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.scenes import (
    CATEGORIES,
    SIZES,
    boxes_of,
    coco_set,
    document,
    random_mask,
    runs_of,
    write_images,
)
from vitrail.data import coco as coco_module
from vitrail.data import open_data
from vitrail.data.boxes import Boxes
from vitrail.data.index import read_index
from vitrail.data.opening import open_source
from vitrail_runtime.errors import InputError


def write(path: Path, given) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(given), encoding="utf-8")
    return path


def check_facts(data) -> None:
    """What `boxes_of` says, in labels by the order of the category ids: dot 0, cell 1."""
    truth = data.truth
    assert truth.kind == "boxes"
    assert data.classes == ("dot", "cell")
    assert truth.category_ids.tolist() == [3, 7]
    by_name = {key.rsplit("/", 1)[-1]: i for i, key in enumerate(data.keys)}
    assert sorted(by_name) == ["a.png", "b.png", "c.png"]
    a, b, c = (truth.target(by_name[name], None) for name in ("a.png", "b.png", "c.png"))
    assert a.boxes.tolist() == [[2, 3, 12, 11], [20.5, 1, 24.5, 7], [1, 10, 21, 19]]
    assert a.labels.tolist() == [1, 0, 1]
    assert a.crowd.tolist() == [False, False, True]
    assert a.ids.tolist() == [100, 102, 103]
    assert a.areas.tolist() == [80, 24, 180]
    assert len(b) == 0
    assert (c.boxes.tolist(), c.labels.tolist()) == ([[0, 0, 30, 20]], [0])
    assert truth.image_ids[by_name["b.png"]] == 12
    for name, size in zip("abc", SIZES, strict=True):
        assert data.images.sizes[by_name[f"{name}.png"]].tolist() == list(size)
        assert data.images.read(by_name[f"{name}.png"]).shape[:2] == size


@pytest.mark.parametrize(
    ("file", "folder"),
    [
        ("train.json", "images"),
        ("train.json", "images/train"),
        ("train.json", "train"),
        ("train.json", "."),
        ("instances_train.json", "images"),
        ("annotations/instances_train2017.json", "train2017"),
        ("annotations/instances_train2017.json", "images/train2017"),
        ("annotations/train.json", "images"),
        ("annotations/train.json", "train"),
        ("train/_annotations.coco.json", "train"),
        ("Training.json", "images"),
    ],
)
def test_every_layout_gives_the_same_truth(tmp_path, file, folder):
    write(tmp_path / file, document(write_images(tmp_path / folder)))
    data = open_data(tmp_path, "train", val_fraction=0.01)
    check_facts(open_data(tmp_path, "all"))
    assert data.images.source.splits() == ("train",)
    check_facts(open_data(tmp_path / file, "all"))
    assert open_source(tmp_path / file).splits() == ("",)


def test_a_folder_of_the_split_goes_before_one_of_all_images(tmp_path):
    write_images(tmp_path / "images")
    write(tmp_path / "train.json", document(write_images(tmp_path / "images" / "train")))
    assert open_data(tmp_path, "all").keys == [f"images/train/{name}.png" for name in "abc"]


def test_file_names_may_hold_folders(tmp_path):
    entries = write_images(tmp_path / "images" / "train")
    for entry, mark in zip(entries, ("/", "\\", "/"), strict=True):
        entry["file_name"] = f"train{mark}{entry['file_name']}"
    write(tmp_path / "train.json", document(entries))
    check_facts(open_data(tmp_path, "all"))


def test_splits_are_files_whose_whole_name_is_one_and_others_are_passed_over(tmp_path):
    coco_set(tmp_path, splits=("train", "valid", "test"))
    for name in ("train_polygons", "captions_train2017", "image_info_test2017", "notes"):
        (tmp_path / f"{name}.json").write_text("[]")
    assert open_source(tmp_path).splits() == ("train", "val", "test")
    for split in ("train", "val", "test"):
        check_facts(open_data(tmp_path, split))
    everything = open_data(tmp_path / "train.json", "all")
    assert len(everything) == 3


def test_two_files_for_a_split_are_an_error(tmp_path):
    coco_set(tmp_path, splits=("train",))
    for name in ("instances_val2014", "instances_val2017"):
        shutil.copy(tmp_path / "train.json", tmp_path / f"{name}.json")
    with pytest.raises(
        InputError, match=r"has two files for the split 'val': .*2014.json and .*2017.json"
    ):
        open_source(tmp_path)


def test_a_folder_of_classes_or_of_masks_is_no_coco_folder(tmp_path, class_folders):
    root = class_folders({"train": {"a": 2, "b": 2}})
    (root / "results.json").write_text("{}")
    assert open_data(root, "train").truth.kind == "labels"


def test_without_val_a_part_of_train_is_held_out_with_its_objects(tmp_path):
    sizes = [(20 + i, 30) for i in range(8)]
    images = write_images(tmp_path / "images", sizes)
    rows = [{"id": i, "image_id": 11 + i, "category_id": 7, "bbox": [i, 1, 5, 5]} for i in range(8)]
    write(tmp_path / "train.json", document(images, rows))
    train, val = (open_data(tmp_path, split, val_fraction=0.25) for split in ("train", "val"))
    assert (len(train), len(val)) == (6, 2)
    assert sorted(train.keys + val.keys) == [f"images/{c}.png" for c in "abcdefgh"]
    for data in (train, val):
        for i, key in enumerate(data.keys):
            assert data.truth.target(i, None).boxes[0, 0] == "abcdefgh".index(key[7])
    assert "no val split: 25%" in " ".join(val.notes)
    assert "no example of 1 of 2 classes in train" in " ".join(train.notes)


@pytest.mark.parametrize("form", ["packed", "runs", "polygons"])
def test_masks_of_every_form_are_read(tmp_path, form):
    height, width = SIZES[0]
    mask = random_mask(3, height, width)
    if form == "polygons":
        mask[:] = False
        mask[2:11, 4:9] = mask[3:7, 12:20] = True
        given = [[4, 2, 9, 2, 9, 11, 4, 11], [12, 3, 20, 3, 20, 7, 12, 7]]
    elif form == "runs":
        given = {"size": [height, width], "counts": runs_of(mask)}
    else:
        coco = pytest.importorskip("pycocotools.mask")
        packed = coco.encode(np.asfortranarray(mask, np.uint8))["counts"].decode()
        given = {"size": [height, width], "counts": packed}
    row = {"id": 1, "image_id": 11, "category_id": 3, "segmentation": given, "iscrowd": 0}
    data = open_data(coco_set(tmp_path, [row]), "all")
    target = data.truth.target(0, None)
    coco = pytest.importorskip("pycocotools.mask")
    assert np.array_equal(coco.decode(target.masks[0]), mask)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    assert target.boxes.tolist() == [[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]]
    assert target.areas.tolist() == [mask.sum()]


def test_what_is_given_goes_before_what_a_mask_says(tmp_path):
    mask = random_mask(3, *SIZES[0])
    given = {"size": list(SIZES[0]), "counts": runs_of(mask)}
    row = {"id": 1, "image_id": 11, "category_id": 3, "segmentation": given}
    row |= {"bbox": [1, 2, 3, 4], "area": 77}
    target = open_data(coco_set(tmp_path, [row]), "all").truth.target(0, None)
    assert target.boxes.tolist() == [[1, 2, 4, 6]]
    assert target.areas.tolist() == [77]
    assert not target.crowd.any()


@pytest.mark.parametrize("nothing", [[], None, "absent"])
def test_boxes_alone_are_fine(tmp_path, nothing):
    rows = boxes_of()
    for row in rows:
        if nothing != "absent":
            row["segmentation"] = nothing
        row["area"] = 0  # of a tool that measures none
    data = open_data(coco_set(tmp_path, rows), "all")
    assert not data.truth.has_masks
    check_facts(data)


# --- Annotations that cannot be used -----------------------------------------------------------------------

BAD = {
    "outside": ({"bbox": [40, 5, 5, 5]}, "lies outside of its image of 30 x 20 pixels"),
    "reaches out": ({"bbox": [25, 5, 15, 5]}, "reaches 10 pixels outside"),
    "zero area": ({"bbox": [5, 5, 0, 5]}, "has no area: it is 0 wide and 5 high"),
    "NaN": ({"bbox": [5, float("nan"), 5, 5]}, "is not finite (NaN or infinite)"),
    "unknown category": (
        {"category_id": 5},
        "its category_id 5 is unknown; known are 3 ('dot'), 7 ('cell')",
    ),
    "category of no kind": ({"category_id": [3]}, "its category_id [3] is unknown"),
    "duplicate id": ({"id": 100}, "its id 100 stands twice"),
    "id of no kind": ({"id": "x"}, "its id is not a whole number"),
    "unknown image": ({"image_id": 5}, "its image_id 5 is not among the images"),
    "image of no kind": ({"image_id": {}}, "its image_id {} is not among the images"),
    "wrong RLE size": (
        {"segmentation": {"size": [30, 20], "counts": [600]}},
        "its mask says the size [30, 20], but its image is [20, 30]",
    ),
    "short RLE": ({"segmentation": {"size": [20, 30], "counts": [5, 5]}}, "cover 10 pixels"),
    "box of three": ({"bbox": [5, 5, 5]}, "its bbox is [5, 5, 5], expected [x, y, width, height]"),
    "box of text": ({"bbox": ["5", 5, 5, 5]}, "its bbox is"),
    "box of no list": ({"bbox": 5}, "its bbox is 5"),
    "huge": ({"bbox": [5, 5, 10**400, 5]}, "its bbox is"),
    "area of text": ({"area": "5"}, "its area is '5', expected a number"),
    "neither": ({"bbox": None}, "has neither a box nor a mask"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_annotation_is_named_and_dropped_where_that_is_asked_for(tmp_path, name):
    change, what = BAD[name]
    bad = {"id": 200, "image_id": 11, "category_id": 3, "bbox": [5, 5, 5, 5], **change}
    root = coco_set(tmp_path, [*boxes_of(), bad])
    with pytest.raises(InputError) as error:
        open_data(root, "all")
    message = str(error.value)
    assert f"{root} train: 1 annotation cannot be used as they stand:" in message or (
        "1 annotation cannot be used" in message
    )
    assert what in message
    assert str(root / "train.json") in message
    assert "--drop-bad" in message
    data = open_data(root, "all", drop_bad=True)
    (said,) = data.bad
    assert what in said[1]
    assert any("1 bad annotation" in note for note in data.notes)
    assert len(data) == 3
    if name == "reaches out":
        assert data.truth.target(0, None).boxes[-1].tolist() == [25, 5, 30, 10]
    else:
        check_facts(data)


def test_an_annotation_that_is_no_object_is_named_by_its_number(tmp_path):
    root = coco_set(tmp_path, [*boxes_of(), [1, 2]])
    with pytest.raises(InputError, match=r"annotation number 5: is \[1, 2\], expected an object"):
        open_data(root, "all")


def test_many_bad_annotations_are_counted_and_the_first_are_shown(tmp_path):
    bad = [
        {"id": n, "image_id": 13, "category_id": 3, "bbox": [5, 5, 0, 5]} for n in range(200, 225)
    ]
    root = coco_set(tmp_path, [*boxes_of(), *bad])
    with pytest.raises(InputError) as error:
        open_data(root, "train", val_fraction=0.4)
    lines = str(error.value).splitlines()
    assert "25 annotations cannot be used" in lines[0]
    assert "annotation 200 of images/c.png: its box" in lines[1]
    assert len(lines) == 13
    assert "... and 15 more" in lines[11]


def test_a_missing_file_is_a_bad_annotation_and_its_image_left_out(tmp_path):
    root = coco_set(tmp_path)
    (root / "images" / "c.png").unlink()
    with pytest.raises(
        InputError, match=r"c\.png: the file is missing; .*train.json gives it 1 object"
    ):
        open_data(root, "all")
    data = open_data(root, "all", drop_bad=True)
    assert data.keys == ["images/a.png", "images/b.png"]
    assert data.truth.ids.tolist() == [100, 102, 103]
    assert data.truth.image_ids.tolist() == [11, 12]


def test_no_file_there_is_one_message_that_says_where_was_looked(tmp_path):
    root = coco_set(tmp_path)
    shutil.rmtree(root / "images")
    with pytest.raises(
        InputError, match=r"none of the 3 images that .* is there, such as a\.png; looked in"
    ):
        open_data(root, "all")


def test_a_broken_image_is_left_out_with_its_objects(tmp_path):
    root = coco_set(tmp_path)
    (root / "images" / "a.png").write_bytes(b"not an image")
    with pytest.raises(InputError, match="1 of 3 pictures is broken"):
        open_data(root, "all")
    data = open_data(root, "all", skip_broken=True)
    assert data.keys == ["images/b.png", "images/c.png"]
    assert data.truth.ids.tolist() == [101]


def test_an_image_of_another_size_than_the_file_says_is_broken(tmp_path):
    root = coco_set(tmp_path)
    Image.new("RGB", (15, 10)).save(root / "images" / "a.png")
    Image.new("RGB", (24, 18)).save(root / "images" / "b.png")
    with pytest.raises(InputError) as error:
        open_data(root, "all")
    assert "a.png: is 10 x 15 (height x width), but" in str(error.value)
    assert "train.json says 20 x 30\n" in str(error.value)
    assert "says 24 x 18; is it turned by EXIF?" in str(error.value)
    assert open_data(root, "all", skip_broken=True).keys == ["images/c.png"]


# --- Files that cannot be used -----------------------------------------------------------------------------


def test_a_byte_order_mark_is_passed_over(tmp_path):
    root = coco_set(tmp_path)
    path = root / "train.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    check_facts(open_data(root, "all"))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"images": "\xe9"}', "is not UTF-8 text .*; save it as UTF-8"),
        (
            b'{"images": [',
            r"is no whole JSON: .* in line 1, column \d+; was it written to its end\?",
        ),
        (b"", "is no whole JSON"),
        (b"[" * 100 + b"]" * 100, "is not COCO's JSON: expected an object .*, but it holds a list"),
        (b"[" * 100_000, "is nested too deeply|is no whole JSON"),
        (b"[1, 2]", "but it holds a list"),
        (b"5", "but it holds 5"),
        (b"{}", "but it has nothing"),
        (b'{"images": {}}', "but it has 'images'"),
        (b'{"images": []}', "has no list 'categories'"),
        (b'{"images": [], "categories": []}', "has no list 'annotations'; without annotations"),
        (b'{"images": [], "categories": [], "annotations": []}', "has no annotation at all"),
        (b'{"images": [], "categories": [], "annotations": [1]}', "names no categories"),
        (b"1" * 5000, "is no JSON that can be read|but it holds"),
    ],
)
def test_a_file_that_is_no_coco_is_one_message(tmp_path, content, what):
    root = coco_set(tmp_path)
    (root / "train.json").write_bytes(content)
    with pytest.raises(InputError, match=what) as error:
        open_data(root, "all")
    assert str(root / "train.json") in str(error.value)


def test_a_file_that_cannot_be_read_is_one_message(tmp_path):
    (tmp_path / "train.json").mkdir()
    with pytest.raises(InputError, match=r"train\.json cannot be read: Is a directory"):
        open_data(tmp_path, "all")


DEEP = json.loads("[" * 100 + "]" * 100)


@pytest.mark.parametrize(
    ("images", "annotations", "categories", "what"),
    [
        ([{"id": 1}], None, None, 'an image is {"id": ..., "file_name": text, ...}, but one is'),
        ([{"id": None, "file_name": "a.png"}], None, None, "an image is"),
        ([{"id": 1, "file_name": ""}], None, None, "an image is"),
        ([5], None, None, "an image is"),
        ([DEEP], None, None, "an image is"),
        ("twice", None, None, "gives image ids twice: 11; give each once"),
        ("named twice", None, None, "gives file names twice: a.png"),
        (None, None, [{"id": 1}], 'a category is {"id": whole number, "name": text}'),
        (None, None, [{"id": "1", "name": "x"}], "a category is"),
        (None, None, [{"id": 1, "name": 5}], "a category is"),
        (None, None, [DEEP], "a category is"),
        (None, None, [*CATEGORIES, {"id": 3, "name": "x"}], "gives category ids twice: 3"),
        (None, None, [*CATEGORIES, {"id": 4, "name": "dot"}], "gives category names twice: dot"),
        ([], None, None, "lists no images"),
        (None, [DEEP], None, "expected an object"),
        (None, [{**boxes_of()[0], "segmentation": DEEP}], None, "not a list of polygons"),
        (None, [{**boxes_of()[0], "bbox": DEEP}], None, "its bbox is"),
    ],
)
def test_entries_that_cannot_be_are_one_message(tmp_path, images, annotations, categories, what):
    entries = write_images(tmp_path / "images")
    if images == "twice":
        entries[1]["id"] = 11
    elif images == "named twice":
        entries[1]["file_name"] = "a.png"
    elif images is not None:
        entries = images
    write(tmp_path / "train.json", document(entries, annotations, categories))
    with pytest.raises(InputError) as error:
        open_data(tmp_path, "all")
    assert what in str(error.value)


def test_classes_that_do_not_fit_are_shown_in_both_lists(tmp_path):
    root = coco_set(tmp_path)
    with pytest.raises(InputError) as error:
        open_data(root, "all", classes=("cell", "rod"))
    assert "has classes that are not among those to be learnt: dot" in str(error.value)
    assert "its 2: dot, cell" in str(error.value)
    assert "to be learnt 2: cell, rod" in str(error.value)


def test_classes_are_matched_by_name_and_an_unused_one_does_not_matter(tmp_path):
    extra = {"id": 0, "name": "everything"}
    root = coco_set(tmp_path, categories=[*CATEGORIES, extra])
    data = open_data(root, "all", classes=("cell", "rod", "dot"))
    assert data.truth.labels.tolist() == [0, 2, 0, 2]
    assert data.truth.category_ids.tolist() == [7, 8, 3]
    assert data.classes == ("cell", "rod", "dot")
    own = open_data(root, "all")
    assert own.classes == ("everything", "dot", "cell")
    assert own.truth.labels.tolist() == [2, 1, 2, 1]


def flawed_set(root: Path) -> Path:
    """Objects with masks, one of them not; one reaches out of its image; an image of another size, one that
    is missing; a file name that is no UTF-8."""
    images = write_images(root / "images")
    images.append({"id": "x", "file_name": "gone.png"})
    images[1]["width"] += 1
    rows = boxes_of()
    for row in rows[:3]:
        height, width = SIZES[row["image_id"] - 11]
        mask = random_mask(row["id"], height, width)
        row["segmentation"] = {"size": [height, width], "counts": runs_of(mask)}
    rows[1]["bbox"] = [0, 0, 40, 20]
    rows.append({"id": 9, "image_id": 11, "category_id": 5, "bbox": [0, 0, 1, 1]})
    del rows[3]
    write(root / "train.json", document(images, rows, [*CATEGORIES, {"id": 4, "name": "ä\0"}]))
    return root


def test_a_second_start_parses_nothing_and_knows_the_same(tmp_path, monkeypatch):
    root = flawed_set(tmp_path)
    given = {"split": "all", "drop_bad": True, "skip_broken": True}
    sources = [open_source(root), open_source(root)]
    first = open_data(sources[0], **given)
    monkeypatch.setattr(coco_module, "parsed", None)
    second = open_data(sources[1], **given)
    assert (len(first), len(first.bad), len(first.broken)) == (2, 3, 1)
    assert second.content_hash == first.content_hash
    assert (second.bad, second.broken, second.notes) == (first.bad, first.broken, first.notes)
    assert second.classes == first.classes == ("dot", "ä\0", "cell")
    truths = [
        source.truth("train", read_index(source, "train"), first.classes) for source in sources
    ]
    for field in fields(Boxes):
        mine, other = (getattr(truth, field.name) for truth in truths)
        if field.name == "masks":
            assert mine is not None
            assert [mine[i] for i in range(3)] == [other[i] for i in range(3)]
        elif isinstance(mine, np.ndarray):
            assert mine.dtype == other.dtype
            assert np.array_equal(mine, other)
        else:
            assert mine == other, field.name
    assert all(d.annotations is None for s in sources for d in s._documents.values())


def test_what_is_kept_of_a_file_is_of_its_content(tmp_path, monkeypatch):
    """Not of its name and times alone: a file of the same size and time says something else."""
    root = coco_set(tmp_path)
    path = root / "train.json"
    before, info = open_data(root, "all").truth, path.stat()
    text = path.read_text()
    path.write_text(text.replace('"bbox": [2, 3', '"bbox": [3, 3'))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    assert path.stat().st_size == info.st_size
    after = open_data(root, "all").truth
    assert (before.boxes[0, 0], after.boxes[0, 0]) == (2, 3)
    path.write_text(text.replace('"name": "cell"', '"name": "call"'))
    assert open_data(root, "all").classes == ("dot", "call")
    monkeypatch.setattr(coco_module, "VERSION", -1)  # parsed again, its boxes from the cache
    source = open_source(root)
    open_data(source, "all")
    assert all(d.annotations is None for d in source._documents.values())


def test_what_is_kept_of_a_file_is_of_the_images_that_are_there(tmp_path):
    images = write_images(tmp_path / "images", [(20, 30)] * 3)
    for entry in images:
        del entry["height"], entry["width"]
    write(tmp_path / "train.json", document(images))
    found = []
    for gone in ("a.png", "c.png"):
        path = tmp_path / "images" / gone
        payload = path.read_bytes()
        path.unlink()
        found.append(open_data(tmp_path, "all", drop_bad=True).truth)
        path.write_bytes(payload)
    assert [len(truth.boxes) for truth in found] == [1, 3]
    assert open_data(tmp_path, "all").truth.boxes[-1].tolist() == [0, 0, 30, 20]
    write_images(tmp_path / "images", [(20, 30), (20, 30), (10, 15)])
    assert open_data(tmp_path, "all", drop_bad=True).truth.boxes[-1].tolist() == [0, 0, 15, 10]


def test_a_file_that_changes_while_it_is_read_is_told(tmp_path, own_cache):
    source = open_source(coco_set(tmp_path))
    index = read_index(source, "train")
    source.truth("train", index, source.classes())
    shutil.rmtree(own_cache)
    path = tmp_path / "train.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(InputError, match=r"train\.json has changed since it was read; start again"):
        source.truth("train", index, source.classes())


def test_the_content_hash_changes_with_an_annotation(tmp_path):
    a = open_data(coco_set(tmp_path / "a"), "all").content_hash
    rows = boxes_of()
    rows[0]["bbox"][2] += 1
    b = open_data(coco_set(tmp_path / "b", rows), "all").content_hash
    assert a != b
    assert a == open_data(coco_set(tmp_path / "c"), "all").content_hash


def test_images_are_numbered_where_the_file_names_them_by_text(tmp_path):
    images = write_images(tmp_path / "images")
    rows = boxes_of()
    for entry in (*images, *rows):
        key = "image_id" if "image_id" in entry else "id"
        entry[key] = f"no. {entry[key]}"
    write(tmp_path / "train.json", document(images, rows))
    data = open_data(tmp_path, "all")
    assert data.truth.image_ids.tolist() == [1, 2, 3]
    assert data.truth.labels.tolist() == [1, 0, 1, 0]
