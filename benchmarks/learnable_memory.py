"""What a task learns beside a ViT: a classifier alone, a class token, memory of several rows, all weights.

    python benchmarks/learnable_memory.py --data $DATA/bccd --weights VIT --json FILE
        [--out DIR] [--seeds 0 1 2] [--updates 200] [--image-size 64] [--threads 1] [--quick]

The task is to name blood cells: each box of the detection data is cut out with a quarter of its sides around
it; of each class and split as many as its rarest has, drawn by seed 0, so that chance is a third. VIT is a
model folder whose ViT was trained on something else.

head: a linear layer on the network's class token. Memory, masked: that token again, learnt beside the
network, whose answers stay the same, with 0, 1, 5 and 20 rows of memory a block. Memory, full: the network's
own class token is learnt, and all tokens see 5 rows. all weights: of the network and its classifier.

As in the paper (Sandler et al. 2022, arXiv 2203.15243): SGD with momentum, gradients clipped, five steps of
warm-up, no weight decay. Unlike there: batches of 32, few updates; of two learning rates each form takes
the one that does better on the validation split with the first seed.
Runs in --out that stand there are only read; without it they are thrown away at the end.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitrail.bench.harness import machine
from vitrail.data import Examples, open_data
from vitrail.data.augmentation import Augmentation
from vitrail.models import load, read_config
from vitrail.train.config import TrainConfig
from vitrail.train.evaluate import evaluate
from vitrail.train.trainer import train
from vitrail.weights.files import write_text

AROUND, BATCH = 0.25, 32
RATES = (0.01, 0.05)
FORMS: dict[str, dict[str, Any]] = {
    "head": {"train_only": "head"},
    **{
        f"memory, masked, rows {rows}": {"train_only": "capsule", "head_fields": {"rows": rows}}
        for rows in (0, 1, 5, 20)
    },
    "memory, full, rows 5": {"train_only": "capsule", "head_fields": {"form": "full"}},
    "all weights": {"train_only": "full"},
}


def cut(data: Examples, split: str, folder: Path) -> None:
    """Cells of a split as class folders, equally many of each class."""
    boxes = [data.truth.target(i, None) for i in range(len(data))]
    cells = [(i, n) for i, objects in enumerate(boxes) for n in range(len(objects.labels))]
    labels = np.array([boxes[i].labels[n] for i, n in cells])
    rng = np.random.default_rng(0)
    count = np.bincount(labels).min()
    for label, name in enumerate(data.classes):
        (folder / split / name).mkdir(parents=True)
        for place in sorted(rng.permutation(np.flatnonzero(labels == label))[:count]):
            i, n = cells[place]
            x1, y1, x2, y2 = boxes[i].boxes[n]
            margins = np.array([x1 - x2, y1 - y2, x2 - x1, y2 - y1]) * AROUND
            cell = Image.fromarray(data.images.read(i)).crop(
                tuple(np.round(boxes[i].boxes[n] + margins).astype(int))
            )
            cell.save(folder / split / name / f"{Path(data.keys[i]).stem}_{n}.png")


def config_of(
    form: str, rate: float, seed: int, given: argparse.Namespace, data: Path, out: Path
) -> TrainConfig:
    base = read_config(given.weights)["name"]
    chosen = FORMS[form]
    return TrainConfig(
        data=str(data),
        out=str(out / f"{form.replace(', ', '-').replace(' ', '-')}-{rate}-{seed}"),
        model=f"memory/{base}" if form.startswith("memory") else base,
        weights=given.weights,
        image_size=given.image_size,
        resize="squash",
        epochs=1000,
        max_steps=given.updates,
        batch_size=BATCH,
        eval_every=1000,
        seed=seed,
        optimizer="sgd",
        lr=rate,
        weight_decay=0.0,
        warmup_epochs=5 * BATCH / given.images,
        warmup_lr=0.0,
        min_lr=0.0,
        augmentation=Augmentation(crop="random_resized", scale=(0.5, 1.0), flip=0.5),
        task={"label_smoothing": 0.0},
        threads=given.threads,
        workers=0,
        device="cpu",
        **chosen,
    )


def score(config: TrainConfig, split: str) -> float:
    """Top-1 of the run's model, which is trained first where it is not there."""
    best = Path(config.out) / "best"
    if not (best / "config.json").is_file():
        train(config)
    model = load(best)
    return evaluate(model, open_data(config.data, split), batch_size=256)["top1"]


def learnt(config: TrainConfig) -> int:
    """Parameters that are trained."""
    model = load(Path(config.out) / "best")
    part = model if config.train_only == "full" else model.head
    return sum(p.numel() for p in part.parameters())


def measured(form: str, given: argparse.Namespace, data: Path, out: Path) -> dict[str, Any]:
    first = given.seeds[0]
    tried = {r: score(config_of(form, r, first, given, data, out), "val") for r in given.rates}
    rate = max(tried, key=lambda r: tried[r])
    configs = [config_of(form, rate, seed, given, data, out) for seed in given.seeds]
    return {
        "name": form,
        "learnt": learnt(configs[0]),
        "lr": rate,
        "top1": [score(config, "test") for config in configs],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| trained | parameters | lr | top-1, mean | lowest | highest |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        top1 = row["top1"]
        lines.append(
            f"| {row['name']} | {row['learnt']:,} | {row['lr']} | {statistics.fmean(top1):.3f} | "
            f"{min(top1):.3f} | {max(top1):.3f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", required=True, help="detection data with boxes of cells")
    parser.add_argument("--weights", required=True, help="the model folder of a ViT")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    given.rates = RATES
    torch.set_num_threads(given.threads)
    if given.quick:
        given.updates, given.seeds, given.rates = 2, [0], RATES[:1]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as thrown_away:
        out = Path(given.out or thrown_away)
        data = out / "data"
        known = open_data(given.data, "train")
        for split in ("train", "val", "test"):
            if not (data / split).exists():
                cut(open_data(given.data, split, classes=known.classes), split, data)
        given.images = len(open_data(data, "train"))
        for form in FORMS:
            rows.append(measured(form, given, data, out))
            print(table(rows), flush=True)
            if given.json:
                found = {"machine": machine(), "images": given.images, "rows": rows}
                write_text(given.json, json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
