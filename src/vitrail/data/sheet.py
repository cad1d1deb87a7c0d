"""A contact sheet: one picture that shows what a data set holds."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitrail.data.boxes import Boxes
from vitrail.data.examples import Examples
from vitrail.data.legend import IGNORE
from vitrail.data.masks import ClassMaps
from vitrail.data.panoptic import Panoptic
from vitrail.data.view import View
from vitrail_runtime.drawing import colour_of, with_segments

WIDTH, MARGIN, GAP = 1600, 56, 6  # pixels
ROW = 92  # height of a row of pictures
LABELS = 190  # width of the column of class names
MOST_ROWS = 24  # classes up to which each has a row of its own
MOST_CELLS = 77  # else one picture a class, in a grid
CELLS_ACROSS, CELL = 11, 128
PAIRS_ACROSS, MOST_PAIRS, PAIR_GAP = (
    3,
    12,
    18,
)  # images beside their class maps, or with their objects
MOST_NAMED = 12  # objects of an image up to which each has its name written beside it
CAPTION = 34  # height of a line below an image
VEIL = 0.4  # opacity of the masks of objects
ENTRIES, ENTRY, SWATCH = 4, 46, 24  # legend: classes in a row, height of an entry and of its colour
OPACITY = 0.6  # of classes laid over an image
GREY = (125, 131, 144)  # of crowds
PAPER, INK, SOFT, RULE, ACCENT = "#fbfaf7", "#22252b", "#7d8390", "#e4e1d8", "#3f7f8c"


def contact_sheet(splits: Sequence[Examples], title: str, *, seed: int = 0) -> Image.Image:
    """Class names, counts, sizes and images of a data set, drawn from its first split.

    Of labels, up to 24 classes have a row each, filled with images in their own shapes; of more, up to 77
    show one image each. Of class maps, a legend with colours and shares of pixels, and up to 12 images beside
    their class maps. Of boxes, a legend with colours and counts, and up to 12 images with their objects and
    masks drawn; crowds in grey. Of segments likewise, beside the images. Of captions, up to 12 images above
    theirs. `seed` chooses the images.
    """
    data = splits[0]
    body = BODIES[data.truth.kind](data, seed)
    header = _header(splits, title)
    sheet = Image.new("RGB", (WIDTH, header.height + body.height + MARGIN), PAPER)
    sheet.paste(header, (0, 0))
    sheet.paste(body, (0, header.height))
    return sheet


def _header(splits: Sequence[Examples], title: str) -> Image.Image:
    data = splits[0]
    height = 168
    image = Image.new("RGB", (WIDTH, height), PAPER)
    draw = ImageDraw.Draw(image)
    sizes = np.concatenate([s.images.sizes for s in splits])
    _write(draw, (MARGIN, 44), title, 40, WIDTH - 2 * MARGIN - 300, INK, bold=True)
    parts = [f"{s.split} {len(s):,}" for s in splits]
    if len(splits) == 1:
        parts = [f"{len(data):,} pictures"]
    facts = [" · ".join(parts), f"{len(data.classes)} classes", _size_range(sizes)]
    draw.text((MARGIN, 104), "     ".join(facts), SOFT, _font(19))
    _size_plot(draw, sizes, (WIDTH - MARGIN - 190, 34, WIDTH - MARGIN, 138))
    draw.line((MARGIN, height - 10, WIDTH - MARGIN, height - 10), RULE, 2)
    return image


def _size_range(sizes: np.ndarray) -> str:
    (low_h, low_w), (high_h, high_w) = sizes.min(0).tolist(), sizes.max(0).tolist()
    if (low_h, low_w) == (high_h, high_w):
        return f"all {low_h} high, {low_w} wide"
    return f"{_span(low_h, high_h)} high, {_span(low_w, high_w)} wide"


def _span(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def _size_plot(
    draw: ImageDraw.ImageDraw, sizes: np.ndarray, box: tuple[int, int, int, int]
) -> None:
    """Width against height, one dot for each of up to 600 pictures, both from zero."""
    left, top, right, bottom = box
    draw.line((left, top, left, bottom), RULE, 2)
    draw.line((left, bottom, right, bottom), RULE, 2)
    scale = min((right - left) / sizes[:, 1].max(), (bottom - top) / sizes[:, 0].max()) * 0.94
    for height, width in sizes[:: max(1, len(sizes) // 600)].tolist():
        x, y = left + width * scale, bottom - height * scale
        draw.ellipse((x - 1.5, y - 1.5, x + 1.5, y + 1.5), ACCENT)
    draw.text((right, bottom + 4), "width", SOFT, _font(12), anchor="ra")
    draw.text((left - 6, top), "height", SOFT, _font(12), anchor="ra")


def _labels(data: Examples, seed: int) -> Image.Image:
    counts = np.bincount(data.truth.labels, minlength=len(data.classes))
    return _rows(data, counts, seed) if len(data.classes) <= MOST_ROWS else _grid(data, seed)


def _rows(data: Examples, counts: np.ndarray, seed: int) -> Image.Image:
    step = ROW + 14
    image = Image.new("RGB", (WIDTH, len(data.classes) * step + 12), PAPER)
    draw = ImageDraw.Draw(image)
    for label, name in enumerate(data.classes):
        top = 12 + label * step
        count = int(counts[label])
        _write(draw, (MARGIN, top + 18), name, 24, LABELS - 16, INK, bold=True)
        draw.text((MARGIN, top + 48), f"{count:,}", SOFT, _font(17))
        length = (LABELS - 24) * count / max(1, counts.max())
        draw.rounded_rectangle((MARGIN, top + 76, MARGIN + LABELS - 24, top + 80), 2, RULE)
        if count:
            draw.rounded_rectangle((MARGIN, top + 76, MARGIN + max(4, length), top + 80), 2, ACCENT)
        _fill_row(image, data, _chosen(data, label, seed), top)
    return image


def _fill_row(image: Image.Image, data: Examples, indices: Sequence[int], top: int) -> None:
    """Pictures at one height in their own shapes; the last one is cut at the margin."""
    left, end = MARGIN + LABELS, WIDTH - MARGIN
    for i in indices:
        if left >= end:
            return
        height, width = data.images.sizes[i].tolist()
        shown = min(max(ROW // 3, round(width * ROW / height)), 4 * ROW)
        picture = _thumbnail(data, i, (ROW, shown))
        picture = picture.crop((0, 0, min(shown, end - left), ROW))
        _paste_rounded(image, picture, (left, top))
        left += shown + GAP


def _grid(data: Examples, seed: int) -> Image.Image:
    shown = min(len(data.classes), MOST_CELLS)
    picked = np.linspace(0, len(data.classes) - 1, shown).round().astype(int).tolist()
    step_y = CELL + 30
    lines = -(-shown // CELLS_ACROSS)
    rest = len(data.classes) - shown
    image = Image.new("RGB", (WIDTH, lines * step_y + 20 + (36 if rest else 0)), PAPER)
    draw = ImageDraw.Draw(image)
    step_x = (WIDTH - 2 * MARGIN + GAP) / CELLS_ACROSS
    for cell, label in enumerate(picked):
        x = round(MARGIN + cell % CELLS_ACROSS * step_x)
        y = 16 + cell // CELLS_ACROSS * step_y
        for i in _chosen(data, label, seed)[:1]:
            _paste_rounded(image, _square(data, i), (x, y))
        _write(draw, (x + 1, y + CELL + 4), data.classes[label], 13, CELL, SOFT)
    if rest:
        draw.text((MARGIN, 20 + lines * step_y), f"and {rest:,} more classes", SOFT, _font(17))
    return image


def _chosen(data: Examples, label: int, seed: int) -> list[int]:
    mine = np.flatnonzero(data.truth.labels == label).tolist()
    return _by_content(data, mine, seed)[:60]


def _by_content(data: Examples, indices: Iterable[int], seed: int) -> list[int]:
    digests = data.images.digests

    def rank(i: int) -> str:
        return hashlib.blake2b(f"{seed}:{digests[i]}".encode(), digest_size=8).hexdigest()

    return sorted(indices, key=rank)


def _maps(data: Examples, seed: int) -> Image.Image:
    """Colours, names and shares of all classes, and up to 12 images beside their class maps."""
    picked = _every_class(data, data.truth.counts > 0, seed)
    legend = _legend(_map_entries(data.truth))
    pairs = _pairs(data, picked, _image_and_overlay)
    return _below(legend, pairs)


def _objects(data: Examples, seed: int) -> Image.Image:
    """Colours, names and counts of all classes, and up to 12 images with their objects."""
    picked = _every_class(data, data.truth.counts() > 0, seed)
    side = (WIDTH - 2 * MARGIN - (PAIRS_ACROSS - 1) * PAIR_GAP) // PAIRS_ACROSS
    cells = _cells([_with_objects(data, i, side) for i in picked], side)
    return _below(_legend(_box_entries(data.truth)), cells)


def _segments(data: Examples, seed: int) -> Image.Image:
    """Colours, names and counts of all classes, and up to 12 images beside their segments."""
    truth: Panoptic = data.truth
    picked = _every_class(data, truth.counts() > 0, seed)
    entries = [
        (f"{name} (stuff)" if k in truth.stuff else name, ink, told, below)
        for k, (name, ink, told, below) in enumerate(_box_entries(truth.told))
    ]
    return _below(_legend(entries), _pairs(data, picked, _image_and_segments))


def _image_and_segments(data: Examples, i: int, side: int) -> tuple[Image.Image, Image.Image]:
    """Both within `side` x `side`, in their own shape; a line round each segment, crowds in grey."""
    shown, told = _within(data, i, side), data.truth.read(i)
    inks = [
        GREY if crowd else colour_of(k) for k, crowd in zip(told.labels, told.crowd, strict=True)
    ]
    small = Image.fromarray(told.segments).resize(shown.size, Image.Resampling.NEAREST)
    return shown, with_segments(shown, np.asarray(small), inks)


def _below(legend: Image.Image, pairs: Image.Image) -> Image.Image:
    body = Image.new("RGB", (WIDTH, legend.height + pairs.height), PAPER)
    body.paste(legend, (0, 0))
    body.paste(pairs, (0, legend.height))
    return body


def _colours(truth: ClassMaps) -> np.ndarray:
    """(K, 3) uint8: the data set's palette, else colours that are far apart."""
    own = truth.palette or [colour_of(k) for k in range(len(truth.classes))]
    return np.array(own, np.uint8).reshape(-1, 3)


def _every_class(data: Examples, there: np.ndarray, seed: int) -> list[int]:
    """Images by a hash of seed and content; first those that a class is waiting for, the rarest first.
    there: (N, K), whether image i has class k."""
    order = _by_content(data, range(len(data)), seed)
    picked: list[int] = []
    for k in np.argsort(there.sum(0), kind="stable").tolist():
        holds = [i for i in order if there[i, k]]
        if holds and not there[picked, k].any() and len(picked) < MOST_PAIRS:
            picked.append(holds[0])
    return (picked + [i for i in order if i not in picked])[:MOST_PAIRS]


Entry = tuple[str, Any, str, str]  # of a legend: name, colour, beside, below


def _map_entries(truth: ClassMaps) -> list[Entry]:
    counts = [*truth.counts.sum(0).tolist(), int(truth.ignored.sum())]
    total = max(1, sum(counts))
    images = [*(truth.counts > 0).sum(0).tolist(), int((truth.ignored > 0).sum())]
    names = [*truth.classes, *["no class"] * bool(counts[-1])]
    inks = [*map(tuple, _colours(truth).tolist()), None]
    return [
        (name, ink, f"{count / total:.1%}", f"in {of:,} images")
        for name, count, of, ink in zip(names, counts, images, inks, strict=False)
    ]


def _box_entries(truth: Boxes) -> list[Entry]:
    counts = truth.counts()
    rows = zip(truth.classes, counts.sum(0).tolist(), (counts > 0).sum(0).tolist(), strict=True)
    return [
        (name, colour_of(k), f"{count:,}", f"in {of:,} images")
        for k, (name, count, of) in enumerate(rows)
    ]


def _legend(entries: Sequence[Entry]) -> Image.Image:
    column = (WIDTH - 2 * MARGIN + 24) // ENTRIES
    rows = -(-len(entries) // ENTRIES)
    image = Image.new("RGB", (WIDTH, rows * ENTRY + 24), PAPER)
    draw = ImageDraw.Draw(image)
    for at, (name, ink, told, below) in enumerate(entries):
        left, top = MARGIN + at % ENTRIES * column, 8 + at // ENTRIES * ENTRY
        box = (left, top, left + SWATCH, top + SWATCH)
        draw.rounded_rectangle(box, 5, ink, RULE if ink else SOFT, 1 if ink else 2)
        room = column - 24 - SWATCH - 10
        wide = _font(15).getlength(told)
        _write(draw, (left + SWATCH + 10, top - 2), name, 17, room - wide - 12, INK)
        draw.text((left + SWATCH + 10 + room - wide, top), told, SOFT, _font(15))
        draw.text((left + SWATCH + 10, top + 18), below, SOFT, _font(12))
    return image


def _pairs(
    data: Examples,
    indices: Sequence[int],
    drawn: Callable[[Examples, int, int], tuple[Image.Image, Image.Image]],
) -> Image.Image:
    pair = (WIDTH - 2 * MARGIN - (PAIRS_ACROSS - 1) * PAIR_GAP) // PAIRS_ACROSS
    side = (pair - 2) // 2
    rows: list[list[tuple[Image.Image, Image.Image]]] = []
    for n, i in enumerate(indices):
        if n % PAIRS_ACROSS == 0:
            rows.append([])
        rows[-1].append(drawn(data, i, side))
    heights = [max(image.height for image, _ in row) for row in rows]
    body = Image.new("RGB", (WIDTH, sum(heights) + PAIR_GAP * len(rows)), PAPER)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for n, (image, overlay) in enumerate(row):
            left = MARGIN + n * (pair + PAIR_GAP)
            body.paste(image, (left, top))
            body.paste(overlay, (left + image.width + 2, top))
        top += height + PAIR_GAP
    return body


def _cells(images: Sequence[Image.Image], side: int) -> Image.Image:
    rows = [images[n : n + PAIRS_ACROSS] for n in range(0, len(images), PAIRS_ACROSS)]
    heights = [max(image.height for image in row) for row in rows]
    body = Image.new("RGB", (WIDTH, sum(heights) + PAIR_GAP * len(rows)), PAPER)
    top = 0
    for row, height in zip(rows, heights, strict=True):
        for n, image in enumerate(row):
            body.paste(image, (MARGIN + n * (side + PAIR_GAP), top))
        top += height + PAIR_GAP
    return body


def _with_objects(data: Examples, i: int, side: int) -> Image.Image:
    """An image within `side` x `side`, in its own shape, with its masks, boxes and, of a few, names."""
    told = data.truth.target(i, None)
    height, width = data.images.sizes[i].tolist()
    shown = _within(data, i, side)
    size = shown.height, shown.width
    whole = View((height, width), size, (0, 0, height, width), None, False)
    inks = [
        GREY if crowd else colour_of(k) for k, crowd in zip(told.labels, told.crowd, strict=True)
    ]
    if told.masks is not None:
        pixels = np.asarray(shown).astype(np.float32)
        for ink, mask in zip(inks, told.masks, strict=True):
            (there,) = whole.masks([mask["counts"]]).astype(bool)
            pixels[there] += VEIL * (np.array(ink, np.float32) - pixels[there])
        shown = Image.fromarray(np.rint(pixels).astype(np.uint8))
    draw = ImageDraw.Draw(shown)
    boxes, _ = whole.boxes(told.boxes)
    for box, ink in zip(boxes.tolist(), inks, strict=True):
        draw.rectangle([round(v) for v in box], outline=ink, width=2)
    if len(boxes) <= MOST_NAMED and len(data.classes) > 1:
        for (x1, y1, _, _), ink, k in zip(boxes.tolist(), inks, told.labels.tolist(), strict=True):
            name = _shortened(data.classes[k], 16) if len(data.classes[k]) > 16 else data.classes[k]
            at = round(x1), max(0, round(y1) - 16)
            wide = round(_font(12).getlength(name)) + 6
            draw.rectangle((*at, at[0] + wide, at[1] + 16), ink)
            _write(
                draw, (at[0] + 3, at[1] + 1), name, 12, wide, "black" if sum(ink) > 380 else "white"
            )
    return shown


def _within(data: Examples, i: int, side: int) -> Image.Image:
    """An image within `side` x `side`, in its own shape."""
    height, width = data.images.sizes[i].tolist()
    scale = side / max(height, width)
    high, wide = max(1, round(height * scale)), max(1, round(width * scale))
    shown = Image.fromarray(data.images.read(i, (high, wide)))
    return shown.resize((wide, high), Image.Resampling.LANCZOS)


def _image_and_overlay(data: Examples, i: int, side: int) -> tuple[Image.Image, Image.Image]:
    """Both within `side` x `side`, in their own shape."""
    shown = _within(data, i, side)
    ids = Image.fromarray(data.truth.read(i)).resize(shown.size, Image.Resampling.NEAREST)
    return shown, _overlay(shown, np.asarray(ids), _colours(data.truth))


def _overlay(image: Image.Image, ids: np.ndarray, palette: np.ndarray) -> Image.Image:
    """The colours of classes laid over an image of the same size; ignored pixels stay as they are."""
    pixels = np.asarray(image).astype(np.float32)
    known = ids != IGNORE
    pixels[known] += OPACITY * (palette[ids[known]] - pixels[known])
    return Image.fromarray(np.rint(pixels).astype(np.uint8))


def _captions(data: Examples, seed: int) -> Image.Image:
    """Up to 12 images above their captions."""
    picked = _by_content(data, range(len(data)), seed)[:MOST_PAIRS]
    side = (WIDTH - 2 * MARGIN - (PAIRS_ACROSS - 1) * PAIR_GAP) // PAIRS_ACROSS
    return _cells([_with_caption(data, i, side) for i in picked], side)


def _with_caption(data: Examples, i: int, side: int) -> Image.Image:
    height, width = data.images.sizes[i].tolist()
    scale = side / max(height, width)
    shown = _thumbnail(data, i, (max(1, round(height * scale)), max(1, round(width * scale))))
    cell = Image.new("RGB", (side, shown.height + CAPTION), PAPER)
    cell.paste(shown, (0, 0))
    _write(ImageDraw.Draw(cell), (2, shown.height + 6), data.truth.captions[i], 17, side - 4, INK)
    return cell


# Kind of truth -> what is drawn below the header.
BODIES = {
    "labels": _labels,
    "class maps": _maps,
    "boxes": _objects,
    "segments": _segments,
    "captions": _captions,
}


def _thumbnail(data: Examples, i: int, size: tuple[int, int]) -> Image.Image:
    height, width = size
    picture = Image.fromarray(data.images.read(i, size))
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def _square(data: Examples, i: int) -> Image.Image:
    height, width = data.images.sizes[i].tolist()
    scale = CELL / min(height, width)
    needed = (max(CELL, round(height * scale)), max(CELL, round(width * scale)))
    picture = Image.fromarray(data.images.read(i, needed))
    side = min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    box = (left, top, left + side, top + side)
    return picture.resize((CELL, CELL), Image.Resampling.LANCZOS, box=box)


def _paste_rounded(sheet: Image.Image, picture: Image.Image, at: tuple[int, int]) -> None:
    mask = Image.new("L", (picture.width * 4, picture.height * 4), 0)
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, mask.width - 1, mask.height - 1), 20, 255)
    sheet.paste(picture, at, mask.resize(picture.size, Image.Resampling.BOX))


def _write(
    draw: ImageDraw.ImageDraw,
    at: tuple[int, int],
    text: str,
    size: int,
    width: float,
    ink: str,
    *,
    bold: bool = False,
) -> None:
    """Draw a name, shortened in the middle until it fits."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    path = _font_with(text, bold)
    if path is None:
        text = _escaped(text)
    font = _font(size, bold) if path is None else _load(path, size)
    keep, shown = len(text), text
    while keep > 2 and font.getlength(shown) > width:
        keep -= 1
        shown = _shortened(text, keep)
    draw.text(at, shown, ink, font)


def names_without_font(names: Iterable[str]) -> list[str]:
    """The names that no font of this machine can write: a sheet shows escapes such as \\u4e2d in them."""
    return [name for name in names if name.isprintable() and _font_with(name, False) is None]


def _escaped(text: str) -> str:
    own = _letters(_dejavu(False))
    return "".join(c if ord(c) in own else c.encode("unicode_escape").decode() for c in text)


def _font_with(text: str, bold: bool) -> str | None:
    """DejaVu, or the first installed font that has every letter of `text`; none: None."""
    wanted = {ord(c) for c in text + "…"}
    own = (_dejavu(bold), _dejavu(False))
    fonts = (path for more in (lambda: own, _installed) for path in more())  # installed: if need be
    return next((path for path in fonts if wanted <= _letters(path)), None)


@lru_cache
def _installed() -> tuple[str, ...]:
    from matplotlib import font_manager

    # Not the font manager's list, which is kept on the disk: a font installed since is not in it.
    return tuple(sorted(font_manager.findSystemFonts()))


@lru_cache
def _letters(path: str) -> frozenset[int]:
    """Code points that a font draws at any size; none of one that is broken, or holds pictures (of emoji)."""
    from matplotlib.ft2font import FT2Font

    try:
        _load(path, 13)
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()


def _shortened(text: str, keep: int) -> str:
    head = (keep + 1) // 2
    return text[:head] + "…" + text[len(text) - (keep - head) :]


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    return _load(_dejavu(bold), size)


@lru_cache
def _load(path: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size)


def _dejavu(bold: bool) -> str:
    # Matplotlib brings DejaVu, which has most alphabets.
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)
