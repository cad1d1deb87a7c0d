"""A corpus of boxes and masks with everything that is easily counted wrongly, and COCO's scores of it by
plain loops, written from the definition (Lin et al. 2014), and by the package that people compare with."""

import contextlib
import io
from typing import Any

import numpy as np
import torch

from vitrail.metrics.detection import Annotated, DetectionMetrics, Found
from vitrail_runtime.rle import decode_mask, encode_mask

HEIGHT, WIDTH = 60, 80
IOUS = [round(0.5 + 0.05 * i, 2) for i in range(10)]
RANGES = {"": (0, 1e10), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e10)}
Corpus = dict[Any, tuple[Found, Annotated]]


def corpus(
    seed: int, *, images: int = 12, classes: int = 4, objects: int = 12, answers: int = 25,
    masks: bool = False, scale: float = 1.0, largest: float = 3.5,
) -> Corpus:  # fmt: skip
    """Images by id: some without objects, some without answers; a class without objects (the last); scores
    that are equal; crowds; answers close to objects, doubled, of another class; sizes of all kinds (scale).
    """
    rng = np.random.default_rng(seed)
    out: Corpus = {}
    for i in range(images):
        n = int(rng.integers(1, objects + 1)) if i % 6 else 0
        d = int(rng.integers(1, answers + 1)) if i % 5 != 3 else 0
        boxes, labels = _boxes(rng, n, scale, largest), rng.integers(0, classes - 1, n)
        said, said_labels = _boxes(rng, d, scale, largest), rng.integers(0, classes, d)
        if n and d:
            near = rng.integers(0, n, d * 3 // 4)
            k = len(near)
            sides = np.tile(boxes[near, 2:] - boxes[near, :2], 2)
            said[:k] = _sound(boxes[near] + rng.normal(0, 0.07, (k, 4)) * sides)
            said_labels[:k] = np.where(rng.random(k) < 0.85, labels[near], said_labels[:k])
        scores = (rng.random(d) * 5 + 5 * (np.arange(d) < d * 3 // 4)).round() / 10
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(
            1
        ) * 0.7  # as of masks, which fill a part of a box
        truth_masks = found_masks = None
        if masks:
            truth_masks, found_masks = _masks(boxes), _masks(said)
            areas = np.array([decode_mask(m).sum() for m in truth_masks], float)
        crowd = rng.random(n) < 0.15
        out[100 + 7 * i] = (
            Found(said, scores.astype(np.float32), said_labels, found_masks),
            Annotated(boxes, labels, crowd, areas.astype(np.float32), truth_masks),
        )
    return out


def _boxes(rng: np.random.Generator, n: int, scale: float, largest: float) -> np.ndarray:
    centre = rng.random((n, 2)) * (WIDTH * scale, HEIGHT * scale)
    side = np.exp(rng.uniform(1, largest, (n, 2))) * scale
    return _sound(np.concatenate([centre - side / 2, centre + side / 2], 1).round(1))


def _sound(boxes: np.ndarray) -> np.ndarray:
    boxes = boxes.astype(np.float32)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    return boxes


def _masks(boxes: np.ndarray) -> list[dict[str, Any]]:
    out = []
    for x0, y0, x1, y1 in boxes.astype(int).tolist():
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[max(0, y0) : y1 + 1, max(0, x0) : x1 + 1] = True
        mask[::4] = False
        out.append(encode_mask(mask))
    return out


def overlaps(found: Found, truth: Annotated, kind: str) -> np.ndarray:
    """(D, G): intersection over union, of a crowd over the answer's own area."""
    out = np.zeros((len(found.labels), len(truth.labels)))
    for d in range(out.shape[0]):
        for g in range(out.shape[1]):
            if kind == "mask":
                a, b = decode_mask(found.masks[d]), decode_mask(truth.masks[g])
                common, own, other = (a & b).sum(), a.sum(), b.sum()
            else:
                p, q = found.boxes[d].astype(float), truth.boxes[g].astype(float)
                sides = [min(p[2 + i], q[2 + i]) - max(p[i], q[i]) for i in (0, 1)]
                common = max(0.0, sides[0]) * max(0.0, sides[1])
                own, other = ((b[2] - b[0]) * (b[3] - b[1]) for b in (p, q))
            union = own if truth.crowd[g] else own + other - common
            out[d, g] = common / union if union else 0.0
    return out


def area_of(found: Found, d: int, kind: str) -> float:
    if kind == "mask":
        return float(decode_mask(found.masks[d]).sum())
    x0, y0, x1, y1 = found.boxes[d].astype(float)
    return (x1 - x0) * (y1 - y0)


def by_loop(rows: Corpus, classes: int, kind: str, cap: int) -> dict[str, Any]:
    """AP and AR by size and IoU: {"AP": (K, T), "APs": ..., "AR": ..., ...}, NaN where there is no object."""
    pairs = [rows[i] for i in sorted(rows)]
    overlap = [overlaps(f, t, kind) for f, t in pairs]
    out = {}
    for size, (low, high) in RANGES.items():
        ap, ar = np.full((classes, 10), np.nan), np.full((classes, 10), np.nan)
        for k in range(classes):
            for t, threshold in enumerate(IOUS):
                entries, positives = [], 0  # (score, right)
                for (found, truth), iou in zip(pairs, overlap, strict=True):
                    mine = [g for g in range(len(truth.labels)) if truth.labels[g] == k]
                    passed = [truth.crowd[g] or not low <= truth.areas[g] <= high for g in mine]
                    positives += passed.count(False)
                    entries += _matched(
                        found, truth, iou, k, kind, cap, threshold, mine, (low, high)
                    )
                if positives:
                    ap[k, t], ar[k, t] = _average(entries, positives)
        out[f"AP{size}"], out[f"AR{size}"] = ap, ar
    return out


def _matched(found, truth, iou, k, kind, cap, threshold, mine, limits):
    low, high = limits
    skipped = {g: bool(truth.crowd[g]) or not low <= truth.areas[g] <= high for g in mine}
    answers = [d for d in range(len(found.labels)) if found.labels[d] == k]
    answers.sort(key=lambda d: -found.scores[d])  # stable
    taken, entries = set(), []
    for d in answers[:cap]:
        best = None
        for wanted in (False, True):  # those that count first
            for g in mine:
                free = g not in taken or truth.crowd[g]
                if skipped[g] is wanted and free and iou[d, g] >= min(threshold, 1 - 1e-10):
                    best = g if best is None or iou[d, g] >= iou[d, best] else best
            if best is not None:
                break
        if best is not None:
            taken.add(best)
            if not skipped[best]:
                entries.append((found.scores[d], True))
        elif low <= area_of(found, d, kind) <= high:
            entries.append((found.scores[d], False))
    return entries


def _average(entries, positives):
    entries = sorted(entries, key=lambda e: -e[0])
    hits, precision, recall = 0, [], []
    for n, (_, right) in enumerate(entries, 1):
        hits += right
        precision.append(hits / n)
        recall.append(hits / positives)
    total = 0.0
    for r in np.linspace(0, 1, 101):
        total += max((p for p, at in zip(precision, recall, strict=True) if at >= r), default=0.0)
    return total / 101, hits / positives


def by_pycocotools(rows: Corpus, classes: int, kind: str, cap: int) -> dict[str, Any]:
    """As `by_loop`, by the package that everybody quotes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations, results = [], []
    for image, (found, truth) in rows.items():
        for j, (label, box) in enumerate(zip(truth.labels, truth.boxes.astype(float), strict=True)):
            entry = {"id": len(annotations) + 1, "image_id": image, "category_id": int(label) + 1}
            entry |= {"bbox": [*box[:2], *(box[2:] - box[:2])], "iscrowd": int(truth.crowd[j])}
            entry["area"] = float(truth.areas[j])
            if kind == "mask":
                entry["segmentation"] = truth.masks[j]
            annotations.append(entry)
        for j, (label, box) in enumerate(zip(found.labels, found.boxes.astype(float), strict=True)):
            entry = {"image_id": image, "category_id": int(label) + 1}
            entry["score"] = float(found.scores[j])
            if kind == "mask":
                entry["segmentation"] = found.masks[j]
            else:
                entry["bbox"] = [*box[:2], *(box[2:] - box[:2])]
            results.append(entry)
    truth = COCO()
    truth.dataset = {
        "images": [{"id": i, "height": HEIGHT, "width": WIDTH} for i in rows],
        "annotations": annotations,
        "categories": [{"id": k + 1, "name": str(k)} for k in range(classes)],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluator = COCOeval(truth, truth.loadRes(results), "bbox" if kind == "box" else "segm")
        evaluator.params.maxDets = [1, 10, cap]
        evaluator.evaluate()
        evaluator.accumulate()
    precision, recall = evaluator.eval["precision"], evaluator.eval["recall"]
    out = {}
    for a, size in enumerate(RANGES):
        ap, ar = precision[:, :, :, a, 2].mean(1).T, recall[:, :, a, 2].T
        out[f"AP{size}"], out[f"AR{size}"] = (np.where(v < 0, np.nan, v) for v in (ap, ar))
    return out


def row(x: int, score: float = 0.9) -> tuple[Found, Annotated]:
    """An object at x, and an answer upon it."""
    box = np.array([[x, 0, x + 10, 20]], np.float32)
    truth = Annotated(box, np.array([0]), np.array([False]), np.array([200.0]))
    return Found(box, np.array([score]), np.array([0])), truth


def of_rank(rank: int, store: str, out: str) -> None:
    """Two processes, one with the images 2 and 1, the other with 1 and 3, of which the last finds nothing."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    metrics = DetectionMetrics(1)
    for image in ([2, 1], [1, 3])[rank]:
        found, truth = row(image)
        if image == 3:
            found = Found(np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
        metrics.update(image, found, truth)
    torch.save(metrics.compute(), f"{out}.{rank}")
    torch.distributed.destroy_process_group()
