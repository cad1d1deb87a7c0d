"""EfficientViT-M0 on CIFAR-10 for the same minutes: our recipe beside timm's model in a plain loop.

python benchmarks/cifar10_m0.py --data DIR --out DIR [--minutes 7] [--only ours | timm] [--json FILE]

DIR of --data holds the shards. Ours is `vitrail train --recipe cifar10_efficientvit_m0`: from the shards,
with evaluations and saved states within the minutes. timm's model is trained as plainly as one would write
it: every picture decoded before the clock starts, enlarged to 64 x 64, random crop and flip, AdamW at 1e-3
under a cosine, batches of 128, label smoothing 0.1. Both train on the same 49,000 pictures with all threads
of torch, one side after the other, and are scored on the 10,000 of the test split. One seed each: a
difference of a point is noise.
"""

import argparse
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.bench.harness import machine
from vitrail.data import open_data
from vitrail.models import load
from vitrail.recipes import recipe_config
from vitrail.train.evaluate import evaluate
from vitrail.train.loop import train

SIDE, PADDING, BATCH = 64, 8, 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the CIFAR-10 shards")
    parser.add_argument("--out", type=Path, required=True, help="run folder of ours")
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--only", choices=("ours", "timm"))
    parser.add_argument("--json", type=Path, help="write the table here")
    flags = parser.parse_args()
    sides = {"ours": ours, "timm": peer}
    names = [flags.only] if flags.only else list(sides)
    rows = {name: sides[name](flags.data, flags.out, flags.minutes) for name in names}
    table = {"machine": machine(), "minutes": flags.minutes, "rows": rows}
    for name, row in rows.items():
        print(f"{name:5} top-1 {row['top1']:.4f} after {row['pictures']:,} pictures")
    if flags.json:
        flags.json.write_text(json.dumps(table, indent=2) + "\n")


def ours(data: Path, out: Path, minutes: float) -> dict[str, float]:
    config = replace(
        recipe_config("cifar10_efficientvit_m0"), data=str(data), out=str(out), max_minutes=minutes
    )
    result = train(config)
    model = load(result.folder / "best")
    scores = evaluate(model, open_data(data, "test", classes=model.classes))
    return {"top1": scores["top1"], "pictures": result.steps * config.batch_size}


def peer(data: Path, out: Path, minutes: float) -> dict[str, float]:
    torch.manual_seed(0)
    pictures, labels = decoded(data, "train")
    model = timm.create_model("efficientvit_m0", num_classes=10, img_size=SIDE).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    begin, seen = time.monotonic(), 0
    while True:
        for batch in torch.randperm(len(labels)).split(BATCH):
            done = (time.monotonic() - begin) / (60 * minutes)
            if done >= 1:
                return {"top1": score(model, data), "pictures": seen}
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * 0.5 * (1 + math.cos(math.pi * done))
            images = changed(pictures[batch])
            loss = F.cross_entropy(model(images), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen += len(batch)


def decoded(data: Path, split: str) -> tuple[Tensor, Tensor]:
    """Pictures (N, 3, 64, 64), bytes, and labels (N,)."""
    source = open_data(data, split, val_fraction=0.02)  # what ours trains on
    small = torch.stack([torch.from_numpy(source.read(i)) for i in range(len(source))])
    parts = [
        F.interpolate(part.permute(0, 3, 1, 2).float(), size=SIDE, mode="bilinear")
        for part in small.split(1000)
    ]
    pictures = torch.cat([part.round().to(torch.uint8) for part in parts])
    return pictures, torch.from_numpy(source.labels)


def changed(pictures: Tensor) -> Tensor:
    """Random crop of the padded picture and flip, each picture its own; normalised to [-1, 1]."""
    padded = F.pad(pictures, [PADDING] * 4)
    corners = torch.randint(0, 2 * PADDING + 1, (len(pictures), 2)).tolist()
    crops = [p[:, y : y + SIDE, x : x + SIDE] for p, (y, x) in zip(padded, corners, strict=True)]
    images = torch.stack(crops).float() / 127.5 - 1
    flip = torch.rand(len(images)) < 0.5
    images[flip] = images[flip].flip(-1)
    return images


@torch.no_grad()
def score(model: torch.nn.Module, data: Path) -> float:
    pictures, labels = decoded(data, "test")
    model.eval()
    right = [
        (model(part.float() / 127.5 - 1).argmax(1) == truth).sum().item()
        for part, truth in zip(pictures.split(500), labels.split(500), strict=True)
    ]
    return sum(right) / len(labels)


if __name__ == "__main__":
    main()
