"""What the values of masks mean: every form of the files, and every message about them."""

import json

import numpy as np
import pytest

from vitrail.data.legend import (
    IGNORE,
    inferred_from_colours,
    inferred_from_values,
    packed,
    ranges,
    read_legend,
    unpacked,
)
from vitrail_runtime.errors import InputError


def legend(folder, lines=None, **meta):
    if lines is not None:
        (folder / "classes.txt").write_text(lines, encoding="utf-8")
    if meta:
        (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return read_legend(folder)


@pytest.mark.parametrize(
    ("text", "classes", "values"),
    [
        ("sky\nroad\n", ("sky", "road"), {0: 0, 1: 1, 255: 255}),
        ("\ufeffsky\n\n big road \n", ("sky", "big road"), {0: 0, 1: 1, 255: 255}),
        ("0 sky\n1 big road", ("sky", "big road"), {0: 0, 1: 1, 255: 255}),
        ("7 road\n0 sky", ("sky", "road"), {0: 0, 7: 1, 255: 255}),
        ("0 sky\n255 road", ("sky", "road"), {0: 0, 255: 1}),
        ("ignore\nsky\nroad", ("sky", "road"), {0: 255, 1: 0, 2: 1, 255: 255}),
        ("sky\nroad\nignore", ("sky", "road"), {0: 0, 1: 1, 2: 255, 255: 255}),
        ("1 sky\n2 road", ("sky", "road"), {0: 255, 1: 0, 2: 1, 255: 255}),
        ("1 sky\n0 ignore\n3 road", ("sky", "road"), {0: 255, 1: 0, 3: 1, 255: 255}),
        ("0\n1\n2", ("0", "1", "2"), {0: 0, 1: 1, 2: 2, 255: 255}),
        ("road 66\n3 trees", ("road 66", "3 trees"), {0: 0, 1: 1, 255: 255}),
    ],
)
def test_classes_are_lines_with_or_without_an_index(tmp_path, text, classes, values):
    told = legend(tmp_path, text)
    assert told.classes == classes
    assert told.values == values
    assert (told.colours, told.palette) == ({}, None)
    first = "begins with 1: pixels of 0 have no class and are ignored"
    assert [first in note for note in told.notes] == ([True] if text.startswith("1 sky\n2") else [])


@pytest.mark.parametrize("numbers", ["", "0 |1 |2 "])
def test_colours_stand_behind_the_names(tmp_path, numbers):
    n = numbers.split("|") if numbers else ["", "", ""]
    text = f"{n[0]}sky 1 2 3\n{n[1]}ignore 0 0 0\n{n[2]}9 255 0 16"
    told = legend(tmp_path, text)
    assert told.classes == ("sky", "9")
    assert told.values == {0: 0, 1: 255, 2: 1, 255: 255}
    assert told.colours == {0x010203: 0, 0: IGNORE, 0xFF0010: 1}
    assert told.palette == ((1, 2, 3), (255, 0, 16))


def test_a_number_above_255_is_no_colour(tmp_path):
    told = legend(tmp_path, "a 1 2 256\nb 4 5 6")
    assert told.classes == ("a 1 2 256", "b 4 5 6")


def test_a_json_file_gives_names_palette_and_what_is_ignored(tmp_path):
    told = legend(tmp_path, classes=["a", "b"], palette=[[1, 2, 3], [4, 5, 6]])
    assert told.classes == ("a", "b")
    assert told.palette == ((1, 2, 3), (4, 5, 6))
    assert told.colours == {0x010203: 0, 0x040506: 1}
    assert told.origin == "meta.json"
    told = legend(tmp_path, "a\nb\n", palette=[[1, 2, 3], [4, 5, 6]], ignore_index=255)
    assert told.palette == ((1, 2, 3), (4, 5, 6))
    assert told.origin == "classes.txt"
    assert legend(tmp_path, "a 9 9 9\nb 8 8 8\n").palette == ((9, 9, 9), (8, 8, 8))


@pytest.mark.parametrize(
    ("ignored", "values"),
    [
        (0, {0: 255, 1: 0, 2: 1, 255: 255}),  # mmsegmentation's reduce_zero_label
        (2, {0: 0, 1: 1, 2: 255, 255: 255}),
        ([1, 9], {0: 0, 1: 255, 2: 1, 9: 255, 255: 255}),
    ],
)
def test_names_take_the_values_that_are_not_ignored(tmp_path, ignored, values):
    assert legend(tmp_path, "a\nb", ignore_index=ignored).values == values
    assert legend(tmp_path, classes=["a", "b"], ignore_index=ignored).values == values


def test_a_line_and_an_index_may_both_say_what_is_ignored(tmp_path):
    told = legend(tmp_path, "ignore\na\nb", ignore_index=0)
    assert told.values == {0: 255, 1: 0, 2: 1, 255: 255}


def test_ade20k_names_its_classes_from_one(tmp_path):
    (tmp_path / "objectInfo150.txt").write_text(
        "Idx\tRatio\tTrain\tVal\tName\n1\t0.1\t5\t6\twall\n2\t0.2\t5\t6\tbuilding, edifice\n"
    )
    told = read_legend(tmp_path)
    assert told.classes == ("wall", "building, edifice")
    assert told.values == {0: 255, 1: 0, 2: 1, 255: 255}
    assert told.notes == (
        "objectInfo150.txt begins with 1: pixels of 0 have no class and are ignored",
    )


def test_without_a_file_nothing_is_told(tmp_path):
    assert read_legend(tmp_path) is None
    assert legend(tmp_path, palette=[[1, 2, 3]]) is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"classes.txt": " \n"}, "is empty; expected the name of a class in each line"),
        ({"classes.txt": "a\nb\na"}, "names classes twice: a; each class needs its own name"),
        ({"classes.txt": "0 a\n1 b\n0 c"}, "gives a value two meanings: 0; each needs one"),
        ({"classes.txt": "a 1 2 3\nb 1 2 3"}, r"gives the colour \(1, 2, 3\) to two classes"),
        ({"classes.txt": b"\xff\xfea"}, "is not UTF-8 text"),
        ({"classes.txt": "\n".join(map(str, range(256)))}, "has 256 classes, but at most 255 are"),
        ({"meta.json": "{"}, r"is not JSON .*; expected \{"),
        ({"meta.json": "[1]"}, r"must hold \{.* but holds '\[1\]'"),
        ({"meta.json": '{"classes": [1]}'}, "its classes, palette or ignore_index differ"),
        ({"meta.json": '{"classes": ["a", 1]}'}, "its classes, palette or ignore_index differ"),
        (
            {"meta.json": '{"ignore_index": [0, "x"]}'},
            "its classes, palette or ignore_index differ",
        ),
        (
            {"meta.json": '{"palette": [[1, 2, 3], 4]}'},
            "its classes, palette or ignore_index differ",
        ),
        ({"meta.json": '{"ignore_index": "x"}'}, "its classes, palette or ignore_index differ"),
        ({"meta.json": '{"palette": [[1, 2]]}'}, "its classes, palette or ignore_index differ"),
        (
            {"meta.json": '{"palette": [[1, 2, 256]]}'},
            "its classes, palette or ignore_index differ",
        ),
        (
            {"classes.txt": "a\nb", "meta.json": '{"classes": ["b", "a"]}'},
            "meta.json and classes.txt beside it name other classes: b, a; and a, b; keep one",
        ),
        (
            {"classes.txt": "a\nb", "meta.json": '{"palette": [[1, 2, 3]]}'},
            "has 1 colours for 2 classes; give one for each class",
        ),
        (
            {"classes.txt": "0 a\n1 b", "meta.json": '{"ignore_index": 1}'},
            "gives a value two meanings: 1",
        ),
        (
            {"objectInfo150.txt": "Idx Name\n1 wall"},
            r"is not ADE20K's table .* but got \['1 wall'\]",
        ),
        ({"objectInfo150.txt": "Idx\tName"}, "but got no line"),
    ],
)
def test_a_file_that_cannot_be_right_is_named(tmp_path, files, message):
    for name, text in files.items():
        payload = text if isinstance(text, bytes) else text.encode()
        (tmp_path / name).write_bytes(payload)
    with pytest.raises(InputError, match=message) as error:
        read_legend(tmp_path)
    assert str(tmp_path / next(iter(files))) in str(error.value) or len(files) == 2


def test_values_become_classes_and_strangers_minus_one(tmp_path):
    told = legend(tmp_path, "2 a 1 1 1\n5 b 2 2 2\n7 ignore 3 3 3")
    values = np.array([[0, 2, 5], [7, 255, 6]], np.uint8)
    assert told.ids(values, False).tolist() == [[255, 0, 1], [255, 255, -1]]
    colours = np.array([0x010101, 0x030303, 0x020202, 0x020203, 0], np.uint32)
    assert told.ids(colours, True).tolist() == [0, 255, 1, -1, -1]
    assert told.ids(np.array([70000]), False).tolist() == [-1]
    plain = legend(tmp_path, "a\nb")
    assert plain.ids(colours, True).tolist() == [-1] * 5
    known = values[:1]
    for told_in in (known, known.astype(np.uint16)):
        ids = told.class_map(told_in, False)
        assert ids.dtype == np.uint8
        assert ids.tolist() == [[255, 0, 1]]
    assert told.class_map(colours[:3], True).tolist() == [0, 255, 1]


def test_the_names_of_a_model_decide_the_order(tmp_path):
    told = legend(tmp_path, "a 1 1 1\nb 2 2 2\nignore 3 3 3")
    assert told.for_classes(("a", "b"), "set") is told
    other = told.for_classes(("b", "c", "a"), "set")
    assert other.classes == ("b", "c", "a")
    assert other.values == {0: 2, 1: 0, 2: 255, 255: 255}
    assert other.colours == {0x010101: 2, 0x020202: 0, 0x030303: 255}
    assert other.palette is None
    with pytest.raises(InputError, match=r"masks of set have classes .* learnt: b; known are a, c"):
        told.for_classes(("a", "c"), "set")


def test_values_without_names_are_numbered_up_to_the_highest():
    told = inferred_from_values([0, 3, 255], "set")
    assert told.classes == ("class 0", "class 1", "class 2", "class 3")
    assert told.values == {0: 0, 1: 1, 2: 2, 3: 3, 255: 255}
    assert (
        "set has no classes.txt: values 0 to 3 of its masks are called class 0 to class 3"
        in (told.notes[0])
    )
    assert len(inferred_from_values([254], "set").classes) == 255


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0, 256], "values up to 256, and no classes.txt says .*at most 255"),
        ([0, 255], "one class only: values are 0, 255, and 255 is ignored; if 255 is a class"),
        ([], "one class only: values are none"),
    ],
)
def test_values_that_cannot_be_classes_are_told(values, message):
    with pytest.raises(InputError, match=message):
        inferred_from_values(values, "set")


def test_colours_without_names_are_classes_in_the_order_of_their_codes():
    told = inferred_from_colours([0x0000FF, 0, 0xFF0000], "set")
    assert told.palette == ((0, 0, 0), (0, 0, 255), (255, 0, 0))
    assert told.colours == {0: 0, 255: 1, 0xFF0000: 2}
    assert told.values == {}
    assert "class 1 is (0, 0, 255), class 2 is (255, 0, 0)" in told.notes[0]
    with pytest.raises(InputError, match=r"RGB and have 256 colours; masks that were resized or"):
        inferred_from_colours(range(256), "set")
    assert len(inferred_from_colours(range(255), "set").classes) == 255
    with pytest.raises(InputError, match="RGB and have 1 colours: write"):
        inferred_from_colours([5], "set")


def test_colours_are_packed_red_first():
    assert packed((1, 2, 3)) == 0x010203
    assert unpacked(0xFE0210) == (254, 2, 16)


def test_values_are_told_by_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0 to 2, 5, 7 to 8"
    assert ranges([]) == ""


def test_a_message_says_what_was_expected(tmp_path):
    told = legend(tmp_path, "0 a 1 1 1\n1 b 2 2 2\n9 ignore 3 3 3")
    assert told.said(False) == "classes are 0 to 1, without a class are 9, 255 (classes.txt)"
    assert told.said(True) == "classes.txt gives 3 colours"
