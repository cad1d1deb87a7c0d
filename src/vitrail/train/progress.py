"""What a person sees while a run works: a bar with throughput and time left, or lines without a terminal."""

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar

LEARNING = 3  # updates behind a start's first one from which its pace is believed


class Progress:
    """Shows steps on stderr. Only the main process speaks; stdout stays free for results.

    total: updates of the whole run. minutes: its time limit. Speed is that of this start.
    """

    def __init__(self, total: int, *, minutes: float | None, speaks: bool) -> None:
        self.total = total
        self.limit = None if minutes is None else 60 * minutes
        self.speaks = speaks
        self.console = Console(stderr=True, quiet=not speaks)
        self.bar: Bar | None = None
        if speaks and self.console.is_terminal:
            columns = (
                TextColumn("{task.fields[epoch]}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[figures]}"),
            )
            self.bar = Bar(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("", total=1.0, epoch="starting", figures="")

    def __enter__(self) -> "Progress":
        self.images, self.busy, self.updates = 0, 0.0, 0
        self.reported = self.last = time.monotonic()
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def step(
        self,
        step: int,
        epoch: str,
        images: int,
        loss: float,
        seconds: float,
        padded: float = 0.0,
    ) -> None:
        """One update more: its number, images seen by it, its loss, training seconds of the whole run, and
        the share of what it computed that was no image."""
        if not self.speaks:
            return
        now = time.monotonic()
        self.updates += 1
        if self.updates == 1:
            self.first = (step, seconds)
        elif self.updates == 2:  # the first paid for what happens once, such as workers that start
            self.images, self.busy = 0, 0.0
        self.images += images
        self.busy += now - self.last
        self.last = now
        share = step / self.total
        if self.limit is not None:
            share = min(1.0, max(share, seconds / self.limit))
        padding = f"padding {padded:.1%}  " if padded else ""
        figures = f"loss {loss:.3f}  {self.rate:.0f} images/s  {padding}"
        figures += f"{self._left(step, seconds)} left"
        if self.bar is not None:
            self.bar.update(self.task, completed=share, epoch=epoch, figures=figures)
        elif now - self.reported >= 15:
            self.reported = now
            self.say(f"{epoch}  step {step}/{self.total}  {figures}")

    def _left(self, step: int, seconds: float) -> str:
        """Time until the last update at the pace of this start, evaluations included, or until the limit."""
        first, then = self.first
        if step - first < LEARNING:
            return "?"
        rest = (self.total - step) * (seconds - then) / (step - first)
        if self.limit is not None:
            rest = min(rest, self.limit - seconds)
        return _clock(max(0.0, rest))

    @property
    def rate(self) -> float:
        """Images per second of training since this start, without its first update where there are others."""
        return self.images / max(self.busy, 1e-9)

    def begin_epoch(self, total: int) -> None:
        """Training goes on, to `total` updates; what passed since the last one (an evaluation) does not
        count."""
        self.total = total
        self.last = time.monotonic()

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.bar is not None:
            self.bar.console.print(text, highlight=False, markup=False)
        elif self.speaks:
            print(text, file=sys.stderr, flush=True)


def counted(count: int, one: str, many: str = "") -> str:
    """ "1 thread", "2 threads"."""
    return f"{count} {one if count == 1 else many or one + 's'}"


def _clock(seconds: float) -> str:
    """ "4:09" or "1:23:04"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
