"""The run folder: config.yaml, metrics.jsonl, best/, last/, state/ and the lock that keeps two runs apart."""

import errno
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml
from safetensors import SafetensorError

from vitrail.configuration import to_dict
from vitrail.rows import read_lines, read_row, read_rows
from vitrail.train.config import TrainConfig, differences, read_config
from vitrail.train.state import newest_whole
from vitrail.weights import write_text
from vitrail_runtime.errors import InputError

try:
    import fcntl
except ImportError:  # Windows has none
    fcntl = None


class RunFolder:
    """A folder that one process at a time writes to.

    best/ and last/ are model folders, state/ holds run states, metrics.jsonl one row per logging interval and
    evaluation, config.yaml the effective configuration.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.state = self.path / "state"
        self.metrics = self.path / "metrics.jsonl"
        self.config = self.path / "config.yaml"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder. The kernel lets go when the process ends, however it ends: no lock goes stale.

        Raises InputError naming the process that holds it.
        """
        if fcntl is None:
            raise InputError(
                "training runs on Linux and macOS, not on Windows itself; there, use the Windows Subsystem "
                "for Linux (wsl --install)"
            )
        if self.path.exists() and not self.path.is_dir():
            raise InputError(f"{self.path} is a file; a run needs a folder, give another --out")
        new = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        with self._writable():
            lock = self._lock()
        with lock:
            try:
                with self._writable():
                    lock.truncate(0)
                    # Unbuffered: what a full disk refused must not be tried again when the file is closed.
                    holder = f"process {os.getpid()} on {socket.gethostname()}"
                    os.write(lock.fileno(), holder.encode())
                    self._recover()
                yield
            finally:
                self._leave_no_empty(new)

    def _lock(self) -> IO[str]:
        """The open lock file, held."""
        assert fcntl is not None
        # Again where another start was refused meanwhile and cleared its folder.
        for _ in range(100):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                lock = open(self.path / "lock", "a+")  # noqa: SIM115  (held as long as the run)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.seek(0)
                holder = lock.read().strip() or "another process"
                lock.close()
                raise InputError(
                    f"{self.path} is in use by {holder}; wait for it, stop it, or give another --out"
                ) from error
            # A lock on a file that is no longer the one in the folder keeps nobody away.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(self.path / "lock")):
                    return lock
            lock.close()
        raise OSError("its lock cannot be made")

    def _leave_no_empty(self, new: list[Path]) -> None:
        """Remove `new` folders, the inner ones first, where a refused start left the lock alone in them.

        The lock goes while it is held: whoever has opened the same file finds that it is no longer in place.
        """
        with suppress(OSError):
            if new and os.listdir(self.path) == ["lock"]:
                (self.path / "lock").unlink()
                for folder in new:
                    folder.rmdir()

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(f"cannot write to the run folder {self.path}: {error}") from error

    def write_config(self, config: TrainConfig) -> None:
        text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
        write_text(self.config, text)

    def config_is(self, config: TrainConfig) -> bool:
        """Whether config.yaml can be read and is that of a run with this configuration."""
        try:
            return not differences(config, read_config(self.config))
        except InputError:
            return False

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; one that is damaged, or cut off by a crash, is left out."""
        return read_rows(self.metrics)

    def keep_rows(self, count: int) -> tuple[int, list[str]]:
        """Forget what was logged after the state that the run resumes from, of which there were `count` rows.

        Returns how many rows there are now, and what a person should know about the others.
        """
        rows = [read_row(line) for line in read_lines(self.metrics)[:count]]
        whole = [row for row in rows if row is not None]
        notes = []
        if len(whole) < count:
            notes.append(
                f"{self.metrics} has {len(whole)} of the {count} rows that it had: the others are gone "
                "or damaged, and the curves of the report lack them"
            )
        write_text(self.metrics, "".join(json.dumps(row) + "\n" for row in whole))
        return len(whole), notes

    def add_row(self, row: Mapping[str, Any]) -> None:
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def models(self) -> list[str]:
        """Names of the model folders in it: best, last, ..."""
        return sorted(path.parent.name for path in self.path.glob("*/model.safetensors"))

    def has(self, name: str) -> bool:
        """Whether a model folder of this name stands there; how whole it is, `models.load` finds out."""
        return (self.path / name / "model.safetensors").is_file()

    @contextmanager
    def replacing(self, name: str) -> Iterator[Path]:
        """A new folder to fill, which then takes the place of NAME; a crash leaves one of the two whole."""
        new, old, place = (self.path / n for n in (f".{name}.new", f".{name}.old", name))
        _remove(new)
        new.mkdir()
        try:
            yield new
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        if os.path.lexists(place):  # a link to nothing too
            _remove(old)
            os.replace(place, old)
        os.replace(new, place)
        with suppress(OSError):
            _remove(old)

    def _recover(self) -> None:
        """Clean up after a crash between the two renames of `replacing`, and after unfinished writes."""
        for old in self.path.glob(".*.old"):
            place = self.path / old.name[1:].removesuffix(".old")
            if os.path.lexists(place):
                _remove(old)
            else:
                os.replace(old, place)
        for new in self.path.glob(".*.new"):
            _remove(new)
        for partial in self.state.glob("*.partial"):
            partial.unlink()


def _remove(path: Path) -> None:
    """Remove a folder with all that is in it, or a file or a link that stands in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def explained(folder: RunFolder) -> Iterator[None]:
    """Turn a failed write into a message that says what is safe and how to go on."""
    try:
        yield
    except (OSError, SafetensorError, InputError) as error:
        if isinstance(error, InputError) and not isinstance(
            error.__cause__, (OSError, SafetensorError)
        ):
            raise
        saved = newest_whole(folder.state)
        safe = f"the state in {saved} is complete" if saved else "no state was saved yet"
        full = getattr(error, "errno", None) == errno.ENOSPC or "space" in str(error).lower()
        todo = "free some space" if full else "put it right"
        raise InputError(
            f"cannot write to {folder.path}: {error}; {safe}; {todo} and give the same command again"
        ) from error
