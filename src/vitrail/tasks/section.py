"""What a task says in a report, as plain blocks: whoever renders them knows no task."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

# The page's colours, for drawings.
MANY_CLASSES = 30  # above this a confusion matrix is unreadable and only its worst cells are shown
INK, ACCENT, SOFT, GOOD, BAD = "#1d2433", "#2f6fb3", "#dfe6ef", "#2d8a57", "#b8433f"


@dataclass(frozen=True)
class Text:
    """A remark in a small font."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of findings."""

    items: Sequence[str]


@dataclass(frozen=True)
class Tiles:
    """Headline numbers side by side: (value, what it is)."""

    items: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Rows:
    """A table; floats are shown with three decimals."""

    header: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Images:
    """A grid of (image, caption); a caption may have several lines. columns: None: as there is room."""

    pairs: Sequence[tuple[Image.Image, str]]
    columns: int | None = None


@dataclass(frozen=True)
class Plot:
    """draw: gets matplotlib's axes and draws on them. width, height: in inches."""

    draw: Callable[[Any], None]
    width: float = 5.0
    height: float = 3.4


Block = Text | Bullets | Tiles | Rows | Images | Plot


@dataclass(frozen=True)
class Section:
    """A titled card of blocks; without a title they stand on the page itself.

    opening: before the training curves instead of behind them.
    """

    title: str
    blocks: tuple[Block, ...]
    opening: bool = False


@dataclass(frozen=True, eq=False)
class Found:
    """What a report is about: a model's answers on a data set.

    said: what was said of every image, as arrays in the data's order. scores: of all of them together, as
        plain data by name.
    history: the rows of the run's log. advice: what its curves say. explain: (image (H, W, 3) uint8,
        label) -> (name of the method, the image as the model sees it under a map of what mattered for it).
    """

    model: Any
    data: Any
    said: Mapping[str, np.ndarray]
    split: str
    explain: Callable[[np.ndarray, int], tuple[str, Image.Image]]
    scores: Mapping[str, Any] | None = None
    history: Sequence[Mapping[str, Any]] = ()
    advice: Sequence[str] = ()


def as_text(name: str) -> str:
    """Bytes of a file's name that are no text cannot be drawn: they stand as escapes."""
    return name.encode("utf-8", "backslashreplace").decode()


def isolated(name: str) -> str:
    """A name within a sentence: written from right to left, it would turn round the digits beside it."""
    leftwards = any(unicodedata.bidirectional(letter) in ("R", "AL", "AN") for letter in name)
    return f"\u2068{name}\u2069" if leftwards else name


def shortened(name: str, most: int = 24) -> str:
    """At most so many letters of a name: its beginning and its end, which tells numbered names apart."""
    if len(name) <= most:
        return name
    end = most // 3
    return f"{name[: most - end - 1]}…{name[-end:]}"


def confusions(confusion: np.ndarray, most: int) -> list[tuple[int, int, int]]:
    """(true, predicted, count) of the most frequent mistakes; of equals the first in the matrix is first."""
    off = confusion.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:most]
    cells = [divmod(int(i), len(off)) for i in order]
    return [(t, p, int(off[t, p])) for t, p in cells if off[t, p] > 0]


def confusion_plot(confusion: np.ndarray, classes: Sequence[str], *, percent: bool = False) -> Plot:
    """(K, K) counts, row = truth, as numbers on shades of the row's share; or that share in per cent."""
    k = len(classes)
    longest = min(max(map(len, classes)), 24)
    side = min(1.2 + 0.06 * longest + 0.42 * k, 9.0)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    # A name is no formula, whatever dollar signs it has.
    names = [shortened(name) for name in classes]

    def draw(ax: Any) -> None:
        ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
        ax.grid(False)
        ax.set_xticks(range(k), names, rotation=45, ha="right", parse_math=False)
        ax.set_yticks(range(k), names, parse_math=False)
        ax.set_xlabel("predicted")
        ax.set_ylabel("true")
        for t in range(k):
            for p in range(k):
                said = round(100 * share[t, p]) if percent else confusion[t, p]
                if said:
                    colour = "white" if share[t, p] > 0.5 else INK
                    what = {"ha": "center", "va": "center", "fontsize": 8, "color": colour}
                    ax.text(p, t, said, **what)

    return Plot(draw, side + 0.6, side)


def confusion_section(
    title: str, confusion: np.ndarray, names: Sequence[str], unit: str, *remark: Text
) -> Section:
    """The matrix, in per cent of a class where a remark goes with it; of many classes its worst cells."""
    if len(names) > MANY_CLASSES:
        rows = [(names[t], names[p], count) for t, p, count in confusions(confusion, 15)]
        return Section("Most frequent confusions", (Rows(("true", "predicted", unit), rows),))
    return Section(title, (confusion_plot(confusion, names, percent=bool(remark)), *remark))


def parameters_tile(model: Any) -> tuple[str, str]:
    """How large the model is."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M", "parameters"


def data_rows(data: Any, counts: Sequence[tuple[str, str]]) -> Rows:
    """A table of a data set: how many images, what the task counts in them, sizes, hash."""
    heights, widths = data.images.sizes[:, 0], data.images.sizes[:, 1]
    rows = [
        ("pictures", f"{len(data):,}"),
        *counts,
        ("width", f"{span(widths)} px, median {np.median(widths):.0f}"),
        ("height", f"{span(heights)} px, median {np.median(heights):.0f}"),
        ("left out as broken", f"{len(data.broken)}"),
        ("content hash", data.content_hash[:16]),
    ]
    return Rows(("", ""), rows)


def span(values: np.ndarray) -> str:
    """ "3 to 9", or "3" where all are equal."""
    low, high = values.min(), values.max()
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
