"""Damage as disks and memories do it, and a count of what a reader makes of it."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from vitrail_runtime.errors import InputError

BLOCK = 4096


def zeroed(whole: bytes) -> Iterator[bytes]:
    """The file with each of its 4 KiB blocks zeroed in turn."""
    for start in range(0, len(whole), BLOCK):
        end = min(start + BLOCK, len(whole))
        yield whole[:start] + bytes(end - start) + whole[end:]


def flipped(whole: bytes, count: int, *, seed: int = 0, header: float = 0.3) -> Iterator[bytes]:
    """The file with one bit flipped, at `count` random places; a share of them among the first 4 KiB, where
    the header is."""
    draw = random.Random(seed)
    for _ in range(count):
        size = min(BLOCK, len(whole)) if draw.random() < header else len(whole)
        bit = draw.randrange(8 * size)
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


def outcomes(
    path: Path, damaged: Iterator[bytes], read: Callable[[], bool], named: str = ""
) -> Counter[str]:
    """How often `read` gave what was written ("equal"), something else ("silent"), a message that names the
    file ("refused") or anything else ("traceback"). The file is put back afterwards.
    """
    whole, count = path.read_bytes(), Counter(equal=0, refused=0, silent=0, traceback=0)
    for content in damaged:
        path.write_bytes(content)
        try:
            count["equal" if read() else "silent"] += 1
        except InputError as error:
            count["refused" if (named or str(path)) in str(error) else "silent"] += 1
        except Exception as error:
            print(f"{type(error).__name__}: {error}")
            count["traceback"] += 1
    path.write_bytes(whole)
    return count
