"""Images and captions: a table of file and caption, or tar shards of KEY.jpg and KEY.txt side by side.

A table (.csv, .tsv) has the columns `file` and `caption` (or `text`), perhaps `split`, and perhaps `label`:
the name of what is on the image, by which zero-shot answers are measured. A folder with a pairs.csv stands
for it. Shards are as those of labels (`data/shards.py`), with `.txt` where they have `.cls`. An image without
a caption, or with an empty one, is counted with the broken ones.
"""

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vitrail.data.index import Index, Source
from vitrail.data.shards import Shards, is_shard, split_of
from vitrail.data.tables import (
    FILE_COLUMNS,
    LABEL_COLUMNS,
    Table,
    is_table,
    read_cells,
    split_called,
)
from vitrail_runtime.errors import InputError, listed

if TYPE_CHECKING:
    from vitrail.data.view import View

FOLDERS_TABLE = "pairs.csv"
CAPTION_COLUMNS = ("caption", "text")
LONGEST = 100_000  # bytes of a caption; more is a file of something else
NO_LABEL = -1
LOOKED_AT = 20  # members of a shard, to tell what it holds


@dataclass(frozen=True, eq=False)
class Captions:
    """A caption for each image. labels: (N,) int64, indices into `classes`, NO_LABEL where none is known."""

    classes: tuple[str, ...]
    captions: list[str]
    labels: np.ndarray
    problems: dict[int, tuple[str, str]] = field(default_factory=dict)
    kind = "captions"
    every_class_needed = False
    bad: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.captions)

    def select(self, ids: np.ndarray) -> "Captions":
        return Captions(self.classes, [self.captions[i] for i in ids], self.labels[ids])

    def joined(self, others: Sequence["Captions"]) -> "Captions":
        parts = [self, *others]
        captions = [caption for part in parts for caption in part.captions]
        return Captions(self.classes, captions, np.concatenate([part.labels for part in parts]))

    def strata(self) -> np.ndarray:
        return self.labels

    def target(self, i: int, view: "View | None") -> np.ndarray | tuple[str, int]:
        """The caption's UTF-8 bytes; for evaluation the caption itself, and its label."""
        if view is None:
            return self.captions[i], int(self.labels[i])
        return np.frombuffer(self.captions[i].encode(), np.uint8).copy()

    def digest(self, i: int) -> str:
        return f"{self.labels[i]}\t{self.captions[i]}"

    def missing(self) -> list[str]:
        return [name for k, name in enumerate(self.classes) if k not in set(self.labels.tolist())]


class PairTable(Table):
    """A CSV of file and caption."""

    def _read(self, path: Path) -> Iterator[tuple[int, str, str, str]]:
        for line, titles, (name, caption, label, split) in read_cells(path, _columns):
            if not name:
                raise InputError(f"{path}, line {line}: no {titles[0]}")
            yield line, name, packed(caption, label), split_called(titles[3], split, path, line)

    def classes(self) -> tuple[str, ...]:
        rows = self._rows[self.splits()[0]]
        return tuple(sorted({unpacked(said)[1] for _, said in rows} - {""}))

    def truth(self, split: str, index: Index, classes: Sequence[str]) -> Captions:
        return captions_of(self, split, index, classes)


class PairShards(Shards):
    """Tar shards of images and captions."""

    ending = "txt"
    called = "caption"

    def classes(self) -> tuple[str, ...]:
        return self._declared or ()

    def truth(self, split: str, index: Index, classes: Sequence[str]) -> Captions:
        return captions_of(self, split, index, classes)

    def _members(self, number: int) -> Iterator[tuple[str, str, int, int]]:
        pictures, captions = self._parts(number)
        for key in captions.keys() - pictures.keys():
            raise InputError(
                f"{self.folder / self._files[number]}: {key}.txt has no image; expected {key}.jpg, .png or "
                ".webp"
            )
        for key, (offset, size, _) in pictures.items():
            yield key, captions.get(key, ""), offset, size

    def _text(self, tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> str:
        file = tar.extractfile(member)
        assert file is not None  # a regular file
        if member.size > LONGEST:
            raise InputError(
                f"{shard}: {member.name} has {member.size:,} bytes, which is no caption; at most {LONGEST:,} "
                "are read"
            )
        try:
            return packed(file.read().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise InputError(
                f"{shard}: {member.name} is no UTF-8 text ({error.reason}); save it as UTF-8"
            ) from error


def captions_of(source: Source, split: str, index: Index, classes: Sequence[str]) -> Captions:
    """What an index of `packed` captions says."""
    label_of = {name: i for i, name in enumerate(classes)}
    captions, labels, problems = [], [], {}
    for i, said in enumerate(index.names):
        caption, label = unpacked(said)
        file, offset, size = index.places[i].tolist()
        where = source.where(index.keys[i], (file, offset, size))
        if not said:
            problems[i] = (where, "has no caption: there is no .txt beside it")
        elif not caption:
            problems[i] = (where, "has an empty caption")
        captions.append(caption)
        labels.append(label_of.get(label, NO_LABEL))
    strange = sorted({unpacked(said)[1] for said in index.names} - label_of.keys() - {""})
    if strange and classes:
        raise InputError(
            f"{source.name} {split or 'data'} has labels that are not among those to be learnt: "
            f"{listed(strange)}; known are {listed(classes)}"
        )
    return Captions(tuple(classes), captions, np.array(labels, np.int64), problems)


def packed(caption: str, label: str = "") -> str:
    """A caption and a label as one text of an index; runs of space are one."""
    return f"{' '.join(label.split())}\t{' '.join(caption.replace(chr(0), ' ').split())}"


def unpacked(said: str) -> tuple[str, str]:
    """(caption, label) of `packed`; both are empty of an image without a caption's file."""
    label, _, caption = said.partition("\t")
    return caption, label


def is_pair_table(path: Path) -> bool:
    """Whether a table has a column `caption`; or `text`, and no labels, of which it may be a remark."""
    if not is_table(path):
        return False
    try:
        with path.open(encoding="utf-8-sig") as file:
            header = file.readline()
    except (OSError, UnicodeDecodeError):
        return False  # reading it says so
    columns = {name.strip().strip('"') for name in header.replace("\t", ",").lower().split(",")}
    return "caption" in columns or ("text" in columns and columns.isdisjoint(LABEL_COLUMNS))


def holds_captions(path: Path) -> bool:
    """Whether a shard, or the first of a folder of them, has captions and no labels."""
    shards = [path] if path.is_file() else sorted(p for p in path.iterdir() if is_shard(p))
    named = [p for p in shards if split_of(p.name)] or shards
    if not named:
        return False
    try:
        with tarfile.open(named[0]) as tar:
            endings = {m.name.rpartition(".")[2].lower() for m in islice(tar, LOOKED_AT)}
    except (OSError, EOFError, tarfile.TarError):
        return False  # reading it says so
    return "txt" in endings and "cls" not in endings


def _columns(header: list[str], path: Path) -> tuple[int, int, int | None, int | None]:
    lower = [name.lower() for name in header]
    caption = next(lower.index(name) for name in CAPTION_COLUMNS if name in lower)
    file = next((lower.index(name) for name in FILE_COLUMNS if name in lower), None)
    label = next((lower.index(name) for name in LABEL_COLUMNS if name in lower), None)
    split = lower.index("split") if "split" in lower else None
    if file is None:
        raise InputError(
            f"{path}: cannot tell which of the columns {', '.join(header)} is the file; call it file"
        )
    return file, caption, label, split
