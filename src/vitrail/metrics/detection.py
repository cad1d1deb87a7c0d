"""Scores of boxes and masks: COCO's average precision, by faster-coco-eval, and what kinds of mistakes cost
it (`detection_errors.py`)."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster

from vitrail.metrics.detection_errors import error_breakdown

IOUS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))  # COCO's thresholds
SIZES = ("s", "m", "l")  # of objects: areas below 32 x 32, below 96 x 96 pixels, and above
MAX_DETECTIONS = 100  # COCO's cap on the answers that count, of an image and class
CHUNK = 64  # images that are in the library's form at a time

Kind = Literal["box", "mask"]


@dataclass(frozen=True, eq=False)
class Found:
    """A model's answers on one image: boxes (n, 4) xyxy in pixels of the original, scores and labels (n,);
    masks: of each, COCO's run-length encoding; None: the model gives none."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    masks: Sequence[dict[str, Any]] | None = None


@dataclass(frozen=True, eq=False)
class Annotated:
    """What is true of one image: boxes, labels and masks as in `Found`; crowd (n,): a box around many
    objects, in which answers are neither right nor wrong; areas (n,) in pixels, by which an object is small
    or large."""

    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    masks: Sequence[dict[str, Any]] | None = None


class DetectionMetrics:
    """Collects the answers on each image by its name; `compute` measures them, over all processes where there
    are several: an image that two of them had counts once.

    kinds: what is compared, boxes or masks. All answers of the model count, of an image and class COCO's 100
    or more; of a model that gives more, `AP_100` and `AR_100` are those of the best 100, which compare with
    others' figures.

    Between updates only numbers and run lengths are kept; the library's own form, some kilobytes for each
    object, exists for one class of CHUNK images at a time.
    """

    def __init__(self, num_classes: int, *, kinds: Sequence[Kind] = ("box",)) -> None:
        self.num_classes, self.kinds = num_classes, tuple(kinds)
        self.rows: dict[Any, tuple[Found, Annotated]] = {}

    def update(self, image: Hashable, found: Found, truth: Annotated) -> None:
        """image: its name, such as its id, by which images are ordered. The same again is the same image."""
        for labels in (found.labels, truth.labels):
            assert len(labels) == 0 or (labels.min() >= 0 and labels.max() < self.num_classes)
        self.rows[image] = found, truth

    def compute(self) -> dict[str, Any]:
        """See `measured`; and `errors` (`error_breakdown`), num_images, and, of each class, its num_objects,
        crowds left out."""
        rows = self.gathered()
        columns = _Columns(rows)
        objects = columns.true_labels[~columns.crowd]
        cap = max([MAX_DETECTIONS, *(len(f.scores) for f, _ in rows)])
        return {
            **{kind: measured(columns, self.num_classes, kind, cap) for kind in self.kinds},
            "errors": error_breakdown(rows, self.num_classes, cap),
            "num_images": len(rows),
            "num_objects": np.bincount(objects, minlength=self.num_classes).tolist(),
        }

    def gathered(self) -> list[tuple[Found, Annotated]]:
        """Of all images of all processes, in the order of their names."""
        parts: list[Any] = [self.rows]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, self.rows)
        whole = {image: row for part in parts for image, row in part.items()}
        return [whole[image] for image in sorted(whole)]


class _Columns:
    """All images' rows, one after another; `owner` says of each which image it belongs to."""

    def __init__(self, rows: Sequence[tuple[Found, Annotated]]) -> None:
        found, true = [f for f, _ in rows], [t for _, t in rows]
        self.owner, self.true_owner = _owners(found), _owners(true)
        self.boxes, self.true_boxes = _joined(found, "boxes"), _joined(true, "boxes")
        self.labels, self.true_labels = _joined(found, "labels"), _joined(true, "labels")
        self.scores = _joined(found, "scores")
        self.crowd, self.areas = _joined(true, "crowd").astype(bool), _joined(true, "areas")
        self.masks = [mask for f in found for mask in f.masks or ()]
        self.true_masks = [mask for t in true for mask in t.masks or ()]


def _owners(rows: Sequence[Any]) -> np.ndarray:
    return np.repeat(np.arange(len(rows)), [len(row.labels) for row in rows])


def _joined(rows: Sequence[Any], name: str) -> np.ndarray:
    empty = np.zeros((0, 4) if name == "boxes" else 0, np.int64 if name == "labels" else float)
    return np.concatenate([empty, *(getattr(row, name) for row in rows)]).astype(empty.dtype)


def measured(columns: _Columns, num_classes: int, kind: Kind, cap: int) -> dict[str, Any]:
    """COCO's numbers, as plain numbers and lists; NaN is what cannot be told (no object of a class or size).

    AP: mean precision over 101 recalls, the thresholds of IOUS and the classes; AP50, AP75: at one of them.
    APs, APm, APl: of objects of that size. AR1, AR10, AR: mean highest recall with 1, 10 and the largest
    number of answers an image and class; ARs, ARm, ARl. AP_100, AR_100: where that number is more than 100.
    by_iou: the AP at each of IOUS. precision: by IoU threshold ("0.50", "0.75"), at each of 101 recalls.
    per_class: AP, AP50, AP75, AR of each class. max_detections: `cap`, the largest of those numbers.
    """
    caps = sorted({1, 10, MAX_DETECTIONS, cap})
    nothing = np.full((len(IOUS), 101, 4, len(caps)), np.nan)
    precision = np.stack([nothing] * num_classes)  # (K, T, R, A, M)
    recall = precision[:, :, 0].copy()
    for label in np.unique(columns.true_labels).tolist():
        precision[label], recall[label] = _of_class(columns, label, kind, caps)
    ap, ar = precision.mean(2), recall.mean(1)  # (K, T, A, M) and (K, A, M)

    def mean(values: np.ndarray) -> float:
        known = values[~np.isnan(values)]
        return float(known.mean()) if len(known) else float("nan")

    t50, t75, hundred = IOUS.index(0.5), IOUS.index(0.75), caps.index(MAX_DETECTIONS)
    out: dict[str, Any] = {
        "AP": mean(ap[:, :, 0, -1]),
        "AP50": mean(ap[:, t50, 0, -1]),
        "AP75": mean(ap[:, t75, 0, -1]),
        **{f"AP{size}": mean(ap[:, :, 1 + i, -1]) for i, size in enumerate(SIZES)},
        "AR1": mean(ar[:, 0, caps.index(1)]),
        "AR10": mean(ar[:, 0, caps.index(10)]),
        "AR": mean(ar[:, 0, -1]),
        **{f"AR{size}": mean(ar[:, 1 + i, -1]) for i, size in enumerate(SIZES)},
    }
    if cap > MAX_DETECTIONS:
        out |= {"AP_100": mean(ap[:, :, 0, hundred]), "AR_100": mean(ar[:, 0, hundred])}
    curves = {"0.50": precision[:, t50, :, 0, -1], "0.75": precision[:, t75, :, 0, -1]}
    return out | {
        "by_iou": [mean(ap[:, t, 0, -1]) for t in range(len(IOUS))],
        "precision": {iou: [mean(at) for at in curve.T] for iou, curve in curves.items()},
        "per_class": [
            {
                "AP": float(ap[k, :, 0, -1].mean()),
                "AP50": float(ap[k, t50, 0, -1]),
                "AP75": float(ap[k, t75, 0, -1]),
                "AR": float(ar[k, 0, -1]),
            }
            for k in range(num_classes)
        ],
        "max_detections": cap,
    }


def _of_class(
    columns: _Columns, label: int, kind: Kind, caps: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Precision (T, R, A, M) and recall (T, A, M) of one class; NaN where there is no object of a size but
    crowds."""
    # The library's two steps: images are matched on their own, chunk by chunk, and then counted together.
    by_size: list[list[Any]] = [[] for _ in range(4)]
    for chunk in _chunks(columns, label, kind):
        matcher = _evaluator(kind, caps, *chunk)
        matcher.evaluate()
        matched = matcher._evalImgs_cpp  # sizes, and of each all images
        images = len(matcher.params.imgIds)
        for a, kept in enumerate(by_size):
            kept += matched[a * images : (a + 1) * images]
    whole = _evaluator(kind, caps)
    whole.params.catIds, whole.params.imgIds = [1], list(range(len(by_size[0])))
    whole._paramsEval = whole.params
    whole._evalImgs_cpp = [image for kept in by_size for image in kept]
    whole.accumulate()
    precision, recall = whole.eval["precision"][:, :, 0], whole.eval["recall"][:, 0]
    return np.where(precision < 0, np.nan, precision), np.where(recall < 0, np.nan, recall)


def _evaluator(kind: Kind, caps: Sequence[int], truth: Any = None, found: Any = None) -> Any:
    name: Any = "bbox" if kind == "box" else "segm"
    evaluator = COCOeval_faster(
        truth,
        found,
        name,
        print_function=lambda *_: None,
        separate_eval=True,
        rle_iou_max_workers=1,
    )
    evaluator.params.maxDets = list(caps)
    return evaluator


def _chunks(columns: _Columns, label: int, kind: Kind) -> Iterator[tuple[COCO, COCO]]:
    """Objects and answers of one class, of CHUNK images at a time, as the library wants them."""
    true_rows = np.flatnonzero(columns.true_labels == label)
    rows = np.flatnonzero(columns.labels == label)
    true_owner, owner = columns.true_owner[true_rows], columns.owner[rows]
    images = np.union1d(true_owner, owner)
    for start in range(0, len(images), CHUNK):
        some = images[start : start + CHUNK]
        truth = [
            _entry(columns, i, kind, true=True)
            for i in true_rows[(true_owner >= some[0]) & (true_owner <= some[-1])].tolist()
        ]
        found = [
            _entry(columns, i, kind, true=False)
            for i in rows[(owner >= some[0]) & (owner <= some[-1])].tolist()
        ]
        masks = columns.true_masks if kind == "mask" else ()
        gt = _coco(some, truth, masks)
        yield gt, gt.loadRes(found)


def _coco(images: np.ndarray, annotations: list[dict[str, Any]], masks: Sequence[Any]) -> COCO:
    height, width = masks[0]["size"] if masks else (0, 0)  # of no consequence: masks bring theirs
    out = COCO()
    out.dataset = {
        "images": [{"id": int(i), "height": height, "width": width} for i in images],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "object"}],
    }
    out.createIndex()
    return out


def _entry(columns: _Columns, i: int, kind: Kind, *, true: bool) -> dict[str, Any]:
    owner = (columns.true_owner if true else columns.owner)[i]
    entry: dict[str, Any] = {"id": i + 1, "image_id": int(owner), "category_id": 1}
    x0, y0, x1, y1 = (columns.true_boxes if true else columns.boxes)[i].tolist()
    bbox = [x0, y0, x1 - x0, y1 - y0]
    if true:
        crowd = int(columns.crowd[i])
        entry |= {"bbox": bbox, "area": float(columns.areas[i]), "iscrowd": crowd}
        if kind == "mask":
            entry["segmentation"] = columns.true_masks[i]
    elif kind == "mask":
        # Without a box, else the library takes an answer's area from that.
        entry |= {"segmentation": columns.masks[i], "score": float(columns.scores[i])}
    else:
        entry |= {"bbox": bbox, "score": float(columns.scores[i])}
    return entry
