"""What is known of every picture before any is decoded: key, class, upright size, digest, flaws.

Making an index reads every byte once. It is kept in the cache under the names, sizes and times of the
files, so that the next start reads only those.
"""

import hashlib
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from vitrail.data.cache import Columns, cached
from vitrail_runtime.errors import ImageError
from vitrail_runtime.preprocess import decode, read_size

VERSION = 3  # of the stored form; a reader of another version makes the index anew
SHOW_PROGRESS_FROM = 5000  # pictures

Place = tuple[int, int, int]  # (file, offset, bytes) inside an archive
NOWHERE: Place = (0, 0, 0)  # the place of a key that is a file

# (key, class name, place, encoded picture or why it could not be read)
Sample = tuple[str, str, Place, bytes | OSError]


class Source(Protocol):
    """One way to store labelled pictures: class folders, shards, a table, a hub data set."""

    name: str  # as the user gave it, for messages

    def splits(self) -> tuple[str, ...]:
        """The splits that the source itself has; ("",) when it has none."""
        ...

    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their labels."""
        ...

    def fingerprint(self, split: str) -> str:
        """Changes when the split's files do; cheap."""
        ...

    def scan(self, split: str) -> Iterator[Sample]:
        """Every sample, in an order that depends on the files alone; keys are unique."""
        ...

    def count(self, split: str) -> int:
        """How many samples `scan` will give, for the progress bar; 0 when only a scan can tell."""
        ...

    def read(self, key: str, place: Place) -> bytes:
        """The encoded picture of one sample."""
        ...

    def where(self, key: str, place: Place) -> str:
        """How messages call a sample."""
        ...

    def truth(self, split: str, index: "Index", classes: tuple[str, ...]) -> Any:
        """What is true of the samples of a split's index (a `vitrail.data.examples.Truth`)."""
        ...


@dataclass(frozen=True)
class Index:
    """Columns over the N samples of one split of one source."""

    keys: list[str]
    names: list[str]  # class names
    sizes: np.ndarray  # (N, 2) int32 upright (height, width); zeros for a broken picture
    digests: list[str]  # hex of 16 bytes over the encoded picture
    places: np.ndarray  # (N, 3) int64
    problems: dict[int, str]  # position -> what is wrong with the picture

    def __len__(self) -> int:
        return len(self.keys)


def read_index(source: Source, split: str) -> Index:
    """The index of a split, from the cache where its files are unchanged, else made and cached."""
    identity = (
        f"{VERSION}|{type(source).__name__}|{source.name}|{split}|{source.fingerprint(split)}"
    )
    return _index_of(cached(identity, lambda: _columns_of(make_index(source, split))))


def make_index(source: Source, split: str) -> Index:
    """Read every sample of a split once."""
    keys, names, sizes, digests, places, problems = [], [], [], [], [], {}
    samples = source.scan(split)
    total = source.count(split)
    if total >= SHOW_PROGRESS_FROM and sys.stderr.isatty():
        samples = _with_progress(samples, total, f"indexing {source.name} {split}".strip())
    for position, (key, name, place, payload) in enumerate(samples):
        keys.append(key)
        names.append(name)
        places.append(place)
        if isinstance(payload, OSError):
            size, problem, payload = (0, 0), payload.strerror or str(payload), b""
        else:
            size, problem = examine(payload)
        digests.append(digest(payload))
        sizes.append(size)
        if problem:
            problems[position] = problem
    return Index(
        keys,
        names,
        np.array(sizes, np.int32).reshape(-1, 2),
        digests,
        np.array(places, np.int64).reshape(-1, 3),
        problems,
    )


def digest(payload: bytes) -> str:
    """32 hex characters over the encoded picture."""
    return hashlib.blake2b(payload, digest_size=16).hexdigest()


def examine(payload: bytes) -> tuple[tuple[int, int], str]:
    """((height, width), "") of an encoded picture, or ((0, 0), what is wrong with it).

    A picture whose last bytes are those of a finished file is believed to be whole, because decoding every
    picture of a large set takes an hour; any other one is decoded to find out.
    """
    try:
        size = read_size(payload)
        if not _looks_finished(payload):
            decode(payload)
    except ImageError as error:
        return (0, 0), error.problem  # the reader knows the bytes only; the caller adds the name
    return size, ""


def _looks_finished(payload: bytes) -> bool:
    if payload[:2] == b"\xff\xd8":  # JPEG: end of image, perhaps with padding behind it
        return payload[-32:].rstrip(b"\0\n\r").endswith(b"\xff\xd9")
    if payload[:8] == b"\x89PNG\r\n\x1a\n":
        return payload[-8:-4] == b"IEND" and _chunks_are_whole(payload)
    if payload[:4] == b"RIFF" and payload[8:12] == b"WEBP":
        return int.from_bytes(payload[4:8], "little") + 8 <= len(payload)
    return False


def _chunks_are_whole(png: bytes) -> bool:
    """Whether every chunk has the checksum it came with: a tenth of the cost of decoding it."""
    at = 8
    while at + 12 <= len(png):
        length = int.from_bytes(png[at : at + 4], "big")
        end = at + 8 + length
        if zlib.crc32(png[at + 4 : end]) != int.from_bytes(png[end : end + 4], "big"):
            return False
        at = end + 4
    return at == len(png)


def _with_progress(samples: Iterator, total: int, title: str) -> Iterator:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return iter(track(samples, title, total=total, console=console, transient=True))


def _columns_of(index: Index) -> Columns:
    return {
        "keys": index.keys,
        "names": index.names,
        "sizes": index.sizes,
        "digests": np.frombuffer(bytes.fromhex("".join(index.digests)), np.uint8),
        "places": index.places,
        "problem_at": np.array(list(index.problems), np.int64),
        "problems": list(index.problems.values()),
    }


def _index_of(columns: Any) -> Index:
    hexes = columns["digests"].tobytes().hex()
    return Index(
        columns["keys"],
        columns["names"],
        columns["sizes"],
        [hexes[i : i + 32] for i in range(0, len(hexes), 32)],
        columns["places"],
        dict(zip(columns["problem_at"].tolist(), columns["problems"], strict=True)),
    )
