"""EfficientViT-M0 on CIFAR-10: what is the model's, what the recipe's. Ours and timm's, each by both recipes.

python benchmarks/cifar10_m0.py --data DIR --json FILE [--images 40000] [--seeds 0 1 2] [--threads 1]

DIR holds the shards. Four cells a seed: {our model, timm's} x {our recipe, a plain one}. Ours is the recipe
cifar10_efficientvit_m0 (rate, warm-up, cosine, decay, clipping and the average of the weights, by vitrail's
own parts); plain is what one would write first: AdamW at 1e-3 with its defaults under a cosine to zero. All
else is the same in every cell: this loop, 49,000 training images decoded before and enlarged to 64 x 64,
batches of 128, crop and flip, label smoothing 0.1, float32. Runs are counted in images, not minutes, so that
a busy machine changes nothing but the time. A seed draws the same batches, crops and flips in every cell;
only the models' own initial weights differ.

A line of JSON is appended to FILE after each run; a run that stands in it is not made again, so that seeds
can be shared out over several commands. The table of FILE is printed in the end: mean and sample standard
deviation of top-1 on the 10,000 test images.
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.bench.harness import machine
from vitrail.data import open_data
from vitrail.models import create_model
from vitrail.recipes import recipe_config
from vitrail.train.config import TrainConfig
from vitrail.train.ema import Ema
from vitrail.train.optim import create_optimizer
from vitrail.train.schedule import learning_rate

SIDE, PADDING, BATCH = 64, 8, 128
MODELS, RECIPES = ("vitrail", "timm"), ("ours", "plain")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the CIFAR-10 shards")
    parser.add_argument("--json", type=Path, required=True, help="lines of the runs; appended to")
    parser.add_argument("--images", type=int, default=40_000, help="training images of each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    cells = [
        (seed, recipe, model) for seed in flags.seeds for recipe in RECIPES for model in MODELS
    ]
    sets = None
    for cell in cells:
        if cell in stored(flags.json, flags.images):  # by another process too
            continue
        sets = sets or (decoded(flags.data, "train"), decoded(flags.data, "test"))
        found = run(*cell, flags.images, *sets)
        row = dict(zip(("seed", "recipe", "model"), cell, strict=True))
        row |= {"images": flags.images, "threads": flags.threads, **found}
        row |= {"instructions": torch.backends.cpu.get_cpu_capability(), "machine": machine()}
        with flags.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"seed {cell[0]}, {cell[2]}'s model, {cell[1]} recipe: {found}", flush=True)
    print(table(stored(flags.json, flags.images)))


def stored(path: Path, images: int) -> dict[tuple, dict[str, Any]]:
    """The runs of as many images that stand in the file."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [row for row in map(json.loads, lines) if row["images"] == images]
    return {(row["seed"], row["recipe"], row["model"]): row for row in rows}


def table(rows: dict[tuple, dict[str, Any]]) -> str:
    """Markdown: a row per cell; the last weights beside their average, where the recipe keeps one."""
    lines = [
        "| recipe | model | runs | top-1 | its last weights, no average |",
        "|---|---|---|---|---|",
    ]
    for recipe in RECIPES:
        for model in MODELS:
            cell = [row for (_, r, m), row in rows.items() if (r, m) == (recipe, model)]
            scores = [spread([row[key] for row in cell]) for key in ("top1", "top1_last")]
            lines.append(f"| {recipe} | {model} | {len(cell)} | {' | '.join(scores)} |")
    return "\n".join(lines)


def spread(scores: list[float]) -> str:
    if not scores:
        return ""
    deviation = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
    return f"{statistics.mean(scores):.3f}{deviation}"


def run(
    seed: int,
    recipe: str,
    name: str,
    count: int,
    data: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
) -> dict[str, float]:
    """Train one cell on `count` images; its scores on the test split."""
    begin = time.monotonic()
    torch.manual_seed(seed)
    if name == "timm":
        model = timm.create_model("efficientvit_m0", num_classes=10, img_size=SIDE)
    else:
        model = create_model("efficientvit_m0", num_classes=10, image_size=SIDE)
    config = recipe_config("cifar10_efficientvit_m0")
    if recipe == "plain":
        config = replace(
            config, lr=1e-3, warmup_epochs=0, min_lr=0.0, clip_grad=None, ema=0.0, weight_decay=0.01
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    else:
        optimizer = create_optimizer(model, config)
    ema = Ema(model, config.ema) if config.ema else None
    draws = torch.Generator().manual_seed(seed)
    total, epoch = count // BATCH, len(data[1]) // BATCH
    warmup = min(round(config.warmup_epochs * epoch), total // 2)
    model.train()
    for step in range(total):
        if step % epoch == 0:
            order = torch.randperm(len(data[1]), generator=draws)
        chosen = order[step % epoch * BATCH :][:BATCH]
        rate = learning_rate(
            config, step, done=step / total, warmup_steps=warmup, total_steps=total
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        learn(model, optimizer, changed(data[0][chosen], draws), data[1][chosen], config)
        if ema is not None:
            ema.update(model, step)
    last = score(model, *test)
    top1 = last
    if ema is not None:
        with ema.applied(model):
            top1 = score(model, *test)
    return {"top1": top1, "top1_last": last, "seconds": round(time.monotonic() - begin)}


def learn(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    config: TrainConfig,
) -> None:
    """One update."""
    loss = F.cross_entropy(model(images), labels, label_smoothing=config.task["label_smoothing"])
    optimizer.zero_grad()
    loss.backward()
    if config.clip_grad is not None:
        nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
    optimizer.step()


def decoded(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 64, 64), bytes, and labels (N,)."""
    source = open_data(data, split, val_fraction=0.02)  # what the recipe trains on
    small = torch.stack([torch.from_numpy(source.images.read(i)) for i in range(len(source))])
    parts = [
        F.interpolate(part.permute(0, 3, 1, 2).float(), size=SIDE, mode="bilinear")
        for part in small.split(1000)
    ]
    images = torch.cat([part.round().to(torch.uint8) for part in parts])
    return images, torch.from_numpy(source.truth.labels)


def changed(images: Tensor, draws: torch.Generator) -> Tensor:
    """Random crop of the padded image and flip, each image its own; normalised to [-1, 1]."""
    padded = F.pad(images, [PADDING] * 4)
    corners = torch.randint(0, 2 * PADDING + 1, (len(images), 2), generator=draws).tolist()
    crops = [p[:, y : y + SIDE, x : x + SIDE] for p, (y, x) in zip(padded, corners, strict=True)]
    out = torch.stack(crops).float() / 127.5 - 1
    flip = torch.rand(len(out), generator=draws) < 0.5
    out[flip] = out[flip].flip(-1)
    return out


@torch.no_grad()
def score(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Top-1; the model is left in eval mode."""
    model.eval()
    right = [
        (model(part.float() / 127.5 - 1).argmax(1) == truth).sum().item()
        for part, truth in zip(images.split(500), labels.split(500), strict=True)
    ]
    return sum(right) / len(labels)


if __name__ == "__main__":
    main()
