"""A table of file and label: .csv, or .tsv with tabs, with a header.

The columns `file` (or filename, path, image) and `label` (or class) are taken; of two columns with other
names the first is the file. A column `split` says train, val or test of each row. Files are relative to the
table's folder.
"""

import csv
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from vitrail.data.examples import labels_by_name
from vitrail.data.folders import SPLIT_NAMES
from vitrail.data.index import Place, Sample
from vitrail_runtime.errors import InputError, listed
from vitrail_runtime.preprocess import IMAGE_SUFFIXES

TABLE_SUFFIXES = (".csv", ".tsv")
FILE_COLUMNS = ("file", "filename", "file_name", "path", "image")
LABEL_COLUMNS = ("label", "class", "class_name")


class Table:
    """A CSV of file and label. See `vitrail.data.index.Source`."""

    truth = labels_by_name

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.folder = path.absolute().parent
        self._rows: dict[str, list[tuple[str, str]]] = {}  # split -> (file, label), in order
        seen: dict[str, int] = {}
        for number, file, label, split in self._read(path):
            if file in seen:
                raise InputError(
                    f"{path}, line {number}: {file} is also in line {seen[file]}; list each file once"
                )
            seen[file] = number
            self._rows.setdefault(split, []).append((file, label))
        if not seen:
            raise InputError(f"{path} has a header but no rows")
        # A link to nothing is there, and a broken image.
        files = {f: self.folder / f for f in seen}
        missing = [f for f, at in files.items() if not at.is_file() and not at.is_symlink()]
        if missing:
            raise InputError(
                f"{path} lists {len(missing)} of {len(seen)} files that do not exist below "
                f"{self.folder}: {listed(missing, limit=5)}"
            )

    def _read(self, path: Path) -> Iterator[tuple[int, str, str, str]]:
        """(line, file, what its image is, split) of every row."""
        return _read_rows(path)

    def splits(self) -> tuple[str, ...]:
        return tuple(s for s in ("train", "val", "test", "") if s in self._rows)

    def classes(self) -> tuple[str, ...]:
        names = {label for _, label in self._rows[self.splits()[0]]}
        if all(n.isascii() and n.isdecimal() for n in names):
            return tuple(sorted(names, key=int))
        return tuple(sorted(names))

    def fingerprint(self, split: str) -> str:
        total = hashlib.sha256(os.fsencode(self.folder))
        for file, label in self._rows[split]:
            try:
                info = (self.folder / file).stat()
                size, changed = info.st_size, info.st_mtime_ns
            except OSError:  # a link to nothing: reading it will say so
                size, changed = 0, 0
            total.update(f"{file}\0{label}\0{size}\0{changed}\n".encode())
        return total.hexdigest()

    def count(self, split: str) -> int:
        return len(self._rows[split])

    def scan(self, split: str) -> Iterator[Sample]:
        for file, label in self._rows[split]:
            try:
                payload = self.read(file, (0, 0, 0))
            except OSError as error:  # counted with the broken pictures
                payload = error
            yield file, label, (0, 0, 0), payload

    def read(self, key: str, place: Place) -> bytes:
        with open(self.folder / key, "rb", buffering=0) as file:
            return file.read()

    def where(self, key: str, place: Place) -> str:
        return str(Path(self.name).parent / key)


def is_table(path: Path) -> bool:
    """Whether a file's name is that of a table."""
    return path.suffix.lower() in TABLE_SUFFIXES


def _read_rows(path: Path) -> Iterator[tuple[int, str, str, str]]:
    """(line, file, label, split) of every row."""
    for line, titles, (name, label, split) in read_cells(path, _columns):
        if not name or not label:
            raise InputError(f"{path}, line {line}: no {titles[1 if name else 0]}")
        yield line, name, label, split_called(titles[2], split, path, line)


def read_cells(
    path: Path, choose: Callable[[list[str], Path], Sequence[int | None]]
) -> Iterator[tuple[int, list[str], list[str]]]:
    """(line, titles, cells) of every row, in the columns that `choose(header, path)` names; "" where it names
    None."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=delimiter)
            header = [cell.strip() for cell in next(rows, [])]
            if "\0" in "".join(header):  # letters of two bytes, such as UTF-16 without its mark
                raise InputError(_no_utf8(path, "it holds zero bytes"))
            chosen = choose(header, path)
            titles = ["" if at is None else header[at] for at in chosen]
            for row in rows:
                if not row:
                    continue
                if len(row) != len(header):
                    raise InputError(
                        f"{path}, line {rows.line_num}: {len(row)} cells under a header of {len(header)}"
                    )
                yield (
                    rows.line_num,
                    titles,
                    ["" if at is None else row[at].strip() for at in chosen],
                )
    except UnicodeDecodeError as error:
        raise InputError(_no_utf8(path, str(error))) from error
    except csv.Error as error:
        raise InputError(f"{path} cannot be read as a table: {error}") from error


def split_called(title: str, cell: str, path: Path, line: int) -> str:
    """The split that a cell names; "" in a table without a column for it. Raises InputError for no split."""
    split = SPLIT_NAMES.get(cell.lower(), "")
    if title and not split:
        raise InputError(f"{path}, line {line}: split must be train, val or test, but is {cell!r}")
    return split


def _no_utf8(path: Path, why: str) -> str:
    return (
        f'{path} is not UTF-8 text ({why}); save it as UTF-8: in Excel as the file type "CSV UTF-8 '
        '(Comma delimited)", or by iconv -f UTF-16 -t UTF-8 OLD.csv > NEW.csv (-f LATIN1 of older exports)'
    )


def _columns(header: list[str], path: Path) -> tuple[int, int, int | None]:
    if len(header) < 2:
        raise InputError(_no_columns(header, path))
    if os.path.splitext(header[0])[1].lower() in IMAGE_SUFFIXES:
        raise InputError(
            f"{path} has no header: its first line names the picture {header[0]}; put file,label above it"
        )
    lower = [h.lower() for h in header]
    split_at = lower.index("split") if "split" in lower else None
    file_at = next((lower.index(c) for c in FILE_COLUMNS if c in lower), None)
    label_at = next((lower.index(c) for c in LABEL_COLUMNS if c in lower), None)
    others = [i for i in range(len(header)) if i not in (file_at, label_at, split_at)]
    # A guess among several would train on a width, or a date, as if it were the class.
    if file_at is None and (label_at is not None or len(others) == 2):
        file_at = others.pop(0) if others else None
    if label_at is None and len(others) == 1:
        label_at = others[0]
    if file_at is None or label_at is None:
        raise InputError(
            f"{path}: cannot tell which of the columns {', '.join(header)} is the file and which the label; "
            "call them file and label"
        )
    return file_at, label_at, split_at


def _no_columns(header: list[str], path: Path) -> str:
    if not header:
        return f"{path} is empty; expected a header such as file,label, and a line for each picture"
    wanted = f"{path} must have a header with columns such as file,label, but its first line is {header[0]!r}"
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        if mark in header[0]:
            what = "save it with commas" + (", or call it .tsv" if mark == "\t" else "")
            return f"{wanted}: it is separated by {name}; {what}"
    return wanted
