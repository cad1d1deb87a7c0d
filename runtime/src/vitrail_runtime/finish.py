"""From a model's raw outputs to Predictions."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vitrail_runtime.errors import InputError, NotFinite
from vitrail_runtime.panoptic import merge
from vitrail_runtime.prediction import Prediction
from vitrail_runtime.preprocess import Geometry


def finish_classification(
    logits: np.ndarray, classes: Sequence[str], top_k: int = 5
) -> list[Prediction]:
    """Logits (B, K) -> B Predictions with the `top_k` classes of highest probability, best first.

    Scores are softmax probabilities over all K classes; equal ones keep the order of the classes.
    Raises: InputError when the logits do not fit `classes` or top_k < 1, NotFinite when they are NaN or
        infinite.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim != 2 or logits.shape[1] != len(classes):
        raise InputError(
            f"logits of shape {logits.shape} do not fit {len(classes)} classes; "
            f"expected (batch, {len(classes)})"
        )
    if top_k < 1:
        raise InputError(f"top_k must be at least 1, but is {top_k}")
    if not np.isfinite(logits).all():
        raise NotFinite("the model gave scores that are not finite; its weights are damaged")
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    return [
        Prediction(
            labels=labels.astype(np.int64),
            scores=row[labels].astype(np.float32),
            names=[classes[int(i)] for i in labels],
        )
        for row, labels in zip(scores, order, strict=True)
    ]


def finish_segmentation(
    logits: np.ndarray | Sequence[np.ndarray],
    geometries: Sequence[Geometry],
    classes: Sequence[str],
) -> list[Prediction]:
    """Logits (B, K, h, w), or (K, h, w) of each image -> B Predictions with the class of every pixel of the
    original image.

    Each class's logits are brought to the original's size, bilinearly, and the highest wins; equal ones go
    to the first class. Pixels that the model did not see (outside a central crop) are -1. Labels are the
    classes that occur, the one of most pixels first; a score is the class's share of the image.
    Raises: InputError when the logits do not fit `classes`, NotFinite when they are NaN or infinite.
    """
    for image in logits:
        if image.ndim != 3 or len(image) != len(classes):
            raise InputError(
                f"logits of shape {(len(logits), *image.shape)} do not fit {len(classes)} classes; "
                f"expected (batch, {len(classes)}, height, width)"
            )
    if not all(np.isfinite(image).all() for image in logits):
        raise NotFinite("the model gave scores that are not finite; its weights are damaged")
    return [
        _segmented(image, geometry, classes)
        for image, geometry in zip(logits, geometries, strict=True)
    ]


def _segmented(logits: np.ndarray, geometry: Geometry, classes: Sequence[str]) -> Prediction:
    rows, columns, box = _placed(geometry, logits.shape[1:])
    best = np.full((len(rows), len(columns)), -np.inf, np.float32)
    labels = np.zeros(best.shape, np.int64)
    for label, scores in enumerate(logits):  # one class at a time: memory of two maps, not of K
        values = _resized(scores, (len(rows), len(columns)), box)
        higher = values > best
        best[higher], labels[higher] = values[higher], label
    segmentation = np.full(geometry.original, -1, np.int64)
    segmentation[rows.start : rows.stop, columns.start : columns.stop] = labels
    counts = np.bincount(labels.ravel(), minlength=len(classes))
    order = [int(k) for k in np.argsort(-counts, kind="stable") if counts[k]]
    return Prediction(
        labels=np.array(order, np.int64),
        scores=(counts[order] / segmentation.size).astype(np.float32),
        names=[classes[k] for k in order],
        segmentation=segmentation,
        classes=classes,
        size=geometry.original,
    )


def finish_panoptic(
    outputs: Mapping[str, np.ndarray], geometries: Sequence[Geometry], classes: Sequence[str]
) -> list[Prediction]:
    """Masks of queries -> B Predictions whose `segments` tell for every pixel of the original which answer it
    belongs to, if any; best first.

    outputs: scores and labels (B, S), masks (B, S, h, w), probabilities over the whole input, count (B,): how
        many of the S rows of an image are sure, stuff (B, K) bool, which classes are no things, and
        input_size (B, 2), the height and width of the input.
    They are merged by `vitrail_runtime.panoptic.merge`. Raises: as `finish_detection`.
    """
    names = ("scores", "labels", "masks", "count", "stuff", "input_size")
    every = [outputs[name] for name in names]
    if every[4].shape[1:] != (len(classes),):
        raise InputError(
            f"the model says of {every[4].shape[1]} classes whether they are stuff, but there are "
            f"{len(classes)}; give the classes that it was trained on"
        )
    found = []
    for geometry, scores, labels, masks, count, stuff, size in zip(geometries, *every, strict=True):
        these = slice(0, int(count))
        # Of an image without an answer too: NaN is above no threshold.
        if not np.isfinite(scores).all() or not np.isfinite(masks[these]).all():
            raise NotFinite("the model gave masks that are not finite; its weights are damaged")
        given = masks[these], scores[these], labels[these].astype(np.int64)
        found.append(_merged(*given, np.flatnonzero(stuff).tolist(), size, geometry, classes))
    return found


def _merged(
    masks: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    stuff: Sequence[int],
    input_size: np.ndarray,
    geometry: Geometry,
    classes: Sequence[str],
) -> Prediction:
    # The masks are as large as the input, in larger pixels.
    ratio = [cells / int(side) for cells, side in zip(masks.shape[1:], input_size, strict=True)]
    (sy, sx), (top, left) = geometry.scale, geometry.offset
    coarse = Geometry(
        geometry.original, (sy * ratio[0], sx * ratio[1]), (top * ratio[0], left * ratio[1])
    )
    rows, columns, box = _placed(coarse, masks.shape[1:])
    size = (len(rows), len(columns))
    large = (_resized(mask, size, box) for mask in masks)  # one at a time: a hundred may be large
    ids, kinds, said = merge(size, large, scores, labels, stuff, sure=-np.inf)
    order = np.argsort(-np.array(said, np.float32), kind="stable")
    number = np.zeros(len(order) + 1, np.int32)
    number[order + 1] = np.arange(1, len(order) + 1)
    segments = np.zeros(geometry.original, np.int32)
    segments[rows.start : rows.stop, columns.start : columns.stop] = number[ids]
    found = np.array(kinds, np.int64)[order]
    return Prediction(
        labels=found,
        scores=np.array(said, np.float32)[order],
        names=[classes[int(k)] for k in found],
        segments=segments,
        stuff=tuple(stuff),
        classes=classes,
        size=geometry.original,
    )


def finish_detection(
    outputs: Mapping[str, np.ndarray], geometries: Sequence[Geometry], classes: Sequence[str]
) -> list[Prediction]:
    """What a detector found -> B Predictions with boxes in pixels of the original images, best first.

    outputs: boxes (B, D, 4) xyxy in pixels of the input, scores and labels (B, D), count (B,): how many of
        the D rows of an image are answers; mask_crops (B, D, m, m), the probabilities over the boxes, of a
        model that gives masks.
    Boxes are cut at the rim of the original; what lies outside it altogether (in padding) is no answer.
    Raises: InputError when the outputs do not fit `classes` or each other, NotFinite when they are NaN or
        infinite.
    """
    boxes, scores, labels, count = (outputs[key] for key in ("boxes", "scores", "labels", "count"))
    crops = outputs.get("mask_crops")
    images, rows = scores.shape
    if boxes.shape != (images, rows, 4) or labels.shape != (images, rows):
        raise InputError(
            f"boxes {boxes.shape}, scores {scores.shape} and labels {labels.shape} do not belong together; "
            "expected (batch, rows, 4), (batch, rows) and (batch, rows)"
        )
    found = []
    for i, geometry in enumerate(geometries):
        these = slice(0, int(count[i]))
        if not (np.isfinite(boxes[i, these]).all() and np.isfinite(scores[i, these]).all()):
            raise NotFinite("the model gave boxes that are not finite; its weights are damaged")
        own = labels[i, these].astype(np.int64)
        if len(own) and (own.min() < 0 or own.max() >= len(classes)):
            raise InputError(
                f"the model gave labels from {own.min()} to {own.max()}, but has {len(classes)} classes; "
                "give the classes that it was trained on"
            )
        original = geometry.boxes_to_original(boxes[i, these])
        there = np.flatnonzero((original[:, 2:] > original[:, :2]).all(axis=1))
        found.append(
            Prediction(
                labels=own[there],
                scores=scores[i, these][there].astype(np.float32),
                names=[classes[int(label)] for label in own[there]],
                boxes=original[there],
                mask_crops=None if crops is None else crops[i, these][there].astype(np.float32),
                classes=classes,
                size=geometry.original,
            )
        )
    return found


def _placed(
    geometry: Geometry, cells: Sequence[int]
) -> tuple[range, range, tuple[float, float, float, float]]:
    """Rows and columns of the original that an input of (h, w) cells shows, and the part (left, top, right,
    bottom) of it that these cover."""
    (height, width), (sy, sx), (top, left) = geometry.original, geometry.scale, geometry.offset
    rows, columns = _seen(height, sy, top, cells[0]), _seen(width, sx, left, cells[1])
    low = columns.start * sx - left, rows.start * sy - top
    high = columns.stop * sx - left, rows.stop * sy - top
    return (
        rows,
        columns,
        (
            max(0.0, low[0]),
            max(0.0, low[1]),
            min(float(cells[1]), high[0]),
            min(float(cells[0]), high[1]),
        ),
    )


def _resized(
    values: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]
) -> np.ndarray:
    """A part of (h, w) values, bilinearly, at `size` (height, width)."""
    image = Image.fromarray(np.ascontiguousarray(values, dtype=np.float32))
    height, width = size
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR, box=box))


def _seen(length: int, scale: float, offset: float, cells: int) -> range:
    """The pixels of one axis whose centres lie within an input of `cells` pixels; at least one."""
    first = min(length - 1, max(0, math.ceil(offset / scale - 0.5)))
    last = min(length, math.ceil((cells + offset) / scale - 0.5))
    return range(first, max(first + 1, last))


def _classify(
    outputs: Mapping[str, np.ndarray],
    geometries: Sequence[Geometry],
    classes: Sequence[str],
    top_k: int,
) -> list[Prediction]:
    predictions = finish_classification(outputs["logits"], classes, top_k)
    for prediction, geometry in zip(predictions, geometries, strict=True):
        prediction.size = geometry.original
    return predictions


def _segment(
    outputs: Mapping[str, np.ndarray],
    geometries: Sequence[Geometry],
    classes: Sequence[str],
    top_k: int,
) -> list[Prediction]:
    return finish_segmentation(outputs["logits"], geometries, classes)


def _detect(
    outputs: Mapping[str, np.ndarray],
    geometries: Sequence[Geometry],
    classes: Sequence[str],
    top_k: int,
) -> list[Prediction]:
    return finish_detection(outputs, geometries, classes)


def _panoptic(
    outputs: Mapping[str, np.ndarray],
    geometries: Sequence[Geometry],
    classes: Sequence[str],
    top_k: int,
) -> list[Prediction]:
    return finish_panoptic(outputs, geometries, classes)


# Task -> (what a model's `forward_tensors` gives, geometries, classes, top_k) -> Predictions, one an image.
def _contrast(*_: Any) -> list[Prediction]:
    raise InputError(
        "a model of images and captions says something once it is asked by names: "
        "vitrail.zero_shot(model, ['cat', 'dog']) is a classifier; or vitrail predict --classes cat dog"
    )


FINISH: dict[str, Callable[..., list[Prediction]]] = {
    "classify": _classify,
    "segment": _segment,
    "detect": _detect,
    "panoptic": _panoptic,
    "contrast": _contrast,
}
