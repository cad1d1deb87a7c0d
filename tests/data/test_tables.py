"""A CSV of file and label."""

import numpy as np
import pytest

from tests.data.conftest import picture
from vitrail.data import open_data
from vitrail_runtime.errors import InputError


@pytest.fixture
def table(tmp_path):
    """table(text) writes labels.csv beside pictures/0.jpg to 9.jpg."""
    (tmp_path / "pictures").mkdir()
    for i in range(10):
        picture(i).save(tmp_path / "pictures" / f"{i}.jpg")

    def make(text: str, name: str = "labels.csv"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return make


def rows(*, label=lambda i: "ab"[i % 2], split=lambda i: None) -> str:
    lines = [(f"pictures/{i}.jpg", label(i), split(i)) for i in range(10)]
    return "\n".join(",".join(c for c in line if c is not None) for line in lines) + "\n"


def test_file_and_label_are_found_by_name_or_by_place(table, tmp_path):
    for header in ("file,label", "picture,what", "Filename,CLASS"):
        data = open_data(table(f"{header}\n{rows()}"), "all")
        assert data.classes == ("a", "b")
        assert data.labels.tolist() == [0, 1] * 5
        assert data.read(3).shape == (20, 30, 3)
        for i in range(10):
            name = f"pictures/{i}.jpg"
            assert data.keys[i] == name
            assert data.read_bytes(i) == (tmp_path / name).read_bytes()
    swapped = "label,width,file\n" + "".join(
        f"{'xy'[i % 2]},5,pictures/{i}.jpg\n" for i in range(10)
    )
    assert open_data(table(swapped), "all").classes == ("x", "y")
    turned = "what,file\n" + "".join(f"{'xy'[i % 2]},pictures/{i}.jpg\n" for i in range(10))
    assert open_data(table(turned), "all").classes == ("x", "y")


def test_no_column_is_taken_for_the_label_by_chance(table):
    text = "filename,width,height,target\n" + "".join(
        f"pictures/{i}.jpg,{30 + i % 2},20,{'ab'[i % 2]}\n" for i in range(10)
    )
    with pytest.raises(
        InputError, match=r"cannot tell which of the columns filename, width, .* call them"
    ):
        open_data(table(text), "all")
    assert open_data(table(text.replace("target", "label")), "all").classes == ("a", "b")


def test_another_separator_is_named(table):
    text = "file,label\n" + rows()
    with pytest.raises(InputError, match=r"separated by semicolons; save it with commas$"):
        open_data(table(text.replace(",", ";")), "all")
    with pytest.raises(
        InputError, match=r"separated by tabs; save it with commas, or call it \.tsv"
    ):
        open_data(table(text.replace(",", "\t")), "all")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_another_encoding_is_refused_with_how_to_save_it(table, encoding):
    path = table("")
    path.write_bytes(("file,label\n" + rows(label=lambda i: "aä"[i % 2])).encode(encoding))
    with pytest.raises(
        InputError, match=r"is not UTF-8 text .*save it as UTF-8: in Excel as .*iconv"
    ):
        open_data(path, "all")


def test_tabs_a_byte_order_mark_and_quotes_are_read(table):
    text = "\ufefffile\tlabel\n" + rows(label=lambda i: '"a, b"' if i % 2 else "c").replace(
        ".jpg,", ".jpg\t"
    )
    assert open_data(table(text, "labels.tsv"), "all").classes == ("a, b", "c")


def test_numbers_are_classes_in_numerical_order(table):
    data = open_data(table("file,label\n" + rows(label=lambda i: str(i + 5))), "all")
    assert data.classes == tuple(str(n) for n in range(5, 15))


def test_a_split_column_is_followed_and_else_val_is_cut(table):
    cut = open_data(table("file,label\n" + rows()), "val")
    assert np.bincount(cut.labels).tolist() == [1, 1]
    split = {0: "train", 1: "train", 2: "train", 3: "train", 4: "valid", 5: "validation"}
    path = table("file,label,split\n" + rows(split=lambda i: split.get(i, "test")))
    sizes = [len(open_data(path, s)) for s in ("train", "val", "test", "all")]
    assert sizes == [4, 2, 4, 10]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty; expected a header such as file,label"),
        ("file,label\n", "has a header but no rows"),
        (rows(), "has no header: its first line names the picture pictures/0.jpg"),
        ("file,label\n" + rows() + "gone.jpg,a\n", "1 of 11 files that do not exist below .*: gone.jpg"),
        ("file,label\n" + rows() + "pictures/3.jpg,a\n", "line 12: pictures/3.jpg is also in line 5"),
        ("file,label\n" + rows() + "x.jpg\n", "line 12: 1 cells under a header of 2"),
        ("file,label\n" + rows() + "x.jpg,\n", "line 12: no label"),
        ("file,label,split\n" + rows(split=lambda i: "mine"), "split must be train, val or test"),
        ("file,label\n" + rows(label=lambda i: "a"), r"one class only \(a\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_said_with_its_line(table, text, message):
    with pytest.raises(InputError, match=message):
        open_data(table(text), "train")


def test_a_label_that_train_does_not_have_is_named(table):
    label = {8: "aa", 9: "a"}
    text = rows(
        label=lambda i: label.get(i, "ab"[i % 2]), split=lambda i: "val" if i > 5 else "train"
    )
    with pytest.raises(InputError, match=r"val has classes .*: aa; known are a, b"):
        open_data(table("file,label,split\n" + text), "val")


def test_a_file_of_another_kind_is_refused(table):
    with pytest.raises(InputError, match=r"neither a table .* nor a shard"):
        open_data(table("x", "labels.txt"), "train")
