"""Pascal VOC's XML: its layout, and everything that can be wrong with it."""

from pathlib import Path

import pytest

from tests.data.scenes import SIZES, write_images
from vitrail.data import open_data
from vitrail.data.opening import open_source
from vitrail.data.voc import Voc
from vitrail_runtime.errors import InputError

Row = tuple[str, tuple[float, ...], int]
OBJECTS: dict[str, list[Row]] = {  # of images of 20 x 30, 24 x 18 and 20 x 30; corners from 1 on
    "a": [("dot", (3, 4, 12, 11), 0), ("cell", (1, 1, 30, 20), 1)],
    "b": [],
    "c": [("cell", (21, 2, 24, 7), 0)],
}


def described(objects: list[Row], size: tuple[int, int] | None, more: str = "") -> str:
    told = (
        "" if size is None else f"<size><width>{size[1]}</width><height>{size[0]}</height></size>"
    )
    for name, corners, difficult in objects:
        box = "".join(
            f"<{k}>{v}</{k}>"
            for k, v in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        )
        told += f"<object><name>{name}</name><difficult>{difficult}</difficult>"
        told += f"<bndbox>{box}</bndbox></object>"
    return f"<annotation>{told}{more}</annotation>"


def voc_set(root: Path, objects=None, lists=None) -> Path:
    write_images(root / "JPEGImages")
    (root / "Annotations").mkdir()
    for (name, rows), size in zip({**OBJECTS, **(objects or {})}.items(), SIZES, strict=True):
        path = root / "Annotations" / f"{name}.xml"
        path.write_text(described(rows, size), encoding="utf-8")
    (root / "ImageSets" / "Main").mkdir(parents=True)
    for split, names in ({"train": "a b c"} if lists is None else lists).items():
        text = "\n".join(names.split()) + "\n"
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text(text)
    return root


def check_facts(data) -> None:
    """Corners lie on the edges of pixels, from 0 on; what is difficult is a crowd."""
    truth = data.truth
    assert (truth.kind, data.classes, truth.has_masks) == ("boxes", ("cell", "dot"), False)
    assert data.keys == [f"JPEGImages/{name}.png" for name in "abc"]
    a, b, c = (truth.target(i, None) for i in range(3))
    assert a.boxes.tolist() == [[2, 3, 12, 11], [0, 0, 30, 20]]
    assert a.labels.tolist() == [1, 0]
    assert a.crowd.tolist() == [False, True]
    assert len(b) == 0
    assert (c.boxes.tolist(), c.labels.tolist()) == ([[20, 1, 24, 7]], [0])
    assert truth.category_ids.tolist() == [1, 2]
    assert truth.image_ids.tolist() == [1, 2, 3]
    for i, size in enumerate(SIZES):
        assert data.images.read(i).shape[:2] == size


def test_boxes_difficulties_and_sizes_are_read(tmp_path):
    data = open_data(voc_set(tmp_path), "all")
    check_facts(data)
    assert (data.notes, data.bad) == ((), ())
    assert isinstance(data.images.source, Voc)


@pytest.mark.parametrize(
    ("lists", "splits"),
    [
        ({"train": "a b", "val": "c", "aeroplane_train": "x"}, ("train", "val")),
        ({"trainval": "a b c"}, ("train",)),
        ({"trainval": "a b c", "train": "a b", "test": "c"}, ("train", "test")),
        ({}, ("",)),
    ],
)
def test_lists_are_splits_where_their_whole_name_is_one(tmp_path, lists, splits):
    root = voc_set(tmp_path, lists=lists)
    source = open_source(root)
    assert source.splits() == splits
    assert source.classes() == ("cell", "dot")
    check_facts(open_data(source, "all"))


def test_a_line_of_a_list_may_say_more_and_name_a_file(tmp_path):
    root = voc_set(tmp_path)
    path = root / "ImageSets" / "Main" / "train.txt"
    path.write_bytes(b"\xef\xbb\xbfa  1\nb.png\n\nc -1\na\n")
    check_facts(open_data(root, "all"))


def test_images_may_lie_in_images(tmp_path):
    root = voc_set(tmp_path)
    (root / "JPEGImages").rename(root / "images")
    data = open_data(root, "all")
    assert data.keys == ["images/a.png", "images/b.png", "images/c.png"]
    (root / "images").rename(root / "pictures")
    with pytest.raises(
        InputError, match=r"has annotations, but no images; expected them in .*JPEGImages"
    ):
        open_data(root, "all")


BAD: dict[str, tuple[Row, str]] = {
    "outside": (("dot", (40, 2, 45, 9), 0), "lies outside of its image of 30 x 20"),
    "reaches out": (("dot", (20, 2, 40, 9), 0), "reaches 10 pixels outside"),
    "zero area": (("dot", (6, 2, 5, 9), 0), "has no area: it is 0 wide"),
    "NaN": (("dot", (float("nan"), 2, 5, 9), 0), "is not finite"),
    "no name": (("", (2, 2, 5, 9), 0), "has no name of a class"),
    "no number": (("dot", ("x", 2, 5, 9), 0), "has no bndbox of the numbers xmin, ymin"),  # type: ignore
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_object_is_named_and_dropped_where_that_is_asked_for(tmp_path, name):
    row, what = BAD[name]
    root = voc_set(tmp_path, {"c": [*OBJECTS["c"], row]})
    with pytest.raises(InputError) as error:
        open_data(root, "all")
    assert f"{root / 'Annotations' / 'c.xml'}, object 2: " in str(error.value)
    assert what in str(error.value)
    data = open_data(root, "all", drop_bad=True)
    assert len(data.bad) == 1
    if name == "reaches out":
        assert data.truth.target(2, None).boxes[1].tolist() == [19, 1, 30, 9]
    else:
        check_facts(data)


@pytest.mark.parametrize("kind", ["image", "annotation"])
def test_a_missing_file_is_bad_and_its_image_left_out(tmp_path, kind):
    root = voc_set(tmp_path)
    path = root / ("JPEGImages/b.png" if kind == "image" else "Annotations/b.xml")
    path.unlink()
    with pytest.raises(
        InputError, match=r"b\.(jpg|xml): the file is missing; train\.txt lists b"
    ) as error:
        open_data(root, "all")
    assert ("VOC has one for every image" in str(error.value)) == (kind == "annotation")
    data = open_data(root, "all", drop_bad=True)
    assert data.keys == ["JPEGImages/a.png", "JPEGImages/c.png"]
    assert data.truth.labels.tolist() == [1, 0, 0]


def test_an_annotation_of_another_size_makes_its_image_broken(tmp_path):
    root = voc_set(tmp_path)
    (root / "Annotations" / "c.xml").write_text(described(OBJECTS["c"], (10, 15)))
    with pytest.raises(InputError, match=r"c\.xml: is for an image of 10 x 15 .*c\.png is 20 x 30"):
        open_data(root, "all")
    assert open_data(root, "all", skip_broken=True).keys == [f"JPEGImages/{n}.png" for n in "ab"]


def test_a_link_to_no_image_is_a_broken_image(tmp_path):
    root = voc_set(tmp_path)
    (root / "JPEGImages" / "b.png").unlink()
    (root / "JPEGImages" / "b.png").symlink_to("gone.png")
    with pytest.raises(InputError, match=r"b\.png: No such file"):
        open_data(root, "all")
    data = open_data(root, "all", skip_broken=True)
    assert data.keys == [f"JPEGImages/{n}.png" for n in "ac"]


@pytest.mark.parametrize("size", [None, (0, 0)])
def test_a_size_that_is_not_given_does_not_matter(tmp_path, size):
    root = voc_set(tmp_path)
    (root / "Annotations" / "c.xml").write_text(described(OBJECTS["c"], size))
    check_facts(open_data(root, "all"))


def test_every_encoding_that_is_declared_is_read(tmp_path):
    root = voc_set(tmp_path)
    path = root / "Annotations" / "c.xml"
    text = described(OBJECTS["c"], SIZES[2], "<note>\xe9</note>")
    path.write_bytes(b'<?xml version="1.0" encoding="ISO-8859-1"?>' + text.encode("latin-1"))
    check_facts(open_data(root, "all"))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    check_facts(open_data(root, "all"))


DEEP = b"<annotation>" + b"<part>" * 100 + b"</part>" * 100 + b"</annotation>"


@pytest.mark.parametrize(
    "content",
    [
        described([], SIZES[2], "<note>\xe9</note>").encode("latin-1"),
        described(OBJECTS["c"], SIZES[2]).encode()[:-30],
        b"",
        b"not xml",
        b'<?xml version="1.0" encoding="klingon"?><annotation/>',
    ],
)
def test_a_file_that_is_no_xml_makes_its_image_broken(tmp_path, content):
    root = voc_set(tmp_path)
    (root / "Annotations" / "c.xml").write_bytes(content)
    with pytest.raises(InputError, match=r"c\.xml: is no whole XML: .*encoding that it declares"):
        open_data(root, "all")
    data = open_data(root, "all", skip_broken=True)
    assert data.keys == ["JPEGImages/a.png", "JPEGImages/b.png"]


def test_a_deeply_nested_file_without_objects_is_legal(tmp_path):
    root = voc_set(tmp_path)
    (root / "Annotations" / "c.xml").write_bytes(DEEP)
    assert open_data(root, "all").truth.labels.tolist() == [1, 0]


def test_no_annotation_at_all_is_an_error(tmp_path):
    root = voc_set(tmp_path, {name: [] for name in OBJECTS})
    with pytest.raises(InputError, match="has no annotation at all"):
        open_data(root, "all")


@pytest.mark.parametrize(
    ("content", "what"), [(b"\n", "lists no images"), (b"\xe9\n", "is not UTF-8 text")]
)
def test_a_list_that_cannot_be_is_one_message(tmp_path, content, what):
    root = voc_set(tmp_path)
    (root / "ImageSets" / "Main" / "train.txt").write_bytes(content)
    with pytest.raises(InputError, match=f"train.txt {what}"):
        open_data(root, "all")


def test_classes_are_matched_by_name(tmp_path):
    data = open_data(voc_set(tmp_path), "all", classes=("rod", "dot", "cell"))
    assert data.truth.labels.tolist() == [1, 2, 2]
    with pytest.raises(InputError, match="not among those to be learnt: cell"):
        open_data(tmp_path, "all", classes=("dot", "rod"))


def test_a_class_of_val_alone_is_a_class_of_train_too(tmp_path):
    root = voc_set(tmp_path, {"a": OBJECTS["a"][:1]}, lists={"train": "a b", "val": "c"})
    data = open_data(root, "train")
    assert data.classes == ("cell", "dot")
    assert "no example of 1 of 2 classes in train" in " ".join(data.notes)
