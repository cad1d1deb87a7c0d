"""Accuracy against training tokens: squares of one size beside packed images of mixed sizes (NaViT).

python benchmarks/native_accuracy.py --data $DATA/cifar10 --out out/native (--minutes 8 | --tokens N)
    [--seeds 0 1] [--runs NAME ...] [--threads 1] [--json FILE] [--picture docs/images/native_accuracy.png]

What Dehghani et al. ("Patch n' Pack: NaViT", NeurIPS 2023, arXiv 2307.06304, figure 1) show on JFT, at the
scale of a CPU core. Every image of CIFAR-10 is pasted at its own ratio, enlarged to the short side of a
canvas of mixed size (32 to 96 pixels) and ratio (1:2 to 2:1), somewhere on it; the rest has the image's
mean colour. An image's name alone says which canvas. They are written once, as tar shards, into --out.

vit: a plain ViT (width 128, depth 6) on squares of 48 x 48 (36 patches of 8 x 8), as classifiers are
trained: canvases squashed.
navit: NaViT of the same width and depth on packs, each canvas at its ratio, its side drawn anew in every
epoch (the paper's cut normal, 16 to 56 pixels, of the area), 30 % of its patches dropped on average.
navit_squares (--runs alone): NaViT's network trained as the first, which tells the network from the
packing.

All have 2,048 tokens an update, class tokens counted, one recipe, and the same number of tokens to learn
from. --tokens says how many; --minutes measures how many fit into so much time of this machine, on average
over the runs, and all take those (kept in --out). Flips are the only augmentation. A run is scored five
times on its way, on 2,000 test images at 36 patches, and at its end at eight budgets: squares of so many
patches, or images at their ratio with at most so many, never enlarged. This takes a minute or two more. A
run that stopped goes on from the last of its five scores; one that is finished is only read. No setting was
chosen by a score.
"""

import argparse
import hashlib
import io
import json
import math
import tarfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils import clip_grad_norm_

from vitrail.bench.harness import machine
from vitrail.data import open_data
from vitrail.data.augmentation import Augmentation
from vitrail.data.examples import Examples
from vitrail.data.loader import TrainLoader
from vitrail.data.pack_plan import PackPlan
from vitrail.data.packed import Packed
from vitrail.data.packing import Packing
from vitrail.data.plan import BatchPlan
from vitrail.models import at_own_shape, create_model
from vitrail.modes import eval_mode
from vitrail.packing import pack
from vitrail.tasks.section import SOFT
from vitrail.train.config import TrainConfig
from vitrail.train.optim import create_optimizer
from vitrail.train.schedule import learning_rate
from vitrail.weights.files import write_text
from vitrail_runtime.preprocess import Preprocessing, prepare

PATCH, SIDE, STEP_TOKENS, EPOCHS = 8, 48, 2048, 1000
SHAPE = {"embed_dim": 128, "depth": 6, "num_heads": 4, "patch_size": PATCH, "image_size": SIDE}
MODELS = {
    "vit": "vit_tiny_patch16",
    "navit": "navit_tiny_patch16",
    "navit_squares": "navit_tiny_patch16",
}
PACKING = Packing(
    max_tokens=STEP_TOKENS, resolution="normal", sides=(16, 56), drop=0.3, drop_std=0.1
)
RECIPE = TrainConfig(lr=1e-3, weight_decay=0.05, min_lr=1e-5)
BUDGETS = (9, 16, 25, 36, 49, 64, 81, 100)  # patches of an image
SCORED = 2000  # test images
POINTS = 5


def canvas(pixels: np.ndarray, key: str) -> Image.Image:
    """An image (H, W, 3) pasted on a canvas that its name chooses."""
    rng = np.random.default_rng(list(hashlib.sha256(key.encode()).digest()[:8]))
    side, ratio, place = rng.uniform(40, 80), 2 ** rng.uniform(-1, 1), rng.uniform()
    height, width = (round(min(96, max(32, side * root))) for root in (ratio**0.5, ratio**-0.5))
    short = min(height, width)
    colour = tuple(pixels.mean((0, 1)).round().astype(int).tolist())
    out = Image.new("RGB", (width, height), colour)
    own = Image.fromarray(pixels).resize((short, short), Image.Resampling.BICUBIC)
    out.paste(own, (round(place * (width - short)), round(place * (height - short))))
    return out


def write_images(source: Path, folder: Path) -> Path:
    """Both splits as shards of canvases, unless they are there."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        path = folder / f"{split}-000000.tar"
        if path.exists():
            continue
        data = open_data(source, split, val_fraction=0.0)
        half = path.with_suffix(".part")
        with tarfile.open(half, "w") as shard:
            for i in range(len(data)):
                buffer = io.BytesIO()
                key = Path(data.keys[i]).stem
                canvas(data.images.read(i), f"{split}/{key}").save(buffer, "PNG", compress_level=1)
                label = str(int(data.truth.target(i, None))).encode()
                for name, content in ((f"{key}.png", buffer.getvalue()), (f"{key}.cls", label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))
        half.rename(path)
    names = folder / "classes.txt"
    names.write_text("\n".join(open_data(source, "test").classes) + "\n", encoding="utf-8")
    return folder


def batches(run: str, model: Any, data: Examples, seed: int, start: int) -> Iterator[Any]:
    """What the updates from `start` on learn from, all of the same number of tokens."""
    own = run == "navit"
    prefix = model.backbone.num_prefix_tokens
    size = 1 if own else round(STEP_TOKENS / ((SIDE // PATCH) ** 2 + prefix))
    plan: Any = BatchPlan(length=len(data), batch_size=size, size=(SIDE, SIDE), seed=seed)
    if own:
        plan = PackPlan(
            samples=plan,
            sizes=data.images.sizes,
            packing=PACKING,
            patch_size=PATCH,
            num_prefix_tokens=prefix,
            epochs=EPOCHS,
        )
    shown = Augmentation(crop="whole")
    shown = replace(shown, mean=model.preprocessing.mean, std=model.preprocessing.std)
    loader = TrainLoader(data, plan, shown)
    for epoch in range(EPOCHS):
        steps = plan.steps(epoch)
        if start < steps:
            for batch in loader.epoch(epoch, start):
                yield batch.to(torch.device("cpu"), model.preprocessing)
        start = max(0, start - steps)


def tokens_of(batch: Any, model: Any) -> int:
    """What the network computes of a batch."""
    packed = isinstance(batch, Packed)
    patches = sum(batch.lengths) if packed else batch.num_images * (SIDE // PATCH) ** 2
    return patches + batch.num_images * model.backbone.num_prefix_tokens


class Trial:
    """A run with its seed: from nothing, or from where it stopped, to its scores."""

    def __init__(self, run: str, seed: int, data: Path, out: Path, tokens: int) -> None:
        self.run, self.seed, self.tokens = run, seed, tokens
        self.train_data = open_data(data, "train", val_fraction=0.0)
        self.test = open_data(data, "test", classes=self.train_data.classes)
        self.kept = out / f"{run}-{seed}.json"
        self.state = out / f"{run}-{seed}.pt"
        torch.manual_seed(seed)
        fields: dict[str, Any] = SHAPE if run == "vit" else {**SHAPE, "image_size": 96}
        self.model: Any = create_model(MODELS[run], classes=self.train_data.classes, **fields)
        self.optimizer = create_optimizer(self.model, RECIPE)
        self.at = {"step": 0, "tokens": 0, "images": 0, "seconds": 0.0}
        self.curve: list[dict[str, float]] = []

    def result(self) -> dict[str, Any]:
        if self.kept.exists():
            return json.loads(self.kept.read_text(encoding="utf-8"))
        if self.state.exists():
            state = torch.load(self.state, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.at, self.curve = state["at"], state["curve"]
        self.train()
        found = {
            "run": self.run,
            "seed": self.seed,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            **self.at,
            "curve": self.curve,
            "budgets": {budget: self.score(budget) for budget in BUDGETS},
        }
        write_text(self.kept, json.dumps(found, indent=2))
        self.state.unlink(missing_ok=True)
        return found

    def train(self) -> None:
        at, before = self.at, time.perf_counter()
        for batch in batches(self.run, self.model, self.train_data, self.seed, int(at["step"])):
            if at["tokens"] >= self.tokens:
                break
            self.update(batch)
            at["seconds"] += time.perf_counter() - before
            if at["tokens"] * POINTS >= self.tokens * (len(self.curve) + 1):
                top1 = self.score((SIDE // PATCH) ** 2)
                self.curve.append({**at, "top1": top1})
                print(f"{self.run} {self.seed}: {json.dumps(self.curve[-1])}", flush=True)
                parts = {"model": self.model.state_dict(), "at": at, "curve": self.curve}
                torch.save({**parts, "optimizer": self.optimizer.state_dict()}, self.state)
            before = time.perf_counter()

    def update(self, batch: Any) -> None:
        at, total = self.at, 10**6  # the schedule in millionths of the tokens
        done = at["tokens"] / self.tokens
        rate = learning_rate(
            RECIPE, int(done * total), done=done, warmup_steps=total // 20, total_steps=total
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        self.model.train()
        losses = self.model.losses(batch.images, batch.targets, **batch.padding)
        loss = sum(losses.values()) / batch.num_images
        self.optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        at["step"] += 1
        at["tokens"] += tokens_of(batch, self.model)
        at["images"] += batch.num_images

    def score(self, patches: int) -> float:
        """Share of test images that are told right with so many patches each."""
        own, side = self.run == "navit", math.isqrt(patches) * PATCH
        p: Preprocessing = replace(self.model.preprocessing, mode="squash", size=(side, side))
        if own:
            p = at_own_shape(self.model, patches)
        right = 0
        with eval_mode(self.model), torch.inference_mode():
            for first in range(0, SCORED, 100):
                some = range(first, min(first + 100, SCORED))
                images = [torch.from_numpy(prepare(self.test.images.read(i), p)[0]) for i in some]
                labels = np.array([int(self.test.truth.target(i, None)) for i in some])
                for packed in pack(
                    images, PATCH, STEP_TOKENS, self.model.backbone.num_prefix_tokens
                ):
                    said = self.model.forward_packed(packed).argmax(1).numpy()
                    right += int((said == labels[list(packed.image_ids)]).sum())
        return right / SCORED


def measured_tokens(minutes: float, trials: list[Trial]) -> int:
    """How many tokens these learn from in so much time each on average, from a few seconds of every one."""
    per_token = []
    for trial in trials:
        source = batches(trial.run, trial.model, trial.train_data, trial.seed, 0)
        for _ in range(3):
            trial.update(next(source))
        tokens, before = trial.at["tokens"], time.perf_counter()
        while time.perf_counter() - before < 10:
            trial.update(next(source))
        per_token.append((time.perf_counter() - before) / (trial.at["tokens"] - tokens))
    return round(60 * minutes / (sum(per_token) / len(per_token)))


def table(found: list[dict[str, Any]]) -> str:
    """Markdown: the way of every run, then its end at every budget."""
    share = [f"{(i + 1) / POINTS:.0%}" for i in range(POINTS)]
    lines = _rows(["run", "seed", "tokens", "images", "minutes", *share])
    for row in found:
        cells = [f"{point['top1']:.3f}" for point in row["curve"]]
        facts = [f"{row['tokens']:,}", f"{row['images']:,}", f"{row['seconds'] / 60:.1f}"]
        lines.append("| " + " | ".join([row["run"], str(row["seed"]), *facts, *cells]) + " |")
    lines += ["", *_rows(["run", "seed", *(f"{n} patches" for n in BUDGETS)])]
    for row in found:
        cells = [f"{row['budgets'][str(n)]:.3f}" for n in BUDGETS]
        lines.append("| " + " | ".join([row["run"], str(row["seed"]), *cells]) + " |")
    return "\n".join(lines)


def _rows(head: list[str]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Accuracy against training tokens, and against the patches of an image at the end."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained")
    colours = dict(zip(MODELS, ("#8a5a00", "#1f5fa8", "#6b7280"), strict=True))
    for row in found:
        style: dict[str, Any] = {"color": colours[row["run"]], "markersize": 4}
        style["linestyle"] = "-" if row["seed"] == found[0]["seed"] else "--"
        style["label"] = f"{row['run']}, seed {row['seed']}"
        points = row["curve"]
        axes[0].plot([p["tokens"] / 1e6 for p in points], [p["top1"] for p in points], "o", **style)
        budgets = [row["budgets"][str(n)] for n in BUDGETS]
        axes[1].plot(BUDGETS, budgets, "o", **style)
    axes[0].set_xlabel("training tokens, millions")
    axes[1].set_xlabel("patches of an image in evaluation")
    for ax in axes:
        ax.set_title(f"top-1, {SCORED:,} test images", fontsize=11, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, color=SOFT, linewidth=0.8)
        ax.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, required=True, help="CIFAR-10 as class folders or shards"
    )
    parser.add_argument("--out", type=Path, required=True, help="where images and runs are kept")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="of each run, about")
    budget.add_argument("--tokens", type=int, help="that each run learns from")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--runs", nargs="+", choices=MODELS, default=["vit", "navit"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the scores and the machine there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw them into this PNG")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    data = write_images(flags.data, flags.out / "images")
    kept = flags.out / "tokens.json"
    if kept.exists():
        tokens = json.loads(kept.read_text(encoding="utf-8"))
        if flags.tokens not in (None, tokens):
            parser.error(
                f"the runs in {flags.out} learn from {tokens:,} tokens; give another --out"
            )
    else:
        trials = [Trial(run, 0, data, flags.out, 10**9) for run in flags.runs]
        tokens = flags.tokens or measured_tokens(flags.minutes, trials)
        write_text(kept, json.dumps(tokens))
    print(f"{tokens:,} tokens a run", flush=True)
    found = []
    for seed in flags.seeds:  # all of a seed first: a study that is cut short compares
        for run in flags.runs:
            Trial(run, seed, data, flags.out, tokens).result()
            path = flags.out / f"{run}-{seed}.json"
            found.append(json.loads(path.read_text(encoding="utf-8")))
    found.sort(key=lambda row: (list(MODELS).index(row["run"]), row["seed"]))
    print(table(found))
    if flags.picture:
        draw(found, flags.picture)
    if flags.json:
        told = {"tokens": tokens, "machine": machine(), "runs": found}
        write_text(flags.json, json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
