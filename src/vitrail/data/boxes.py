"""Boxes: the truth of detection and of instance segmentation, whatever format it was read from.

A source hands what its files say as `Found`, one annotation after another; `collect` checks each, names
those that cannot be used, and keeps the others in flat columns. A mask is kept packed, and unpacked only as
far as a view shows it.
"""

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from vitrail.data import rle
from vitrail.data.cache import Columns
from vitrail_runtime.errors import InputError, listed

if TYPE_CHECKING:
    from vitrail.data.view import View

MOST_OBJECTS = (
    500  # of an image, that training takes: memory of masks and of matching grows with them
)
OVERHANG = (
    2.0  # pixels that a box may reach beyond its image: rounding, and corners counted from one
)

BoxTuple = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Objects:
    """What is true of one image as it stands, in pixels of the upright original.

    boxes: (n, 4) float32 xyxy. labels: (n,) int64. crowd: (n,) bool, of what is no single object. areas: (n,)
    float32, of the masks where there are any. ids: (n,) int64 of the annotations.
    masks: COCO's {"size": [height, width], "counts": bytes}; None where the data has none.
    """

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    ids: np.ndarray
    masks: list[dict[str, Any]] | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Packed:
    """M masks, packed, in one row of bytes: mask j is data[starts[j]:starts[j + 1]]."""

    data: np.ndarray  # uint8
    starts: np.ndarray  # (M + 1,) int64

    @classmethod
    def of(cls, masks: Sequence[bytes]) -> "Packed":
        starts = np.concatenate([[0], np.cumsum([len(m) for m in masks])]).astype(np.int64)
        return cls(np.frombuffer(b"".join(masks), np.uint8), starts)

    def __getitem__(self, j: int) -> bytes:
        return self.data[self.starts[j] : self.starts[j + 1]].tobytes()

    def select(self, rows: np.ndarray) -> "Packed":
        places, starts = gathered(self.starts, rows)
        return Packed(self.data[places], starts)


@dataclass(frozen=True, eq=False)
class Boxes:
    """The objects of N images, M in all. See `vitrail.data.examples.Truth`.

    starts: (N + 1,) int64; the objects of image i stand in starts[i]:starts[i + 1] of `boxes` (M, 4) float32
        xyxy in pixels of the upright original, `labels` (M,) int64, `crowd` (M,) bool, `areas` (M,) float32
        and `ids` (M,) int64.
    sizes: (N, 2) int32 (height, width). masks: of every object, or None.
    category_ids: (K,) int64 and image_ids: (N,) int64, as results in COCO's format call them.
    bad: (name, what is wrong) of annotations that cannot be used. problems: position -> likewise, of images
        of which nothing can be said. notes: what a person should know. All three are of a whole split.
    """

    classes: tuple[str, ...]
    starts: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    ids: np.ndarray
    sizes: np.ndarray
    category_ids: np.ndarray
    image_ids: np.ndarray
    masks: Packed | None = None
    bad: tuple[tuple[str, str], ...] = ()
    problems: dict[int, tuple[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kind: ClassVar[str] = "boxes"
    every_class_needed: ClassVar[bool] = False  # rare classes may be in one split alone
    VERSION: ClassVar[int] = 1  # of `columns`, and of what `collect` makes of annotations

    def __len__(self) -> int:
        return len(self.image_ids)

    def columns(self) -> Columns:
        """All but the classes, for the cache."""
        out: Columns = {name: getattr(self, name) for name in (*_OF_OBJECTS, *_OF_IMAGES)}
        if self.masks is not None:
            out |= {"masks": self.masks.data, "mask_starts": self.masks.starts}
        problems = [(i, *told) for i, told in self.problems.items()]
        return out | {"bad": list(self.bad), "problems": problems, "notes": list(self.notes)}

    @classmethod
    def of_columns(cls, classes: Sequence[str], columns: Mapping[str, Any]) -> "Boxes":
        arrays = {name: columns[name] for name in (*_OF_OBJECTS, *_OF_IMAGES)}
        masked = "masks" in columns
        return cls(
            tuple(classes),
            **arrays,
            masks=Packed(columns["masks"], columns["mask_starts"]) if masked else None,
            bad=tuple((name, what) for name, what in columns["bad"]),
            problems={i: (where, what) for i, where, what in columns["problems"]},
            notes=tuple(columns["notes"]),
        )

    @property
    def has_masks(self) -> bool:
        return self.masks is not None

    def select(self, ids: Sequence[int] | np.ndarray) -> "Boxes":
        """The truth of these images, in this order."""
        ids = np.asarray(ids, np.int64)
        rows, starts = gathered(self.starts, ids)
        return replace(
            self,
            **{name: getattr(self, name)[rows] for name in _OF_OBJECTS},
            starts=starts,
            sizes=self.sizes[ids],
            image_ids=self.image_ids[ids],
            masks=None if self.masks is None else self.masks.select(rows),
            bad=(),
            problems={},
            notes=(),
        )

    def joined(self, others: Sequence["Boxes"]) -> "Boxes":
        """These and others of the same source, one after another. Ids that are not unique any more are given
        anew."""
        parts = [self, *others]
        columns = {
            name: np.concatenate([getattr(p, name) for p in parts])
            for name in (*_OF_OBJECTS, "sizes", "image_ids")
        }
        for name in ("ids", "image_ids"):
            if len(np.unique(columns[name])) < len(columns[name]):
                columns[name] = np.arange(1, len(columns[name]) + 1)
        masks = None
        packed = [p.masks for p in parts if p.masks is not None]
        if len(packed) == len(parts):
            masks = Packed(
                np.concatenate([m.data for m in packed]), chained([m.starts for m in packed])
            )
        starts = chained([p.starts for p in parts])
        return replace(self, **columns, starts=starts, masks=masks, bad=(), problems={}, notes=())

    def missing(self) -> list[str]:
        """Classes without an object."""
        counts = np.bincount(self.labels[~self.crowd], minlength=len(self.classes))
        return [self.classes[k] for k in np.flatnonzero(counts == 0).tolist()]

    def counts(self) -> np.ndarray:
        """(N, K) int64: objects of each class in each image, crowds too."""
        images = np.repeat(np.arange(len(self)), np.diff(self.starts))
        kinds = len(self.classes)
        counts = np.bincount(images * kinds + self.labels, minlength=len(self) * kinds)
        return counts.reshape(len(self), kinds)

    def strata(self) -> np.ndarray:
        """(N,) int64: of the classes that an image contains, the one that the fewest images contain; of equal
        ones the first. K for an image without objects. As `ClassMaps.strata`."""
        there = self.counts() > 0
        rarity = np.argsort(there.sum(0), kind="stable")
        first = there[:, rarity].argmax(1)
        return np.where(there.any(1), rarity[first], len(self.classes)).astype(np.int64)

    def digest(self, i: int) -> str:
        """Changes with any object of image i."""
        part = slice(self.starts[i], self.starts[i + 1])
        total = hashlib.blake2b(digest_size=16)
        for name in ("boxes", "labels", "crowd", "areas"):
            total.update(np.ascontiguousarray(getattr(self, name)[part]).tobytes())
        if self.masks is not None:
            ends = self.masks.starts[self.starts[i] : self.starts[i + 1] + 1]
            total.update((ends - ends[0]).tobytes())
            total.update(self.masks.data[ends[0] : ends[-1]].tobytes())
        return total.hexdigest()

    def target(self, i: int, view: "View | None") -> "Objects | dict[str, np.ndarray]":
        """The objects of image i: `Objects` without a view; under a view what it teaches.

        That is {"boxes": (n, 4) float32 xyxy in pixels of the view, "labels": (n,) int64}, and where the data
        has masks "masks": (n, height, width) uint8. Left out are crowds, objects that `View.boxes` drops,
        those whose mask shows no pixel, and of more than MOST_OBJECTS the smallest.
        """
        part = slice(int(self.starts[i]), int(self.starts[i + 1]))
        if view is None:
            masks = None
            if self.masks is not None:
                size = self.sizes[i].tolist()
                masks = [
                    {"size": size, "counts": self.masks[j]} for j in range(part.start, part.stop)
                ]
            columns = {name: getattr(self, name)[part] for name in _OF_OBJECTS}
            return Objects(**columns, masks=masks)
        seen, kept = view.boxes(self.boxes[part])
        rows = np.flatnonzero(kept & ~self.crowd[part])
        if len(rows) > MOST_OBJECTS:
            sides = seen[rows, 2:] - seen[rows, :2]
            largest = np.argsort(-sides.prod(1), kind="stable")[:MOST_OBJECTS]
            rows = rows[np.sort(largest)]
        target = {"boxes": seen[rows], "labels": self.labels[part][rows]}
        if self.masks is not None:
            shown = view.masks([self.masks[j] for j in (part.start + rows).tolist()])
            there = shown.any((1, 2))
            target = {name: column[there] for name, column in target.items()}
            target["masks"] = shown[there]
        return target


_OF_OBJECTS = ("boxes", "labels", "crowd", "areas", "ids")
_OF_IMAGES = ("starts", "sizes", "category_ids", "image_ids")


def gathered(starts: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of runs that begin at `starts`: the places of those of `rows`, one after another, and their starts."""
    lengths = np.diff(starts)[rows]
    begin = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.arange(begin[-1]) + np.repeat(starts[rows] - begin[:-1], lengths), begin


def chained(parts: Sequence[np.ndarray]) -> np.ndarray:
    """The starts of runs that stand one after another."""
    return np.concatenate([[0], np.cumsum(np.concatenate([np.diff(p) for p in parts]))]).astype(
        np.int64
    )


class Found(NamedTuple):
    """One annotation as a file gives it, or why it cannot be one.

    image: position among the images, None where it is not known. name: how messages call it. label: of its
    class. box: xyxy, None where a mask says it. mask: COCO's polygons [[x, y, ...], ...] or runs {"size",
    "counts"}. problem: what is wrong.
    """

    image: int | None
    name: str
    label: int = 0
    box: BoxTuple | None = None
    crowd: bool = False
    area: float | None = None
    id: int | None = None
    mask: Any = None
    problem: str = ""


class BadAnnotation(ValueError):
    """Says what is wrong with it."""


def collect(
    found: Iterable[Found],
    *,
    classes: Sequence[str],
    sizes: np.ndarray,
    category_ids: Sequence[int],
    image_ids: Sequence[int],
    source: str,
    where: Callable[[int], str],
    bad: Iterable[tuple[str, str]] = (),
    problems: Mapping[int, tuple[str, str]] = MappingProxyType({}),
    notes: Sequence[str] = (),
) -> Boxes:
    """Boxes from annotations in any order; `bad` lists those that cannot be used.

    A box that reaches beyond its image by OVERHANG pixels at most is cut at its edge; one that reaches
    further is cut as well and named, one that lies outside is left out and named.

    sizes: (N, 2) (height, width) of the images. Annotations of one that cannot be read, (0, 0), or of which
        nothing can be said, in `problems`, are passed over.
    where: how messages call an image.
    Raises InputError when there is no annotation at all.
    """
    rows, wrong, total = _sorted_out(found, sizes, problems)
    wrong = [*bad, *wrong]
    if not total and not wrong:
        raise InputError(
            f"{source} has no annotation at all; images without objects are fine beside others, but at least "
            "one object is needed"
        )
    if wrong and not rows:
        raise InputError(
            f"none of the annotations of {source} can be used; the first: {wrong[0][0]}: {wrong[0][1]}"
        )
    without = sum(row.mask is None for row in rows)
    if 0 < without < len(rows):
        notes = [
            *notes,
            f"{without:,} of {len(rows):,} objects of {source} have no mask, so the masks of the others are "
            "not used",
        ]
    counts = np.bincount([row.image for row in rows], minlength=len(sizes))
    truth = Boxes(
        classes=tuple(classes),
        starts=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        boxes=np.array([row.box for row in rows], np.float32).reshape(-1, 4),
        labels=np.array([row.label for row in rows], np.int64),
        crowd=np.array([row.crowd for row in rows], bool),
        areas=np.array([row.area for row in rows], np.float32),
        ids=_ids(rows),
        sizes=np.asarray(sizes, np.int32),
        category_ids=np.array(category_ids, np.int64),
        image_ids=np.array(image_ids, np.int64),
        masks=None if without or not rows else Packed.of([row.mask or b"" for row in rows]),
        bad=tuple(wrong),
        problems=dict(problems),
    )
    return replace(truth, notes=(*notes, *_notes(truth, where)))


def _sorted_out(
    found: Iterable[Found], sizes: np.ndarray, problems: Mapping[int, tuple[str, str]]
) -> tuple[list["_Row"], list[tuple[str, str]], int]:
    """What can be used, image after image; what cannot; and how many annotations there were."""
    rows: list[_Row] = []
    wrong: list[tuple[str, str]] = []
    seen: set[int] = set()
    total = 0
    for total, one in enumerate(found, 1):  # noqa: B007
        if one.image is None:
            wrong.append((one.name, one.problem))
            continue
        height, width = (int(n) for n in sizes[one.image])
        if not height or one.image in problems:
            continue
        try:
            row, reaches_out = _row(one, height, width, seen)
        except BadAnnotation as error:
            wrong.append((one.name, str(error)))
            continue
        if reaches_out:
            wrong.append((one.name, reaches_out))
        if one.id is not None:
            seen.add(one.id)
        rows.append(row)
    return sorted(rows, key=attrgetter("image")), wrong, total


class _Row(NamedTuple):
    """An annotation that can be used."""

    image: int
    box: BoxTuple
    label: int
    crowd: bool
    area: float
    id: int | None
    mask: bytes | None


def _row(one: Found, height: int, width: int, seen: set[int]) -> tuple[_Row, str]:
    """What is kept of an annotation; and what is to be said of it all the same. Raises BadAnnotation."""
    assert one.image is not None
    if one.problem:
        raise BadAnnotation(one.problem)
    if one.id is not None and one.id in seen:
        raise BadAnnotation(f"its id {one.id} stands twice; an id is given once")
    mask, box, area = None, one.box, one.area
    if one.mask is not None:
        mask = _packed(one.mask, height, width)
        around, pixels = rle.box_and_area(mask, height)
        if not pixels:
            raise BadAnnotation("its mask covers no pixel")
        box = around if box is None else box
        area = pixels if area is None else area
    if box is None:
        raise BadAnnotation("has neither a box nor a mask")
    cut, reaches_out = _checked(box, height, width)
    if area is None:
        area = (cut[2] - cut[0]) * (cut[3] - cut[1])
    if not math.isfinite(area) or area < 0:
        raise BadAnnotation(f"its area is {area:g}; give what it covers, or leave it away")
    return _Row(one.image, cut, one.label, one.crowd, area, one.id, mask), reaches_out


def _ids(rows: Sequence[_Row]) -> np.ndarray:
    """Those that are given; for the others the smallest that are free, from 1 on."""
    seen = {row.id for row in rows}
    free = (n for n in itertools.count(1) if n not in seen)
    return np.array([next(free) if row.id is None else row.id for row in rows], np.int64)


def _notes(truth: Boxes, where: Callable[[int], str]) -> list[str]:
    of_crowds = np.bincount(
        np.repeat(np.arange(len(truth)), np.diff(truth.starts))[truth.crowd], minlength=len(truth)
    )
    counts = np.diff(truth.starts) - of_crowds
    many = np.flatnonzero(counts > MOST_OBJECTS)
    if not len(many):
        return []
    most = int(counts.argmax())
    return [
        f"{len(many)} of {len(truth)} images have more than {MOST_OBJECTS} objects, the most "
        f"{counts[most]:,} ({where(most)}); training takes the {MOST_OBJECTS} largest "
        "of a view, evaluation all"
    ]


def _checked(box: BoxTuple, height: int, width: int) -> tuple[BoxTuple, str]:
    """The box within the image; and what is to be said where it reaches far beyond it."""
    x1, y1, x2, y2 = box
    shown = f"its box, from ({x1:g}, {y1:g}) to ({x2:g}, {y2:g}),"
    if not all(map(math.isfinite, box)):
        raise BadAnnotation(f"{shown} is not finite (NaN or infinite)")
    if x2 <= x1 or y2 <= y1:
        raise BadAnnotation(f"{shown} has no area: it is {x2 - x1:g} wide and {y2 - y1:g} high")
    there = f"of its image of {width} x {height} pixels (width x height)"
    if x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
        raise BadAnnotation(f"{shown} lies outside {there}")
    far = max(-x1, -y1, x2 - width, y2 - height)
    cut = max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))
    if far > OVERHANG:
        return cut, f"{shown} reaches {far:g} pixels outside {there}"
    return cut, ""


def _packed(mask: Any, height: int, width: int) -> bytes:
    """COCO's polygons or runs, packed."""
    if isinstance(mask, dict):
        return _packed_runs(mask, height, width)
    if not isinstance(mask, list) or not mask:
        raise BadAnnotation(
            "its segmentation is neither a list of polygons nor runs {size, counts}"
        )
    for polygon in mask:
        if not isinstance(polygon, list) or not all(map(is_number, polygon)):
            raise BadAnnotation("its segmentation is not a list of polygons [x, y, x, y, ...]")
        if len(polygon) < 6 or len(polygon) % 2:
            raise BadAnnotation(
                f"a polygon of it has {len(polygon)} numbers; three points or more, x and y of each, are "
                "expected"
            )
        if not all(map(math.isfinite, polygon)):
            raise BadAnnotation("a polygon of it is not finite (NaN or infinite)")
        xs, ys = polygon[0::2], polygon[1::2]
        if min(xs) >= width or min(ys) >= height or max(xs) <= 0 or max(ys) <= 0:
            raise BadAnnotation(
                f"a polygon of it lies outside its image of {width} x {height} pixels (width x height)"
            )
    # The library's reader walks every edge in steps of a fifth of a pixel, however far it goes.
    near = [
        [min(max(v, -side), 2 * side) for v, side in zip(p, (width, height) * (len(p) // 2), strict=True)]
        for p in mask
    ]  # fmt: skip
    return rle.from_polygons(near, height, width)


def _packed_runs(mask: dict, height: int, width: int) -> bytes:
    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(size, list) or len(size) != 2 or size != [height, width]:
        raise BadAnnotation(
            f"its mask says the size {size!r}, but its image is [{height}, {width}] (height, width)"
        )
    if isinstance(counts, str):
        try:
            packed = counts.encode("ascii")
            runs = rle.unpack(packed)
        except ValueError as error:
            raise BadAnnotation("its mask's counts are no packed runs") from error
    elif isinstance(counts, list) and all(
        is_number(c) and 0 <= c < 2**31 and c == int(c) for c in counts
    ):
        runs = np.array(counts, np.int64)
        packed = None
    else:
        raise BadAnnotation("its mask's counts are neither a string nor a list of whole numbers")
    if runs.sum() != height * width:
        raise BadAnnotation(
            f"the runs of its mask cover {runs.sum():,} pixels, but its image has {height * width:,}"
        )
    return packed if packed is not None else rle.pack(runs.tolist(), height, width)


def is_number(value: Any) -> bool:
    """Whether what a file gives is a number, NaN included; not one that a float cannot hold."""
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**53
    return isinstance(value, float)


def label_of_names(
    names: Sequence[str], used: Iterable[str], classes: Sequence[str], source: str
) -> dict[str, int]:
    """name -> label among `classes`, of the classes of a split. Raises InputError with both lists when one
    that is `used` is not among them."""
    place = {name: label for label, name in enumerate(classes)}
    used = set(used)
    strange = [name for name in names if name in used and name not in place]
    if strange:
        raise InputError(
            f"{source} has classes that are not among those to be learnt: {listed(strange, limit=20)}\n"
            f"  its {len(names)}: {listed(names, limit=20)}\n"
            f"  to be learnt {len(classes)}: {listed(classes, limit=20)}\n"
            "rename them, or train a model on these classes"
        )
    return place
