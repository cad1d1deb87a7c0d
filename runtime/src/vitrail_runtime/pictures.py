"""Which files a person means: a picture, a folder of them, or a pattern."""

import glob
import os
from fnmatch import fnmatch
from pathlib import Path

from vitrail_runtime.decoding import IMAGE_SUFFIXES
from vitrail_runtime.errors import InputError


def find_pictures(source: str | os.PathLike[str]) -> list[Path]:
    """The picture files that a path or a glob pattern stands for, in sorted order.

    A file is itself, whatever its name, and so is a link to nothing: like every other file that is no
    image, whoever reads it says so. A folder is searched with all folders below it; links are followed,
    each real folder once, so that loops end. A pattern ("*", "?", "[...]", "**" for any depth) may match
    files and folders. In folders and patterns only files with a picture's suffix count, and names that
    start with a dot don't.
    Raises: InputError when there is no such file, or no picture in the folder or under the pattern.
    """
    path = Path(source)
    if path.is_dir():
        found = _in_folder(path)
        if not found:
            raise InputError(f"no pictures in {path} or the folders below it; {_suffixes()} count")
        return found
    if path.exists() or path.is_symlink():
        return [path]
    pattern = os.fspath(source)
    if not glob.has_magic(pattern):
        raise InputError(f"{pattern}: no such file or folder")
    if "**" in path.parts:
        found = _at_any_depth(path)
    else:
        found = []
        for match in sorted(glob.glob(pattern)):
            if os.path.isdir(match):
                found += _in_folder(Path(match))
            elif Path(match).suffix.lower() in IMAGE_SUFFIXES:
                found.append(Path(match))
    if not found:
        raise InputError(f"no pictures match {pattern}; {_suffixes()} count")
    return list(dict.fromkeys(found))


def _at_any_depth(pattern: Path) -> list[Path]:
    """What a pattern with "**" matches. `glob` would go round loops of links, forty times, in every way."""
    fixed = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    folder, wanted = Path(*pattern.parts[:fixed]), pattern.parts[fixed:]
    return [f for f in _in_folder(folder) if _fits(f.relative_to(folder).parts, wanted)]


def _fits(parts: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatch(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _in_folder(folder: Path) -> list[Path]:
    found, seen = [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        # In place: os.walk goes on in this order, and not into hidden folders.
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        for name in files:
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES:
                found.append(Path(root, name))
    return sorted(found)


def _suffixes() -> str:
    return ", ".join(sorted(IMAGE_SUFFIXES))
