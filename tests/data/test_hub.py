"""Data sets of the hub, with the package's loading replaced: nothing is downloaded."""

import io
import sys

import pytest

from tests.data.conftest import picture
from vitrail.data import open_data
from vitrail_runtime.errors import InputError


def encoded(number: int) -> bytes:
    buffer = io.BytesIO()
    picture(number).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def hub(monkeypatch):
    """Train and test of a made-up data set; returns what load_dataset was asked for."""
    datasets = pytest.importorskip("datasets")
    asked = []
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )

    def part(first: int, count: int):
        images = [{"bytes": encoded(i), "path": None} for i in range(first, first + count)]
        labels = [i % 2 for i in range(count)]
        return datasets.Dataset.from_dict({"img": images, "label": labels}, features=features)

    def load_dataset(name, config=None, *, revision):
        asked.append((name, config, revision))
        return datasets.DatasetDict({"train": part(0, 10), "test": part(10, 4)})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_a_hub_data_set_reads_like_any_other(hub):
    train, val, test = (open_data("hf:some/pets:small@abc123", s) for s in ("train", "val", "test"))
    assert hub[0] == ("some/pets", "small", "abc123")
    assert (len(train), len(val), len(test)) == (8, 2, 4)
    assert train.classes == ("cat", "dog")
    assert test.truth.labels.tolist() == [0, 1, 0, 1]
    assert test.images.read_bytes(3) == encoded(13)
    assert test.where(3) == "hf:some/pets:small@abc123: test row 3"


def test_a_name_without_a_revision_is_refused():
    with pytest.raises(InputError, match="write hf:owner/name@revision"):
        open_data("hf:some/pets", "train")


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'vitrail\[hub\]'"):
        open_data("hf:some/pets@main", "train")


def test_what_the_hub_says_is_passed_on(hub, monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match="cannot be loaded from the hub: offline"):
        open_data("hf:some/pets@main", "train")


def loaded(monkeypatch, columns: dict, **splits) -> None:
    """Put a made-up data set in the hub's place: columns' types, and rows of each split."""
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({c: getattr(datasets, t)(**g) for c, (t, g) in columns.items()})
    parts = {s: datasets.Dataset.from_list(rows, features=features) for s, rows in splits.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **g: datasets.DatasetDict(parts))


def row(number: int, label, column: str = "label") -> dict:
    return {"image": {"bytes": encoded(number), "path": None}, column: label}


IMAGE, TEXT = ("Image", {}), ("Value", {"dtype": "string"})


def test_splits_of_other_names_and_labels_of_text_are_taken(monkeypatch):
    rows = [row(i, "zebra" if i % 3 else "ant") for i in range(6)]
    columns = {"image": IMAGE, "label": TEXT}
    loaded(monkeypatch, columns, validation=rows[:4], training=rows, unsupervised=rows)
    train, val = (open_data("hf:some/pets@main", s) for s in ("train", "val"))
    assert train.classes == val.classes == ("ant", "zebra")
    assert train.truth.labels.tolist() == [0, 1, 1, 0, 1, 1]
    assert val.truth.labels.tolist() == [0, 1, 1, 0]
    assert [val.images.read_bytes(i) for i in range(4)] == [encoded(i) for i in range(4)]
    assert val.keys[2] == "val/2"


@pytest.mark.parametrize(
    ("columns", "splits", "message"),
    [
        ({"label": TEXT}, {"train": [{"label": "a"}]}, "no column of images; it has label"),
        (
            {"image": IMAGE, "kind": TEXT},
            {"train": [row(1, "a", "kind")]},
            "no column of class labels",
        ),
        (
            {"image": IMAGE, "label": TEXT},
            {"rest": [row(1, "a")]},
            "no train, val or test split; it has rest",
        ),
        (
            {"image": IMAGE, "label": ("ClassLabel", {"names": ["a", "b"]})},
            {"train": [row(1, 0), row(2, 1)], "test": [row(3, 0), row(4, -1)]},
            "test row 1 has label -1, which stands for no class",
        ),
    ],
)
def test_a_hub_data_set_that_cannot_be_learnt_from_is_refused(
    monkeypatch, columns, splits, message
):
    loaded(monkeypatch, columns, **splits)
    with pytest.raises(InputError, match=message):
        open_data("hf:some/pets@main", "test" if "test" in splits else "train")


@pytest.mark.parametrize("column", ["label", "labels", "class"])
def test_a_column_of_labels_has_three_names_and_a_declared_one_goes_first(monkeypatch, column):
    rows = [row(i, "ba"[i % 2], column) | {"kind": i % 2} for i in range(4)]
    columns = {"kind": ("Value", {"dtype": "int64"}), "image": IMAGE, column: TEXT}
    loaded(monkeypatch, columns, train=rows)
    assert open_data("hf:pets@v1.0", "all").truth.labels.tolist() == [1, 0, 1, 0]
    columns["kind"] = ("ClassLabel", {"names": ["x", "y"]})
    loaded(monkeypatch, columns, train=rows)
    data = open_data("hf:pets@v1.0", "all")
    assert data.classes == ("x", "y")
    assert data.truth.labels.tolist() == [0, 1, 0, 1]


def test_an_image_that_is_a_file_beside_the_table_is_read(monkeypatch, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(1))
    rows = [{"image": {"bytes": None, "path": str(tmp_path / "a.png")}, "label": "a"}, row(2, "b")]
    loaded(monkeypatch, {"image": IMAGE, "label": TEXT}, train=rows)
    data = open_data("hf:some/pets@main", "all")
    assert [data.images.read_bytes(i) for i in range(2)] == [encoded(1), encoded(2)]
    assert data.images.source.count("train") == 2
    assert data.images.places.tolist() == [[0, 0, 0], [0, 1, 0]]


def test_of_two_splits_by_one_name_the_first_is_taken(monkeypatch):
    columns = {"image": IMAGE, "label": TEXT}
    splits = {"test": [row(5, "a")], "Training": [row(1, "a"), row(2, "b")], "train": [row(3, "b")]}
    loaded(monkeypatch, columns, **splits)
    data = open_data("hf:some/pets@main", "all")
    assert data.images.source.splits() == ("train", "test")
    assert data.keys == ["train/0", "train/1", "test/0"]
    assert data.where(2) == "hf:some/pets@main: test row 0"
    assert data.images.source.fingerprint("train") != data.images.source.fingerprint("test")


@pytest.mark.parametrize(
    "name", ["hf:a/b/c@main", "hf:a b@main", "hf:@main", "hf:a@", "hf:a:@main"]
)
def test_a_name_that_the_hub_could_not_have_is_refused(name):
    with pytest.raises(InputError, match="is no data set of the hub"):
        open_data(name, "train")


def test_of_two_columns_of_images_the_first_is_taken(monkeypatch):
    rows = [row(i, "ab"[i]) | {"mask": row(i + 5, "")["image"]} for i in range(2)]
    for label in (TEXT, ("ClassLabel", {"names": ["a", "b"]})):
        loaded(monkeypatch, {"image": IMAGE, "mask": IMAGE, "label": label}, train=rows)
        data = open_data("hf:some/pets@main", "all")
        assert [data.images.read_bytes(i) for i in range(2)] == [encoded(0), encoded(1)]


def test_of_two_declared_labels_the_first_is_taken_with_its_names(monkeypatch):
    names = {"kind": ["x", "y"], "colour": ["blue", "red"]}
    columns = {"image": IMAGE} | {c: ("ClassLabel", {"names": n}) for c, n in names.items()}
    rows = [row(i, i % 2, "kind") | {"colour": 1 - i % 2} for i in range(4)]
    loaded(monkeypatch, columns, train=rows)
    data = open_data("hf:some/pets@main", "all")
    assert data.classes == ("x", "y")
    assert data.truth.labels.tolist() == [0, 1, 0, 1]
