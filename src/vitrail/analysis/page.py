"""One HTML page in one file: sections, tables and pictures, nothing fetched from elsewhere."""

import base64
import html
import io
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from vitrail.tasks.section import ACCENT as ACCENT
from vitrail.tasks.section import GOOD as GOOD
from vitrail.tasks.section import INK as INK
from vitrail.tasks.section import SOFT, Block, Bullets, Images, Plot, Rows, Section, Text, Tiles
from vitrail.tasks.section import shortened as shortened
from vitrail.weights import write_text

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1d2433;
  background: #f6f7f9; margin: 0; overflow-wrap: anywhere; }
main { max-width: 1080px; margin: 0 auto; padding: 28px 24px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 0 0 10px; }
.lead { color: #5b6577; margin: 0 0 20px; }
section { background: #fff; border: 1px solid #e3e7ee; border-radius: 10px;
  padding: 20px 22px; margin: 16px 0; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 16px 0; }
.tile { background: #fff; border: 1px solid #e3e7ee; border-radius: 10px;
  padding: 12px 18px; min-width: 130px; }
.tile b { display: block; font-size: 24px; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { color: #5b6577; font-size: 13px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: left; border-bottom: 1px solid #eef1f5; vertical-align: top; }
th { font-weight: 600; color: #5b6577; font-size: 13px; }
th { position: sticky; top: 0; background: #fff; }
th, td + td { overflow-wrap: normal; }
td:first-child { min-width: 7em; }
td.n, th.n { text-align: right; }
.wide { overflow: auto; max-height: 560px; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 14px; }
figure { margin: 0; }
figure img { width: 100%; border-radius: 6px; display: block; background: #eef1f5; }
figcaption { font-size: 13px; color: #434c5e; margin-top: 4px; }
.plots { display: flex; flex-wrap: wrap; gap: 18px; align-items: flex-start; }
.plots svg { max-width: 100%; height: auto; }
pre { background: #f3f5f8; border-radius: 6px; padding: 12px; overflow-x: auto; font-size: 13px; margin: 0; }
ul { margin: 0; padding-left: 20px; }
.note { color: #5b6577; font-size: 13px; }
@media (max-width: 520px) {
  main { padding: 16px 10px 40px; }
  section { padding: 14px; }
  .tile { flex: 1 1 40%; min-width: 0; box-sizing: border-box; }
  .gallery { grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); }
  table { font-size: 13px; }
  th, td { padding-right: 8px; }
}
@media print { .wide { max-height: none; } }
"""


@dataclass
class Page:
    """Collects sections in order; `write` makes the file."""

    title: str
    lead: str = ""
    parts: list[str] = field(default_factory=list)

    def tiles(self, items: Iterable[tuple[str, str]]) -> None:
        """Headline numbers: (value, what it is)."""
        self.parts.append(tiles(items))

    def section(self, title: str, *content: str) -> None:
        """A titled card; `content` is HTML made by the functions of this module."""
        self.parts.append(f"<section><h2>{esc(title)}</h2>{''.join(content)}</section>")

    def add(self, section: Section) -> None:
        """A section of blocks, whatever they say."""
        content = [render(block) for block in section.blocks]
        if section.title:
            self.section(section.title, *content)
        else:
            self.parts += content

    def write(self, path: Path) -> Path:
        """Whole or not at all. Raises InputError where it cannot be written."""
        body = f'<h1>{esc(self.title)}</h1><p class="lead">{esc(self.lead)}</p>' + "\n".join(
            self.parts
        )
        text = (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{esc(self.title)}</title><style>{STYLE}</style></head>"
            f"<body><main>{body}</main></body></html>\n"
        )
        write_text(path, text)
        return path


def esc(text: Any) -> str:
    return html.escape(str(text))


def flowing(text: Any) -> str:
    """Text whose long names break after a slash, a dash or an underscore; elsewhere only where none helps."""
    return re.sub(r"([/_-])(?=\w)", r"\1<wbr>", esc(text))


def render(block: Block) -> str:
    """A block as HTML."""
    match block:
        case Text(text):
            return paragraph(text)
        case Bullets(items):
            return bullets(items)
        case Tiles(items):
            return tiles(items)
        case Rows(header, rows):
            return table(header, rows)
        case Images(pairs, columns):
            return gallery(pairs, columns)
        case Plot(draw, width, height):
            fig, ax = figure(width, height)
            draw(ax)
            return plots(svg(fig))


def paragraph(text: str, kind: str = "note") -> str:
    return f'<p class="{kind}">{esc(text)}</p>'


def tiles(items: Iterable[tuple[str, str]]) -> str:
    cells = (f'<div class="tile"><b>{esc(v)}</b><span>{esc(t)}</span></div>' for v, t in items)
    return f'<div class="tiles">{"".join(cells)}</div>'


def bullets(items: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{flowing(i)}</li>" for i in items) + "</ul>"


def preformatted(text: str) -> str:
    return f"<pre>{esc(text)}</pre>"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Numbers are right-aligned; a float is shown with three decimals."""

    def cell(value: Any) -> str:
        if isinstance(value, float):
            return f'<td class="n">{value:.3f}</td>'
        if isinstance(value, int):
            return f'<td class="n">{value:,}</td>'
        return f"<td>{flowing(value)}</td>"

    body = ["<tr>" + "".join(map(cell, row)) + "</tr>" for row in rows]
    head = "".join(f"<th>{esc(h)}</th>" for h in header)
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def gallery(pictures: Iterable[tuple[Image.Image, str]], columns: int | None = None) -> str:
    """Images with captions, in a grid; a caption may have several lines. columns: None: as there is room."""
    figures = (
        f'<figure><img src="{data_uri(image)}" alt="{esc(caption)}">'
        f"<figcaption>{'<br>'.join(map(flowing, caption.splitlines()))}</figcaption></figure>"
        for image, caption in pictures
    )
    style = f' style="grid-template-columns: repeat({columns}, 1fr)"' if columns else ""
    return f'<div class="gallery"{style}>{"".join(figures)}</div>'


def plots(*figures: str) -> str:
    return f'<div class="plots">{"".join(figures)}</div>'


def data_uri(image: Image.Image, side: int = 320) -> str:
    """A picture as a data: address, its longer side at most `side` pixels; small ones are enlarged
    by whole factors so that single pixels stay visible."""
    longer = max(image.size)
    if longer > side:
        image = image.resize(
            (max(1, image.width * side // longer), max(1, image.height * side // longer)),
            Image.Resampling.LANCZOS,
        )
    elif longer * 2 <= side:
        factor = side // longer
        image = image.resize(
            (image.width * factor, image.height * factor), Image.Resampling.NEAREST
        )
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def figure(width: float = 5.0, height: float = 3.4) -> tuple[Any, Any]:
    """A matplotlib figure and axes in the page's look; give it to `svg` when drawn."""
    fig, ax = plt.subplots(figsize=(width, height), layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#aab3c2")
    ax.tick_params(colors="#5b6577", labelsize=9)
    ax.grid(True, color=SOFT, linewidth=0.8)
    ax.set_axisbelow(True)
    return fig, ax


def svg(fig: Any) -> str:
    """The figure as inline SVG; closes it."""
    buffer = io.StringIO()
    # A fixed salt and no date: the same numbers give the same file.
    with (
        plt.rc_context({"svg.hashsalt": "vitrail", "svg.fonttype": "none"}),
        warnings.catch_warnings(),
    ):
        # Letters stay text, which the reader's fonts draw, whatever this one has.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        fig.savefig(
            buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    plt.close(fig)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def heat(image: np.ndarray, values: np.ndarray) -> Image.Image:
    """`values` (h, w) >= 0 as a warm veil over `image` (H, W, 3) uint8."""
    height, width = image.shape[:2]
    top = float(values.max())
    scaled = (values / top if top > 0 else values).astype(np.float32)
    veil = Image.fromarray((scaled * 255).astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    strength = np.asarray(veil, np.float32)[..., None] / 255
    colour = plt.get_cmap("inferno")(np.asarray(veil))[..., :3] * 255
    mixed = image * (1 - 0.75 * strength) * 0.85 + colour * 0.75 * strength
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))
