"""From a model's raw outputs to Predictions."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from vitrail_runtime.errors import InputError, NotFinite
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
    (height, width), (sy, sx) = geometry.original, geometry.scale
    top, left = geometry.offset
    rows = _seen(height, sy, top, logits.shape[1])
    columns = _seen(width, sx, left, logits.shape[2])
    # The part of the input that these pixels of the original cover.
    low = columns.start * sx - left, rows.start * sy - top
    high = columns.stop * sx - left, rows.stop * sy - top
    box = (
        max(0.0, low[0]),
        max(0.0, low[1]),
        min(float(logits.shape[2]), high[0]),
        min(float(logits.shape[1]), high[1]),
    )
    best = np.full((len(rows), len(columns)), -np.inf, np.float32)
    labels = np.zeros(best.shape, np.int64)
    for label, scores in enumerate(logits):  # one class at a time: memory of two maps, not of K
        image = Image.fromarray(np.ascontiguousarray(scores, dtype=np.float32))
        size = (len(columns), len(rows))
        values = np.asarray(image.resize(size, Image.Resampling.BILINEAR, box=box))
        higher = values > best
        best[higher], labels[higher] = values[higher], label
    segmentation = np.full((height, width), -1, np.int64)
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
    "contrast": _contrast,
}
