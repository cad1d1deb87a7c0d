"""COCO's JSON: boxes, polygons and runs of pixels for any number of images in one file.

- ROOT/train.json, val.json, test.json with the images in ROOT/images;
- ROOT/annotations/instances_train2017.json (or train.json, ...) with the images in ROOT/train2017 or
  ROOT/images/train2017;
- ROOT/train/_annotations.coco.json with the images beside it; or
- a single .json file, without splits.

A JSON file stands for a split where its whole name is that of one, after `instances_` and before a year;
others, such as train_polygons.json, are passed over: give such a file itself. `file_name` is relative to the
first of ROOT/images/SPLIT, ROOT/SPLIT, ROOT/images, the JSON file's folder and ROOT that has the images.

What a file says is kept in the cache under a digest of its content: the next start does not parse it.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vitrail.data.boxes import Boxes, Found, collect, is_number, label_of_names
from vitrail.data.cache import Columns, cached
from vitrail.data.folders import SPLIT_NAMES
from vitrail.data.image_files import ImageFiles
from vitrail.data.index import NOWHERE, Index, digest
from vitrail_runtime.errors import InputError, listed

NAME = re.compile(r"(?:instances_)?([a-z]+)(?:20\d\d)?", re.IGNORECASE)
BESIDE = "_annotations.coco.json"
VERSION = 1  # of what is kept of a file
TRIED = 20  # images of a file, to find its folder


def is_coco_folder(path: Path) -> bool:
    """Whether a folder holds images with JSON files named after splits."""
    return bool(split_files(path))


@dataclass(eq=False)
class Document:
    """One JSON file. keys: of its images, as paths below the root. there: which of them exist. things: of the
    categories, by id, where they say it. annotations: None where they were not parsed, or have been read.
    """

    path: Path
    digest: str  # of its content
    categories: dict[Any, str]  # by id
    things: dict[Any, bool]
    image_ids: list[Any]
    keys: list[str]
    sizes: list[tuple[int, int] | None]  # (height, width), where it gives them
    there: list[bool]
    annotations: list[Any] | None


class Coco(ImageFiles):
    """Images whose objects stand in JSON files. See `vitrail.data.index.Source`. A key is a path below the
    root."""

    called = NAME  # what its files are called

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._above = path.parent if path.is_file() else path  # as it was given, for messages
        self.root = self._above.absolute()
        self._files = {"": path} if path.is_file() else split_files(path, self.called)
        self._documents: dict[str, Document] = {}

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_documents": {}}  # workers read by key; listings stay here

    def splits(self) -> tuple[str, ...]:
        return tuple(s for s in ("train", "val", "test", "") if s in self._files)

    def classes(self) -> tuple[str, ...]:
        return tuple(self._document(self.splits()[0]).categories.values())

    def truth(self, split: str, index: Index, classes: Sequence[str]) -> Any:  # Boxes
        document = self._document(split)
        asked = json.dumps([str(document.path), classes, index.keys, sorted(index.problems)])
        asked = digest(asked.encode() + index.sizes.tobytes())
        columns = cached(
            f"boxes {Boxes.VERSION}|{document.digest}|{asked}",
            lambda: self._boxes(split, index, classes).columns(),
        )
        document.annotations = None
        return Boxes.of_columns(classes, columns)

    def _boxes(self, split: str, index: Index, classes: Sequence[str]) -> Boxes:
        document, annotations = self._read_once(split)
        used = {
            document.categories[a["category_id"]]
            for a in annotations
            if isinstance(a, dict) and known(a.get("category_id"), document.categories)
        }
        path = str(document.path)
        label_of = label_of_names(list(document.categories.values()), used, classes, path)
        position = {key: i for i, key in enumerate(index.keys)}
        image_at = {
            image: position.get(key)
            for image, key in zip(document.image_ids, document.keys, strict=True)
        }
        objects = Counter(
            a.get("image_id")
            for a in annotations
            if isinstance(a, dict) and is_id(a.get("image_id"))
        )
        absent = [
            (
                self.where(key, NOWHERE),
                f"the file is missing; {path} gives it {objects[image]:,} objects",
            )
            for image, key, there in zip(
                document.image_ids, document.keys, document.there, strict=True
            )
            if not there
        ]
        ids = {name: key for key, name in document.categories.items()}
        return collect(
            self._found(document, annotations, image_at, label_of),
            classes=classes,
            sizes=index.sizes,
            category_ids=category_ids_of(classes, ids),
            image_ids=image_ids_of(document, index.keys),
            source=path,
            where=partial(self._image, index),
            bad=absent,
            problems=self._other_sizes(document, index),
        )

    def _read_once(self, split: str) -> tuple["Document", list[Any]]:
        """A file and its annotations, which are many times what is kept of it and stay with the caller."""
        document = self._document(split)
        annotations, document.annotations = document.annotations, None
        if annotations is None:
            payload = _bytes_of(document.path)
            if digest(payload) != document.digest:
                raise InputError(f"{document.path} has changed since it was read; start again")
            annotations = parsed(payload, document.path)["annotations"]
        return document, annotations

    def _image(self, index: Index, i: int) -> str:
        return self.where(index.keys[i], NOWHERE)

    def _found(
        self,
        document: Document,
        annotations: list[Any],
        image_at: dict[Any, int | None],
        label_of: dict[str, int],
    ) -> Iterator[Found]:
        names = dict(zip(document.image_ids, document.keys, strict=True))
        for number, given in enumerate(annotations, 1):
            if not isinstance(given, dict):
                name = f"{document.path}: annotation number {number}"
                yield Found(None, name, problem=f"is {short(given)}, expected an object {{...}}")
                continue
            called = (
                f"annotation {short(given['id'])}"
                if "id" in given
                else f"annotation number {number}"
            )
            image = given.get("image_id")
            if not known(image, image_at):
                name = f"{document.path}: {called}"
                yield Found(
                    None, name, problem=f"its image_id {short(image)} is not among the images"
                )
                continue
            at = image_at[image]
            if at is None:
                continue  # the file is missing, which is said
            name = f"{document.path}: {called} of {names[image]}"
            yield _read(given, at, name, document.categories, label_of)

    def _other_sizes(self, document: Document, index: Index) -> dict[int, tuple[str, str]]:
        """Images whose file is not as large as the JSON file says."""
        position = {key: i for i, key in enumerate(index.keys)}
        problems = {}
        for key, size in zip(document.keys, document.sizes, strict=True):
            i = position.get(key)
            if i is None or size is None or i in index.problems:
                continue
            height, width = index.sizes[i].tolist()
            if (height, width) != size:
                turned = (
                    "; is it turned by EXIF? Save it upright" if (width, height) == size else ""
                )
                problems[i] = (
                    self.where(key, NOWHERE),
                    f"is {height} x {width} (height x width), but {document.path} says {size[0]} x "
                    f"{size[1]}{turned}",
                )
        return problems

    def _present(self, split: str) -> list[str]:
        document = self._document(split)
        return [key for key, there in zip(document.keys, document.there, strict=True) if there]

    def _document(self, split: str) -> Document:
        if split not in self._documents:
            self._documents[split] = self._read_document(split)
        return self._documents[split]

    def _read_document(self, split: str) -> Document:
        path = self._files[split]
        payload, given = _bytes_of(path), {}

        def make() -> Columns:
            given.update(_checked(parsed(payload, path), path))
            return _kept(given, path)

        content = digest(payload)
        told: Any = cached(f"coco {VERSION}|{content}", make)
        names = told["names"]
        folder = self._folder_of(path, names)
        beside = "" if folder == "." else f"{folder}/"
        keys = [name if name.startswith("/") else beside + name for name in names]
        return Document(
            path,
            content,
            dict(told["categories"]),
            dict(told["things"]),
            told["image_ids"],
            keys,
            [None if size is None else tuple(size) for size in told["sizes"]],
            [os.path.isfile(self.root / key) for key in keys],
            given.get("annotations"),
        )

    def _folder_of(self, path: Path, names: list[str]) -> str:
        """Where the images of a JSON file are, from the root on."""
        beside = path.parent
        token = path.stem.removeprefix("instances_").removeprefix("panoptic_")
        above = self.root.parent if self.root.name == "annotations" else self.root
        candidates = [
            above / "images" / token,
            above / token,
            above / "images",
            beside,
            above,
        ]
        some = names[:: max(1, len(names) // TRIED)]
        found = [sum(os.path.isfile(folder / name) for name in some) for folder in candidates]
        if not any(found):
            found = [sum(os.path.isfile(folder / name) for name in names) for folder in candidates]
        if not any(found):
            raise InputError(
                f"none of the {len(names):,} images that {path} lists is there, such as {names[0]}; looked "
                f"in {listed(dict.fromkeys(str(folder) for folder in candidates))}"
            )
        return os.path.relpath(candidates[found.index(max(found))], self.root).replace(os.sep, "/")


def _checked(given: Any, path: Path) -> dict[str, Any]:
    """What a JSON file holds, where it is of COCO's form."""
    if not isinstance(given, dict) or not isinstance(given.get("images"), list):
        raise InputError(
            f"{path} is not COCO's JSON: expected an object with the lists images, annotations and "
            f"categories, but {_kind(given)}"
        )
    for name in ("categories", "annotations"):
        if not isinstance(given.get(name), list):
            without = "; without annotations nothing can be learnt or measured"
            raise InputError(f"{path} has no list {name!r}" + without * (name == "annotations"))
    if not given["annotations"]:
        raise InputError(
            f"{path} has no annotation at all; images without objects are fine beside others, but at "
            "least one object is needed"
        )
    return given


def _kept(given: dict[str, Any], path: Path) -> Columns:
    """What is told of a file's categories and images."""
    categories = _categories(given["categories"], path)
    images = [_image_entry(entry, path) for entry in given["images"]]
    if not images:
        raise InputError(f"{path} lists no images")
    ids, names, sizes = map(list, zip(*images, strict=True))
    _check_unique("image ids", [str(image) for image in ids], path)
    _check_unique("file names", names, path)
    told = [c for c in given["categories"] if c.get("isthing") in (0, 1)]
    return {
        "categories": list(categories.items()),
        "things": [(c["id"], bool(c["isthing"])) for c in told],
        "image_ids": ids,
        "names": names,
        "sizes": sizes,
    }


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error


def parsed(payload: bytes, path: Path) -> Any:
    """What a JSON file holds; a byte order mark is passed over. Raises InputError where it is none."""
    try:
        return json.loads(payload.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text ({error.reason}, byte {error.start}); save it as UTF-8"
        ) from error
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is no whole JSON: {error.msg} in line {error.lineno}, column {error.colno}; was it "
            "written to its end?"
        ) from error
    except RecursionError as error:
        raise InputError(f"{path} is nested too deeply for COCO's JSON") from error
    except ValueError as error:  # such as a number of more than 4,300 digits
        raise InputError(f"{path} is no JSON that can be read: {error}") from error


def split_files(root: Path, called: re.Pattern[str] = NAME) -> dict[str, Path]:
    """split -> JSON file of such a name."""
    found: dict[str, Path] = {}
    candidates = [(path, path.stem) for path in _json_in(root)]
    candidates += [(path, path.stem) for path in _json_in(root / "annotations")]
    candidates += [
        (folder / BESIDE, folder.name)
        for folder in sorted(root.iterdir())
        if (folder / BESIDE).is_file()
    ]
    for path, name in candidates:
        match = called.fullmatch(name)
        split = SPLIT_NAMES.get(match[1].lower()) if match else None
        if split is None:
            continue
        if split in found:
            raise InputError(
                f"{root} has two files for the split {split!r}: {found[split]} and {path}; keep one, or give "
                "the file itself"
            )
        found[split] = path
    return found


def _json_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json")) if folder.is_dir() else []


def _read(
    given: dict, image: int, name: str, categories: dict[Any, str], label_of: dict[str, int]
) -> Found:
    """One annotation of an image that is there."""
    category, number, box = given.get("category_id"), given.get("id"), given.get("bbox")
    mask, area = given.get("segmentation"), given.get("area")
    problem, corners = "", None
    if not known(category, categories):
        there = listed([f"{key} ({short(name)})" for key, name in categories.items()])
        problem = f"its category_id {short(category)} is unknown; known are {there}"
    elif "id" in given and not (isinstance(number, int) and is_id(number)):
        problem = "its id is not a whole number"
    elif box is not None and not (
        isinstance(box, list) and len(box) == 4 and all(map(is_number, box))
    ):
        problem = f"its bbox is {short(box)}, expected [x, y, width, height]"
    elif area is not None and not is_number(area):
        problem = f"its area is {short(area)}, expected a number"
    if problem:
        return Found(image, name, problem=problem)
    if box is not None:
        x, y, width, height = map(float, box)
        corners = x, y, x + width, y + height
    return Found(
        image,
        name,
        label_of[categories[category]],
        corners,
        bool(given.get("iscrowd")),
        float(area) if area else None,  # 0 where a tool did not measure it
        number,
        mask or None,  # an empty list where there are boxes alone
    )


def _categories(given: list[Any], path: Path) -> dict[Any, str]:
    """Names by id, in the order of the ids."""
    pairs = []
    for entry in given:
        key, name = (
            (entry.get("id"), entry.get("name")) if isinstance(entry, dict) else (None, None)
        )
        if not (isinstance(key, int) and is_id(key)) or not isinstance(name, str):
            raise InputError(
                f'{path}: a category is {{"id": whole number, "name": text}}, but one is {short(entry)}'
            )
        pairs.append((key, name))
    if not pairs:
        raise InputError(f"{path} names no categories; at least one is needed")
    _check_unique("category ids", [str(key) for key, _ in pairs], path)
    _check_unique("category names", [name for _, name in pairs], path)
    return dict(sorted(pairs))


def _image_entry(entry: Any, path: Path) -> tuple[Any, str, tuple[int, int] | None]:
    key, name = (
        (entry.get("id"), entry.get("file_name")) if isinstance(entry, dict) else (None, None)
    )
    if not is_id(key) or not isinstance(name, str) or not name or "\0" in name:
        raise InputError(
            f'{path}: an image is {{"id": ..., "file_name": text, ...}}, but one is {short(entry)}'
        )
    name = name.replace("\\", "/")
    height, width = entry.get("height"), entry.get("width")
    if not (isinstance(height, int) and isinstance(width, int)):
        return key, name, None
    return key, name, (height, width)


def _check_unique(what: str, values: list[str], path: Path) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise InputError(f"{path} gives {what} twice: {listed(twice)}; give each once")


def category_ids_of(classes: Sequence[str], ids: dict[str, int]) -> list[int]:
    """Those of the file; of classes that it has not, numbers behind them."""
    free = max(ids.values(), default=0)
    found = []
    for name in classes:
        if name not in ids:
            free += 1
        found.append(ids.get(name, free))
    return found


def image_ids_of(document: Document, keys: Sequence[str]) -> list[int]:
    """Those of the file; where they are no whole numbers, 1, 2, ..."""
    of = dict(zip(document.keys, document.image_ids, strict=True))
    ids = [of[key] for key in keys]
    return ids if all(isinstance(i, int) for i in ids) else list(range(1, len(keys) + 1))


def is_id(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and is_number(value))


def known(value: Any, table: dict[Any, Any]) -> bool:
    return is_id(value) and value in table


def short(value: Any) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return "something nested deeply"
    return text if len(text) <= 60 else text[:57] + "..."


def _kind(given: Any) -> str:
    if isinstance(given, dict):
        return f"it has {listed(map(repr, given)) or 'nothing'}"
    return f"it holds {'a list' if isinstance(given, list) else short(given)}"
