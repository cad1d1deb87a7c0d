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
    assert test.labels.tolist() == [0, 1, 0, 1]
    assert test.read_bytes(3) == encoded(13)
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
