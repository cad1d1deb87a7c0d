"""Labelled pictures from wherever they are stored: `open_data` gives one `ImageData` for each split."""

import dataclasses
import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vitrail.data import hub
from vitrail.data.folders import ClassFolders
from vitrail.data.index import Index, Source, digest, read_index
from vitrail.data.shards import Shards, is_shard, split_of
from vitrail.data.tables import Table, is_table
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import decode

SPLITS = ("train", "val", "test", "all")
SHOWN = 10  # names in one message


@dataclass(frozen=True, eq=False)
class ImageData:
    """N labelled pictures of one split. Pictures are decoded on `read`; all else is known beforehand.

    classes: names in the order of the labels. labels: (N,) int64. sizes: (N, 2) int32, upright (height,
        width).
    keys: unique names. content_hash: over classes, keys, labels and every picture's bytes.
    broken: (key, what is wrong) of the pictures left out by `skip_broken`. notes: what `open_data` decided by
    itself and a person should know.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    sizes: np.ndarray
    keys: list[str]
    content_hash: str
    broken: list[tuple[str, str]]
    notes: tuple[str, ...]
    digests: list[str]
    places: np.ndarray
    source: Source
    split: str

    def __len__(self) -> int:
        return len(self.keys)

    def read_bytes(self, i: int) -> bytes:
        """The encoded picture. Raises InputError when it is gone or is not what was indexed."""
        key, place = self.keys[i], self._place(i)
        try:
            payload = self.source.read(key, place)
        except OSError as error:
            raise InputError(
                f"{self.where(i)} cannot be read: {error.strerror or error}"
            ) from error
        # A picture swapped under a running training would train on a wrong size or label.
        if digest(payload) != self.digests[i]:
            raise InputError(
                f"{self.where(i)} has changed since it was indexed; start again to index it anew"
            )
        return payload

    def read(self, i: int, at_least: tuple[int, int] | None = None) -> np.ndarray:
        """Upright RGB, uint8 (H, W, 3). A JPEG may come reduced, never below `at_least` (height, width)."""
        return self.decode(i, self.read_bytes(i), at_least)

    def decode(self, i: int, payload: bytes, at_least: tuple[int, int] | None) -> np.ndarray:
        """Decode `payload`, which `read_bytes(i)` gave; an InputError names picture i."""
        return decode(payload, at_least=at_least, name=self.where(i))

    def where(self, i: int) -> str:
        """How messages call picture i: its file, or its shard and member."""
        return self.source.where(self.keys[i], self._place(i))

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageData":
        """The same classes, these pictures, in this order."""
        return _select(self, np.asarray(indices, np.int64))

    def _place(self, i: int) -> tuple[int, int, int]:
        file, offset, size = self.places[i].tolist()
        return file, offset, size


def open_data(
    source: str | Path | Source,
    split: str,
    *,
    classes: Sequence[str] | None = None,
    skip_broken: bool = False,
    val_fraction: float = 0.2,
    seed: int = 0,
) -> ImageData:
    """One split of a set of labelled pictures.

    Args:
        source: class folders (ROOT/train/CLASS/*.jpg with val and test beside train, or ROOT/CLASS/*.jpg);
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
        val_fraction: in (0, 1).
        seed: of the held-out split alone.
    Raises: InputError for anything that does not fit, naming files.
    """
    if split not in SPLITS:
        raise InputError(f"split must be one of {', '.join(SPLITS)}, but is {split!r}")
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction must lie between 0 and 1, but is {val_fraction}")
    opened = open_source(source) if isinstance(source, (str, Path)) else source
    source = opened.name
    have = opened.splits()
    parts, cut = _parts(opened, split)
    names = tuple(classes) if classes is not None else opened.classes()
    if len(set(names)) < len(names):
        raise InputError(f"class names must be unique, but are {_shown(names)}")
    if len(names) < 2:
        raise InputError(
            f"{source} has one class only ({_shown(names)}); a classifier needs at least two"
        )
    notes: list[str] = []
    found = [_labelled(opened, part, names, skip_broken, notes) for part in parts]
    data = found[0] if len(found) == 1 else _joined(found)
    if cut:
        held_out = hold_out(data.labels, data.digests, val_fraction, seed)
        unsure = int(contradictory(data.labels, data.digests).sum())
        kept = held_out if split == "val" else ~held_out
        few = [names[i] for i in np.setdiff1d(data.labels, data.labels[kept]).tolist()]
        if few:
            raise InputError(
                f"{source} has no val split, and {len(few)} of {len(names)} classes have too few pictures to "
                f"hold out some of them: {_shown(few)}; add some, or give a val split"
            )
        data = _select(data, np.flatnonzero(kept))
        part = "the training pictures" if have != ("",) else "the pictures"
        notes.append(
            f"{source} has no val split: {val_fraction:.0%} of {part} of each class are held out as val "
            f"(seed {seed})"
        )
        if unsure:
            notes.append(
                f"{unsure} pictures stand under several labels with the same content, and stay in train; "
                f"vitrail data check {source} names them"
            )
    data = dataclasses.replace(data, split=split, notes=tuple(notes))
    # A user who gives the names may measure on a part of them, but train and val must cover all.
    _check_every_class(data, source, strict=classes is None or split in ("train", "val"))
    return data


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
            return Table(path)
        if is_shard(path):
            return Shards(path)
        raise InputError(
            f"{source} is a file, but neither a table (.csv, .tsv) nor a shard (.tar, .tar.gz); "
            "give a folder of class folders or shards, or a table of file and label"
        )
    entries = sorted(p for p in path.iterdir() if not p.name.startswith("."))
    shards = [p.name for p in entries if is_shard(p)]
    if not shards:
        return ClassFolders(path)
    folders = [p.name for p in entries if p.is_dir()]
    if folders and not any(split_of(name) for name in shards):  # an archive beside what was in it
        raise InputError(
            f"{source} holds both tar files ({_shown(shards)}) and folders ({_shown(folders)}); move away "
            "those that are not the data set, or give the shard itself"
        )
    return Shards(path)


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


def _labelled(
    source: Source, part: str, classes: tuple[str, ...], skip_broken: bool, notes: list[str]
) -> ImageData:
    index = read_index(source, part)
    label_of = {name: label for label, name in enumerate(classes)}
    strangers = sorted(set(index.names) - label_of.keys())
    if strangers:
        closest = difflib.get_close_matches(strangers[0], classes, n=1)
        hint = f" (closest to {strangers[0]!r}: {closest[0]!r})" if closest else ""
        raise InputError(
            f"{source.name} {part or 'data'} has classes that are not among those to be learnt: "
            f"{_shown(strangers)}; known are {_shown(classes)}{hint}"
        )
    broken = [
        (source.where(index.keys[i], _place(index, i)), what) for i, what in index.problems.items()
    ]
    if broken and not skip_broken:
        raise InputError(broken_message(broken, len(index)))
    data = ImageData(
        classes=classes,
        labels=np.array([label_of[n] for n in index.names], np.int64),
        sizes=index.sizes,
        keys=index.keys,
        content_hash="",
        broken=broken,
        notes=(),
        digests=index.digests,
        places=index.places,
        source=source,
        split=part,
    )
    if broken:
        are = "is" if len(broken) == 1 else "are"
        notes.append(f"{len(broken)} of {len(index)} pictures {are} broken and left out")
    good = np.array([i for i in range(len(index)) if i not in index.problems], np.int64)
    return _select(data, good)


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


def _select(data: ImageData, indices: np.ndarray) -> ImageData:
    keys = [data.keys[i] for i in indices]
    digests = [data.digests[i] for i in indices]
    labels = data.labels[indices]
    return dataclasses.replace(
        data,
        labels=labels,
        sizes=data.sizes[indices],
        keys=keys,
        digests=digests,
        places=data.places[indices],
        content_hash=_content_hash(data.classes, keys, labels, digests),
    )


def _joined(parts: list[ImageData]) -> ImageData:
    first = parts[0]
    whole = dataclasses.replace(
        first,
        labels=np.concatenate([p.labels for p in parts]),
        sizes=np.concatenate([p.sizes for p in parts]),
        keys=[k for p in parts for k in p.keys],
        digests=[d for p in parts for d in p.digests],
        places=np.concatenate([p.places for p in parts]),
        broken=[b for p in parts for b in p.broken],
    )
    return _select(whole, np.arange(len(whole.keys)))


def _content_hash(
    classes: Sequence[str], keys: Sequence[str], labels: np.ndarray, digests: Sequence[str]
) -> str:
    total = hashlib.sha256("\0".join(classes).encode("utf-8", "surrogateescape"))
    for key, label, content in zip(keys, labels.tolist(), digests, strict=True):
        total.update(f"{key}\0{label}\0{content}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def _check_every_class(data: ImageData, source: str | Path, *, strict: bool) -> None:
    counts = np.bincount(data.labels, minlength=len(data.classes))
    empty = [name for name, count in zip(data.classes, counts, strict=True) if count == 0]
    if len(data) == 0:
        raise InputError(f"{source} has no readable picture in {data.split}")
    if empty and strict:
        raise InputError(
            f"{data.split} of {source} has no picture of {len(empty)} of {len(data.classes)} classes: "
            f"{_shown(empty)}; add some, or remove these classes from every split"
        )


def _place(index: Index, i: int) -> tuple[int, int, int]:
    file, offset, size = index.places[i].tolist()
    return file, offset, size


def _shown(names: Sequence[str]) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _nearest(path: Path) -> str:
    parent = path.parent
    if not parent.is_dir():
        return ""
    names = [p.name for p in parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {parent / close[0]}?" if close else ""
