"""What the values of masks mean: names of classes, their values and colours, and what has no class.

It is told by a file beside the images, or inferred from the masks, and said.

classes.txt: a line for each class: `NAME`, `INDEX NAME`, `NAME R G B` or `INDEX NAME R G B`. A class called
    `ignore` is none: its pixels teach nothing and count in no score. Without indices the lines are values
    0, 1, 2, ...
meta.json: {"classes": [...], "palette": [[r, g, b], ...], "ignore_index": 255}, each of them optional.
objectInfo150.txt: ADE20K's own, whose classes begin at 1: 0 is no class.

255 is ignored unless it has a name. Names and values as in mmsegmentation; `ignore` in the first line, or an
ignore_index of 0, is its `reduce_zero_label`.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitrail_runtime.errors import InputError, listed

IGNORE = 255  # in class maps: a pixel without a class
IGNORE_NAME = "ignore"
MOST_CLASSES = 255  # 0 to 254

RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Legend:
    """From what stands in masks to classes 0..K-1 or IGNORE.

    values: grey level or index of a palette -> class. colours: 0xRRGGBB of an RGB mask -> class.
    palette: a colour for each class, for images of masks. origin: what told all this, for messages.
    notes: what a person should know of it.
    """

    classes: tuple[str, ...]
    values: dict[int, int]
    colours: dict[int, int]
    palette: tuple[RGB, ...] | None
    origin: str
    notes: tuple[str, ...] = ()

    def ids(self, values: np.ndarray, colour: bool) -> np.ndarray:
        """Integers of a mask -> classes, int64, -1 for what is no class and not ignored either."""
        known = self.colours if colour else self.values
        keys = np.array(sorted(known), np.int64)
        if not len(keys):
            return np.full(values.shape, -1, np.int64)
        classes = np.array([known[int(k)] for k in keys], np.int64)
        at = np.minimum(np.searchsorted(keys, values), len(keys) - 1)
        return np.where(keys[at] == values, classes[at], -1)

    def class_map(self, values: np.ndarray, colour: bool) -> np.ndarray:
        """The integers of a mask, all of them known -> uint8 classes or IGNORE."""
        if colour or values.dtype != np.uint8:
            return self.ids(values, colour).astype(np.uint8)
        return self.ids(np.arange(256), False).astype(np.uint8)[
            values
        ]  # a table: ten times as fast

    def for_classes(self, names: Sequence[str], source: str) -> "Legend":
        """The same masks, taught as the classes of `names`, such as those of a trained model."""
        if tuple(names) == self.classes:
            return self
        strangers = [name for name in self.classes if name not in names]
        if strangers:
            raise InputError(
                f"masks of {source} have classes that are not among those to be learnt: {listed(strangers)}; "
                f"known are {listed(names)}"
            )
        to = {i: list(names).index(name) for i, name in enumerate(self.classes)}
        # A class that is not among these masks has no colour of theirs.
        palette = None
        return replace(
            self,
            classes=tuple(names),
            values={v: to.get(k, IGNORE) for v, k in self.values.items()},
            colours={v: to.get(k, IGNORE) for v, k in self.colours.items()},
            palette=palette,
        )

    def said(self, colour: bool) -> str:
        """What is expected, for a message about what was found."""
        if colour:
            return f"{self.origin} gives {len(self.colours)} colours"
        taught = sorted(v for v, k in self.values.items() if k != IGNORE)
        ignored = sorted(v for v, k in self.values.items() if k == IGNORE)
        without = f", without a class are {listed(map(str, ignored))}" if ignored else ""
        return f"classes are {ranges(taught)}{without} ({self.origin})"


def read_legend(folder: Path) -> Legend | None:
    """What the files of a folder say; None where there is none of them."""
    entries: list[tuple[int | None, str, RGB | None]] = []
    origin = ""
    for name, read in (("classes.txt", _class_lines), ("objectInfo150.txt", _ade20k_lines)):
        if not entries and (folder / name).is_file():
            origin = name
            entries = read(folder / name)
    path = folder / "meta.json"
    if path.is_file():
        told = _meta(path)
        names = told.get("classes")
        mine = [name for _, name, _ in entries if name != IGNORE_NAME]
        if entries and names is not None and [n for n in names if n != IGNORE_NAME] != mine:
            raise InputError(
                f"{path} and {origin} beside it name other classes: {listed(names)}; and {listed(mine)}; "
                "keep one of the files"
            )
        if not entries and names is not None:
            origin = "meta.json"
            entries = [(None, str(name), None) for name in names]
        if entries:
            return _legend(entries, path.with_name(origin), told)
    return _legend(entries, folder / origin, {}) if entries else None


# (value or None, name, colour or None)
_Entry = tuple[int | None, str, RGB | None]


def _class_lines(path: Path) -> list[_Entry]:
    lines = [line.split() for line in _lines(path)]
    if not lines:
        raise InputError(f"{path} is empty; expected the name of a class in each line")
    # A form holds for the whole file: a class may be called "3", or "road 66".
    coloured = all(len(words) > 3 and all(map(_is_byte, words[-3:])) for words in lines)
    colours: list[RGB | None] = [None] * len(lines)
    if coloured:
        colours = [(int(w[-3]), int(w[-2]), int(w[-1])) for w in lines]
        lines = [words[:-3] for words in lines]
    numbered = all(len(words) > 1 and words[0].isdecimal() for words in lines)
    if numbered:
        return [
            (int(w[0]), " ".join(w[1:]), colour) for w, colour in zip(lines, colours, strict=True)
        ]
    return [(None, " ".join(w), colour) for w, colour in zip(lines, colours, strict=True)]


def _ade20k_lines(path: Path) -> list[_Entry]:
    """Index, ratio, counts and, last, the names, separated by tabs under a header."""
    rows = [line.split("\t") for line in _lines(path)[1:]]
    odd = [row for row in rows if len(row) < 2 or not row[0].strip().isdecimal()]
    if odd or not rows:
        raise InputError(
            f"{path} is not ADE20K's table of classes: expected an index and, last, a name in each line, "
            f"separated by tabs, but got {odd[0] if odd else 'no line'}"
        )
    return [(int(row[0]), row[-1].strip(), None) for row in rows]


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    return [line.strip() for line in text.splitlines() if line.strip()]


def _meta(path: Path) -> dict[str, Any]:
    wanted = '{"classes": [names], "palette": [[r, g, b], ...], "ignore_index": 255}'
    try:
        told = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # also bytes that are not UTF-8
        raise InputError(f"{path} is not JSON ({error}); expected {wanted}") from error
    if not isinstance(told, dict):
        raise InputError(f"{path} must hold {wanted}, but holds {str(told)[:60]!r}")
    names, palette = told.get("classes"), told.get("palette")
    ignored = told.get("ignore_index", [])
    ignored = ignored if isinstance(ignored, list) else [ignored]
    fits = (
        (names is None or (isinstance(names, list) and all(isinstance(n, str) for n in names)))
        and all(isinstance(v, int) for v in ignored)
        and (palette is None or (isinstance(palette, list) and all(map(_is_colour, palette))))
    )
    if not fits:
        raise InputError(
            f"{path} must hold {wanted}, but its classes, palette or ignore_index differ"
        )
    return {"classes": names, "palette": palette, "ignored": ignored}


def _legend(entries: list[_Entry], path: Path, told: dict[str, Any]) -> Legend:
    names = [name for _, name, _ in entries if name != IGNORE_NAME]
    same = sorted({name for name in names if names.count(name) > 1})
    if same:
        raise InputError(
            f"{path} names classes twice: {listed(same)}; each class needs its own name"
        )
    if len(names) > MOST_CLASSES:
        raise InputError(f"{path} has {len(names)} classes, but at most {MOST_CLASSES} are read")
    ignored = set(told.get("ignored", ()))
    if entries[0][0] is not None:
        entries = sorted(entries, key=lambda entry: entry[0] or 0)
        places = [entry[0] or 0 for entry in entries]
    else:  # as they stand; the values of an ignore_index have no line of their own
        skipped = ignored if len(names) == len(entries) else set()
        free = (v for v in range(len(entries) + len(skipped)) if v not in skipped)
        places = [next(free) for _ in entries]
    taught = {v for v, (_, name, _) in zip(places, entries, strict=True) if name != IGNORE_NAME}
    twice = {v for v in places if places.count(v) > 1} | (ignored & taught)
    if twice:
        raise InputError(
            f"{path} gives a value two meanings: {listed(map(str, sorted(twice)))}; each needs one"
        )
    values, colours, classes, palette = {}, {}, [], []
    given = told.get("palette")
    for value, (_, name, colour) in zip(places, entries, strict=True):
        label = IGNORE if name == IGNORE_NAME else len(classes)
        values[value] = label
        if label != IGNORE:
            classes.append(name)
            if colour is None and given is not None and label < len(given):
                colour = tuple(given[label])
            palette.append(colour)
        if colour is not None:
            if packed(colour) in colours:
                raise InputError(
                    f"{path} gives the colour {colour} to two classes; each needs its own"
                )
            colours[packed(colour)] = label
    if given is not None and len(given) != len(classes):
        raise InputError(
            f"{path.with_name('meta.json')} has {len(given)} colours for {len(classes)} classes; give one "
            "for each class"
        )
    values |= dict.fromkeys(ignored, IGNORE)
    values.setdefault(IGNORE, IGNORE)
    notes = ()
    if 0 not in values:
        values[0] = IGNORE
        first = min(v for v, k in values.items() if k == 0)
        notes = (f"{path.name} begins with {first}: pixels of 0 have no class and are ignored",)
    return Legend(
        tuple(classes),
        values,
        colours,
        None if None in palette else tuple(palette),
        path.name,
        notes,
    )


def inferred_from_values(values: Iterable[int], source: str) -> Legend:
    """Classes 0 to the highest value, for masks without a file that names them."""
    present = sorted(set(values) - {IGNORE})
    if present and present[-1] >= MOST_CLASSES:
        raise InputError(
            f"masks of {source} have values up to {present[-1]}, and no classes.txt says what they mean; "
            f"write one with a line `INDEX NAME` for each class (at most {MOST_CLASSES})"
        )
    if not present or present[-1] < 1:
        raise InputError(
            f"masks of {source} have one class only: values are "
            f"{listed(map(str, sorted(set(values)))) or 'none'}, and 255 is ignored; if 255 is a class, "
            "write classes.txt with the lines `0 background` and "
            "`255 NAME`"
        )
    count = present[-1] + 1
    return Legend(
        tuple(f"class {k}" for k in range(count)),
        {k: k for k in range(count)} | {IGNORE: IGNORE},
        {},
        None,
        "values of the masks",
        (
            f"{source} has no classes.txt: values 0 to {count - 1} of its masks are called class 0 to class "
            f"{count - 1}; if 0 means no class, write classes.txt with `ignore` as its first line",
        ),
    )


def inferred_from_colours(colours: Iterable[int], source: str) -> Legend:
    """A class for each colour of RGB masks, in the order of their codes."""
    present = sorted(set(colours))
    if not 2 <= len(present) <= MOST_CLASSES:
        many = "; masks that were resized or saved as JPEG have invented colours"
        raise InputError(
            f"masks of {source} are RGB and have {len(present)} colours{many if len(present) > 1 else ''}: "
            "write classes.txt with a line `NAME R G B` for each class"
        )
    palette = tuple(unpacked(colour) for colour in present)
    names = tuple(f"class {k}" for k in range(len(present)))
    told = [f"{n} is {c}" for n, c in zip(names, palette, strict=True)]
    return Legend(
        names,
        {},
        {colour: k for k, colour in enumerate(present)},
        palette,
        "colours of the masks",
        (
            f"masks of {source} are RGB and no classes.txt gives their colours: each colour is a class "
            f"({listed(told)}); name them by lines `NAME R G B`, with `ignore R G B` for what has no class",
        ),
    )


def packed(colour: Sequence[int]) -> int:
    """(r, g, b) -> 0xRRGGBB."""
    return (colour[0] << 16) | (colour[1] << 8) | colour[2]


def unpacked(code: int) -> RGB:
    """0xRRGGBB -> (r, g, b)."""
    return code >> 16 & 255, code >> 8 & 255, code & 255


def ranges(values: Sequence[int]) -> str:
    """Sorted values in short: "0 to 10, 12"."""
    cuts = [i for i in range(1, len(values)) if values[i] != values[i - 1] + 1]
    runs = [values[a:b] for a, b in zip([0, *cuts], [*cuts, len(values)], strict=True)]
    return listed([f"{r[0]} to {r[-1]}" if len(r) > 1 else f"{r[0]}" for r in runs if len(r)])


def _is_byte(word: Any) -> bool:
    return str(word).isdecimal() and int(word) < 256


def _is_colour(colour: Any) -> bool:
    return isinstance(colour, list) and len(colour) == 3 and all(map(_is_byte, colour))
