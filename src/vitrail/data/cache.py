"""A folder for what is costly to make again: indexes of data sets and inflated shards.

It lies at $VITRAIL_CACHE, else $XDG_CACHE_HOME/vitrail, else ~/.cache/vitrail, and holds at most
$VITRAIL_CACHE_BYTES (16 GiB): the files that were not used for longest go first. Deleting it costs only time.
"""

import hashlib
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

from vitrail_runtime.errors import InputError

DEFAULT_BOUND = 16 * 2**30
ABANDONED_AFTER = 3600  # seconds
SUM = 16  # bytes of the digest in front of columns
TEXTS = "texts"  # where they lie among the arrays

Columns = dict[str, np.ndarray | list[Any]]


def cache_folder() -> Path:
    """Where cached files go; it need not exist."""
    given = os.environ.get("VITRAIL_CACHE")
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "vitrail"


def cache_bound() -> int:
    """The most bytes that the cache holds."""
    text = os.environ.get("VITRAIL_CACHE_BYTES")
    if not text:
        return DEFAULT_BOUND
    try:
        return int(float(text))
    except ValueError:
        raise InputError(
            f"VITRAIL_CACHE_BYTES must be a number of bytes, such as 20e9, but is {text!r}"
        ) from None


def cached(identity: str, make: Callable[[], Columns]) -> Columns:
    """Columns by name, arrays and lists of what JSON holds: from the cache, else made and put there.

    identity: changes with whatever they are made from, and with what their names mean. What is damaged is
    made again; a cache that cannot be written costs time at the next start, nothing else.
    """
    name = hashlib.sha256(identity.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    path = cache_folder() / "index" / f"{name}.npz"
    found = load_columns(path)
    if found is not None:
        mark_used(path)
        return found
    columns = make()
    payload = _packed(columns)
    payload = _sum(payload, path) + payload
    try:
        if make_room(len(payload)):
            write_atomically(path, payload)
    except OSError:
        pass
    return columns


def load_columns(path: Path) -> Columns | None:
    """What `cached` put there; None where there is nothing, or nothing whole, or of another identity."""
    try:
        payload = path.read_bytes()
    except OSError:
        return None
    if payload[:SUM] != _sum(payload[SUM:], path):
        return None
    with np.load(io.BytesIO(payload[SUM:]), allow_pickle=False) as stored:
        arrays = dict(stored)
    texts = json.loads(arrays.pop(TEXTS).tobytes())
    return arrays | texts


def _packed(columns: Columns) -> bytes:
    texts = {name: column for name, column in columns.items() if isinstance(column, list)}
    arrays = {name: column for name, column in columns.items() if name not in texts}
    buffer = io.BytesIO()
    # Bytes of file names that are not UTF-8 are surrogates, which JSON escapes.
    arrays[TEXTS] = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _sum(payload: bytes, path: Path) -> bytes:
    """Of what is stored and of its name, which tells whose it is."""
    return hashlib.blake2b(path.name.encode() + payload, digest_size=SUM).digest()


def write_atomically(path: Path, payload: bytes) -> None:
    """The file appears whole or not at all, also when two processes write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(payload)
        os.replace(partial, path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def make_room(wanted: int, keep: Collection[Path] = ()) -> bool:
    """Remove cached files, the longest unused first, until `wanted` more bytes fit the bound.

    Files in `keep` stay. Returns False, having removed nothing, when even all others are too few.
    """
    files = []
    kept = 0
    for path in cache_folder().glob("*/*"):
        try:
            info = path.stat()
        except FileNotFoundError:  # another process made room
            continue
        # A partial file of another process is being written now, unless it died.
        writing = path.name.startswith(".") and time.time() - info.st_mtime < ABANDONED_AFTER
        if path in keep or writing:
            kept += info.st_size
        else:
            files.append((info.st_mtime, info.st_size, path))
    if kept + wanted > cache_bound():
        return False
    total = kept + sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total + wanted <= cache_bound():
            break
        path.unlink(missing_ok=True)
        total -= size
    return True


def mark_used(path: Path) -> None:
    """Note that a cached file serves still, so that it goes last."""
    try:
        os.utime(path)
    except OSError:  # a cache that this user may only read works too
        return
