"""What a model says of one picture, in words and numbers that need no model to read."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from vitrail_runtime.decoding import Source
from vitrail_runtime.errors import InputError
from vitrail_runtime.rle import encode_part

NO_CLASS = 255  # in a stored class map: a pixel without a class
THRESHOLD = 0.5  # probability from which a pixel belongs to a mask


@dataclass(eq=False)
class Prediction:
    """What a model says of one picture; N answers, the best first.

    labels: (N,) int64, indices into the model's classes. scores: (N,) float32 in [0, 1].
    names: the N class names. boxes: (N, 4) float32 xyxy in pixels of the original picture.
    mask_crops: (N, m, m) float32, the probability of the object over its box; `masks` pastes them.
    segmentation: (H, W) integers, the class of every pixel of the original; negative: none.
    segments: (H, W) int32, n + 1 where a pixel of the original is of answer n, 0 for none; stuff: labels of
    classes of which there is one segment at most.
    classes: all class names, where `segmentation` or `segments` needs them.
    source: the file, where there is one. size: (height, width) of the original picture, upright.
    """

    labels: np.ndarray
    scores: np.ndarray
    names: list[str]
    boxes: np.ndarray | None = None
    mask_crops: np.ndarray | None = None
    segmentation: np.ndarray | None = None
    segments: np.ndarray | None = None
    stuff: Sequence[int] = ()
    classes: Sequence[str] = ()
    source: str | None = None
    size: tuple[int, int] | None = None

    @property
    def several(self) -> bool:
        """Whether all N answers are true at once, as those of a detector, and not one or another."""
        return self.boxes is not None or self.segments is not None

    @property
    def masks(self) -> np.ndarray | None:
        """(N, H, W) bool over the original picture, True on the object; pasted anew on every call."""
        if self.mask_crops is None or self.boxes is None or self.size is None:
            return None
        pasted = [
            paste_mask(crop, box, self.size)
            for crop, box in zip(self.mask_crops, self.boxes, strict=True)
        ]
        return np.stack(pasted) if pasted else np.zeros((0, *self.size), dtype=bool)

    @property
    def rles(self) -> list[dict[str, Any]] | None:
        """N masks as COCO's run-length encoding, without a mask of the whole image in memory."""
        if self.mask_crops is None or self.boxes is None or self.size is None:
            return None
        found = []
        for crop, box in zip(self.mask_crops, self.boxes, strict=True):
            part, corner = _pasted(crop, box, self.size, THRESHOLD)
            found.append(encode_part(part, corner, self.size))
        return found

    def above(self, score: float) -> "Prediction":
        """Only the answers with at least this score. A segmentation stays whole."""
        kept = np.flatnonzero(np.asarray(self.scores) >= score)
        number = np.zeros(len(self.scores) + 1, np.int32)
        number[kept + 1] = np.arange(1, len(kept) + 1)
        return replace(
            self,
            labels=self.labels[kept],
            scores=self.scores[kept],
            names=[self.names[i] for i in kept],
            boxes=None if self.boxes is None else self.boxes[kept],
            mask_crops=None if self.mask_crops is None else self.mask_crops[kept],
            segments=None if self.segments is None else number[self.segments],
        )

    def draw(self, image: Source | None = None, *, long_side: int = 1280) -> Image.Image:
        """The picture with what was found on it: boxes, masks and classes, the best scores in a bar below.

        image: the picture, where `source` is not a file that can be read again.
        long_side: larger pictures are shrunk to it; small ones grow, so that words stay legible.
        Raises: InputError when there is no picture, or one of another size than `size`.
        """
        from vitrail_runtime.drawing import draw_prediction

        return draw_prediction(self, image, long_side)

    def class_map(self) -> Image.Image:
        """`segmentation` as an image to store: 8-bit indices of classes with a palette, 255 for none.

        Raises: InputError when there is no segmentation, or more classes than such an image can hold.
        """
        from vitrail_runtime.drawing import colour_of

        if self.segmentation is None:
            raise InputError("this prediction has no segmentation, so there is no class map of it")
        if len(self.classes) > NO_CLASS:
            raise InputError(
                f"an 8-bit image holds at most {NO_CLASS} classes, but there are {len(self.classes)}; "
                "store `segmentation` in another form"
            )
        indices = np.where(self.segmentation < 0, NO_CLASS, self.segmentation).astype(np.uint8)
        image = Image.fromarray(indices)
        colours = [colour_of(label) for label in range(NO_CLASS)]
        image.putpalette([value for colour in (*colours, (0, 0, 0)) for value in colour])
        return image

    def to_dict(self, *, masks: bool = False) -> dict[str, Any]:
        """JSON-ready: `path`, `size`, the best `label` (its name), its `score`, and all N under `top`,
        with `box` where there are boxes; of segments with `area` in pixels and whether it is a `thing`.

        masks: with `mask`, COCO's run-length encoding, where there are masks. A segmentation stays out.
        """
        top: list[dict[str, Any]] = [
            {"label": name, "index": int(label), "score": round(float(score), 6)}
            for name, label, score in zip(self.names, self.labels, self.scores, strict=True)
        ]
        if self.boxes is not None:
            for entry, box in zip(top, self.boxes, strict=True):
                entry["box"] = [round(float(v), 2) for v in box]
        if self.segments is not None:
            areas = np.bincount(self.segments.ravel(), minlength=len(top) + 1)[1:]
            for entry, area in zip(top, areas.tolist(), strict=True):
                entry |= {"area": area, "thing": entry["index"] not in self.stuff}
        rles = self.rles if masks else None
        if rles is not None:
            for entry, rle in zip(top, rles, strict=True):
                entry["mask"] = rle
        best = {"label": top[0]["label"], "score": top[0]["score"]} if top else {}
        size = list(self.size) if self.size else None
        return {"path": self.source, "size": size, **best, "top": top}

    def to_coco(
        self, image_id: int, category_ids: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """N entries of a COCO results file: image_id, category_id, bbox (x, y, width, height), score, and
        `segmentation` where there are masks.

        category_ids: of each of the model's classes; None: 1, 2, 3, ...
        Raises: InputError when there are no boxes, or no id for a label.
        """
        if self.boxes is None:
            raise InputError("this prediction has no boxes, so there are no COCO results of it")
        highest = max(map(int, self.labels), default=-1)
        if category_ids is not None and highest >= len(category_ids):
            raise InputError(
                f"there are {len(category_ids)} category ids, but the prediction has class {highest} "
                "(counted from 0); give the id of each of the model's classes"
            )
        entries = []
        for label, box, score in zip(self.labels, self.boxes, self.scores, strict=True):
            x0, y0, x1, y1 = (float(v) for v in box)
            category = int(label) + 1 if category_ids is None else int(category_ids[int(label)])
            bbox = [x0, y0, x1 - x0, y1 - y0]
            entries.append(
                {
                    "image_id": image_id,
                    "category_id": category,
                    "bbox": [round(v, 3) for v in bbox],
                    "score": round(float(score), 6),
                }
            )
        for entry, rle in zip(entries, self.rles or (), strict=False):
            entry["segmentation"] = rle
        return entries


def paste_mask(
    crop: np.ndarray, box_xyxy: np.ndarray, size: tuple[int, int], threshold: float = THRESHOLD
) -> np.ndarray:
    """(m, n) probabilities over a box -> (H, W) bool of the picture, True at `threshold` and above.

    Values are interpolated linearly between the centres of the crop's cells and fade to zero over half
    a cell outside, as in Mask R-CNN's official pasting.
    """
    part, (top, left) = _pasted(crop, box_xyxy, size, threshold)
    out = np.zeros(size, dtype=bool)
    out[top : top + part.shape[0], left : left + part.shape[1]] = part
    return out


def _pasted(
    crop: np.ndarray, box_xyxy: np.ndarray, size: tuple[int, int], threshold: float
) -> tuple[np.ndarray, tuple[int, int]]:
    # The pixels that the box may touch, (h, w) bool, and the (top, left) of them.
    height, width = size
    x0, y0, x1, y1 = (float(v) for v in box_xyxy)
    rows = _cells(y0, y1, height, crop.shape[0])
    columns = _cells(x0, x1, width, crop.shape[1])
    if rows is None or columns is None:
        return np.zeros((0, 0), dtype=bool), (0, 0)
    padded = np.pad(np.asarray(crop, dtype=np.float32), 1)
    (top, r0, fr), (left, c0, fc) = rows, columns
    fr = fr[:, None]
    across = padded[:, c0] * (1 - fc) + padded[:, c0 + 1] * fc
    values = across[r0] * (1 - fr) + across[r0 + 1] * fr
    return values >= threshold, (top, left)


def _cells(
    start: float, end: float, length: int, cells: int
) -> tuple[int, np.ndarray, np.ndarray] | None:
    # For the pixels of one axis that a box may touch: the first of them, and for each the cell
    # (of the padded crop) before its centre and how far it lies behind that cell's centre.
    if not end > start:
        return None
    half = (end - start) / cells / 2
    first, last = max(0, int(np.floor(start - half))), min(length, int(np.ceil(end + half)))
    if first >= last:
        return None
    at = (np.arange(first, last) + 0.5 - start) / (end - start) * cells - 0.5 + 1
    at = at.clip(0, cells + 1)
    before = np.minimum(at.astype(np.int64), cells)
    return first, before, (at - before).astype(np.float32)
