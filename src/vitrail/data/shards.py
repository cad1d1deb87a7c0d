"""Tar shards in the WebDataset convention, plain or gzip: KEY.jpg (.png, .webp) and KEY.cls side by side.

A folder holds train-*.tar, val-*.tar and test-*.tar, each also as .tar.gz. `.cls` is a class's index, with
the names in classes.txt (one a line) where it exists, or its name. Pictures are read at random by shard,
offset and size; a gzip shard is inflated once into the cache, because nothing in the middle of gzip can be
reached. Shards may hold any number of samples: the batch plan is drawn over all of them.
"""

import gzip
import hashlib
import json
import os
import tarfile
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from vitrail.data.cache import cache_bound, cache_folder, make_room, mark_used
from vitrail.data.examples import labels_by_name
from vitrail.data.folders import SPLIT_NAMES
from vitrail.data.index import Place, Sample, read_index
from vitrail_runtime.errors import InputError

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
MEMBER_SUFFIXES = ("jpg", "jpeg", "png", "webp")
LONGEST_LABEL = 200  # characters; more is a file of something else
OPEN_FILES = 256  # per process; a set of thousands of shards must not meet the limit of the system
CHUNK = 2**22


class Shards:
    """A folder of tar shards, or a single one. See `vitrail.data.index.Source`."""

    truth = labels_by_name
    ending = "cls"  # of the member that says what an image is, which messages call
    called = "label"

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        folder = self._shown = path if path.is_dir() else path.parent
        found = sorted(p for p in path.iterdir() if is_shard(p)) if path.is_dir() else [path]
        self.folder = folder.absolute()
        declared = _declared_splits(folder)
        by_split: dict[str, list[str]] = {}
        for shard in found:
            by_split.setdefault(declared.get(shard.name, split_of(shard.name)), []).append(
                shard.name
            )
        for name in declared.keys() - {s.name for s in found}:
            if path.is_dir():
                raise InputError(
                    f"{folder / 'shards.json'} lists {name}, but there is no such shard"
                )
        if "" in by_split and len(by_split) > 1:
            raise InputError(
                f"{path} has shards of named splits and others ({', '.join(by_split[''][:5])}); call "
                "them train-*.tar, val-*.tar or test-*.tar"
            )
        self._shards = by_split
        names = folder / "classes.txt"
        self._declared = _read_classes(names) if names.is_file() else None
        self._open_files: OrderedDict[int, IO[bytes]] = OrderedDict()
        # Places count shards over all splits, so that a place says which file it is in.
        self._files = [s for split in sorted(by_split) for s in by_split[split]]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open_files": OrderedDict()}

    def splits(self) -> tuple[str, ...]:
        return tuple(s for s in ("train", "val", "test", "") if s in self._shards)

    def classes(self) -> tuple[str, ...]:
        if self._declared is not None:
            return self._declared
        names = set(read_index(self, self.splits()[0]).names)
        if all(n.isascii() and n.isdecimal() for n in names):
            return tuple(sorted(names, key=int))
        return tuple(sorted(names))

    def fingerprint(self, split: str) -> str:
        total = hashlib.sha256(os.fsencode(self.folder))
        for shard in self._shards[split]:
            info = (self.folder / shard).stat()
            total.update(
                f"{shard}\0{info.st_size}\0{info.st_mtime_ns}\n".encode("utf-8", "surrogateescape")
            )
        total.update(repr((self._files, self._declared)).encode())
        return total.hexdigest()

    def count(self, split: str) -> int:
        return 0  # only a scan can tell

    def scan(self, split: str) -> Iterator[Sample]:
        seen: dict[str, str] = {}
        for shard in self._shards[split]:
            number = self._files.index(shard)
            for key, name, offset, size in self._members(number):
                if key in seen:
                    raise InputError(
                        f"{self.folder / shard}: sample {key!r} is also in {seen[key]}; keys must be unique "
                        "within a split"
                    )
                seen[key] = shard
                place = (number, offset, size)
                yield key, name, place, self.read(key, place)
        if not seen:
            raise InputError(
                f"{self.name} holds no {split or 'labelled'} picture; expected members KEY.jpg (.png, .webp) "
                "and KEY.cls, where a key ends at its first dot"
            )

    def read(self, key: str, place: Place) -> bytes:
        number, offset, size = place
        # pread keeps no position, so threads and forked workers may share the file.
        return os.pread(self._file(number).fileno(), size, offset)

    def where(self, key: str, place: Place) -> str:
        return f"{self._shown / self._files[place[0]]}: {key}"

    def _file(self, number: int) -> IO[bytes]:
        if number in self._open_files:
            self._open_files.move_to_end(number)
            return self._open_files[number]
        file = open(self._plain(number), "rb", buffering=0)  # noqa: SIM115  (kept open)
        self._open_files[number] = file
        if len(self._open_files) > OPEN_FILES:
            self._open_files.popitem(last=False)[1].close()
        return file

    def _plain(self, number: int) -> Path:
        """The shard itself, or its inflated copy in the cache, made now if need be."""
        shard = self.folder / self._files[number]
        if not _is_gzip(shard):
            return shard
        inflated = _inflated_path(shard)
        if inflated.is_file():
            mark_used(inflated)
        else:
            shards = [self.folder / f for f in self._files]
            mine = {_inflated_path(s) for s in shards if _is_gzip(s)}
            _inflate(shard, inflated, keep=mine)
        return inflated

    def _members(self, number: int) -> Iterator[tuple[str, str, int, int]]:
        """(key, class name, offset, bytes) of every sample of a shard, checked."""
        shard = self.folder / self._files[number]
        pictures, labels = self._parts(number)
        for key in pictures.keys() ^ labels.keys():
            if key in pictures:
                unpack = "; where its folders are the classes, unpack it" if "/" in key else ""
                raise InputError(
                    f"{shard}: {pictures[key][2]} has no label; expected {key}.cls{unpack}"
                )
            raise InputError(
                f"{shard}: {key}.cls has no picture; expected {key}.jpg, .png or .webp"
            )
        for key, (offset, size, _) in pictures.items():
            yield key, labels[key], offset, size

    def _parts(self, number: int) -> tuple[dict[str, tuple[int, int, str]], dict[str, str]]:
        """By key, (offset, bytes, member's name) of the pictures of a shard, and what is said of them."""
        shard = self.folder / self._files[number]
        plain = self._plain(number)
        length = plain.stat().st_size
        pictures: dict[str, tuple[int, int, str]] = {}
        said: dict[str, str] = {}
        try:
            with tarfile.open(plain, "r:") as tar:
                for member in tar:
                    _check_member(member, shard, length)
                    folder, _, base = member.name.rpartition("/")
                    stem, _, ending = base.partition(".")
                    if not member.isfile() or not stem:  # a folder, or a hidden file
                        continue
                    key = f"{folder}/{stem}" if folder else stem
                    ending = ending.lower()
                    if ending in MEMBER_SUFFIXES:
                        if key in pictures:
                            raise InputError(
                                f"{shard}: sample {key!r} is there twice ({pictures[key][2]} and "
                                f"{member.name}); keys must be unique within a split"
                            )
                        pictures[key] = (member.offset_data, member.size, member.name)
                    elif ending == self.ending:
                        if key in said:
                            raise InputError(f"{shard}: sample {key!r} has two {self.called}s")
                        said[key] = self._text(tar, member, shard)
                    elif ending.endswith(f".{self.ending}"):
                        raise InputError(
                            f"{shard}: {member.name} {self.called}s no picture, because a key ends at its "
                            f"first dot; expected {stem}.jpg and {stem}.{self.ending}"
                        )
                # tarfile takes a damaged header for the end.
                _check_end(plain, tar.offset, shard)
        except tarfile.TarError as error:
            raise InputError(f"{shard} is no whole tar file: {error}") from error
        return pictures, said

    def _text(self, tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> str:
        file = tar.extractfile(member)
        assert file is not None  # a regular file, checked above
        try:
            text = file.read(4 * LONGEST_LABEL + 2).decode("utf-8").strip()
        except UnicodeDecodeError:
            text = "\0"
        if not text:
            raise InputError(f"{shard}: {member.name} is empty; expected a class's index or name")
        if not text.isprintable() or len(text) > LONGEST_LABEL:
            raise InputError(
                f"{shard}: {member.name} holds no label; expected a class's index or name, as UTF-8 text of "
                f"one line and at most {LONGEST_LABEL} characters"
            )
        if self._declared is None:
            return text
        if text.isascii() and text.isdecimal() and int(text) < len(self._declared):
            return self._declared[int(text)]
        if text in self._declared:
            return text
        raise InputError(
            f"{shard}: {member.name} says {text!r}, but classes.txt has classes 0 to "
            f"{len(self._declared) - 1}"
        )


def is_shard(path: Path) -> bool:
    """Whether a file's name is that of a shard."""
    name = path.name.lower()
    return name.endswith(SHARD_SUFFIXES) and not name.startswith(".") and path.is_file()


def _is_gzip(shard: Path) -> bool:
    return shard.suffix.lower() != ".tar"


def split_of(name: str) -> str:
    """The split that a shard's name begins with, or ""."""
    word = name.partition(".")[0].replace("_", "-").partition("-")[0].lower()
    return SPLIT_NAMES.get(word, "")


def _declared_splits(folder: Path) -> dict[str, str]:
    """shards.json, where there is one: {"shards": [{"file": ..., "split": ...}, ...]}."""
    path = folder / "shards.json"
    if not path.is_file():
        return {}
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["shards"]
        return {s["file"]: SPLIT_NAMES[s["split"].lower()] for s in shards}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f'{path} must hold {{"shards": [{{"file": NAME, "split": "train", "val" or "test"}}, ...]}} '
            f"({type(error).__name__}: {error})"
        ) from error


def _read_classes(path: Path) -> tuple[str, ...]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text: {error}") from error
    names = tuple(line.strip() for line in text.splitlines())
    while names and not names[-1]:
        names = names[:-1]
    if "" in names or len(set(names)) < len(names):
        raise InputError(
            f"{path} must hold one class name a line, each once, in the order of labels"
        )
    return names


def _check_member(member: tarfile.TarInfo, shard: Path, length: int) -> None:
    name = member.name
    if name.startswith("/") or ".." in name.split("/"):
        raise InputError(f"{shard}: member {name!r} points outside the shard; make the shard anew")
    if not (member.isfile() or member.isdir()):
        raise InputError(
            f"{shard}: member {name!r} is a link or a device, and only files are read; make the shard "
            "anew (tar --dereference)"
        )
    if member.offset_data + member.size > length:
        raise InputError(f"{shard} is truncated: it ends within {name}")


def _check_end(plain: Path, offset: int, shard: Path) -> None:
    with open(plain, "rb") as file:
        file.seek(offset)
        block = file.read(512)
    if len(block) < 512:
        raise InputError(f"{shard} is truncated: it has no end mark")
    if block.strip(b"\0"):
        raise InputError(f"{shard} is damaged: no member begins at byte {offset}")


def _inflated_path(shard: Path) -> Path:
    info = shard.stat()
    identity = f"{shard}|{info.st_size}|{info.st_mtime_ns}"
    name = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    return cache_folder() / "shards" / f"{name}.tar"


def _inflate(shard: Path, target: Path, keep: set[Path]) -> None:
    """Write the plain form of a gzip shard, whole or not at all."""
    partial: str | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        with os.fdopen(handle, "wb") as out, gzip.open(shard, "rb") as file:
            while chunk := file.read(CHUNK):
                # Room is made as it is needed: how large a gzip file inflates is known only at its end.
                if not make_room(len(chunk), keep={*keep, Path(partial)}):
                    raise InputError(
                        f"the gzip shards beside {shard} inflate to more than the cache may hold "
                        f"({cache_bound() / 1e9:.1f} GB); set VITRAIL_CACHE_BYTES higher, or store the "
                        "shards as plain tar"
                    )
                out.write(chunk)
        os.replace(partial, target)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{shard} is a broken or truncated gzip file: {error}") from error
    except OSError as error:
        raise InputError(
            f"{shard} cannot be inflated into {target.parent}: {error.strerror or error}; set "
            "VITRAIL_CACHE to a folder with room, or store the shard as plain tar"
        ) from error
    finally:
        if partial is not None:
            Path(partial).unlink(missing_ok=True)
