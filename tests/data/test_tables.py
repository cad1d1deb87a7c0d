"""A CSV of file and label."""

from pathlib import Path

import numpy as np
import pytest

from tests.data.conftest import picture
from vitrail.data import open_data, tables
from vitrail.data.opening import open_source
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
        assert data.truth.labels.tolist() == [0, 1] * 5
        assert data.images.read(3).shape == (20, 30, 3)
        for i in range(10):
            name = f"pictures/{i}.jpg"
            assert data.keys[i] == name
            assert data.images.read_bytes(i) == (tmp_path / name).read_bytes()
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
    assert np.bincount(cut.truth.labels).tolist() == [1, 1]
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


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (("file", "label"), (0, 1, None)),
        (("label", "file"), (1, 0, None)),
        (("a", "b"), (0, 1, None)),
        (("a", "b", "split"), (0, 1, 2)),
        (("split", "a", "b"), (1, 2, 0)),
        (("what", "file"), (1, 0, None)),
        (("path", "what"), (0, 1, None)),
        (("label", "where"), (1, 0, None)),
        (("class", "where", "width"), (1, 0, None)),
        (("path", "file", "label"), (1, 2, None)),
        (("File_Name", "CLASS_NAME"), (0, 1, None)),
        (("image", "class", "label", "Split"), (0, 2, 3)),
        (("image", "class", "class_name"), (0, 1, None)),
        (("filename", "image", "width", "label"), (0, 3, None)),
        (("file", "width", "what"), None),
        (("a", "b", "c"), None),
        (("file", "split"), None),
        (("label", "split"), None),
        (("split", "a"), None),
    ],
)
def test_which_column_is_what(header, expected):
    if expected is None:
        with pytest.raises(
            InputError, match=f"cannot tell which of the columns {', '.join(header)}"
        ):
            tables._columns(list(header), Path("list.csv"))
    else:
        assert tables._columns(list(header), Path("list.csv")) == expected


def test_every_name_of_a_column_is_known():
    for name in ("file", "filename", "file_name", "path", "image"):
        assert tables._columns(["x", name], Path("list.csv")) == (1, 0, None)
    for name in ("label", "class", "class_name"):
        assert tables._columns([name, "x"], Path("list.csv")) == (1, 0, None)


@pytest.mark.parametrize(
    ("said", "split"),
    [("train", "train"), (" Training ", "train"), ("VAL", "val"), ("valid", "val"),
     ("validation", "val"), ("test", "test"), ("Testing", "test")],
)  # fmt: skip
def test_a_split_has_many_names(table, said, split):
    path = table(f"file,label,split\n{rows(split=lambda i: said)}")
    assert open_source(path).splits() == (split,)


def test_splits_come_in_their_order_with_the_classes_of_the_first(table):
    label = dict.fromkeys(range(6), "a") | {1: "b", 6: "c"}
    split = ["val", "train", "train", "test", "val", "train", "test", "val", "train", "test"]
    text = rows(label=lambda i: label.get(i, "b"), split=lambda i: split[i])
    source = open_source(table("file,label,split\n" + text))
    assert source.splits() == ("train", "val", "test")
    assert source.classes() == ("a", "b"), "those of train"
    assert [source.count(s) for s in source.splits()] == [4, 3, 3]
    assert open_data(source, "train").keys == [f"pictures/{i}.jpg" for i in (1, 2, 5, 8)]


def test_only_digits_are_numbers_and_names_go_by_code_point(table):
    for labels, classes in (
        (("10", "9", "007"), ("007", "9", "10")),
        (("10", "9", "x"), ("10", "9", "x")),
        (("10", "9", "²"), ("10", "9", "²")),
        (("10", "9", "\u0661"), ("10", "9", "\u0661")),  # an Arabic 1
        (("10", "9", "-1"), ("-1", "10", "9")),
    ):
        text = "file,label\n" + rows(label=lambda i, labels=labels: labels[i % 3])
        assert open_source(table(text)).classes() == classes


def test_empty_lines_and_spaces_around_cells_are_passed_over(table):
    text = "\n".join(" , ".join(line.split(",")) + "\n" for line in rows().splitlines())
    data = open_data(table("file , label\n\n" + text), "all")
    assert data.keys == [f"pictures/{i}.jpg" for i in range(10)]
    assert data.classes == ("a", "b")


def test_images_are_named_as_the_table_is(table, tmp_path, monkeypatch):
    path = table("file,label\n" + rows(), "LIST.CSV")
    assert open_data(path, "all").where(3) == str(tmp_path / "pictures/3.jpg")
    monkeypatch.chdir(tmp_path.parent)
    data = open_data(f"{tmp_path.name}/LIST.CSV", "all")
    assert data.where(3) == f"{tmp_path.name}/pictures/3.jpg"
    monkeypatch.chdir("/")  # what was opened is still found
    assert data.images.read_bytes(3) == (tmp_path / "pictures/3.jpg").read_bytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\n" + rows() + "".join(f"{i}.png,a\n" for i in range(5)),
         r"lists 5 of 15 files .*: 0\.png, 1\.png, 2\.png, 3\.png, 4\.png$"),
        ("file,label\n" + rows() + "".join(f"{i}.png,a\n" for i in range(6)),
         r"lists 6 of 16 files .* 3\.png, 4\.png, \.\.\. \(6 in all\)$"),
        ("file,label\n" + rows() + ",a\n", "line 12: no file$"),
        ("label,file\na,\n", "line 2: no file$"),
        ("label,file\n,x.jpg\n", "line 2: no label$"),
        ("file,label\n" + rows() + "x.jpg,a,5\n", "line 12: 3 cells under a header of 2"),
        ("file\nx.jpg\n", "with columns such as file,label, but its first line is 'file'$"),
        ("a;b\n", "'a;b': it is separated by semicolons; save it with commas$"),
        ("X.JPEG,a\n" + rows(), r"has no header: its first line names the picture X\.JPEG; put file,l"),
        ("file,label,split\na,b,\n", "line 2: split must be train, val or test, but is ''$"),
        ('file,label\n"' + "x" * 140_000 + '",a\n', "cannot be read as a table: field larger"),
        ("file,label\npictures,a\n", "1 of 1 files that do not exist"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told_to_the_letter(table, text, message):
    with pytest.raises(InputError, match=message):
        open_source(table(text))


def test_tabs_are_missing_in_a_tsv_of_commas(table):
    with pytest.raises(InputError, match=r"but its first line is 'file,label'$"):
        open_source(table("file,label\n" + rows(), "list.TSV"))


def test_a_byte_order_mark_does_not_hide_the_first_of_several_columns(table):
    lines = [f"{'ab'[i]},pictures/{i}.jpg,{i},2021" for i in range(2)]
    path = table("\ufeff" + "\n".join(["label,file,width,date", *lines, ""]))
    data = open_data(path, "all")
    assert data.classes == ("a", "b")
    assert data.keys == ["pictures/0.jpg", "pictures/1.jpg"]


def test_a_folder_with_its_table_of_labels_is_that_table_and_may_hold_nothing_out(tmp_path):
    """One picture a class: none could be held out."""
    (tmp_path / "images").mkdir()
    rows = ["file,class_name,width"]
    for i in range(3):
        picture(i).save(tmp_path / "images" / f"{i}.jpg")
        rows.append(f"images/{i}.jpg,kind{i},1")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    with pytest.raises(InputError, match="too few pictures to hold out"):
        open_data(tmp_path, "val")
    train, val = (open_data(tmp_path, split, val_fraction=0) for split in ("train", "val"))
    assert train.classes == ("kind0", "kind1", "kind2")
    assert train.keys == val.keys
    assert train.truth.labels.tolist() == val.truth.labels.tolist() == [0, 1, 2]
    assert "none is held out: val are the training pictures" in val.notes[-1]
    with pytest.raises(InputError, match=r"from 0 to below 1, but is -0\.1"):
        open_data(tmp_path, "train", val_fraction=-0.1)
