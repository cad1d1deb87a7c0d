"""A look through a whole data set before it costs a training: what is broken, doubled, leaking or missing."""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import scipy.sparse.csgraph
import scipy.spatial
from PIL import Image

from vitrail.data.boxes import Boxes
from vitrail.data.coco import Coco
from vitrail.data.index import Index, Place, Source, digest, read_index
from vitrail.data.masks import ClassMaps, MaskSource, read_class_maps
from vitrail.data.opening import hold_out, open_source
from vitrail.data.pairs import Captions, PairShards, PairTable
from vitrail.data.panoptic import Panoptic
from vitrail.data.voc import Voc
from vitrail.data.yolo import Yolo
from vitrail_runtime.errors import ImageError, InputError
from vitrail_runtime.preprocess import decode

IMBALANCE = 10.0  # largest class over smallest from which it is worth a word
SMALL = 32  # pixels of the short side, likewise
BORDERS = (32**2, 96**2)  # pixels of area: between small, medium and large objects, as COCO has it
BOXED = (Coco, Voc, Yolo)
PAIRED = (PairTable, PairShards)
VAL_FRACTION = 0.2  # held out for validation where no val split is, as in training by default
LOOK_SIDE = 8  # pictures are compared as thumbnails of this many pixels a side,
LOOK_APART = 4.0  # and look the same up to this mean difference of 255


@dataclass(frozen=True)
class SplitSummary:
    """Counts and sizes of one split. Sizes are (height, width) in pixels.

    per_class: images of each class; of masks and boxes, images that contain it. Of masks `pixels`
    counts its pixels, and `ignored` are those without a class; `objects` counts those of boxes. Of captions
    `texts` tells how many different ones there are and (fewest, median, most) words of one.
    """

    name: str
    pictures: int
    per_class: dict[str, int]
    smallest: tuple[int, int]  # by area
    median: tuple[int, int]
    largest: tuple[int, int]
    most_elongated: float  # long side over short side
    pixels: dict[str, int] = field(default_factory=dict)
    ignored: int = 0
    objects: "ObjectSummary | None" = None
    texts: tuple[int, tuple[int, int, int]] | None = None


@dataclass(frozen=True)
class ObjectSummary:
    """The objects of one split.

    per_class: objects of each class, crowds too, of which there are `crowds`. small, medium, large: by
    COCO's borders of 32 x 32 and 96 x 96 pixels of area. most: in one image. empty: images without any.
    masks: whether there are. called: what they are, in a line. stuff: classes of one segment an image.
    """

    per_class: dict[str, int]
    crowds: int
    small: int
    medium: int
    large: int
    most: int
    empty: int
    masks: bool
    called: str = "objects"
    stuff: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkup:
    """What `check` found. Errors spoil a training or its scores; warnings are worth knowing."""

    source: str
    classes: tuple[str, ...]
    splits: tuple[SplitSummary, ...]
    errors: dict[str, list[str]]  # what -> where
    warnings: dict[str, list[str]]
    notes: tuple[str, ...] = ()  # what was taken as what

    def to_dict(self) -> dict:
        """Plain data for JSON."""
        return asdict(self)


@dataclass
class _Seen:
    """One picture, as far as comparing needs it."""

    split: str
    label: str  # or the mask's digest
    where: str
    digest: str
    look: bytes = b""  # thumbnail


def check(source: str | Path, *, drop_bad: bool = False) -> Checkup:
    """Decode every picture of every split once and compare all of them.

    drop_bad: bad annotations are no errors, but warnings, as for a training that goes on without them.

    Raises InputError where there is no data set to look at; flaws of single pictures are collected.
    """
    opened = open_source(source)
    classes, notes = opened.classes(), ()
    errors: dict[str, list[str]] = defaultdict(list)
    warnings: dict[str, list[str]] = defaultdict(list)
    summaries, seen = [], []
    masks = opened if isinstance(opened, MaskSource) else None
    boxed, paired = isinstance(opened, BOXED), isinstance(opened, PAIRED)
    indexes = {}
    for split in opened.splits():
        try:
            indexes[split] = read_index(opened, split)
        except InputError as error:
            if masks is None and not boxed:
                raise
            errors["splits that cannot be read"].append(f"{split}: {error}")
    for split, index in indexes.items():
        if boxed:
            try:
                boxes = opened.truth(split, index, classes)
            except InputError as error:
                errors["splits that cannot be used"].append(str(error))
                continue
            truths, summary = _digests(boxes), _object_summary(split, index, boxes)
            _check_boxes(summary.name, boxes, warnings if drop_bad else errors, errors, warnings)
        elif paired:
            pairs = opened.truth(split, index, classes)
            truths, summary = [""] * len(index), _pair_summary(split, index, pairs)
            for where, problem in pairs.problems.values():
                errors["images without a caption"].append(f"{where}: {problem}")
        elif masks is None:
            truths, summary = index.names, _summary(split, index, classes)
            _check_classes(summary, classes, errors, warnings)
        else:
            maps = read_class_maps(masks, split)
            truths, summary = maps.digests, _mask_summary(split, index, maps)
            notes = maps.legend.notes
            _check_maps(summary.name, maps, errors, warnings)
        summaries.append(summary)
        seen += _look_through(opened, split, index, truths, errors)
        small = np.flatnonzero((index.sizes.min(1) < SMALL) & (index.sizes.min(1) > 0))
        if len(small):
            warnings[f"pictures with a side under {SMALL} pixels"] += [
                f"{opened.where(index.keys[i], _place(index, i))}: "
                f"{index.sizes[i][0]} x {index.sizes[i][1]}"
                for i in small.tolist()
            ]
    by_class = masks is None and not boxed and not paired
    _check_splits(indexes, errors, by_class=by_class)
    if len(classes) < 2 and not boxed and not paired:
        errors["one class only; a classifier needs at least two"].append(", ".join(classes))
    kind = "labels" if by_class else "boxes" if boxed else "captions" if paired else "masks"
    _compare(seen, errors, warnings, kind)
    return Checkup(str(source), classes, tuple(summaries), dict(errors), dict(warnings), notes)


def _look_through(
    source: Source,
    split: str,
    index: Index,
    truths: Sequence[str],
    errors: dict[str, list[str]],
) -> Iterator[_Seen]:
    positions: Iterable[int] = range(len(index))
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        title = f"checking {split or 'pictures'}"
        positions = track(positions, title, console=Console(stderr=True), transient=True)
    for i in positions:
        place = _place(index, i)
        where = source.where(index.keys[i], place)
        if i in index.problems:
            errors["broken pictures"].append(f"{where}: {index.problems[i]}")
            continue
        try:
            payload = source.read(index.keys[i], place)
            if digest(payload) != index.digests[i]:
                raise ImageError(where, "changed while it was checked")
            pixels = decode(payload)
        except (InputError, OSError) as error:
            # The index believes a picture whose last bytes look right; decoding knows.
            problem = error.problem if isinstance(error, ImageError) else error
            errors["broken pictures"].append(f"{where}: {problem}")
            continue
        look = Image.fromarray(pixels).resize((LOOK_SIDE, LOOK_SIDE), Image.Resampling.BOX)
        yield _Seen(split, truths[i], where, index.digests[i], look.tobytes())


def _summary(split: str, index: Index, classes: tuple[str, ...]) -> SplitSummary:
    counts = dict.fromkeys(classes, 0)
    for name in index.names:
        counts[name] = counts.get(name, 0) + 1
    sizes = index.sizes[index.sizes.min(1) > 0]
    if not len(sizes):
        return SplitSummary(split or "all", len(index), counts, (0, 0), (0, 0), (0, 0), 0.0)
    by_area = sizes[np.argsort(sizes.prod(1), kind="stable")]

    def size(position: int) -> tuple[int, int]:
        height, width = by_area[position].tolist()
        return height, width

    return SplitSummary(
        name=split or "all",
        pictures=len(index),
        per_class=counts,
        smallest=size(0),
        median=size(len(by_area) // 2),
        largest=size(-1),
        most_elongated=float((sizes.max(1) / sizes.min(1)).max()),
    )


def _mask_summary(split: str, index: Index, maps: ClassMaps) -> SplitSummary:
    there, pixels = (maps.counts > 0).sum(0).tolist(), maps.counts.sum(0).tolist()
    return replace(
        _summary(split, index, ()),
        per_class=dict(zip(maps.classes, there, strict=True)),
        pixels=dict(zip(maps.classes, pixels, strict=True)),
        ignored=int(maps.ignored.sum()),
    )


def _pair_summary(split: str, index: Index, pairs: Captions) -> SplitSummary:
    words = sorted(len(caption.split()) for caption in pairs.captions if caption) or [0]
    named = pairs.labels[pairs.labels >= 0]
    counts = np.bincount(named, minlength=len(pairs.classes)).tolist()
    different = len(set(pairs.captions) - {""})
    return replace(
        _summary(split, index, ()),
        per_class=dict(zip(pairs.classes, counts, strict=True)),
        texts=(different, (words[0], words[len(words) // 2], words[-1])),
    )


def _object_summary(split: str, index: Index, truth: Boxes | Panoptic) -> SplitSummary:
    if not isinstance(truth, Panoptic):
        return _box_summary(split, index, truth)
    summary = _box_summary(split, index, truth.told)
    assert summary.objects is not None
    stuff = tuple(truth.classes[k] for k in sorted(truth.stuff))
    return replace(summary, objects=replace(summary.objects, called="segments", stuff=stuff))


def _digests(boxes: Boxes | Panoptic) -> list[str]:
    return [boxes.digest(i) for i in range(len(boxes))]


def _box_summary(split: str, index: Index, boxes: Boxes) -> SplitSummary:
    counts, of_image = boxes.counts(), np.diff(boxes.starts)
    large = np.digitize(boxes.areas, BORDERS)
    return replace(
        _summary(split, index, ()),
        per_class=dict(zip(boxes.classes, (counts > 0).sum(0).tolist(), strict=True)),
        objects=ObjectSummary(
            per_class=dict(zip(boxes.classes, counts.sum(0).tolist(), strict=True)),
            crowds=int(boxes.crowd.sum()),
            small=int((large == 0).sum()),
            medium=int((large == 1).sum()),
            large=int((large == 2).sum()),
            most=int(of_image.max(initial=0)),
            empty=int((of_image == 0).sum()),
            masks=boxes.has_masks,
        ),
    )


def _check_boxes(
    split: str,
    boxes: Boxes | Panoptic,
    bad: dict[str, list[str]],
    errors: dict[str, list[str]],
    warnings: dict[str, list[str]],
) -> None:
    for where, problem in boxes.bad:
        bad["bad annotations"].append(f"{where}: {problem}")
    for where, problem in boxes.problems.values():
        errors["images that their annotations do not fit"].append(f"{where}: {problem}")
    for name in boxes.missing():
        what = "a segment" if isinstance(boxes, Panoptic) else "an object"
        warnings[f"classes without {what}"].append(f"{split}: {name}")
    for note in boxes.notes:
        warnings["annotations to look at"].append(f"{split}: {note}")


def _check_maps(
    split: str,
    maps: ClassMaps,
    errors: dict[str, list[str]],
    warnings: dict[str, list[str]],
) -> None:
    for where, problem in maps.problems.values():
        errors["masks that cannot be used"].append(f"{where}: {problem}")
    for name in maps.missing():
        warnings["classes without a pixel"].append(f"{split}: {name}")
    for note in maps.notes[len(maps.legend.notes) :]:
        warnings["masks to look at"].append(f"{split}: {note}")


def _check_classes(
    summary: SplitSummary,
    classes: tuple[str, ...],
    errors: dict[str, list[str]],
    warnings: dict[str, list[str]],
) -> None:
    for name, count in summary.per_class.items():
        if name not in classes:
            errors["classes that train does not have"].append(f"{summary.name}: {name} ({count})")
        elif count == 0:
            errors["classes without a picture"].append(f"{summary.name}: {name}")
    counts = [c for c in summary.per_class.values() if c]
    if counts and max(counts) >= IMBALANCE * min(counts):
        largest = max(summary.per_class, key=summary.per_class.__getitem__)
        smallest = min(
            (n for n, c in summary.per_class.items() if c), key=summary.per_class.__getitem__
        )
        warnings["unbalanced classes"].append(
            f"{summary.name}: {largest} has {max(counts) / min(counts):.0f} times as many pictures as "
            f"{smallest} ({max(counts)} and {min(counts)})"
        )


def _check_splits(
    indexes: dict[str, Index], errors: dict[str, list[str]], *, by_class: bool
) -> None:
    """A training needs pictures of every class to learn from, and others to be measured on."""
    if not {"train", ""} & indexes.keys():
        errors["no train split; a model is trained on one"].append(f"there is {', '.join(indexes)}")
    elif "val" not in indexes and by_class:
        (learnt,) = (index for split, index in indexes.items() if split in ("train", ""))
        good = [i for i in range(len(learnt)) if i not in learnt.problems]
        names = np.array([learnt.names[i] for i in good])
        kinds, labels = np.unique(names, return_inverse=True)
        held = hold_out(labels, [learnt.digests[i] for i in good], VAL_FRACTION, seed=0)
        for name in sorted(set(kinds) - (set(names[held]) & set(names[~held]))):
            errors["classes with too few pictures to hold out some for validation"].append(
                f"{name} ({(names == name).sum()}); add some, or give a val split"
            )


def _compare(
    seen: list[_Seen],
    errors: dict[str, list[str]],
    warnings: dict[str, list[str]],
    truths: str,
) -> None:
    exact: dict[str, list[_Seen]] = defaultdict(list)
    for picture in seen:
        exact[picture.digest].append(picture)
    for group in exact.values():
        if len(group) > 1:
            _file_group(group, "the same bytes", errors, warnings, truths)
    # Thumbnails that agree are a reason to look, not a proof: plain textures agree as well.
    for group in _looking_the_same([group[0] for group in exact.values()]):
        if truths != "labels":  # those of two frames of a film differ, and both are right
            group = [replace(picture, label="") for picture in group]
        _file_group(group, "pictures that look the same", warnings, warnings, truths)


def _file_group(
    group: list[_Seen],
    what: str,
    errors: dict[str, list[str]],
    warnings: dict[str, list[str]],
    truths: str = "labels",
) -> None:
    line = "  =  ".join(p.where for p in group)
    if len({p.label for p in group}) > 1:
        labels = ", ".join(sorted({p.label for p in group}))
        told = f" ({labels})" if truths == "labels" else ""
        errors[f"{what} under different {truths}"].append(line + told)
    if len({p.split for p in group}) > 1:
        errors[f"leaks: {what} in different splits"].append(line)
    elif len({p.label for p in group}) == 1:
        warnings[f"duplicates: {what} more than once in a split"].append(line)


def _looking_the_same(pictures: list[_Seen]) -> Iterator[list[_Seen]]:
    """Groups of pictures whose thumbnails differ by little: copies saved anew, or at another size."""
    if not pictures:  # all are broken
        return
    looks = np.stack([np.frombuffer(p.look, np.uint8) for p in pictures]).astype(np.float32)
    # A flat picture looks like every other flat picture.
    vivid = np.flatnonzero(looks.std(1) > 4 * LOOK_APART)
    coarse = looks[vivid].reshape(-1, 4, LOOK_SIDE // 4, 4, LOOK_SIDE // 4, 3).mean((2, 4, 5))
    if len(vivid) < 2:
        return
    tree = scipy.spatial.KDTree(coarse.reshape(len(vivid), -1))
    pairs = vivid[tree.query_pairs(2 * LOOK_APART, p=np.inf, output_type="ndarray")]
    apart = np.abs(looks[pairs[:, 0]] - looks[pairs[:, 1]]).mean(1)
    first, second = pairs[apart <= LOOK_APART].T
    graph = scipy.sparse.coo_matrix((np.ones(len(first)), (first, second)), [len(pictures)] * 2)
    count, group_of = scipy.sparse.csgraph.connected_components(graph, directed=False)
    for group in np.flatnonzero(np.bincount(group_of, minlength=count) > 1):
        yield [pictures[i] for i in np.flatnonzero(group_of == group)]


def _place(index: Index, i: int) -> Place:
    file, offset, size = index.places[i].tolist()
    return file, offset, size
