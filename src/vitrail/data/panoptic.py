"""Segments: the truth of panoptic segmentation (Kirillov et al., CVPR 2019, https://arxiv.org/abs/1801.00868).

Every pixel of an image belongs to one segment at most, which is one object of a class of things, or all there
is of a class of stuff. Which is where stands in an image of ids beside it (`vitrail_runtime.panoptic`), that
is decoded when it is read and never kept; what it holds is found once and kept in the cache.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from vitrail.data.boxes import MOST_OBJECTS, Boxes
from vitrail.data.cache import Columns, cached
from vitrail.data.index import NOWHERE, Source, digest
from vitrail.data.masks import decode_mask
from vitrail_runtime.errors import ImageError
from vitrail_runtime.panoptic import ids_of

if TYPE_CHECKING:
    from vitrail.data.view import View

VERSION = 2  # of the stored facts
NONE = 0  # in a map of segments: a pixel of none


@dataclass(frozen=True, eq=False)
class Segments:
    """What is true of one image as it stands.

    segments: (H, W) int32, n + 1 where segment n is, NONE where none is known. labels: (N,) int64. crowd:
    (N,) bool, of several objects as one: neither found nor missed.
    """

    segments: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Panoptic:
    """The segments of N images. See `vitrail.data.examples.Truth`.

    told: of every segment its box, class, area and id in the image of ids, as `Boxes` without masks.
    stuff: labels of classes of which an image has one segment at most. images: of ids, keys of the source.
    same: of each image, ids of more segments of a class of stuff -> the id of its first.
    """

    told: Boxes
    stuff: frozenset[int]
    images: list[str]
    digests: list[str]
    source: Source
    same: list[dict[int, int]]
    kind: ClassVar[str] = "segments"
    every_class_needed: ClassVar[bool] = False  # rare classes may be in one split alone
    has_masks: ClassVar[bool] = True

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.told.classes

    @property
    def bad(self) -> tuple[tuple[str, str], ...]:
        return self.told.bad

    @property
    def problems(self) -> dict[int, tuple[str, str]]:
        return self.told.problems

    @property
    def notes(self) -> tuple[str, ...]:
        return self.told.notes

    def select(self, ids: Sequence[int] | np.ndarray) -> "Panoptic":
        """The truth of these images, in this order."""
        ids = np.asarray(ids, np.int64)
        return replace(
            self,
            told=self.told.select(ids),
            images=[self.images[i] for i in ids],
            digests=[self.digests[i] for i in ids],
            same=[self.same[i] for i in ids],
        )

    def joined(self, others: Sequence["Panoptic"]) -> "Panoptic":
        """These and others of the same source, one after another."""
        parts = [self, *others]
        told = self.told.joined([other.told for other in others])
        told = replace(told, ids=np.concatenate([part.told.ids for part in parts]))  # of an image
        return replace(
            self,
            told=told,
            images=[key for part in parts for key in part.images],
            digests=[d for part in parts for d in part.digests],
            same=[ids for part in parts for ids in part.same],
        )

    def missing(self) -> list[str]:
        """Classes without a segment."""
        return self.told.missing()

    def counts(self) -> np.ndarray:
        """(N, K) int64: segments of each class in each image, crowds too."""
        return self.told.counts()

    def strata(self) -> np.ndarray:
        """As `Boxes.strata`."""
        return self.told.strata()

    def digest(self, i: int) -> str:
        """Changes with the image of ids, and with what they mean."""
        part = self._part(i)
        columns = (self.told.ids[part], self.told.labels[part], self.told.crowd[part])
        stuff = np.isin(self.told.labels[part], sorted(self.stuff))
        told = f"{self.digests[i]}{sorted(self.same[i].items()) or ''}"
        total = hashlib.blake2b(told.encode(), digest_size=16)
        for column in (*columns, stuff):
            total.update(np.ascontiguousarray(column).tobytes())
        return total.hexdigest()

    def read(self, i: int) -> Segments:
        """Raises ImageError when the image of ids is gone or is not what was indexed."""
        where = self.source.where(self.images[i], NOWHERE)
        try:
            payload = self.source.read(self.images[i], NOWHERE)
        except OSError as error:
            raise ImageError(where, f"cannot be read: {error.strerror or error}") from error
        if digest(payload) != self.digests[i]:
            raise ImageError(
                where, "has changed since it was indexed; start again to index it anew"
            )
        ids, part = decode_ids(payload, where), self._part(i)
        for value, whole in self.same[i].items():
            ids[ids == value] = whole
        known = self.told.ids[part]
        order = np.argsort(known)
        place = np.searchsorted(known[order], ids).clip(max=max(0, len(known) - 1))
        there = known[order][place] == ids if len(known) else np.zeros(ids.shape, bool)
        numbers = np.where(there, order[place] + 1 if len(known) else 0, NONE).astype(np.int32)
        return Segments(numbers, self.told.labels[part], self.told.crowd[part])

    def target(self, i: int, view: "View | None") -> "Segments | dict[str, np.ndarray]":
        """The segments of image i: `Segments` without a view; under a view what it teaches.

        That is {"boxes": (n, 4) float32 xyxy around what is seen of each, in pixels of the view, "labels":
        (n,) int64, "masks": (n, height, width) uint8}, of things and of stuff. Left out are crowds, things
        that `View.boxes` drops, what shows no pixel, and of more than MOST_OBJECTS the smallest.
        """
        read = self.read(i)
        if view is None:
            return read
        seen = view.class_map(read.segments, none=NONE)
        numbers, areas, boxes = facts_of(seen)
        rows = numbers - 1
        part = self._part(i)
        _, left = view.boxes(self.told.boxes[part])
        left |= np.isin(read.labels, sorted(self.stuff))
        kept = np.flatnonzero(np.append(left & ~read.crowd, False)[rows])  # the last: of none
        if len(kept) > MOST_OBJECTS:
            kept = np.sort(kept[np.argsort(-areas[kept], kind="stable")[:MOST_OBJECTS]])
        return {
            "boxes": boxes[kept],
            "labels": read.labels[rows[kept]],
            "masks": (seen == numbers[kept, None, None]).astype(np.uint8),
        }

    def _part(self, i: int) -> slice:
        return slice(int(self.told.starts[i]), int(self.told.starts[i + 1]))


def decode_ids(payload: bytes, name: str) -> np.ndarray:
    """(H, W) int32 ids of COCO's coloured image. Raises ImageError, which calls it by `name`."""
    values, colour, orientation = decode_mask(payload, name)
    if not colour or orientation != 1:
        what = "is turned by EXIF" if colour else "holds no colours"
        raise ImageError(
            name,
            f"{what}; ids of segments are stored as colours, red + 256 green + 65,536 blue, in an upright "
            "RGB image",
        )
    parts = (values >> 16 & 255, values >> 8 & 255, values & 255)
    return ids_of(np.stack(parts, -1).astype(np.uint8))


class Facts(NamedTuple):
    """Of the values of an image, in ascending order: how many pixels, and the box xyxy around them."""

    values: np.ndarray
    areas: np.ndarray  # int64
    boxes: np.ndarray  # (n, 4) float32


def facts_of(values: np.ndarray) -> Facts:
    """Of an image (H, W) of integers; by runs of equal values in a row, of which there are few."""
    height, width = values.shape
    starts = np.ones(values.shape, bool)
    starts[:, 1:] = values[:, 1:] != values[:, :-1]
    first = np.flatnonzero(starts)
    lengths = np.diff(np.append(first, values.size))
    there, which = np.unique(values.ravel()[first], return_inverse=True)
    rows, columns = np.divmod(first, max(1, width))
    low, high = np.full((2, len(there)), max(height, width)), np.zeros((2, len(there)), int)
    for low_of, high_of, begin, end in (
        (low[0], high[0], columns, columns + lengths),
        (low[1], high[1], rows, rows + 1),
    ):
        np.minimum.at(low_of, which, begin)
        np.maximum.at(high_of, which, end)
    areas = np.bincount(which, lengths, len(there)).astype(np.int64)
    return Facts(there, areas, np.stack([*low, *high], 1).astype(np.float32))


@dataclass(frozen=True, eq=False)
class IdIndex:
    """What the N images of ids of a split hold: `Facts` of image i stand in starts[i]:starts[i + 1].

    sizes: (N, 2) int32 (height, width); zeros for one that cannot be read. problems: position -> why.
    """

    digests: list[str]
    sizes: np.ndarray
    starts: np.ndarray
    facts: Facts
    problems: dict[int, str] = field(default_factory=dict)

    def of(self, i: int) -> Facts:
        part = slice(int(self.starts[i]), int(self.starts[i + 1]))
        return Facts(*(column[part] for column in self.facts))


def read_id_index(source: Source, split: str, keys: Sequence[str], fingerprint: str) -> IdIndex:
    """The index of a split's images of ids, from the cache where they are unchanged, else made and cached.

    fingerprint: changes when the files do.
    """
    identity = f"ids {VERSION}|{type(source).__name__}|{source.name}|{split}|{fingerprint}"
    columns: Any = cached(identity, lambda: _columns_of(_make(source, keys)))
    return IdIndex(
        columns["digests"],
        columns["sizes"],
        columns["starts"],
        Facts(*(columns[name] for name in Facts._fields)),
        dict(zip(columns["problem_at"].tolist(), columns["problems"], strict=True)),
    )


def _columns_of(index: IdIndex) -> Columns:
    return {
        "digests": index.digests,
        "sizes": index.sizes,
        "starts": index.starts,
        **index.facts._asdict(),
        "problem_at": np.array(list(index.problems), np.int64),
        "problems": list(index.problems.values()),
    }


def _make(source: Source, keys: Sequence[str]) -> IdIndex:
    """Decode every image of ids once."""
    digests, sizes, found, problems = [], [], [], {}
    nothing = facts_of(np.zeros((0, 0), np.int32))
    for i, (payload, problem) in enumerate(_read(source, keys)):
        size, facts = (0, 0), nothing
        if not problem:
            try:
                ids = decode_ids(payload, keys[i])
                size, facts = ids.shape, facts_of(ids)
            except ImageError as error:
                problem = error.problem
        digests.append(digest(payload))
        sizes.append(size)
        found.append(facts)
        if problem:
            problems[i] = problem
    lengths = [len(facts.values) for facts in found]
    return IdIndex(
        digests,
        np.array(sizes, np.int32).reshape(-1, 2),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        Facts(*(np.concatenate(columns) for columns in zip(nothing, *found, strict=True))),
        problems,
    )


def _read(source: Source, keys: Sequence[str]) -> Iterator[tuple[bytes, str]]:
    for key in keys:
        try:
            yield source.read(key, NOWHERE), ""
        except OSError as error:
            yield b"", error.strerror or str(error)
