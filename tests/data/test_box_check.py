"""`vitrail data check` and `show` on images with objects."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.data.scenes import SIZES, boxes_of, coco_set, document, runs_of, write_images
from vitrail.cli import main
from vitrail.data import open_data
from vitrail.data.checkup import check
from vitrail.data.sheet import _with_objects, contact_sheet
from vitrail_runtime.drawing import colour_of


def bigger_set(root, annotations=None):
    """Images of 120 x 160, 100 x 50 and 200 x 200 with objects of three sizes, in train and val."""
    sizes = [(120, 160), (100, 50), (200, 200)]
    rows = [
        {"id": 1, "image_id": 11, "category_id": 7, "bbox": [2, 3, 10, 8], "iscrowd": 0},
        {"id": 2, "image_id": 11, "category_id": 7, "bbox": [0, 0, 32, 32], "iscrowd": 0},
        {"id": 3, "image_id": 11, "category_id": 3, "bbox": [0, 0, 96, 96], "iscrowd": 1},
        {"id": 4, "image_id": 13, "category_id": 7, "bbox": [0, 0, 95, 97], "iscrowd": 0},
    ]
    for split, part in (("train", "abc"), ("val", "xyz")):
        images = write_images(root / "images" / split, [(h, w + len(split)) for h, w in sizes])
        for entry, name in zip(images, part, strict=True):
            old = root / "images" / split / entry["file_name"]
            rng = np.random.default_rng(ord(name))
            noise = rng.integers(0, 256, (entry["height"], entry["width"], 3), np.uint8)
            Image.fromarray(noise).save(old)
            entry["file_name"] = f"{split}/{entry['file_name']}"
        text = json.dumps(document(images, rows if annotations is None else annotations))
        (root / f"{split}.json").write_text(text)
    return root


def test_objects_are_counted_by_class_size_and_image(tmp_path, capsys):
    root = bigger_set(tmp_path)
    found = check(root)
    assert (found.classes, found.errors) == (("dot", "cell"), {})
    train = found.splits[0]
    assert (train.name, train.pictures) == ("train", 3)
    assert train.per_class == {"dot": 1, "cell": 2}
    boxes = train.objects
    assert boxes.per_class == {"dot": 1, "cell": 3}
    assert (boxes.crowds, boxes.most, boxes.empty, boxes.masks) == (1, 3, 1, False)
    # 80 is small; 32 x 32 and 95 x 97 = 9,215 are medium; 96 x 96 is large.
    assert (boxes.small, boxes.medium, boxes.large) == (1, 2, 1)
    assert found.warnings["classes without an object"] == ["train: dot", "val: dot"]
    assert main(["data", "check", str(root)]) == 0
    out = capsys.readouterr().out
    assert "  train: 3 images, 4 objects, 1 of them crowds\n" in out
    assert "objects: 1 small, 2 medium, 1 large (under 32 x 32, under 96 x 96 pixels, over)" in out
    assert "at most 3 in an image, 1 images without any" in out
    assert "    dot           1 objects in       1 images\n" in out
    assert "    cell          3 objects in       2 images\n" in out
    assert "ready to train, with warnings" in out
    assert main(["data", "check", str(root), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["splits"][1]["objects"]["per_class"] == {"dot": 1, "cell": 3}


def test_bad_annotations_are_errors_and_with_drop_bad_warnings(tmp_path, capsys):
    bad = {"id": 9, "image_id": 11, "category_id": 3, "bbox": [400, 5, 5, 5]}
    root = coco_set(tmp_path, [*boxes_of(), bad])
    assert main(["data", "check", str(root)]) == 1
    out = capsys.readouterr().out
    assert "ERROR: bad annotations: 1\n" in out
    assert "annotation 9 of images/a.png: its box, from (400, 5) to (405, 10), lies outside" in out
    assert "ready to train" not in out
    assert main(["data", "check", str(root), "--drop-bad"]) == 0
    out = capsys.readouterr().out
    assert "warning: bad annotations: 1\n" in out
    assert "ready to train, with warnings" in out


def test_images_that_their_annotations_do_not_fit_are_errors(tmp_path):
    root = coco_set(tmp_path)
    Image.new("RGB", (15, 10)).save(root / "images" / "a.png")
    (error,) = check(root).errors["images that their annotations do not fit"]
    assert "a.png: is 10 x 15" in error


def test_one_class_is_enough(tmp_path):
    rows = [row | {"category_id": 3} for row in boxes_of()]
    root = coco_set(tmp_path, rows, categories=[{"id": 3, "name": "dot"}])
    assert check(root).errors == {}


def test_a_split_that_cannot_be_used_is_an_error_beside_the_others(tmp_path, capsys):
    root = coco_set(tmp_path, splits=("train", "val"))
    (root / "val.json").write_text('{"images": [')
    assert main(["data", "check", str(root)]) == 1
    out = capsys.readouterr().out
    assert "ERROR: splits that cannot be read: 1" in out
    assert "val.json is no whole JSON" in out
    assert "  train: 3 images" in out
    (root / "train.json").write_text('{"images": [')
    assert main(["data", "check", str(root)]) == 2


def test_a_val_split_of_other_classes_is_an_error_beside_train(tmp_path):
    root = coco_set(tmp_path, splits=("train",))
    images = json.loads((root / "train.json").read_text())["images"]
    other = document(images, None, [{"id": 7, "name": "rod"}, {"id": 3, "name": "dot"}])
    (root / "val.json").write_text(json.dumps(other))
    (error,) = check(root).errors["splits that cannot be used"]
    assert "not among those to be learnt: rod" in error


def test_leaks_are_found_and_copies_with_other_boxes(tmp_path):
    root = bigger_set(tmp_path)
    (root / "images" / "val" / "a.png").write_bytes((root / "images/train/a.png").read_bytes())
    given = json.loads((root / "val.json").read_text())
    given["images"][0]["width"] += 2
    (root / "val.json").write_text(json.dumps(given))
    errors = check(root).errors
    assert len(errors["leaks: the same bytes in different splits"]) == 1
    assert "the same bytes under different boxes" not in errors
    given["annotations"][0]["bbox"][0] += 1
    (root / "val.json").write_text(json.dumps(given))
    (line,) = check(root).errors["the same bytes under different boxes"]
    assert line.endswith("a.png")


def test_a_sheet_shows_boxes_and_masks_where_they_are(tmp_path):
    """Beside a blank image: the outline of each box in its class's colour, its mask within."""
    root = tmp_path
    images = write_images(root / "images", [(100, 100)])
    Image.new("RGB", (100, 100), (255, 255, 255)).save(root / "images" / "a.png")
    rows = []
    for n, (category, x, y) in enumerate([(7, 10, 20), (3, 60, 50)]):
        mask = np.zeros((100, 100), bool)
        mask[y + 5 : y + 15, x + 5 : x + 15] = True
        given = {"size": [100, 100], "counts": runs_of(mask)}
        row = {"id": n, "image_id": 11, "category_id": category, "bbox": [x, y, 20, 20]}
        rows.append({**row, "segmentation": given, "iscrowd": int(n == 1)})
    (root / "train.json").write_text(json.dumps(document(images, rows)))
    data = open_data(root, "all")
    shown = np.asarray(_with_objects(data, 0, 400))
    assert shown.shape == (400, 400, 3)
    cell, crowd = colour_of(1), (125, 131, 144)
    for (x, y), ink in (((40, 80), cell), ((240, 200), crowd)):
        assert tuple(shown[y + 40, x]) == ink  # the left edge of a box
        assert tuple(shown[y + 80, x + 60]) == ink  # the lower one
        assert tuple(shown[y + 70, x + 70]) == (255, 255, 255)  # within the box, beside the mask
        veil = tuple(round(255 + 0.4 * (v - 255)) for v in ink)
        assert np.abs(shown[y + 40, x + 40].astype(int) - veil).max() <= 1
    assert tuple(shown[60, 350]) == (255, 255, 255)
    assert tuple(shown[70, 42]) == cell  # its name stands above


def test_a_sheet_of_one_class_writes_no_names(tmp_path):
    rows = [{"id": 1, "image_id": 11, "category_id": 3, "bbox": [2, 8, 10, 8]}]
    root = coco_set(tmp_path, rows, categories=[{"id": 3, "name": "dot"}])
    blank = Image.new("RGB", SIZES[0][::-1], (255, 255, 255))
    blank.save(root / "images" / "a.png")
    shown = np.asarray(_with_objects(open_data(root, "all"), 0, 300))
    assert (shown[:78] == 255).all()


@pytest.mark.parametrize("bad", [False, True])
def test_show_draws_a_sheet_and_tells_what_is_left_out(tmp_path, capsys, bad):
    more = [{"id": 9, "image_id": 11, "category_id": 3, "bbox": [400, 5, 5, 5]}] * bad
    root = coco_set(tmp_path / "set", [*boxes_of(), *more], splits=("train", "val"))
    out = tmp_path / "sheet.png"
    assert main(["data", "show", str(root), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert ("  bad: " in said) == bad
    assert ("lies outside of its image" in said) == bad
    with Image.open(out) as sheet:
        assert sheet.width == 1600


def test_a_legend_counts_objects_and_images_and_a_sheet_starts_with_the_rarest(tmp_path):
    data = open_data(bigger_set(tmp_path), "train")
    from vitrail.data.sheet import _box_entries, _every_class

    assert _box_entries(data.truth) == [
        ("dot", colour_of(0), "1", "in 1 images"),
        ("cell", colour_of(1), "3", "in 2 images"),
    ]
    assert data.keys[_every_class(data, data.truth.counts() > 0, 5)[0]] == "images/train/a.png"
    assert contact_sheet([data], "x").height > 400
