"""Data sets of the Hugging Face hub, by the optional package `datasets`: hf:owner/name@revision.

`hf:owner/name:config@revision` takes one of a data set's configurations. The first image feature holds the
pictures; the first class-label feature, or a column called label, the labels.
"""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vitrail.data.examples import labels_by_name
from vitrail.data.folders import SPLIT_NAMES
from vitrail.data.index import Place, Sample
from vitrail_runtime.errors import InputError

PREFIX = "hf:"
_NAME = re.compile(
    r"hf:(?P<name>[\w.-]+/[\w.-]+|[\w.-]+)(:(?P<config>[\w.-]+))?@(?P<revision>[\w./-]+)"
)


class HubDataset:
    """Splits of a data set of the hub. See `vitrail.data.index.Source`."""

    truth = labels_by_name

    def __init__(self, name: str) -> None:
        self.name = name
        found = _NAME.fullmatch(name)
        if found is None:
            raise InputError(
                f"{name!r} is no data set of the hub; write hf:owner/name@revision, where the revision is a "
                "commit, a tag or a branch such as main"
            )
        try:
            datasets = importlib.import_module("datasets")
        except ImportError as error:
            raise InputError(
                f"{name} needs the package datasets; install it with pip install 'vitrail[hub]'"
            ) from error
        try:
            loaded = datasets.load_dataset(
                found["name"], found["config"], revision=found["revision"]
            )
        # The package raises its own, the network's and the file system's.
        except Exception as error:
            raise InputError(f"{name} cannot be loaded from the hub: {error}") from error
        self._tables: dict[str, Any] = {}
        for split, table in loaded.items():
            ours = SPLIT_NAMES.get(str(split).lower())
            if ours is not None and ours not in self._tables:
                self._tables[ours] = table
        if not self._tables:
            raise InputError(f"{name} has no train, val or test split; it has {', '.join(loaded)}")
        first = self._tables[self.splits()[0]]
        self._image, self._label, self._classes = _columns(first, name, datasets)
        for split, table in self._tables.items():
            # Encoded bytes: decoding is ours, the same for every kind of storage.
            self._tables[split] = table.cast_column(self._image, datasets.Image(decode=False))

    def splits(self) -> tuple[str, ...]:
        return tuple(s for s in ("train", "val", "test") if s in self._tables)

    def classes(self) -> tuple[str, ...]:
        if self._classes is not None:
            return self._classes
        return tuple(sorted({str(v) for v in self._tables[self.splits()[0]][self._label]}))

    def fingerprint(self, split: str) -> str:
        return str(self._tables[split]._fingerprint)  # the package's own, over content and revision

    def count(self, split: str) -> int:
        return len(self._tables[split])

    def scan(self, split: str) -> Iterator[Sample]:
        table = self._tables[split]
        labels = table[self._label]
        number = SPLITS.index(split)
        for row in range(len(table)):
            label = labels[row]
            name = str(label) if self._classes is None else self._name_of(label, split, row)
            place = (number, row, 0)
            yield f"{split}/{row}", name, place, self.read("", place)

    def read(self, key: str, place: Place) -> bytes:
        cell = self._tables[SPLITS[place[0]]][place[1]][self._image]
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def where(self, key: str, place: Place) -> str:
        return f"{self.name}: {SPLITS[place[0]]} row {place[1]}"

    def _name_of(self, label: int, split: str, row: int) -> str:
        assert self._classes is not None
        if not 0 <= label < len(self._classes):
            raise InputError(
                f"{self.name}: {split} row {row} has label {label}, which stands for no class; a split "
                "without labels cannot be used"
            )
        return self._classes[label]


SPLITS = ("train", "val", "test")


def _columns(table: Any, name: str, datasets: Any) -> tuple[str, str, tuple[str, ...] | None]:
    """(image column, label column, class names where the data set declares them)."""
    features = table.features
    images = [c for c, f in features.items() if isinstance(f, datasets.Image)]
    if not images:
        raise InputError(f"{name} has no column of images; it has {', '.join(features)}")
    declared = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
    if declared:
        return images[0], declared[0], tuple(features[declared[0]].names)
    for column in ("label", "labels", "class"):
        if column in features:
            return images[0], column, None
    raise InputError(f"{name} has no column of class labels; it has {', '.join(features)}")
