"""Class maps: the truth of semantic segmentation, read from a mask beside each image.

What every mask holds (values, how many pixels of each, flaws) is found once and kept in the cache, as the
index of the images is; a mask itself is decoded when it is read, and never kept.
"""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from PIL import Image, ImageOps

from vitrail.data.cache import Columns, cached
from vitrail.data.index import NOWHERE, Source, digest
from vitrail.data.legend import (
    IGNORE,
    RGB,
    Legend,
    inferred_from_colours,
    inferred_from_values,
    unpacked,
)
from vitrail_runtime.errors import ImageError, InputError, listed
from vitrail_runtime.preprocess import read_size

if TYPE_CHECKING:
    from vitrail.data.view import View

VERSION = 2  # of the stored index of masks
ORIENTATION = 0x0112  # EXIF's tag


@runtime_checkable
class MaskSource(Source, Protocol):
    """A way to store images with a mask for each."""

    def pairs(self, split: str) -> list[tuple[str, str]]:
        """(image, mask) in the order of `scan`: keys that `read` and `where` take."""
        ...

    def masks_fingerprint(self, split: str) -> str:
        """Changes when the split's masks do; cheap."""
        ...

    def told_legend(self) -> Legend | None:
        """What the source's own files say of its masks, if they do."""
        ...

    def legend(self) -> Legend:
        """What its masks mean: told, or inferred from those of its first split."""
        ...


@dataclass(frozen=True, eq=False)
class ClassMaps:
    """The class of every pixel of N images, uint8 0..K-1 or IGNORE. See `vitrail.data.examples.Truth`.

    counts: (N, K) int64 pixels of each class. ignored: (N,) int64 pixels without a class.
    legend: what the values of the masks mean. colour: (N,) bool, of which mask they are colours.
    turns: (N,) uint8 EXIF orientation that makes a mask upright.
    problems: position -> (mask, what is wrong with it) of those that cannot be read. notes: what a person
    should know of the masks. Both are of a whole split: a selection has none.
    """

    legend: Legend
    counts: np.ndarray
    ignored: np.ndarray
    masks: list[str]  # keys of the source
    digests: list[str]
    colour: np.ndarray
    turns: np.ndarray
    source: MaskSource
    problems: dict[int, tuple[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    bad: ClassVar[tuple[tuple[str, str], ...]] = ()
    kind: ClassVar[str] = "class maps"
    every_class_needed: ClassVar[bool] = False  # rare classes may be in one split alone

    def __len__(self) -> int:
        return len(self.masks)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.legend.classes

    @property
    def palette(self) -> tuple[RGB, ...] | None:
        """A colour for each class, where the data set gives them."""
        return self.legend.palette

    def select(self, ids: Sequence[int] | np.ndarray) -> "ClassMaps":
        """The truth of these images, in this order."""
        ids = np.asarray(ids, np.int64)
        return replace(
            self,
            counts=self.counts[ids],
            ignored=self.ignored[ids],
            masks=[self.masks[i] for i in ids],
            digests=[self.digests[i] for i in ids],
            colour=self.colour[ids],
            turns=self.turns[ids],
            problems={},
            notes=(),
        )

    def joined(self, others: Sequence["ClassMaps"]) -> "ClassMaps":
        """These and others of the same source, one after another."""
        parts = [self, *others]
        columns = ("counts", "ignored", "colour", "turns")
        return replace(
            self,
            **{name: np.concatenate([getattr(p, name) for p in parts]) for name in columns},
            masks=[m for p in parts for m in p.masks],
            digests=[d for p in parts for d in p.digests],
            problems={},
            notes=(),
        )

    def missing(self) -> list[str]:
        """Classes without a pixel."""
        return [self.classes[k] for k in np.flatnonzero(~self.counts.any(0)).tolist()]

    def strata(self) -> np.ndarray:
        """(N,) int64: of the classes that an image contains, the one that the fewest images contain.

        Drawn by this, a part has its share of every class, the rare ones first: a common class is in nearly
        every image and comes by itself. Of equal ones, the class of fewer pixels. K for an image without a
        class.
        """
        there = self.counts > 0
        rarity = np.lexsort((self.counts.sum(0), there.sum(0)))  # classes, the rarest first
        first = there[:, rarity].argmax(1)
        return np.where(there.any(1), rarity[first], len(self.classes)).astype(np.int64)

    def digest(self, i: int) -> str:
        """Changes with the file of the mask and with what its values mean."""
        told = self.legend.colours if self.colour[i] else self.legend.values
        meaning = f"{self.digests[i]}{sorted(told.items())}"
        return hashlib.blake2b(meaning.encode(), digest_size=16).hexdigest()

    def read(self, i: int) -> np.ndarray:
        """(H, W) uint8 of 0..K-1 or IGNORE, upright and of its image's size.

        Raises ImageError when the mask is gone or is not what was indexed.
        """
        where = self.where(i)
        try:
            payload = self.source.read(self.masks[i], NOWHERE)
        except OSError as error:
            raise ImageError(where, f"cannot be read: {error.strerror or error}") from error
        if digest(payload) != self.digests[i]:
            raise ImageError(
                where, "has changed since it was indexed; start again to index it anew"
            )
        values, colour, _ = decode_mask(payload, where)
        return _turned(self.legend.class_map(values, colour), int(self.turns[i]))

    def target(self, i: int, view: "View | None") -> np.ndarray:
        """The class map that a view of image i shows; without one, that of the whole image."""
        return self.read(i) if view is None else view.class_map(self.read(i))

    def where(self, i: int) -> str:
        """How messages call mask i."""
        return self.source.where(self.masks[i], NOWHERE)


def class_weights(counts: np.ndarray) -> np.ndarray:
    """(K,) float32 "balanced" weights of classes from `ClassMaps.counts`: median frequency balancing.

    Eigen and Fergus (ICCV 2015): median(f) / f_c, where f_c is the number of pixels of class c over the
    number of pixels of the images that contain it, and the median is over the classes. Pixels without a
    class are not counted; a class that never occurs has no loss to weigh, and 0.
    """
    there = counts > 0
    pixels = counts.sum(0)
    of_images = (counts.sum(1, keepdims=True) * there).sum(0)
    frequency = pixels / np.maximum(of_images, 1)
    weights = np.zeros(len(pixels), np.float32)
    seen = pixels > 0
    if seen.any():
        weights[seen] = np.median(frequency[seen]) / frequency[seen]
    return weights


def read_class_maps(
    source: MaskSource, split: str, classes: Sequence[str] | None = None
) -> ClassMaps:
    """The masks of one split, in the order of its images, as classes of `classes` or else of the source."""
    legend = source.legend()
    if len(legend.classes) < 2:
        raise InputError(
            f"{source.name} has one class only ({listed(legend.classes)}); a segmenter needs at least two: "
            "name the background too"
        )
    if classes is not None:
        legend = legend.for_classes(classes, source.name)
    index = read_mask_index(source, split)
    masks = [mask for _, mask in source.pairs(split)]
    problems = {i: (source.where(masks[i], NOWHERE), p) for i, p in index.problems.items()}
    counts = np.zeros((len(index), len(legend.classes)), np.int64)
    ignored = np.zeros(len(index), np.int64)
    of_values, of_colours = legend.ids(index.values, False), legend.ids(index.values, True)
    for i in range(len(index)):
        part = slice(index.starts[i], index.starts[i + 1])
        ids = (of_colours if index.colour[i] else of_values)[part]
        pixels = index.counts[part]
        if (ids < 0).any() and i not in problems:
            wrong = np.flatnonzero(ids < 0)
            problems[i] = (source.where(masks[i], NOWHERE), _strange(index, i, wrong, legend))
        elif i not in problems:
            known = ids != IGNORE
            np.add.at(counts[i], ids[known], pixels[known])
            ignored[i] = pixels[~known].sum()
    maps = ClassMaps(
        legend, counts, ignored, masks, index.digests, index.colour, index.turns, source
    )
    notes = (*legend.notes, *_notes(maps, index, problems))
    return replace(maps, problems=dict(sorted(problems.items())), notes=notes)


def _strange(index: "MaskIndex", i: int, wrong: np.ndarray, legend: Legend) -> str:
    at = index.starts[i] + wrong
    at = at[np.argsort(-index.counts[at], kind="stable")]
    width = index.sizes[i, 1]
    if index.colour[i] and not legend.colours:
        return (
            f"is RGB, and {legend.origin} gives no colours; write lines `NAME R G B` in classes.txt, or save "
            "the mask as 8-bit greyscale or with a palette"
        )
    found = []
    for k in at[:5].tolist():
        value = unpacked(int(index.values[k])) if index.colour[i] else index.values[k]
        row, column = divmod(int(index.firsts[k]), int(width))
        pixels = "1 pixel" if index.counts[k] == 1 else f"{index.counts[k]:,} pixels"
        found.append(f"{pixels} of {value} (first in row {row}, column {column})")
    more = f" and {len(at) - 5} other values" if len(at) > 5 else ""
    total = index.counts[at].sum() / index.sizes[i].prod()
    return (
        f"has values outside the classes, {total:.1%} of it: {'; '.join(found)}{more}; "
        f"{legend.said(bool(index.colour[i]))}"
    )


def _notes(maps: ClassMaps, index: "MaskIndex", problems: dict) -> list[str]:
    notes = []
    good = np.array([i not in problems for i in range(len(maps))], bool)
    empty = np.flatnonzero(good & ~maps.counts.any(1))
    if len(empty):
        notes.append(
            f"{len(empty)} of {len(maps)} masks are all ignored, so their images teach nothing: "
            f"{listed([maps.where(int(i)) for i in empty])}"
        )
    unsure = np.flatnonzero(good & index.unsure)
    if len(unsure):
        notes.append(
            f"{len(unsure)} images are turned by EXIF and their masks fit both ways; the masks are taken to "
            f"be upright: {listed([maps.where(int(i)) for i in unsure])}"
        )
    return notes


def infer_legend(source: MaskSource) -> Legend:
    """What the masks of the first split mean, where no file says it."""
    split = source.splits()[0]
    index = read_mask_index(source, split)
    of = np.repeat(np.arange(len(index)), np.diff(index.starts))
    colour = index.colour[of]
    good = np.array([i not in index.problems for i in range(len(index))], bool)[of]
    # A file in colours among others that hold values is one of the flaws.
    if good.any() and colour[good].all():
        return inferred_from_colours(np.unique(index.values[good]).tolist(), source.name)
    if not good.any() and index.problems:
        place, what = next(iter(index.problems.items()))
        where = source.where(source.pairs(split)[place][1], NOWHERE)
        raise InputError(f"no mask of {source.name} can be read; the first: {where} {what}")
    return inferred_from_values(np.unique(index.values[good & ~colour]).tolist(), source.name)


@dataclass(frozen=True, eq=False)
class MaskIndex:
    """Columns over the N masks of a split, whatever their values mean.

    The values of mask i, how many pixels have them and the first of these (row by row) stand in
    starts[i]:starts[i + 1] of `values`, `counts` and `firsts`.
    """

    digests: list[str]
    sizes: np.ndarray  # (N, 2) int32 (height, width) as stored; zeros for what cannot be read
    turns: np.ndarray  # (N,) uint8 EXIF orientation that makes the mask upright
    unsure: np.ndarray  # (N,) bool: the image is turned by EXIF, and the mask fits both ways
    colour: np.ndarray  # (N,) bool: values are 0xRRGGBB
    starts: np.ndarray  # (N + 1,) int64
    values: np.ndarray
    counts: np.ndarray
    firsts: np.ndarray
    problems: dict[int, str]

    def __len__(self) -> int:
        return len(self.digests)


_COLUMNS = ("sizes", "turns", "unsure", "colour", "starts", "values", "counts", "firsts")


def read_mask_index(source: MaskSource, split: str) -> MaskIndex:
    """The index of a split's masks, from the cache where the files are unchanged, else made and cached."""
    told = (source.fingerprint(split), source.masks_fingerprint(split))
    identity = f"masks {VERSION}|{type(source).__name__}|{source.name}|{split}|{told}"
    columns: Any = cached(identity, lambda: _columns_of(make_mask_index(source, split)))
    return MaskIndex(
        digests=columns["digests"],
        **{name: columns[name] for name in _COLUMNS},
        problems=dict(zip(columns["problem_at"].tolist(), columns["problems"], strict=True)),
    )


def _columns_of(index: MaskIndex) -> Columns:
    return {
        "digests": index.digests,
        **{name: getattr(index, name) for name in _COLUMNS},
        "problem_at": np.array(list(index.problems), np.int64),
        "problems": list(index.problems.values()),
    }


def make_mask_index(source: MaskSource, split: str) -> MaskIndex:
    """Decode every mask of a split once."""
    digests, found, problems = [], [], {}
    for i, (image, mask) in enumerate(source.pairs(split)):
        payload = b""
        try:
            payload = source.read(mask, NOWHERE)
            facts, problem = _facts(payload, source, image)
        except OSError as error:
            facts, problem = _NOTHING, error.strerror or str(error)
        except ImageError as error:
            facts, problem = _NOTHING, error.problem
        digests.append(digest(payload))
        found.append(facts)
        if problem:
            problems[i] = problem
    sizes, turns, unsure, colour, values, counts, firsts = zip(*found, strict=True)
    lengths = [len(v) for v in values]
    return MaskIndex(
        digests=digests,
        sizes=np.array(sizes, np.int32),
        turns=np.array(turns, np.uint8),
        unsure=np.array(unsure, bool),
        colour=np.array(colour, bool),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        values=np.concatenate(values).astype(np.int64),
        counts=np.concatenate(counts).astype(np.int64),
        firsts=np.concatenate(firsts).astype(np.int64),
        problems=problems,
    )


_NONE = np.zeros(0, np.int64)
_NOTHING = ((0, 0), 1, False, False, _NONE, _NONE, _NONE)


def _facts(payload: bytes, source: MaskSource, image: str) -> tuple[tuple, str]:
    values, colour, own = decode_mask(payload, image)
    size, turn, unsure, problem = values.shape, own, False, ""
    try:
        encoded = source.read(image, NOWHERE)
        wanted, orientation = read_size(encoded), _orientation(encoded)
    except (OSError, ImageError):  # the image is among the broken ones, and its mask fits nothing
        wanted, orientation = None, 1
    if wanted is not None and own == 1:
        if size == wanted:
            unsure = orientation > 1 and (orientation < 5 or size[0] == size[1])
        elif orientation >= 5 and size[::-1] == wanted:
            turn = orientation  # drawn over the pixels as they are stored
    upright = size[::-1] if turn >= 5 else size
    if wanted is not None and upright != wanted:
        problem = (
            f"is {upright[0]} x {upright[1]} (height x width), but its image "
            f"{source.where(image, NOWHERE)} is {wanted[0]} x {wanted[1]}; a mask has its image's size"
        )
    there, counts, firsts = _values_of(values)
    return (size, turn, unsure, colour, there, counts, firsts), problem


def _values_of(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values, how many pixels have each, and where the first of these stands."""
    flat = values.reshape(-1)
    if values.dtype != np.uint8:
        there, firsts, counts = np.unique(flat, return_index=True, return_counts=True)
        return there, counts, firsts
    counts = np.bincount(flat, minlength=256)
    there = np.flatnonzero(counts)
    first = np.zeros(256, np.int64)
    first[flat[::-1]] = np.arange(len(flat) - 1, -1, -1)  # of equal places the last write stays
    return there, counts[there], first[there]


def decode_mask(payload: bytes, name: str) -> tuple[np.ndarray, bool, int]:
    """(H, W) integers as stored, whether they are colours 0xRRGGBB, and the file's own EXIF orientation.

    Greyscale files of 1, 8 and 16 bits give their values, files with a palette their indices. Raises
    ImageError for what cannot be a mask; `name` is what it calls the file.
    """
    read_size(payload, name=name)  # whether it is an image at all, and not too large
    try:
        with Image.open(io.BytesIO(payload)) as image:
            kind = image.format or ""
            image.load()
            mode, orientation = image.mode, _of_exif(image)
            if kind == "JPEG":
                raise ImageError(
                    name,
                    "is a JPEG, whose compression changes the values of a mask; save masks as PNG",
                )
            if "A" in mode and mode != "PA":
                if image.getchannel("A").getextrema()[0] != 255:
                    raise ImageError(
                        name,
                        "is partly transparent, which says nothing of classes; save it without transparency",
                    )
                image = image.convert("L" if mode == "LA" else "RGB")
            elif mode == "PA":
                image = image.getchannel("P")
            pixels = np.array(image)
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Pillow's readers raise nearly anything at a damaged file
        raise ImageError(name, f"is broken or truncated: {error}") from error
    if pixels.ndim == 2 and pixels.dtype.kind in "bui":
        if pixels.dtype.kind == "b":
            pixels = pixels.astype(np.uint8)
        return pixels, False, orientation
    if pixels.ndim == 3 and mode in ("RGB", "RGBA"):
        parts = pixels.astype(np.uint32)
        return (parts[..., 0] << 16) | (parts[..., 1] << 8) | parts[..., 2], True, orientation
    raise ImageError(
        name,
        f"has pixels of kind {mode}; a mask is greyscale of 8 or 16 bits, has a palette, or is RGB",
    )


def _orientation(payload: bytes) -> int:
    with Image.open(io.BytesIO(payload)) as image:
        return _of_exif(image)


def _of_exif(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turns it when it is loaded
        return 1
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # a damaged EXIF block must not cost the image
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turned(ids: np.ndarray, orientation: int) -> np.ndarray:
    if orientation == 1:
        return ids
    image = Image.fromarray(ids)
    image.getexif()[ORIENTATION] = orientation
    return np.array(ImageOps.exif_transpose(image))
