"""Images that are files of their own below one root: what a source says of them once they are listed."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from vitrail.data.index import NOWHERE, Place, Sample


class ImageFiles:
    """The part of a `vitrail.data.index.Source` that is the same for all formats that keep what is true of
    images apart from them. A key is a path below the root."""

    root: Path  # absolute
    _above: Path  # the root as messages call it; a source that has none gives `where` itself

    def _present(self, split: str) -> list[str]:
        """The keys of a split's images, in the order of `scan`; of those that are listed, what is there."""
        raise NotImplementedError

    def fingerprint(self, split: str) -> str:
        return fingerprint_of(self.root, self._present(split))

    def count(self, split: str) -> int:
        return len(self._present(split))

    def scan(self, split: str) -> Iterator[Sample]:
        for key in self._present(split):
            try:
                payload = self.read(key, NOWHERE)
            except OSError as error:  # counted with the broken images
                payload = error
            yield key, "", NOWHERE, payload

    def read(self, key: str, place: Place) -> bytes:
        with open(self.root / key, "rb", buffering=0) as file:
            return file.read()

    def where(self, key: str, place: Place) -> str:
        return os.path.normpath(self._above / key)


def fingerprint_of(root: Path, names: Iterable[str]) -> str:
    """Of the root, and of the names, sizes and times of files below it."""
    total = hashlib.sha256(os.fsencode(root))
    for name in names:
        try:
            info = (root / name).stat()
            size, changed = info.st_size, info.st_mtime_ns
        except OSError:  # a link to nothing: reading it will say so
            size, changed = 0, 0
        total.update(f"{name}\0{size}\0{changed}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()
