"""A Prediction as a picture: words that stay legible at any size, colours that stay with their class."""

import colorsys
import importlib.util
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vitrail_runtime.decoding import Source, decode, name_of, read_size
from vitrail_runtime.errors import InputError
from vitrail_runtime.rle import decode_mask

if TYPE_CHECKING:
    from vitrail_runtime.prediction import Prediction

Colour = tuple[int, int, int]

_SHORTEST = 320  # pixels of the long side below which a picture is enlarged
_PIXEL_ART = 96  # and up to which its pixels are shown as squares
_PANEL, _TRACK, _TEXT, _MUTED = (22, 24, 29), (52, 56, 66), (245, 246, 248), (166, 172, 184)
_ROWS = 3  # answers in the bar below
_LEGEND = 8  # classes of a segmentation in the bar below
_OPACITY = 0.5


def draw_prediction(
    prediction: "Prediction", image: Source | None, long_side: int = 1280
) -> Image.Image:
    """See `Prediction.draw`."""
    source = image if image is not None else prediction.source
    if source is None:
        raise InputError("this prediction has no file; give its picture: draw(image)")
    size = read_size(source)
    if prediction.size is not None and size != prediction.size:
        raise InputError(
            f"{name_of(source)} is {size[0]} x {size[1]} (height x width), but the prediction is of "
            f"a picture of {prediction.size[0]} x {prediction.size[1]}"
        )
    shown = _display_size(size, long_side)
    resampling = Image.Resampling.LANCZOS if max(size) > _PIXEL_ART else Image.Resampling.NEAREST
    canvas = Image.fromarray(decode(source, at_least=shown))
    canvas = canvas.resize((shown[1], shown[0]), resampling)
    if prediction.segmentation is not None:
        canvas = overlay(canvas, prediction.segmentation)
    if prediction.segments is not None:
        canvas = _with_named_segments(canvas, prediction)
    if prediction.boxes is None:
        return _with_panel(canvas, _rows_of(prediction))
    texts = [f"{n} {s:.0%}" for n, s in zip(prediction.names, prediction.scores, strict=True)]
    shown = prediction.rles
    return draw_objects(canvas, size, prediction.boxes, prediction.labels, texts, shown)


def _with_named_segments(canvas: Image.Image, prediction: "Prediction") -> Image.Image:
    """Segments in the colours of their classes, and the names of things."""
    assert prediction.segments is not None
    whole = Image.fromarray(prediction.segments)
    shown = np.asarray(whole.resize(canvas.size, Image.Resampling.NEAREST))
    canvas = with_segments(canvas, shown, [colour_of(int(k)) for k in prediction.labels])
    pen, size = ImageDraw.Draw(canvas), max(12, min(26, max(canvas.size) // 36))
    for number in np.flatnonzero(~np.isin(prediction.labels, list(prediction.stuff))).tolist():
        rows, columns = np.nonzero(shown == number + 1)
        if len(rows):
            corner = int(columns.min()), int(rows.min())
            _tag(pen, canvas, corner, prediction.names[number], size, prediction.labels[number])
    return canvas


def draw_objects(
    canvas: Image.Image,
    size: tuple[int, int],
    boxes: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    texts: Sequence[str],
    masks: Sequence[Mapping[str, Any]] | None = None,
) -> Image.Image:
    """The image with a box and a text for each object in its class's colour, the first on top.

    canvas: the image at any size. size: (height, width) of the original, whose pixels `boxes` (N, 4) xyxy are
        in. texts: an empty one is left out. masks: of each object, COCO's run-length encoding.
    """
    if masks is not None:
        canvas = _with_masks(canvas, labels, masks)
    _draw_boxes(canvas, size, boxes, labels, texts)
    return canvas


def colour_of(label: int) -> Colour:
    """A class's colour: neighbours in number are far apart in hue."""
    hue = (0.58 + label * 0.61803398875) % 1
    value, saturation = ((1.0, 0.75), (0.85, 0.6), (0.95, 0.9))[label % 3]
    r, g, b = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(r * 255), round(g * 255), round(b * 255)


def _display_size(size: tuple[int, int], long_side: int) -> tuple[int, int]:
    longest = max(size)
    scale = min(1.0, long_side / longest)
    if longest <= _PIXEL_ART:
        scale = _SHORTEST // longest
    elif longest < _SHORTEST:
        scale = _SHORTEST / longest
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


# text on the left, text on the right, share of the bar that is filled, its colour
_Row = tuple[str, str, float, Colour]


def _rows_of(prediction: "Prediction") -> list[_Row]:
    if prediction.segments is not None:
        return _rows_of_classes(prediction)
    if prediction.segmentation is None:
        rows = zip(prediction.names, prediction.scores, prediction.labels, strict=True)
        return [(n, _percent(s), float(s), colour_of(int(k))) for n, s, k in rows][:_ROWS]
    values, counts = np.unique(prediction.segmentation, return_counts=True)
    largest = np.argsort(-counts, kind="stable")
    rows = []
    for value, share in zip(values[largest], counts[largest] / counts.sum(), strict=True):
        if value >= 0:
            known = value < len(prediction.classes)
            name = prediction.classes[value] if known else f"class {value}"
            rows.append((name, _percent(share), float(share), colour_of(int(value))))
    return rows[:_LEGEND]


def _rows_of_classes(prediction: "Prediction") -> list[_Row]:
    """Of each class how many segments there are and which share of the image is theirs."""
    assert prediction.segments is not None
    areas = np.bincount(prediction.segments.ravel(), minlength=len(prediction.labels) + 1)[1:]
    rows = []
    for label in np.unique(prediction.labels).tolist():
        mine = prediction.labels == label
        share = float(areas[mine].sum() / prediction.segments.size)
        name, count = prediction.classes[label], int(mine.sum())
        name = name if label in prediction.stuff else f"{count} x {name}"
        rows.append((name, _percent(share), share, colour_of(label)))
    return sorted(rows, key=lambda row: -row[2])[:_LEGEND]


def _percent(share: float) -> str:
    return "< 0.1%" if 0 < share < 0.001 else f"{share:.1%}"


def _with_panel(picture: Image.Image, rows: list[_Row]) -> Image.Image:
    # The picture, centred where it is narrow, above a bar of rows: name, score, and how much.
    width = max(picture.width, 240)
    size = max(14, min(28, width // 22))
    margin, bar = round(size * 0.8), max(3, size // 5)
    step = round(size * 1.4) + bar + round(size * 0.55)
    panel = margin + step * len(rows) - round(size * 0.55) + margin if rows else 0
    canvas = Image.new("RGB", (width, picture.height + panel), _PANEL)
    canvas.paste(picture, ((width - picture.width) // 2, 0))
    pen = ImageDraw.Draw(canvas)
    y = picture.height + margin
    for place, (name, score, share, colour) in enumerate(rows):
        font = _font(size, name)
        right = round(font.getlength(score))
        name = _shortened(name, font, width - 2 * margin - right - size)
        text = _TEXT if place == 0 else _MUTED
        pen.text((margin, y), name, fill=text, font=font)
        pen.text((width - margin - right, y), score, fill=text, font=font)
        top = y + round(size * 1.4)
        _bar(pen, (margin, top, width - margin, top + bar), _TRACK)
        if share > 0:
            end = margin + max(bar, round((width - 2 * margin) * min(1.0, share)))
            _bar(pen, (margin, top, end, top + bar), colour)
        y += step
    return canvas


def _bar(pen: ImageDraw.ImageDraw, box: tuple[int, int, int, int], colour: Colour) -> None:
    pen.rounded_rectangle(box, radius=(box[3] - box[1]) / 2, fill=colour)


def _draw_boxes(
    canvas: Image.Image,
    size: tuple[int, int],
    boxes: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    texts: Sequence[str],
) -> None:
    pen = ImageDraw.Draw(canvas)
    longest = max(canvas.size)
    line, font_size = max(2, longest // 320), max(12, min(26, longest // 36))
    scale = np.array([canvas.width / size[1], canvas.height / size[0]] * 2)
    corners = (np.asarray(boxes).reshape(-1, 4) * scale).round().astype(int).tolist()
    colours = [colour_of(int(label)) for label in labels]
    best_last = list(zip(corners, colours, texts, strict=True))[::-1]
    for (x0, y0, x1, y1), colour, _ in best_last:
        dark = tuple(c // 4 for c in colour)
        pen.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=dark, width=line + 2)
        pen.rectangle((x0, y0, x1, y1), outline=colour, width=line)
    for ((x0, y0, _, _), _, text), label in zip(best_last, list(labels)[::-1], strict=True):
        if text:  # no line may cross a word
            _tag(pen, canvas, (x0, y0), text, font_size, int(label))


def _tag(
    pen: ImageDraw.ImageDraw,
    canvas: Image.Image,
    corner: tuple[int, int],
    text: str,
    font_size: int,
    label: int,
) -> None:
    """A text in its class's colour above a corner (x, y)."""
    (x0, y0), colour, font = corner, colour_of(int(label)), _font(font_size, text)
    text = _shortened(text, font, canvas.width - font_size)
    width, height = round(font.getlength(text) + font_size * 0.6), round(font_size * 1.35)
    left = max(0, min(x0, canvas.width - width))
    top = max(0, y0 - height if y0 >= height else min(y0, canvas.height - height))
    pen.rectangle((left, top, left + width, top + height), fill=colour)
    middle = (left + width / 2, top + height / 2)
    pen.text(middle, text, font=font, fill=_on(colour), anchor="mm")


def _with_masks(
    canvas: Image.Image,
    labels: Sequence[int] | np.ndarray,
    masks: Sequence[Mapping[str, Any]],
) -> Image.Image:
    if not len(masks):
        return canvas
    pixels = np.asarray(canvas).astype(np.float32)
    rim = max(1, max(canvas.size) // 500)
    for mask, label in list(zip(masks, labels, strict=True))[::-1]:
        whole = Image.fromarray(decode_mask(mask))  # one at a time: a hundred may be large
        shown = np.asarray(whole.resize(canvas.size, Image.Resampling.NEAREST))
        colour = np.array(colour_of(int(label)), dtype=np.float32)
        pixels[shown] += _OPACITY * (colour - pixels[shown])
        pixels[shown & ~_eroded(shown, rim)] = colour
    return Image.fromarray(pixels.round().astype(np.uint8))


def overlay(canvas: Image.Image, segmentation: np.ndarray) -> Image.Image:
    """The image under the colours of its classes, (H, W) integers; open where they are negative."""
    values, places = np.unique(segmentation, return_inverse=True)
    colours = np.array([colour_of(int(v)) for v in values], dtype=np.uint8)
    layer = Image.fromarray(colours[places.reshape(segmentation.shape)])
    opacity = Image.fromarray(
        np.where(segmentation >= 0, np.uint8(round(_OPACITY * 255)), np.uint8(0))
    )
    nearest = Image.Resampling.NEAREST
    layer, opacity = layer.resize(canvas.size, nearest), opacity.resize(canvas.size, nearest)
    return Image.composite(layer, canvas, opacity)


def with_segments(canvas: Image.Image, segments: np.ndarray, inks: Sequence[Colour]) -> Image.Image:
    """The image under its segments, each in its ink and with a line of it along its rim.

    segments: (H, W) integers of the image's size, n + 1 where segment n is, 0 where none is.
    """
    pixels = np.asarray(canvas).astype(np.float32)
    colours = np.array([(0, 0, 0), *inks], np.float32)[segments]
    there = segments > 0
    pixels[there] += _OPACITY * (colours[there] - pixels[there])
    rim = there & _rim(segments, max(1, max(canvas.size) // 500))
    pixels[rim] = colours[rim]
    return Image.fromarray(pixels.round().astype(np.uint8))


def _rim(segments: np.ndarray, wide: int) -> np.ndarray:
    # True for pixels from which another segment is at most so many steps up, down, left or right.
    rim = np.zeros(segments.shape, bool)
    for step in range(1, wide + 1):
        down, right = segments[step:] != segments[:-step], segments[:, step:] != segments[:, :-step]
        rim[step:] |= down
        rim[:-step] |= down
        rim[:, step:] |= right
        rim[:, :-step] |= right
    return rim


def _eroded(mask: np.ndarray, by: int) -> np.ndarray:
    # True where all pixels up to `by` steps up, down, left and right are; the picture's rim counts.
    inner = mask.copy()
    for _ in range(by):
        padded = np.pad(inner, 1, mode="edge")
        inner = padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1]
        inner &= padded[1:-1, :-2] & padded[1:-1, 2:]
    return inner


def _on(colour: Colour) -> Colour:
    light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return (16, 18, 22) if light > 140 else (255, 255, 255)


def _shortened(text: str, font: "_Font", width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def _font(size: int, text: str) -> _Font:
    return _fonts(size, text.isascii())


@lru_cache(maxsize=64)
def _fonts(size: int, ascii_only: bool) -> _Font:
    # Pillow's own font knows ASCII alone; for the rest look for one of the system's or Matplotlib's.
    if not ascii_only:
        names = ["NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "DejaVuSans.ttf"]
        matplotlib = importlib.util.find_spec("matplotlib")
        for folder in (matplotlib and matplotlib.submodule_search_locations) or []:
            names.append(str(Path(folder, "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")))
        for name in names:
            try:
                return ImageFont.truetype(name, size)
            except OSError:
                continue
    return ImageFont.load_default(size)
