"""A folder for what is costly to make again: indexes of data sets and inflated shards.

It lies at $VITRAIL_CACHE, else $XDG_CACHE_HOME/vitrail, else ~/.cache/vitrail, and holds at most
$VITRAIL_CACHE_BYTES (16 GiB): the files that were not used for longest go first. Deleting it costs only time.
"""

import os
import tempfile
import time
from collections.abc import Collection
from pathlib import Path

from vitrail_runtime.errors import InputError

DEFAULT_BOUND = 16 * 2**30
ABANDONED_AFTER = 3600  # seconds


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
