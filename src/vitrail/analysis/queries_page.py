"""The page of `vitrail inspect queries`: what was found, and where query and encoder looked for it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vitrail.analysis import page
from vitrail.analysis.queries import Answer, answers

COLOUR, SMALLEST = (90, 220, 120), 320  # of a box; the longer side of what is shown, in pixels


def queries_page(
    path: Path, model: Any, images: Iterable[tuple[str, Tensor]], *, count: int, score: float
) -> Path:
    """Write the page. images: name and preprocessed image (3, H, W). count, score: see `queries.answers`."""
    out = page.Page(f"Where the queries of {model.info.name} look", "")
    out.section(
        "How to read it",
        page.paragraph(
            "Each row is one answer. Left: its box. Middle: what its query looked at in the last decoder "
            "layer, the mean over heads; a trained DETR looks at the rim of an object, where its box ends. "
            "Right: what the encoder's cell in the middle of the box (the cross) looked at in the last "
            "encoder layer; a trained one keeps to its own object, apart from its neighbours."
        ),
    )
    for name, image in images:
        found = answers(model, image, count=count, score=score)
        picture = _pixels(image, model.preprocessing)
        drawn = [one for answer in found for one in _row(picture, answer, model.classes)]
        out.section(name, page.gallery(drawn, columns=3))
    return out.write(path)


def _row(
    picture: np.ndarray, answer: Answer, classes: tuple[str, ...]
) -> list[tuple[Image.Image, str]]:
    said = f"{classes[answer.label]}, {answer.score:.2f}"
    looked, around = (page.heat(picture, seen) for seen in (answer.looked, answer.around))
    return [
        (_marked(Image.fromarray(picture), answer.box), said),
        (_marked(looked, answer.box), f"query {answer.query}"),
        (_marked(around, cross=answer.middle), "encoder"),
    ]


def _marked(
    image: Image.Image,
    box: np.ndarray | None = None,
    cross: tuple[float, float] | None = None,
) -> Image.Image:
    """Enlarged by a whole number, so that lines of a pixel are thin."""
    factor = max(1, round(SMALLEST / max(image.size)))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    if box is not None:
        draw.rectangle([factor * float(side) for side in box], outline=COLOUR, width=2)
    if cross is not None:
        x, y = factor * cross[0], factor * cross[1]
        for line in ((x - 6, y, x + 6, y), (x, y - 6, x, y + 6)):
            draw.line(line, fill=COLOUR, width=2)
    return image


def _pixels(image: Tensor, preprocessing: Any) -> np.ndarray:
    """(3, H, W) as the model takes it -> (H, W, 3) uint8."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (preprocessing.mean, preprocessing.std))
    pixels = ((image.cpu() * std + mean) * 255).round().clamp(0, 255)
    return pixels.to(torch.uint8).permute(1, 2, 0).numpy()
