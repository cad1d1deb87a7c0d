"""Detection at images' own shape: a plain ViT trained on squares, and on packs of as many tokens.

    python benchmarks/native_detection.py --data $DATA/bccd --minutes 10 --threads 1 --weights VIT --json FILE
        [--out DIR] [--seeds 0 1] [--patches 256] [--train-only full] [--updates N] [--quick]

Images are cut to mixed shapes first: of each a part or two (training and test), of a third to nine tenths of
its area and a ratio from 1:3 to 3:1, drawn by its file's name; boxes are cut with them, and those of which
less than a quarter is left go. squares: every image squashed to a square of so many patches, in batches of
eight. native: every image at its own ratio, made smaller to at most as many patches, in packs of as many
tokens as such a batch has. All else is the same: Faster R-CNN with a simple pyramid, the recipe
`detect_small` without its jitter of sizes, and the number of updates, which the squares' minutes decide (or
--updates).

Scored on the test split in pixels of the cut images: all of them, and those of a ratio beyond 3:2 and within.
Runs in --out that stand there go on, or are only read; without it they are thrown away at the end.
"""

import argparse
import hashlib
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitrail.bench.harness import machine
from vitrail.data import Examples, open_data
from vitrail.data.augmentation import Augmentation
from vitrail.data.packing import Packing
from vitrail.models import load
from vitrail.recipes.detection import detect_small
from vitrail.train.config import TrainConfig
from vitrail.train.evaluate import evaluate
from vitrail.train.trainer import train
from vitrail.weights.files import write_text

PATCH, BATCH, EPOCHS = 16, 8, 100
PARTS = {"train": 2, "val": 1, "test": 2}  # of each image
LEAST, LONG = 0.25, 1.5
HEAD = {  # that of docs/results.md: narrow
    "neck": "simple_pyramid",
    "neck_dim": 96,
    "strides": [8, 16, 32],
    "anchor_sizes": [4.0],
    "box_dim": 128,
    "samples": 128,
    "proposals": [500, 300],
    "proposals_before_nms": [500, 300],
}
SHOWN = ("AP", "AP50", "AP75")


def part(size: tuple[int, int], key: str) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the part of an image of (height, width) that a name chooses."""
    rng = np.random.default_rng(list(hashlib.sha256(key.encode()).digest()[:8]))
    height, width = size
    area, ratio = rng.uniform(1 / 3, 0.9) * height * width, 3 ** rng.uniform(-1, 1)
    high = min(height, round((area / ratio) ** 0.5))
    wide = min(width, round((area * ratio) ** 0.5))
    top, left = rng.integers(0, height - high + 1), rng.integers(0, width - wide + 1)
    return int(left), int(top), int(left + wide), int(top + high)


def cut(data: Examples, split: str, folder: Path) -> None:
    """The parts of a split's images, and COCO's file of their boxes."""
    (folder / "images" / split).mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for i, key in enumerate(data.keys):
        pixels, objects = Image.fromarray(data.images.read(i)), data.truth.target(i, None)
        for n in range(PARTS[split]):
            name = f"{split}/{Path(key).stem}_{n}.jpg"
            corner = part((pixels.height, pixels.width), name)
            shown = pixels.crop(corner)
            shown.save(folder / "images" / name, quality=95)
            sizes = {"height": shown.height, "width": shown.width}
            images.append({"id": len(images) + 1, "file_name": name, **sizes})
            for box, label in zip(objects.boxes, objects.labels.tolist(), strict=True):
                seen = np.clip(box, corner[:2] * 2, corner[2:] * 2)
                (w, h), whole = seen[2:] - seen[:2], np.prod(box[2:] - box[:2])
                if w * h < LEAST * whole or min(w, h) < 1:
                    continue
                x, y = seen[:2] - corner[:2]
                about = {"id": len(found) + 1, "image_id": len(images), "category_id": label + 1}
                box = [float(v) for v in (x, y, w, h)]
                found.append(about | {"bbox": box, "area": float(w * h), "iscrowd": 0})
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(data.classes)]
    told = {"images": images, "annotations": found, "categories": categories}
    write_text(folder / f"{split}.json", json.dumps(told))


def config_of(
    form: str, given: argparse.Namespace, data: Path, out: Path, seed: int
) -> TrainConfig:
    side = round(given.patches**0.5) * PATCH
    config = replace(
        detect_small(),
        data=str(data),
        out=str(out),
        model=f"faster_rcnn/{given.model}",
        weights=given.weights,
        train_only=given.train_only,
        head_fields=HEAD,
        epochs=EPOCHS,
        batch_size=BATCH,
        eval_every=EPOCHS,
        seed=seed,
        threads=given.threads,
        workers=0,
        device="cpu",
        precision=given.precision,
        backbone_lr=given.backbone_lr,
        max_steps=given.updates,
        image_size=side,
        augmentation=Augmentation(crop="whole", interpolation="bilinear", color_jitter=0.2),
    )
    if form == "squares":
        return replace(config, resize="squash")
    tokens = BATCH * ((side // PATCH) ** 2 + 1)  # a class token each
    packing = Packing(max_tokens=tokens, tokens_per_image=(side // PATCH) ** 2)
    return replace(config, resize=None, native=True, packing=packing)


def scores(folder: Path, data: Examples) -> dict[str, Any]:
    """Of all images, and of the long and the other ones."""
    model = load(folder)
    height, width = data.images.sizes.T.astype(float)
    long = np.maximum(height / width, width / height) > LONG
    parts = {
        "all": np.arange(len(data)),
        "long": np.flatnonzero(long),
        "other": np.flatnonzero(~long),
    }
    out = {}
    for name, ids in parts.items():
        found = evaluate(model, data.subset(ids), batch_size=BATCH)
        out[name] = {"images": len(ids)} | {key: found[key] for key in SHOWN}
    return out


def run(form: str, given: argparse.Namespace, data: Path, out: Path, seed: int) -> dict[str, Any]:
    config = config_of(form, given, data, out, seed)
    if form == "squares" and given.updates is None:
        config = replace(config, max_minutes=given.minutes)
    done = train(config)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "eval"][-1]
    test = open_data(data, "test", classes=open_data(data, "train").classes)
    facts = {"updates": done.steps, "images": last["images"], "minutes": done.seconds / 60}
    return {"name": form, "seed": seed, **facts, "scores": scores(out / "best", test)}


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    header = ["form", "seed", "updates", "images", "minutes", *SHOWN, "AP50 long", "AP50 other"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for row in rows:
        of = row["scores"]
        cells = [
            row["name"],
            row["seed"],
            row["updates"],
            f"{row['images']:,}",
            f"{row['minutes']:.1f}",
        ]
        cells += [f"{of['all'][key]:.3f}" for key in SHOWN]
        cells += [f"{of[name]['AP50']:.3f}" for name in ("long", "other")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    counts = rows[0]["scores"]
    lines.append(
        f"\n{counts['all']['images']} test images, {counts['long']['images']} of them long"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--model", default="vit_tiny_patch16")
    parser.add_argument("--weights", default=None)
    parser.add_argument("--train-only", choices=["full", "head"], default="full")
    parser.add_argument("--backbone-lr", type=float, default=1.0)
    parser.add_argument("--patches", type=int, default=256)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--updates", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.quick:
        given.updates, given.patches = 2, 36
    rows = []
    with tempfile.TemporaryDirectory() as thrown_away:
        out = Path(given.out or thrown_away)
        data = out / "data"
        known = open_data(given.data, "train")
        for split in PARTS:
            if not (data / f"{split}.json").exists():
                cut(open_data(given.data, split, classes=known.classes), split, data)
        for seed in given.seeds:
            squares = run("squares", given, data, out / f"squares-{seed}", seed)
            as_many = argparse.Namespace(**{**vars(given), "updates": squares["updates"]})
            rows += [squares, run("native", as_many, data, out / f"native-{seed}", seed)]
            print(table(rows), flush=True)
            if given.json:
                found = {"machine": machine(), "rows": rows}
                given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
