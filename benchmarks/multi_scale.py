"""Multi-scale batches against batches of one size: updates per epoch, pixels per update, time per epoch.

python benchmarks/multi_scale.py --data DIR [--quick] [--models NAME ...] [--sizes PIXELS ...] [--train]
    [--json FILE]

One update of every size is timed (forward, cross entropy, backward, AdamW on pictures in memory); the time
of an epoch is the sum over the updates that the plan of the data has, reading and augmenting left out.
--train also trains both for --epochs and evaluates them at the smallest, the base and the largest size.
"""

import argparse
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitrail.bench.harness import Row, arguments, interleave, report, summary, threads
from vitrail.data import open_data
from vitrail.data.augmentation import Augmentation
from vitrail.data.plan import BatchPlan
from vitrail.models import create_model, load

MODELS = ("efficientvit_m0", "mobilevit_xxs")
EPOCHS = 8  # epochs that the plan's counts are averaged over: the sizes are drawn


def plans(length: int, batch: int, sizes: list[int], base: int) -> dict[str, BatchPlan]:
    how: dict[str, Any] = {"length": length, "batch_size": batch, "size": (base, base)}
    scales = tuple((side, side) for side in sizes)
    return {"one size": BatchPlan(**how), "multi-scale": BatchPlan(**how, scales=scales)}


def updates(plan: BatchPlan) -> Counter[tuple[int, int]]:
    """(pictures, side) of an update -> how many of them EPOCHS epochs have."""
    return Counter(
        (len(batch.indices), batch.size[0])
        for epoch in range(EPOCHS)
        for batch in plan.batches(epoch)
    )


def update(model: nn.Module, optimizer: torch.optim.Optimizer, shape: tuple[int, int]) -> Callable:
    count, side = shape
    images, labels = torch.randn(count, 3, side, side), torch.arange(count) % 10

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return run


def time_updates(name: str, shapes: list[tuple[int, int]], **how: Any) -> list[list[float]]:
    """Seconds of an update of each shape, in turn."""
    model = create_model(name, num_classes=10).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    return interleave([update(model, optimizer, shape) for shape in shapes], **how)


def epoch_facts(counts: Counter[tuple[int, int]]) -> dict[str, float]:
    pixels = [n * side * side for n, side in counts.elements()]
    return {
        "updates_per_epoch": counts.total() / EPOCHS,
        "megapixels_per_update": statistics.fmean(pixels) / 1e6,
        "smallest_megapixels": min(pixels) / 1e6,
        "largest_megapixels": max(pixels) / 1e6,
    }


def measure(name: str, flags: argparse.Namespace, length: int) -> tuple[Row, dict[str, Any]]:
    """A row (ours: an epoch of multi-scale batches, peer: of one size), and what else there is to tell."""
    both = plans(length, flags.batch, flags.sizes, flags.base)
    counts = {what: updates(plan) for what, plan in both.items()}
    shapes = sorted(set().union(*counts.values()))
    seconds = (10 if flags.quick else 120) / len(flags.models)
    how = {"seconds": seconds, "min_rounds": 2 if flags.quick else 5, "warmup": 1}
    taken = time_updates(name, shapes, clock=flags.clock, **how)
    rounds = len(taken[0])
    epochs = {  # seconds of an epoch, as each round would have it
        what: [
            sum(n * taken[shapes.index(shape)][r] for shape, n in count.items()) / EPOCHS
            for r in range(rounds)
        ]
        for what, count in counts.items()
    }
    ours, peer = epochs["multi-scale"], epochs["one size"]
    a, b = summary(ours), summary(peer)
    ratio = statistics.median(p / o for o, p in zip(ours, peer, strict=True))
    row = Row(
        name=f"{name}, an epoch of multi-scale batches",
        ours=a[0],
        ours_spread=a[1],
        peer=b[0],
        peer_spread=b[1],
        ratio=round(ratio, 3),
        rounds=rounds,
    )
    return row, {what: epoch_facts(count) for what, count in counts.items()}


def train_both(name: str, flags: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Plan -> side -> top-1 on the test pictures, after as many epochs of either."""
    from vitrail.train.config import TrainConfig
    from vitrail.train.evaluate import evaluate
    from vitrail.train.trainer import train

    scores: dict[str, dict[str, float]] = {}
    for what, sizes in (("one size", ()), ("multi-scale", tuple(flags.sizes))):
        with tempfile.TemporaryDirectory() as folder:
            config = TrainConfig(
                data=str(flags.data),
                model=name,
                out=folder,
                image_size=flags.base,
                resize="squash",
                sizes=sizes,
                batch_size=flags.batch,
                epochs=flags.epochs,
                max_steps=flags.max_steps,
                val_fraction=0.02,
                ema=0.995,
                augmentation=Augmentation(crop="simple", interpolation="bilinear"),
                device="cpu",
                workers=0,
                threads=flags.threads,
            )
            train(config)
            model = load(Path(folder) / "last")
            test = open_data(flags.data, "test", classes=model.classes)
            scores[what] = {}
            for side in sorted({flags.sizes[0], flags.base, flags.sizes[-1]}):
                seen = replace(model.preprocessing, size=(side, side))
                scores[what][str(side)] = evaluate(model, test, seen)["top1"]
    return scores


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="class folders or tar shards")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME")
    parser.add_argument("--sizes", nargs="+", type=int, default=[32, 48, 64, 80, 96])
    parser.add_argument("--base", type=int, default=64, help="side that --batch is meant at")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--train", action="store_true", help="also train both and compare")
    parser.add_argument("--epochs", type=int, default=10, help="of --train")
    parser.add_argument("--max-steps", type=int, help="of --train: stop earlier")
    flags = parser.parse_args()
    flags.sizes.sort()
    length = len(open_data(flags.data, "train"))
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    with threads(flags.threads):
        for name in flags.models:
            row, facts[name] = measure(name, flags, length)
            rows.append(row)
            if flags.train:
                facts[name]["top1"] = train_both(name, flags)
        print(lines(facts), end="\n\n")
        what = {
            "what": "an epoch of updates in fp32, multi-scale (ours) and of one size (peer)",
            "clock": flags.clock,
            "pictures": length,
            "batch": flags.batch,
            "base": flags.base,
            "sizes": flags.sizes,
            "models": facts,
        }
        report(rows, json_file=flags.json, **what)


def lines(facts: dict[str, Any]) -> str:
    """What the plans have, and the scores of --train, as Markdown."""
    out = [
        "| model | batches | updates per epoch | megapixels per update (least, most) | top-1 by side |",
        "|---|---|---|---|---|",
    ]
    for name, about in facts.items():
        for what in ("one size", "multi-scale"):
            f = about[what]
            top1 = about.get("top1", {}).get(what, {})
            scores = ", ".join(f"{side}: {score:.3f}" for side, score in top1.items())
            pixels = f"{f['megapixels_per_update']:.3f}"
            span = f"({f['smallest_megapixels']:.3f}, {f['largest_megapixels']:.3f})"
            out.append(
                f"| {name} | {what} | {f['updates_per_epoch']:.1f} | {pixels} {span} | {scores} |"
            )
    return "\n".join(out)


if __name__ == "__main__":
    main()
