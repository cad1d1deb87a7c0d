"""The rows of a run's log: JSON lines, of which a crash may have cut off the last."""

import json
from pathlib import Path
from typing import Any

from vitrail_runtime.errors import InputError


def read_lines(path: Path) -> list[bytes]:
    """Lines as they stand; none where there is no file. Raises InputError where it cannot be read."""
    try:
        return path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def read_row(line: bytes) -> dict[str, Any] | None:
    """A row; None where it is damaged, or cut off."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a log, in their order."""
    return [row for line in read_lines(path) if (row := read_row(line)) is not None]
