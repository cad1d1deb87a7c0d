"""YOLO's text files: the layouts they are found in, and everything that can be wrong with them."""

from pathlib import Path

import numpy as np
import pytest

from tests.data.scenes import SIZES, write_images
from vitrail.cli import main
from vitrail.data import open_data
from vitrail.data.opening import open_source
from vitrail.data.yolo import Yolo
from vitrail_runtime.errors import InputError

NAMES = "names: [dot, cell]\n"
LINES = {  # of images of 20 x 30, 24 x 18 and 20 x 30
    "a": ["1 0.25 0.35 0.5 0.4", "0 0.75 0.5 0.1 0.2"],
    "b": [],
    "c": ["0 0.5 0.5 1 1"],
}


def write_labels(folder: Path, lines=None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in {**LINES, **(lines or {})}.items():
        if rows is not None:
            (folder / f"{name}.txt").write_text("\n".join(rows), encoding="utf-8")


def yolo_set(root: Path, lines=None, yaml: str = f"train: images/train\n{NAMES}") -> Path:
    write_images(root / "images" / "train")
    write_labels(root / "labels" / "train", lines)
    (root / "data.yaml").write_text(yaml, encoding="utf-8")
    return root


def check_facts(data) -> None:
    truth = data.truth
    assert (truth.kind, data.classes, truth.has_masks) == ("boxes", ("dot", "cell"), False)
    by_name = {key.rsplit("/", 1)[-1]: i for i, key in enumerate(data.keys)}
    assert sorted(by_name) == ["a.png", "b.png", "c.png"]
    a, b, c = (truth.target(by_name[name], None) for name in sorted(by_name))
    np.testing.assert_allclose(a.boxes, [[0, 3, 15, 11], [21, 8, 24, 12]], atol=1e-4)
    assert a.labels.tolist() == [1, 0]
    assert not a.crowd.any()
    assert len(b) == 0
    np.testing.assert_allclose(c.boxes, [[0, 0, 30, 20]])
    np.testing.assert_allclose(c.areas, [600])
    assert truth.category_ids.tolist() == [1, 2]
    assert truth.image_ids.tolist() == [1, 2, 3]
    assert len(np.unique(truth.ids)) == 3
    for name, size in zip("abc", SIZES, strict=True):
        assert data.images.read(by_name[f"{name}.png"]).shape[:2] == size


@pytest.mark.parametrize(
    ("yaml", "images", "labels"),
    [
        ("train: images/train\n", "images/train", "labels/train"),
        ("path: .\ntrain: images\n", "images", "labels"),
        ("path: set\ntrain: images\n", "set/images", "set/labels"),
        ("path: /not/there\ntrain: images\n", "images", "labels"),
        ("path: ../datasets/x\ntrain: images\n", "images", "labels"),
        ("train: ../train/images\n", "train/images", "train/labels"),
        ("train: [train/images]\n", "train/images", "train/labels"),
        ("train: everything\n", "everything", "everything"),
        ("train: images\n", "images/deep/er", "labels/deep/er"),
        ("train: images/images\n", "images/images", "images/labels"),
        ("train: train.txt\n", "images", "labels"),
        ("train: lists/train.txt\n", "lists/images", "lists/labels"),
    ],
)
def test_every_layout_gives_the_same_truth(tmp_path, yaml, images, labels):
    write_images(tmp_path / images)
    write_labels(tmp_path / labels)
    if "train.txt" in yaml:
        (tmp_path / "lists").mkdir(exist_ok=True)
        near, folder = ("./", "lists/") if "lists" in yaml else ("", "")
        lines = [f"{near}images/{name}.png" for name in "abc"]
        (tmp_path / folder / "train.txt").write_text("\n".join([*lines, ""]))
    (tmp_path / "data.yaml").write_text(yaml + NAMES)
    data = open_data(tmp_path, "all")
    check_facts(data)
    assert data.notes == ()
    check_facts(open_data(tmp_path / "data.yaml", "all"))
    assert isinstance(data.images.source, Yolo)


def test_a_table_of_names_and_other_names_of_the_file_are_fine(tmp_path):
    root = yolo_set(
        tmp_path, yaml='train: images/train\nval: ""\nnc: 2\nnames: {1: cell, 0: dot}\n'
    )
    (root / "data.yaml").rename(root / "cells.yml")
    (root / "other.yaml").write_text("a: b\n")
    check_facts(open_data(root, "all"))
    assert open_source(root).splits() == ("train",)


def test_splits_are_those_of_the_file(tmp_path):
    root = yolo_set(tmp_path, yaml=f"val: images/val\ntrain: images/train\n{NAMES}")
    write_images(root / "images" / "val", SIZES[:1])
    write_labels(root / "labels" / "val", {"b": None, "c": None})
    assert open_source(root).splits() == ("train", "val")
    val = open_data(root, "val")
    assert val.keys == ["images/val/a.png"]
    assert val.truth.labels.tolist() == [1, 0]
    assert len(open_data(root, "all")) == 4


def test_polygons_are_masks_of_what_they_cover(tmp_path):
    coco = pytest.importorskip("pycocotools.mask")
    lines = {
        "a": ["1 0.1 0.2 0.5 0.2 0.5 0.8 0.1 0.8", "0 0.6 0.1 0.9 0.1 0.75 0.5"],
        "c": ["0 0 0 1 0 1 1 0 1"],
    }
    data = open_data(yolo_set(tmp_path, lines), "all")
    assert data.truth.has_masks
    target = data.truth.target(0, None)
    np.testing.assert_allclose(target.boxes, [[3, 4, 15, 16], [18, 2, 27, 10]], atol=1e-4)
    mask = coco.decode(target.masks[0])
    expected = np.zeros((20, 30), np.uint8)
    expected[4:16, 3:15] = 1
    assert np.array_equal(mask, expected)
    triangle = coco.frPyObjects([[18, 2, 27, 2, 22.5, 10]], 20, 30)
    assert np.array_equal(coco.decode(target.masks[1]), coco.decode(triangle)[..., 0])
    assert target.areas.tolist() == [144, coco.area(triangle)[0]]


def test_boxes_beside_polygons_leave_boxes_alone(tmp_path):
    lines = {"a": ["1 0.1 0.2 0.5 0.2 0.5 0.8 0.1 0.8"]}
    data = open_data(yolo_set(tmp_path, lines), "all")
    assert not data.truth.has_masks
    assert any("1 of 2 objects" in note and "have no mask" in note for note in data.notes)


def test_an_image_without_a_label_file_has_no_objects_and_that_is_told(tmp_path):
    root = yolo_set(tmp_path)
    (root / "labels" / "train" / "b.txt").unlink()
    data = open_data(root, "all")
    check_facts(data)
    (note,) = data.notes
    assert "1 of 3 images" in note
    assert "has no label file and is taken to show no object, as YOLO's format has it" in note
    assert str(root / "images" / "train" / "b.png") in note
    (root / "labels" / "train" / "a.txt").unlink()
    (note,) = open_data(root, "all").notes
    assert "2 of 3 images" in note
    assert "have no label file and are" in note


def test_no_label_file_at_all_is_an_error(tmp_path):
    root = yolo_set(tmp_path, dict.fromkeys(LINES))
    with pytest.raises(InputError, match="has no annotation at all"):
        open_data(root, "all")


BAD = {
    "0 1.5 0.5 0.2 0.2": "lies outside of its image of 30 x 20",
    "0 0.9 0.5 0.5 0.2": "reaches 4.5 pixels outside",
    "0 0.5 0.5 0 0.2": "has no area: it is 0 wide",
    "0 nan 0.5 0.2 0.2": "is not finite",
    "2 0.5 0.5 0.2 0.2": "its class 2 is unknown; known are 0 to 1",
    "-1 0.5 0.5 0.2 0.2": "its class -1 is unknown",
    "0.5 0.5 0.5 0.2 0.2": "its class 0.5 is unknown",
    "nan 0.5 0.5 0.2 0.2": "its class nan is unknown",
    "0 0.5 0.5 0.2": "has 4 numbers; expected a class and a box (5), or a class and 3 points or more",
    "0 0.5 0.5 0.2 0.2 0.9": "has 6 numbers",
    "0 1 2 3 4 5 6 7": "has 8 numbers",
    "0 a 0.5 0.2 0.2": "expected numbers",
    "0 15 10 5 5": "is not in shares of the image's width and height, from 0 to 1",
    "0 0.5 0.5 5 0.1": "is not in shares",
    "0 0.5 0.5 -0.2 0.2": "is not in shares",
    "0 1 1 9 1 9 9": "is not in shares of the image's width and height, from 0 to 1, but in pixels",
    "0 0.5  0.5 1 1": "stands in line 1 already",
}


@pytest.mark.parametrize("line", BAD)
def test_a_bad_line_is_named_and_dropped_where_that_is_asked_for(tmp_path, line):
    root = yolo_set(tmp_path, {"c": [*LINES["c"], "", line]})
    with pytest.raises(InputError) as error:
        open_data(root, "all")
    path = root / "labels" / "train" / "c.txt"
    assert f"{path}, line 3: " in str(error.value)
    assert BAD[line] in str(error.value)
    data = open_data(root, "all", drop_bad=True)
    assert len(data.bad) == 1
    if "reaches" in BAD[line]:
        np.testing.assert_allclose(
            data.truth.target(2, None).boxes[1], [19.5, 8, 30, 12], atol=1e-4
        )
    else:
        check_facts(data)


def test_a_listed_image_that_is_missing_is_bad(tmp_path):
    root = yolo_set(tmp_path, yaml=f"train: list.txt\n{NAMES}")
    lines = [f"images/train/{name}.png" for name in "abcd"]
    (root / "list.txt").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"d\.png: the file is missing, but listed"):
        open_data(root, "all")
    check_facts(open_data(root, "all", drop_bad=True))


def test_a_label_file_with_a_byte_order_mark_is_read(tmp_path):
    root = yolo_set(tmp_path)
    for path in (root / "labels" / "train" / "a.txt", root / "data.yaml"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    check_facts(open_data(root, "all"))


def test_a_label_file_that_is_no_text_is_one_message(tmp_path):
    root = yolo_set(tmp_path)
    (root / "labels" / "train" / "a.txt").write_bytes(b"0 0.5 \xe9")
    with pytest.raises(InputError, match=r"a\.txt is not UTF-8 text .*; save it as UTF-8"):
        open_data(root, "all")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"train: images/train\nnames: [d\xe9, cell]\n", "data.yaml is not UTF-8 text"),
        (b"train: images/train\nnames: [dot, cell\n", "data.yaml is no YAML that can be read: "),
        (
            b"train: images/train\nnames: " + b"[" * 500,
            "nested too deeply|no YAML that can be read",
        ),
        (b"train: images/train\nnames:\n", "has no `names`; expected a list of class names"),
        (b"train: images/train\nnames: []\n", "has no `names`"),
        (b"train: images/train\nnames: [[1]]\n", "expected text"),
        (
            b"train: images/train\nnames: {1: dot, 2: cell}\n",
            "names has the numbers 1, 2, expected 0 to 1",
        ),
        (b"train: images/train\nnames: [dot, dot]\n", "names classes twice: dot"),
        (
            b"train: images/train\nnc: 3\nnames: [dot, cell]\n",
            "says nc: 3, but has 2 names: dot, cell",
        ),
        (b"train: nowhere\nnames: [dot, cell]\n", "nowhere of train is not there; looked for "),
        (b"train: labels\nnames: [dot, cell]\n", "no image is in labels of train"),
        (b"train: [{}]\nnames: [dot, cell]\n", "expected a folder or a list's name"),
        (b"train:\nnames: [dot, cell]\n", "names no images; expected `train`, `val` or `test`"),
    ],
)
def test_a_file_that_cannot_be_is_one_message(tmp_path, content, what, capsys):
    root = yolo_set(tmp_path)
    (root / "data.yaml").write_bytes(content)
    with pytest.raises(InputError, match=what):
        open_data(root, "all")
    # 2: nothing can be looked at; 1: a split is found to be wrong, beside others that are not.
    assert main(["data", "check", str(root)]) in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_a_yaml_that_is_no_table_is_one_message(tmp_path):
    (tmp_path / "x.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match=r"is no data\.yaml: expected a table"):
        open_data(tmp_path / "x.yaml", "all")


def test_labels_without_a_data_yaml_are_told(tmp_path):
    root = yolo_set(tmp_path)
    (root / "data.yaml").unlink()
    with pytest.raises(InputError, match=r"has label files as YOLO keeps them, but no data\.yaml"):
        open_data(root, "all")


def test_two_yaml_files_of_data_sets_are_told(tmp_path):
    root = yolo_set(tmp_path)
    (root / "more.yaml").write_text((root / "data.yaml").read_text())
    with pytest.raises(InputError, match=r"several data sets' files: data\.yaml, more\.yaml"):
        open_data(root, "all")
    check_facts(open_data(root / "more.yaml", "all"))


def test_classes_are_matched_by_name(tmp_path):
    data = open_data(yolo_set(tmp_path), "all", classes=("cell", "rod", "dot"))
    assert data.truth.labels.tolist() == [0, 2, 2]
    with pytest.raises(
        InputError, match="not among those to be learnt: cell\n  its 2: dot, cell\n"
    ):
        open_data(tmp_path, "all", classes=("dot", "rod"))


def test_a_broken_image_is_left_out_with_its_objects(tmp_path):
    root = yolo_set(tmp_path)
    (root / "images" / "train" / "a.png").write_bytes(b"no image")
    data = open_data(root, "all", skip_broken=True)
    assert data.truth.labels.tolist() == [0]
