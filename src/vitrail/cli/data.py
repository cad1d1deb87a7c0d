"""vitrail data make|check|show: make the embedded data set, look at one's own."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vitrail.cli.flags import act, parse_flags
from vitrail.tasks.task import DEFAULT
from vitrail_runtime.errors import InputError

if TYPE_CHECKING:
    from vitrail.data.checkup import Checkup, ObjectSummary, SplitSummary

HELP = """usage: vitrail data make digits DIR      write the embedded digits (--task: what for)
       vitrail data check SOURCE         find broken files, duplicates, leaks and missing classes
       vitrail data show SOURCE          draw a contact sheet

A SOURCE is a folder of class folders, of images with masks, of images with boxes (COCO, YOLO, Pascal VOC),
with segments (COCO panoptic) or of tar shards, a COCO .json, a YOLO .yaml, a .csv of file and label or
caption, or hf:owner/name@revision.
vitrail data ACTION --help tells an action's options."""

SHOWN = 10  # places named for each finding


@dataclass(frozen=True, kw_only=True)
class MakeFlags:
    """Write the embedded handwritten digits with train, val and test."""

    what: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="digits DIR")]
    """The data set, and where it goes."""
    task: str = DEFAULT
    """What they are for: classify (class folders, a digit an image), semantic (several, with a mask of the
    whole), detect (several, with a box for each), instances (with a box and a mask for each), panoptic (a
    segment for each, and for what they lie on) or pairs (one, with a caption)."""
    seed: int = 0
    """Of the splits, and of colours, sizes and places."""


@dataclass(frozen=True, kw_only=True)
class CheckFlags:
    """Decode every image once; report broken files, masks and annotations, duplicates, leaks, imbalance,
    missing classes.

    Exit code 0: nothing that spoils a training; 1: something does.
    """

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE")]
    """A folder of class folders, of images with masks or boxes or of tar shards, a .json, .yaml or .csv, or
    hf:owner/name@revision."""
    drop_bad: bool = False
    """Take bad annotations for warnings, as a training with --drop-bad goes on without them."""
    json: bool = False
    """The whole finding as JSON, on stdout."""


@dataclass(frozen=True, kw_only=True)
class ShowFlags:
    """Draw a contact sheet: class names, counts, sizes, and images, with class maps or objects, of the first
    split."""

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCE")]
    """A folder of class folders, of images with masks or boxes or of tar shards, a .json, .yaml or .csv, or
    hf:owner/name@revision."""
    out: Path = Path("sheet.png")
    """Where to write it."""
    split: str | None = None
    """The split whose pictures are shown; all of one without splits, else train."""
    seed: int = 0
    """Which pictures are chosen."""


def run(argv: list[str]) -> int | None:
    return act("data", {"make": make, "check": check, "show": show}, HELP, argv)


def make(argv: list[str]) -> None:
    flags = parse_flags(MakeFlags, argv, prog="vitrail data make")
    names = flags.what
    if len(names) != 2 or names[0] != "digits":
        raise InputError("say what and where: vitrail data make digits DIR")

    from vitrail.data.digits import SETS, make_digits

    folder = make_digits(names[1], task=flags.task, seed=flags.seed)
    made = SETS[flags.task]
    print(f"{folder}: {made.what} in train, val and test (UCI, CC BY 4.0)")
    print(f"next: vitrail train --data {folder} --model {made.model} --out runs/digits")


def check(argv: list[str]) -> int:
    flags = parse_flags(CheckFlags, argv, prog="vitrail data check")
    source = _one_source(flags.sources, "check")

    from vitrail.data.checkup import check as look_through

    found = look_through(source, drop_bad=flags.drop_bad)
    if flags.json:
        print(json.dumps(found.to_dict(), indent=2))
    else:
        print("\n".join(report(found)))
    return 1 if found.errors else 0


def show(argv: list[str]) -> None:
    flags = parse_flags(ShowFlags, argv, prog="vitrail data show")
    source = _one_source(flags.sources, "show")
    if flags.out.is_dir():
        raise InputError(
            f"--out {flags.out} is a folder; name a picture, such as {flags.out / 'sheet.png'}"
        )

    from vitrail.data.opening import open_data, open_source
    from vitrail.data.sheet import contact_sheet, names_without_font

    opened = open_source(source)
    have = opened.splits()
    wanted = [flags.split] if flags.split else ["all"] if have == ("",) else []
    # As a training sees them: without a val split, a part of train is val.
    splits_there = ("train", "val", "test") if "train" in have else have
    wanted += [s for s in splits_there if s in (*have, "val") and s and s not in wanted]
    unread: dict[str, str] = {}
    for split in have:  # such as a test split whose files are still in an archive
        try:
            opened.count(split)
        except InputError as error:
            unread[split] = str(error)
    if first := unread.get("" if wanted[0] == "all" else wanted[0]):
        raise InputError(first)
    classes = opened.classes()
    splits = [
        open_data(source, s, classes=classes, skip_broken=True, drop_bad=True)
        for s in wanted
        if s not in unread
    ]
    sheet = contact_sheet(splits, Path(source).name or str(source), seed=flags.seed)
    try:
        flags.out.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(flags.out)
    except (OSError, ValueError) as error:
        raise InputError(f"{flags.out} cannot be written: {error}") from error
    for note in dict.fromkeys(n for data in splits for n in data.notes):
        print(note)
    for split, problem in unread.items():
        print(f"{split} cannot be read: {problem}")
    for data in splits:
        print(f"{data.split}: {len(data):,} pictures of {len(data.classes)} classes")
        for where, what in data.broken[:SHOWN]:
            print(f"  broken: {where}: {what}")
        for where, what in data.bad[:SHOWN]:
            print(f"  bad: {where}: {what}")
    if strange := names_without_font(splits[0].classes):
        print(
            f"no font here has the letters of {', '.join(strange[:SHOWN])}: the sheet shows escapes such as "
            "\\u4e2d; install one that has them, such as Noto Sans CJK"
        )
    print(f"contact sheet: {flags.out} ({sheet.width} x {sheet.height})")


def report(found: "Checkup") -> list[str]:
    """The finding as lines for a terminal."""
    classes = len(found.classes)
    lines = [f"{found.source}: {classes} {'class' if classes == 1 else 'classes'}"]
    for split in found.splits:
        lines += _split_lines(split)
    lines += [f"note: {note}" for note in found.notes]
    for mark, findings in (("ERROR", found.errors), ("warning", found.warnings)):
        for what, places in findings.items():
            lines.append(f"{mark}: {what}: {len(places):,}")
            lines += [f"    {place}" for place in places[:SHOWN]]
            if len(places) > SHOWN:
                lines.append(f"    ... and {len(places) - SHOWN:,} more (all with --json)")
    if not found.errors:
        lines.append("ready to train" + (", with warnings" if found.warnings else ""))
    return lines


def _split_lines(split: "SplitSummary") -> list[str]:
    if split.pixels:
        return _mask_lines(split)
    if split.objects is not None:
        return _object_lines(split, split.objects)
    if split.texts is not None:
        different, words = split.texts
        few, middle, many = words
        return [
            f"  {split.name}: {split.pictures:,} images, {different:,} different captions of {few} to {many} "
            f"words (median {middle})",
            _size_line(split),
        ]
    counts = sorted(split.per_class.values())
    each = f"{counts[0]:,}" + (f" to {counts[-1]:,}" if counts[-1] > counts[0] else "")
    return [f"  {split.name}: {split.pictures:,} pictures, {each} a class", _size_line(split)]


def _mask_lines(split: "SplitSummary") -> list[str]:
    """Of every class, in how many images and which share of all pixels it is."""
    total = max(1, sum(split.pixels.values()) + split.ignored)
    wide = max(len(name) for name in (*split.pixels, "no class"))
    lines = [
        f"    {name:{wide}}  in {split.per_class[name]:>7,} images {count / total:>7.2%} of pixels"
        for name, count in split.pixels.items()
    ]
    if split.ignored:
        lines.append(f"    {'no class':{wide}}  {'':17} {split.ignored / total:>7.2%} of pixels")
    return [f"  {split.name}: {split.pictures:,} images", _size_line(split), *lines]


def _object_lines(split: "SplitSummary", objects: "ObjectSummary") -> list[str]:
    """Of every class, how many objects there are and in how many images."""
    total = sum(objects.per_class.values())
    empty = f", {objects.empty:,} images without any" if objects.empty else ""
    crowds = f", {objects.crowds:,} of them crowds" if objects.crowds else ""
    called = objects.called
    kind = " of things and stuff" if objects.stuff else " with masks" if objects.masks else ""
    names = [f"{name} (stuff)" if name in objects.stuff else name for name in objects.per_class]
    wide = max(map(len, names))
    return [
        f"  {split.name}: {split.pictures:,} images, {total:,} {called}{kind}{crowds}",
        _size_line(split),
        f"    {called}: {objects.small:,} small, {objects.medium:,} medium, {objects.large:,} large "
        f"(under 32 x 32, under 96 x 96 pixels, over); at most {objects.most:,} in an image{empty}",
        *(
            f"    {shown:{wide}}  {count:>9,} {called} in {split.per_class[name]:>7,} images"
            for shown, (name, count) in zip(names, objects.per_class.items(), strict=True)
        ),
    ]


def _size_line(split: "SplitSummary") -> str:
    sizes = " / ".join(f"{h} x {w}" for h, w in (split.smallest, split.median, split.largest))
    return (
        f"    height x width, smallest / median / largest: {sizes}; "
        f"longest shape {split.most_elongated:.1f} : 1"
    )


def _one_source(names: Sequence[str], action: str) -> str:
    if len(names) != 1:
        given = f"got {', '.join(names)}" if names else "got none"
        raise InputError(f"vitrail data {action} takes one SOURCE, but {given}")
    return names[0]
