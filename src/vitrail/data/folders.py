"""Class folders: ROOT/train/CLASS/*.jpg with val and test beside train, or ROOT/CLASS/*.jpg alone.

Pictures lie at any depth below their class. Hidden files and folders, and files whose ending is no
picture's, are passed over. Links are followed; a link back to a folder that contains it is an error.
"""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from vitrail.data.examples import labels_by_name
from vitrail.data.index import Place, Sample
from vitrail_runtime.errors import InputError, listed
from vitrail_runtime.preprocess import IMAGE_SUFFIXES

SPLIT_NAMES = {  # what people call a split -> what it is called here
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


class ClassFolders:
    """A folder of class folders, or of splits of class folders. See `vitrail.data.index.Source`."""

    truth = labels_by_name

    def __init__(self, root: Path) -> None:
        self.name = str(root)
        self.root = root.absolute()
        self._files: dict[str, list[tuple[str, str, int, int]]] = {}
        folders = _subfolders(self.root)
        self._split_folders: dict[str, str] = {}
        for folder in folders:
            split = SPLIT_NAMES.get(folder.lower())
            if split is None:
                continue
            if split in self._split_folders:
                raise InputError(
                    f"{root} has two folders for the split {split!r}: "
                    f"{self._split_folders[split]!r} and {folder!r}; keep one"
                )
            self._split_folders[split] = folder
        # A class may be called "test"; one split folder alone among class folders is a class.
        if (
            self._split_folders
            and "train" not in self._split_folders
            and len(folders) > len(self._split_folders)
        ):
            self._split_folders = {}
        elif self._split_folders and len(folders) > len(self._split_folders):
            odd = sorted(set(folders) - set(self._split_folders.values()))
            raise InputError(
                f"{root} has split folders ({listed(self._split_folders.values())}) and others "
                f"beside them ({listed(odd)}); move the others away or into a split"
            )
        if not folders:
            raise InputError(_no_class_folders(root))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_files": {}}  # workers read by key; listings stay here

    def splits(self) -> tuple[str, ...]:
        return tuple(s for s in ("train", "val", "test") if s in self._split_folders) or ("",)

    def classes(self) -> tuple[str, ...]:
        split = self.splits()[0]
        names = _subfolders(self.root / self._split_folders.get(split, ""))
        if not names:
            raise InputError(_no_class_folders(self.root / self._split_folders.get(split, "")))
        # Sorted by code point, as torchvision's ImageFolder does: the labels agree.
        return tuple(sorted(names))

    def files(self, split: str) -> list[tuple[str, str, int, int]]:
        """(class, path below the root, bytes, time of change in ns) of every picture, by path."""
        if split not in self._files:
            found: list[tuple[str, str, int, int]] = []
            top = self.root / self._split_folders.get(split, "")
            for name in _subfolders(top):
                folder, before = str(top / name), len(found)
                real = Path(folder).resolve()
                above = (str(real), *map(str, real.parents))
                _walk(folder, name, str(self.root), above, found)
                if len(found) == before:
                    raise InputError(
                        f"class folder {folder} holds no pictures; add some or remove the folder"
                    )
            if not found:
                raise InputError(_no_class_folders(top))
            self._files[split] = sorted(found, key=lambda f: f[1])
        return self._files[split]

    def fingerprint(self, split: str) -> str:
        total = hashlib.sha256(os.fsencode(self.root))
        for name, path, size, changed in self.files(split):
            total.update(f"{name}\0{path}\0{size}\0{changed}\n".encode("utf-8", "surrogateescape"))
        return total.hexdigest()

    def count(self, split: str) -> int:
        return len(self.files(split))

    def scan(self, split: str) -> Iterator[Sample]:
        for name, path, _, _ in self.files(split):
            try:
                payload = self.read(path, (0, 0, 0))
            except OSError as error:  # counted with the broken pictures
                payload = error
            yield path, name, (0, 0, 0), payload

    def read(self, key: str, place: Place) -> bytes:
        with open(self.root / key, "rb", buffering=0) as file:
            return file.read()

    def where(self, key: str, place: Place) -> str:
        return str(Path(self.name) / key)


def _subfolders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and _is_dir(e))


def _is_dir(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        if _is_image(entry.name):  # one of the broken images
            return False
        raise InputError(
            f"{entry.path} is a symbolic link that leads to itself; remove it"
        ) from None


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _walk(
    folder: str,
    name: str,
    root: str,
    above: tuple[str, ...],
    found: list[tuple[str, str, int, int]],
) -> None:
    with os.scandir(folder) as scanned:
        entries = [e for e in scanned if not e.name.startswith(".")]
    for entry in entries:
        if _is_dir(entry):
            real = os.path.realpath(entry.path)
            if real in above:
                raise InputError(
                    f"{entry.path} is a symbolic link that leads back to {real}, which contains it; "
                    "remove it"
                )
            _walk(entry.path, name, root, (*above, real), found)
        elif _is_image(entry.name):
            try:
                info = entry.stat()
                size, changed = info.st_size, info.st_mtime_ns
            except OSError:  # a link to nothing: reading it will say so
                size, changed = 0, 0
            below = entry.path[len(root) :].lstrip(os.sep)  # os.path.relpath takes 12 times as long
            found.append((name, below, size, changed))


def _no_class_folders(folder: Path) -> str:
    if any(p.suffix.lower() in IMAGE_SUFFIXES for p in folder.iterdir()):
        return (
            f"{folder} holds pictures but no class folders; put the pictures of each class into a "
            "folder with the class's name, or give a .csv of file and label"
        )
    return (
        f"{folder} holds no pictures; expected CLASS/*.jpg, train/CLASS/*.jpg and val/CLASS/*.jpg, "
        "tar shards, or a .csv of file and label"
    )
