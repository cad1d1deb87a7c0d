"""COCO's panoptic JSON: of every image one annotation, which names an image of ids and lists its segments.

The files are found as those of boxes are (`data/coco.py`), by the same names or with `panoptic_` before the
split: ROOT/annotations/panoptic_train2017.json, ROOT/train.json, ROOT/train/_annotations.coco.json or a
single .json. `file_name` of an annotation is relative to the first of a folder beside the JSON file and
called like it, ROOT/panoptic/SPLIT, ROOT/panoptic and the JSON file's own folder that has the images of ids.
Where a folder has boxes too (`instances_train2017.json`), they are taken: give a folder without them.

Area and box of a segment are counted in the image; those that the JSON says are not read. Of a class of stuff
an image has one segment; several (but crowds) are taken as one.
"""

import hashlib
import mmap
import os
import re
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from vitrail.data.boxes import Found, collect, label_of_names
from vitrail.data.coco import (
    Coco,
    Document,
    category_ids_of,
    image_ids_of,
    known,
    short,
    split_files,
)
from vitrail.data.index import NOWHERE, Index
from vitrail.data.panoptic import NONE, IdIndex, Panoptic, read_id_index
from vitrail_runtime.errors import InputError, listed
from vitrail_runtime.panoptic import LARGEST

NAME = re.compile(r"(?:panoptic_)?([a-z]+)(?:20\d\d)?", re.IGNORECASE)
MARK = b'"segments_info"'  # what only this kind of JSON has
TRIED = 20  # images of ids, to find their folder


def is_panoptic(path: Path) -> bool:
    """Whether a JSON file, or the first of a folder's files of splits, lists segments."""
    if path.is_file():
        return _has_mark(path)
    files = split_files(path) or split_files(path, NAME)
    return bool(files) and _has_mark(next(iter(files.values())))


def _has_mark(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            if not os.fstat(file.fileno()).st_size:
                return False
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
                return text.find(MARK) >= 0
    except OSError:
        return False  # reading it says so


@dataclass(frozen=True, eq=False)
class _Given:
    """What a JSON file says of the images of a split, one entry each.

    keys: of the images of ids; "" where there is none. segments: of each image. same: as of `Panoptic`. bad:
    (name, what is wrong).
    """

    keys: list[str]
    segments: list[list[Any]]
    same: list[dict[int, int]]
    bad: list[tuple[str, str]] = field(default_factory=list)


class CocoPanoptic(Coco):
    """Images whose segments stand in images of ids and JSON files. See `vitrail.data.index.Source`."""

    called = NAME

    def truth(self, split: str, index: Index, classes: Sequence[str]) -> Panoptic:
        document, annotations = self._read_once(split)
        names = document.categories
        unsaid = [names[key] for key in names if key not in document.things]
        if unsaid:
            raise InputError(
                f"{document.path} does not say which categories are things and which are stuff: "
                f'{listed(unsaid, limit=5)} without an "isthing" of 1 or 0'
            )
        given = self._given(document, annotations, index)
        ids = read_id_index(self, split, given.keys, self._fingerprint(given.keys))
        used = {
            names[segment["category_id"]]
            for segments in given.segments
            for segment in segments
            if isinstance(segment, dict) and known(segment.get("category_id"), names)
        }
        label_of = label_of_names(list(names.values()), used, classes, str(document.path))
        problems = self._other_sizes(document, index)
        problems |= self._without_ids(document, index, given, ids)
        told = collect(
            self._segments(document, given, ids, label_of),
            classes=classes,
            sizes=index.sizes,
            category_ids=category_ids_of(classes, {name: key for key, name in names.items()}),
            image_ids=image_ids_of(document, index.keys),
            source=str(document.path),
            where=partial(self._image, index),
            bad=given.bad,
            problems=problems,
        )
        # The reader of boxes wants ids that no other image has.
        told = replace(told, ids=told.ids % (LARGEST + 1), notes=(*told.notes, *self._notes(given)))
        stuff = {names[key] for key, thing in document.things.items() if not thing}
        labels = frozenset(label for name, label in label_of.items() if name in stuff)
        return Panoptic(told, labels, given.keys, ids.digests, self, given.same)

    def _notes(self, given: "_Given") -> list[str]:
        several = [
            self.where(key, NOWHERE)
            for key, same in zip(given.keys, given.same, strict=True)
            if same
        ]
        if not several:
            return []
        return [
            f"{len(several)} of {len(given.keys)} images of ids have several segments of one class of stuff, "
            f"which are taken as one: {listed(several)}"
        ]

    def _given(self, document: Document, annotations: list[Any], index: Index) -> "_Given":
        """The annotation of each image of the index."""
        position = {key: i for i, key in enumerate(index.keys)}
        pairs = zip(document.image_ids, document.keys, strict=True)
        image_at = {image: position.get(key) for image, key in pairs}
        given = _Given([""] * len(index), [[] for _ in index.keys], [{} for _ in index.keys])
        for image, key, there in zip(
            document.image_ids, document.keys, document.there, strict=True
        ):
            if not there:
                what = f"the file is missing; {document.path} lists it as image {short(image)}"
                given.bad.append((self.where(key, NOWHERE), what))
        names = [a.get("file_name") for a in annotations if isinstance(a, dict)]
        folder = self._folder_of_ids(document.path, [n for n in names if isinstance(n, str)])
        for number, told in enumerate(annotations, 1):
            called = f"{document.path}: annotation number {number}"
            image = told.get("image_id") if isinstance(told, dict) else None
            if not isinstance(told, dict) or not known(image, image_at):
                what = f"its image_id {short(image)} is not among the images"
                given.bad.append((called, what))
                continue
            at, name, segments = image_at[image], told.get("file_name"), told.get("segments_info")
            if at is None:
                continue  # the file is missing, which is said
            called = f"{called} of {index.keys[at]}"
            if not isinstance(name, str) or not name or "\0" in name:
                given.bad.append((called, f"its file_name is {short(name)}, expected text"))
            elif not isinstance(segments, list):
                given.bad.append((called, f"its segments_info is {short(segments)}, not a list"))
            elif given.keys[at]:
                given.bad.append((called, "its image has an annotation before; one is expected"))
            else:
                name = name.replace("\\", "/")
                given.keys[at] = name if folder == "." else f"{folder}/{name}"
                given.segments[at] = segments
        return given

    def _without_ids(
        self, document: Document, index: Index, given: "_Given", ids: IdIndex
    ) -> dict[int, tuple[str, str]]:
        """Images of which nothing can be said, as their image of ids is none, or of another size."""
        problems = {}
        for i, key in enumerate(given.keys):
            if i in index.problems:
                continue
            size, wanted = ids.sizes[i].tolist(), index.sizes[i].tolist()
            if not key:
                where = self.where(index.keys[i], NOWHERE)
                problems[i] = where, f"has no annotation in {document.path} that can be used"
            elif i in ids.problems:
                problems[i] = self.where(key, NOWHERE), ids.problems[i]
            elif size != wanted:
                problems[i] = (
                    self.where(key, NOWHERE),
                    f"is {size[0]} x {size[1]} (height x width), but its image "
                    f"{self.where(index.keys[i], NOWHERE)} is {wanted[0]} x {wanted[1]}",
                )
        return problems

    def _segments(
        self, document: Document, given: "_Given", ids: IdIndex, label_of: dict[str, int]
    ) -> Iterator[Found]:
        for i, segments in enumerate(given.segments):
            facts, told = ids.of(i), set()
            row_of = {
                value: row for row, value in enumerate(facts.values.tolist()) if value != NONE
            }
            where = self.where(given.keys[i], NOWHERE)
            good: dict[
                int, tuple[dict[str, Any], list[int]]
            ] = {}  # of an id its entry and its rows
            first: dict[Any, int] = {}  # of a category of stuff its first id
            for number, segment in enumerate(segments, 1):
                problem = _problem(segment, document.categories, row_of, told)
                if problem:
                    name = segment.get("id", None) if isinstance(segment, dict) else None
                    called = (
                        f"segment number {number}" if name is None else f"segment {short(name)}"
                    )
                    yield Found(i, f"{where}: {called}", problem=f"{problem} ({document.path})")
                    continue
                value, category = segment["id"], segment["category_id"]
                told.add(value)
                whole = value
                if not document.things[category] and not segment.get("iscrowd"):
                    whole = first.setdefault(category, value)
                if whole != value:
                    given.same[i][value] = whole
                good.setdefault(whole, (segment, []))[1].append(row_of[value])
            for value, (segment, rows) in good.items():
                (x1, y1), (x2, y2) = facts.boxes[rows, :2].min(0), facts.boxes[rows, 2:].max(0)
                yield Found(
                    i,
                    f"{where}: segment {value}",
                    label_of[document.categories[segment["category_id"]]],
                    (float(x1), float(y1), float(x2), float(y2)),
                    bool(segment.get("iscrowd")),
                    float(facts.areas[rows].sum()),
                    i * (LARGEST + 1) + value,
                )
            listed_ids = {s["id"] for s in segments if isinstance(s, dict) and _is_id(s.get("id"))}
            rest = sorted(row_of.keys() - listed_ids)
            if rest:
                what = f"the ids {listed(map(str, rest), limit=5)} stand in the image but not in its list"
                yield Found(
                    i,
                    where,
                    problem=f"{what} in {document.path}; take image and JSON of one export",
                )

    def _folder_of_ids(self, path: Path, names: list[str]) -> str:
        """Where the images of ids of a JSON file are, from the root on."""
        split = path.stem.removeprefix("panoptic_")
        above = self.root.parent if self.root.name == "annotations" else self.root
        candidates = [
            path.parent / path.stem,
            above / "panoptic" / split,
            above / "panoptic",
            path.parent,
        ]
        some = names[:: max(1, len(names) // TRIED)]
        found = [sum(os.path.isfile(folder / name) for name in some) for folder in candidates]
        if names and not any(found):
            raise InputError(
                f"none of the images of ids that {path} names is there, such as {names[0]}; looked in "
                f"{listed(dict.fromkeys(str(folder) for folder in candidates))}"
            )
        folder = candidates[found.index(max(found))].absolute()
        return os.path.relpath(folder, self.root).replace(os.sep, "/")

    def _fingerprint(self, keys: Sequence[str]) -> str:
        total = hashlib.sha256(os.fsencode(self.root))
        for key in keys:
            try:
                info = (self.root / key).stat()
                line = f"{key}\0{info.st_size}\0{info.st_mtime_ns}\n"
            except OSError:
                line = f"{key}\0\n"
            total.update(line.encode("utf-8", "surrogateescape"))
        return total.hexdigest()


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST


def _problem(segment: Any, categories: dict[Any, str], there: Container, told: set[int]) -> str:
    """What is wrong with an entry of a list of segments."""
    if not isinstance(segment, dict):
        return f"is {short(segment)}, expected an object {{...}}"
    value, category = segment.get("id"), segment.get("category_id")
    if not _is_id(value):
        return f"its id is {short(value)}, expected a whole number from 1 to {LARGEST:,}"
    if not known(category, categories):
        known_ones = listed([f"{key} ({short(name)})" for key, name in categories.items()])
        return f"its category_id {short(category)} is unknown; known are {known_ones}"
    if value in told:
        return "its id stands twice in the list; an id is given once"
    if value not in there:
        return "its id stands in the list but not in the image; take image and JSON of one export"
    return ""
