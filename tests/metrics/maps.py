"""Class maps whose scores are counted pixel by pixel; in processes of their own, too."""

import json
import math
from pathlib import Path

import numpy as np
import torch

from vitrail.metrics import SegmentationMetrics

IGNORE = 255
K = 6  # class 3 is nowhere, 4 only in the truth, 5 only predicted


def maps(seed: int = 0, size: tuple[int, int] = (13, 21)) -> tuple[torch.Tensor, torch.Tensor]:
    """(predicted, truth), uint8; every eighth pixel or so is ignored."""
    rng = np.random.default_rng(seed)
    truth = rng.choice([0, 1, 2, 4], size, p=(0.6, 0.25, 0.1, 0.05))
    predicted = np.where(rng.random(size) < 0.7, truth, rng.choice([0, 1, 2, 5], size))
    predicted[truth == 4] = 1
    truth[rng.random(size) < 0.12] = IGNORE
    return torch.tensor(predicted, dtype=torch.uint8), torch.tensor(truth, dtype=torch.uint8)


def by_loop(pairs, num_classes: int = K) -> dict:
    """As the definitions have it, pixel by pixel. A class without pixels has no score."""
    confusion = [[0] * num_classes for _ in range(num_classes)]
    hits, shown, said, total = ([0] * num_classes for _ in range(4))
    for predicted, truth in pairs:
        for p, t in zip(predicted.flatten().tolist(), truth.flatten().tolist(), strict=True):
            if t == IGNORE:
                continue
            shown[t] += 1
            if p >= 0:
                said[p] += 1
                confusion[t][p] += 1
            hits[t] += p == t
    total = [s + p - h for s, p, h in zip(shown, said, hits, strict=True)]
    iou = [h / n if n else math.nan for h, n in zip(hits, total, strict=True)]
    accuracy = [h / n if n else math.nan for h, n in zip(hits, shown, strict=True)]
    each = zip(iou, accuracy, shown, strict=True)
    return {
        "mIoU": np.nanmean(iou),
        "pixel_accuracy": sum(hits) / sum(shown),
        "mean_accuracy": np.nanmean(accuracy),
        "num_pixels": sum(shown),
        "per_class": [{"iou": i, "accuracy": a, "pixels": n} for i, a, n in each],
        "confusion": confusion,
    }


def count(rank: int, world: int, store: str, out: str) -> None:
    """Each process counts its share of three images; what it was given stands in OUT-RANK."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    metrics = SegmentationMetrics(K)
    said = [metrics.update(*maps(seed, (7 + seed, 9))) for seed in range(rank, 3, world)]
    Path(f"{out}-{rank}").write_text(json.dumps([said, metrics.compute()]))
    torch.distributed.destroy_process_group()
