"""Data sets from wherever they are stored: `open_data` gives the `Examples` of a split."""

import dataclasses
import difflib
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vitrail.data import hub
from vitrail.data.coco import Coco, is_coco_folder
from vitrail.data.coco_panoptic import CocoPanoptic, is_panoptic
from vitrail.data.examples import Examples, Images
from vitrail.data.folders import ClassFolders
from vitrail.data.index import Index, Source, read_index
from vitrail.data.mask_folders import MaskFolders, is_mask_folder
from vitrail.data.pairs import FOLDERS_TABLE, PairShards, PairTable, holds_captions, is_pair_table
from vitrail.data.shards import Shards, is_shard, split_of
from vitrail.data.tables import Table, is_table
from vitrail.data.voc import Voc, is_voc_folder
from vitrail.data.yolo import YAML_SUFFIXES, Yolo, is_yolo_folder, yolo_file
from vitrail_runtime.errors import InputError, listed

SPLITS = ("train", "val", "test", "all")
LABELS_TABLE = "labels.csv"  # of file and label, in the folder of the images
SHOWN = 10  # broken images in one message


def open_data(
    source: str | Path | Source,
    split: str,
    *,
    classes: Sequence[str] | None = None,
    skip_broken: bool = False,
    drop_bad: bool = False,
    val_fraction: float = 0.2,
    seed: int = 0,
) -> Examples:
    """One split of a data set.

    Args:
        source: class folders (ROOT/train/CLASS/*.jpg with val and test beside train, or ROOT/CLASS/*.jpg);
            images with masks (ROOT/images/train/*.jpg and ROOT/masks/train/*.png, or lists of both);
            images with boxes (`data/coco.py`, `data/yolo.py`, `data/voc.py`), with segments
            (`data/coco_panoptic.py`) or with captions (`data/pairs.py`);
            a folder of tar shards (train-*.tar, train-*.tar.gz, ...); a .csv or .tsv of file and label; or
            a data set of the hub, hf:owner/name@revision; or what `open_source` gave for one of these, whose
            files are then listed once for all splits.
        split: "train", "val", "test", or "all" for every picture of every split. Where the source has no val,
            `val_fraction` of each class of its training pictures is held out: drawn by `seed` from the
            pictures' content, so that exact duplicates stay on one side (in train, where their labels
            contradict each other) and names do not matter; `notes` says so. A test split is never made up
            and never stands in for val.
        classes: the names that labels refer to, such as a trained model's; None takes the source's own,
            those of train for every split. With names given, test may lack some of them.
        skip_broken: leave broken pictures out and list them in `broken`, instead of raising.
        drop_bad: leave unusable annotations out and cut boxes at the edge; the truth's `bad` lists both.
        val_fraction: in [0, 1); with 0 nothing is held out, and val are the training pictures themselves.
        seed: of the held-out split alone.
    Raises: InputError for anything that does not fit, naming files.
    """
    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, but is {split!r}")
    if not 0 <= val_fraction < 1:
        raise InputError(f"val_fraction must be from 0 to below 1, but is {val_fraction}")
    opened = open_source(source) if isinstance(source, (str, Path)) else source
    source, have = opened.name, opened.splits()
    parts, cut = _parts(opened, split)
    names = tuple(classes) if classes is not None else opened.classes()
    if len(set(names)) < len(names):
        raise InputError(f"class names must be unique, but are {listed(names)}")
    notes: list[str] = []
    found = [_examples(opened, part, names, skip_broken, drop_bad, notes) for part in parts]
    data = found[0] if len(found) == 1 else _joined(found)
    if cut and val_fraction == 0:
        notes.append(
            f"{source} has no val split, and none is held out: val are the training pictures, so its scores "
            "tell what was learnt by heart"
        )
    elif cut:
        data = _cut(data, source, split, val_fraction, seed, whole=have == ("",))
        notes += data.notes
    if split == "train":
        notes += _not_learnt(data, source)
    data = dataclasses.replace(data, split=split, notes=tuple(notes))
    # A user who names classes may measure on a part of them, but train and val must cover all.
    _check_every_class(data, source, strict=classes is None or split in ("train", "val"))
    return data


def _cut(
    data: Examples, source: str, split: str, fraction: float, seed: int, *, whole: bool
) -> Examples:
    """The part of train (or of the `whole` set) that is val, or what is left; its `notes` tell."""
    strata, digests = data.truth.strata(), data.images.digests
    held_out = hold_out(strata, digests, fraction, seed)
    unsure = int(contradictory(strata, digests).sum())
    kept = data.subset(np.flatnonzero(held_out if split == "val" else ~held_out))
    few = [name for name in kept.truth.missing() if name not in data.truth.missing()]
    if few and data.truth.every_class_needed:
        raise InputError(
            f"{source} has no val split, and {len(few)} of {len(data.classes)} classes have too few pictures "
            f"to hold out some of them: {listed(few)}; add some, give a val split, "
            "or hold out none: --val-fraction 0"
        )
    part = "the pictures" if whole else "the training pictures"
    notes = [
        f"{source} has no val split: {fraction:.0%} of {part} of each class are held out as val (seed {seed})"
    ]
    if unsure:
        notes.append(
            f"{unsure} pictures stand under several labels with the same content, and stay in train; "
            f"vitrail data check {source} names them"
        )
    return dataclasses.replace(kept, notes=tuple(notes))


def open_source(source: str | Path) -> Source:
    """The kind of storage that a path or name stands for."""
    if str(source).startswith(hub.PREFIX):
        return hub.HubDataset(str(source))
    if not str(source):
        raise InputError("no data set is named: give a folder, a table, a shard or hf:owner/name")
    path = Path(source)
    if not path.exists():
        raise InputError(f"{source}: no such file or folder{_nearest(path)}")
    if path.is_file():
        if is_table(path):
            return PairTable(path) if is_pair_table(path) else Table(path)
        if is_shard(path):
            return PairShards(path) if holds_captions(path) else Shards(path)
        if path.suffix.lower() == ".json":
            return CocoPanoptic(path) if is_panoptic(path) else Coco(path)
        if path.suffix.lower() in YAML_SUFFIXES:
            return Yolo(path)
        raise InputError(
            f"{source} is a file, but neither a table (.csv, .tsv) nor a shard (.tar, .tar.gz), COCO's "
            ".json or YOLO's .yaml; "
            "give a folder of class folders or shards, or a table of file and label"
        )
    if (path / FOLDERS_TABLE).is_file():
        return PairTable(path / FOLDERS_TABLE)
    if (path / LABELS_TABLE).is_file():
        return Table(path / LABELS_TABLE)
    if is_mask_folder(path):
        return MaskFolders(path)
    if is_panoptic(path):
        return CocoPanoptic(path)
    if is_coco_folder(path):
        return Coco(path)
    if is_voc_folder(path):
        return Voc(path)
    if yolo_file(path) or is_yolo_folder(path):
        return Yolo(path)
    entries = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    shards = [p.name for p in entries if is_shard(p)]
    if not shards:
        return ClassFolders(path)
    folders = [p.name for p in entries if p.is_dir()]
    if folders and not any(split_of(name) for name in shards):  # an archive beside what was in it
        raise InputError(
            f"{source} holds both tar files ({listed(shards)}) and folders ({listed(folders)}); move away "
            "those that are not the data set, or give the shard itself"
        )
    return PairShards(path) if holds_captions(path) else Shards(path)


def hold_out(labels: np.ndarray, digests: Sequence[str], fraction: float, seed: int) -> np.ndarray:
    """(N,) bool, True for the held-out share of each class: at least one picture and never all.

    Pictures are ranked by a hash of seed and content; equal ones rank together and stay together. A content
    that stands under several labels is never held out: no answer to it could be right.
    """
    unsure = contradictory(labels, digests)
    ranks = [hashlib.blake2b(f"{seed}:{d}".encode(), digest_size=16).hexdigest() for d in digests]
    held_out = np.zeros(len(labels), bool)
    for label in np.unique(labels).tolist():
        of_class = np.flatnonzero(labels == label)
        mine = sorted(of_class[~unsure[of_class]].tolist(), key=ranks.__getitem__)
        count = min(max(1, round(fraction * len(of_class))), len(of_class) - 1, len(mine))
        while 0 < count < len(mine) and ranks[mine[count]] == ranks[mine[count - 1]]:
            count += 1
        if 0 < count < len(of_class):
            held_out[mine[:count]] = True
    return held_out


def contradictory(labels: np.ndarray, digests: Sequence[str]) -> np.ndarray:
    """(N,) bool, True for pictures whose content also stands under another label."""
    label_of: dict[str, int] = {}
    several = {
        d for d, k in zip(digests, labels.tolist(), strict=True) if label_of.setdefault(d, k) != k
    }
    return np.array([d in several for d in digests], bool)


def _parts(source: Source, split: str) -> tuple[list[str], bool]:
    """Which splits of the source hold what is asked for, and whether val must be cut from them."""
    have = source.splits()
    if split == "all":
        return list(have), False
    if have == ("",):
        if split == "test":
            raise InputError(
                f"{source.name} has no test split; ask for val, or put the test pictures beside train"
            )
        return [""], True
    if split == "train" and "train" in have:
        return ["train"], "val" not in have
    if split in have:
        return [split], False
    if split == "val" and "train" in have:
        return ["train"], True
    raise InputError(f"{source.name} has no {split} split; it has {', '.join(have)}")


def _examples(
    source: Source,
    part: str,
    classes: tuple[str, ...],
    skip_broken: bool,
    drop_bad: bool,
    notes: list[str],
) -> Examples:
    index = read_index(source, part)
    truth = source.truth(part, index, classes)
    if truth.bad and not drop_bad:
        raise InputError(bad_message(truth.bad, f"{source.name} {part}".strip()))
    problems = {
        **truth.problems,
        **{
            i: (source.where(index.keys[i], _place(index, i)), what)
            for i, what in index.problems.items()
        },
    }
    broken = [problems[i] for i in sorted(problems)]
    if broken and not skip_broken:
        raise InputError(broken_message(broken, len(index)))
    images = Images(index.keys, index.sizes, index.digests, index.places, source)
    data = Examples(images, truth, part, tuple(broken), bad=truth.bad)
    if truth.bad:
        notes.append(
            f"{len(truth.bad):,} bad annotations of {source.name} {part} are left out, or cut at the image's "
            f"edge; vitrail data check {source.name} names them"
        )
    if broken:
        are = "is" if len(broken) == 1 else "are"
        notes.append(f"{len(broken)} of {len(index)} pictures {are} broken and left out")
    notes += [note for note in truth.notes if note not in notes]  # of parts of one source
    return data.subset([i for i in range(len(index)) if i not in problems])


def broken_message(broken: Sequence[tuple[str, str]], total: int) -> str:
    """One message for all broken pictures."""
    lines = [f"  {where}: {what}" for where, what in broken[:SHOWN]]
    if len(broken) > SHOWN:
        lines.append(f"  ... and {len(broken) - SHOWN} more")
    are = "is" if len(broken) == 1 else "are"
    return "\n".join(
        [
            f"{len(broken)} of {total} pictures {are} broken:",
            *lines,
            "repair or remove them, or skip them with --skip-broken",
        ]
    )


def bad_message(bad: Sequence[tuple[str, str]], source: str) -> str:
    """One message for all annotations that cannot be used."""
    lines = [f"  {where}: {what}" for where, what in bad[:SHOWN]]
    if len(bad) > SHOWN:
        lines.append(f"  ... and {len(bad) - SHOWN:,} more")
    annotations = "annotation cannot" if len(bad) == 1 else "annotations cannot"
    return "\n".join(
        [
            f"{source}: {len(bad):,} {annotations} be used as they stand:",
            *lines,
            "repair or remove them, or go on with --drop-bad, which leaves them out and cuts boxes at the "
            "image's edge",
        ]
    )


def _joined(parts: list[Examples]) -> Examples:
    first, *others = parts
    return Examples(
        first.images.joined([p.images for p in others]),
        first.truth.joined([p.truth for p in others]),
        broken=tuple(b for p in parts for b in p.broken),
        bad=tuple(b for p in parts for b in p.bad),
    )


def _check_every_class(data: Examples, source: str | Path, *, strict: bool) -> None:
    if len(data) == 0:
        raise InputError(f"{source} has no readable picture in {data.split}")
    empty = data.truth.missing()
    if empty and strict and data.truth.every_class_needed:
        raise InputError(
            f"{data.split} of {source} has no picture of {len(empty)} of {len(data.classes)} classes: "
            f"{listed(empty)}; add some, or remove these classes from every split"
        )


def _not_learnt(data: Examples, source: str | Path) -> list[str]:
    absent = data.truth.missing()
    if data.truth.every_class_needed or not absent:  # it is an error, or there is nothing to say
        return []
    return [
        f"no example of {len(absent)} of {len(data.classes)} classes in train of {source}, so nothing is "
        f"learnt of them: {listed(absent)}"
    ]


def _place(index: Index, i: int) -> tuple[int, int, int]:
    file, offset, size = index.places[i].tolist()
    return file, offset, size


def _nearest(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return ""
    names = [p.name for p in parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {parent / close[0]}?" if close else ""
