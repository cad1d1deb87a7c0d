"""Every head on every backbone family, at tiny size: does it build, learn, evaluate, and come back as it was
saved?

    python benchmarks/matrix.py --json docs/matrix.json

A cell is a head of `vitrail.models.HEADS` (or none, which is a classifier) on the tiny form of a family. It
is built by its name; five updates are made on one batch of two images, whose loss must fall; it is evaluated
on four images; it is saved, loaded, and asked again, and must answer the same to the last bit. The images are
the embedded digits. Where a combination is refused, the table says why; any other error, and a loss that does
not fall, fails the run.

Cells are written one by one, and those in the file are not computed again: a run that was stopped goes on.
`--quick` takes one family; `--only detr` the heads whose names begin so, anew. docs/models.md shows the file
as a table.
"""

import argparse
import json
import sys
import tempfile
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vitrail
from vitrail.data import Examples, open_data
from vitrail.data.augmentation import Augmentation
from vitrail.data.digits import make_digits
from vitrail.data.loader import train_batches
from vitrail.data.plan import BatchPlan
from vitrail.models import HEADS
from vitrail.predictor import Predictor
from vitrail.registry import list_backbones, tiny_entries
from vitrail.tasks.task import DEFAULT, task_of
from vitrail.train.evaluate import evaluate
from vitrail.train.ranks import total_loss
from vitrail_runtime.errors import InputError

UPDATES, RATE, BATCH, EVALUATED = 5, 1e-3, 2, 4
SIZE = (64, 96)
CLASSIFIER = "classifier"
DIGITS = {  # of each task
    "classify": "classify",
    "segment": "semantic",
    "detect": "instances",
    "panoptic": "panoptic",
    "contrast": "pairs",
}
_RCNN = {"neck_dim": 16, "box_dim": 32, "proposals": (60, 40), "samples": 64}
_MASKS = {**_RCNN, "mask_dim": 8, "mask_convs": 1}
_DETR = {"dim": 32, "num_heads": 2, "mlp_dim": 64, "encoder_layers": 1, "decoder_layers": 2}
_TEXT = {"dim": 32, "text_dim": 32, "text_depth": 1, "text_heads": 2, "vocab_size": 800}
SMALL: dict[str, dict[str, Any]] = {  # fields of the heads
    "semantic_fpn": {"fpn_dim": 16, "dim": 16, "groups": 4},
    "upernet": {"dim": 16, "auxiliary_dim": 8},
    "faster_rcnn": _RCNN,
    "mask_rcnn": _MASKS,
    "cascade_rcnn": _RCNN,
    "cascade_mask_rcnn": _MASKS,
    "efficientdet": {"neck_dim": 16, "neck_cells": 1, "head_convs": 1},
    "detr": _DETR,
    "detr_panoptic": {**_DETR, "num_heads": 8},
    "clip": _TEXT,
    "siglip": _TEXT,
    "deformable_detr": {**_DETR, "dim": 64, "num_queries": 40, "detections": 40},
}


def names() -> list[tuple[str, str, dict[str, Any]]]:
    """Of each family its name, a backbone's, and the fields that make it tiny."""
    found = []
    backbones = {vitrail.registry.backbone_entry(n).cls: n for n in reversed(list_backbones())}
    for family, entry in tiny_entries().items():
        config = {f.name: getattr(entry.config, f.name) for f in fields(entry.config)}
        config.pop(
            "head", None
        )  # a ViT's own; under this name create_model takes that of the model
        found.append((family, backbones[entry.cls], config))
    return found


def cell(head: str, backbone: str, config: dict[str, Any], data: Examples) -> dict[str, Any]:
    """What became of one combination: "loss" before and after the updates, "score"; or "refused"."""
    name = backbone if head == CLASSIFIER else f"{head}/{backbone}"
    torch.manual_seed(0)
    given = {} if head == CLASSIFIER else {"head": SMALL.get(head, {})}
    try:
        model = vitrail.create_model(name, classes=data.classes, **given, **config)
    except InputError as error:
        return {"refused": str(error)}
    task = task_of(model.task)
    for option, value in task.model_options(task.settings(), data.truth).items():
        setattr(model, option, value)
    seen = replace(model.preprocessing, size=SIZE)
    vitrail.models.describe(model, replace(model.info, preprocessing=seen))
    try:
        before, after = learn(model, data)
    except InputError as error:
        return {"refused": str(error)}
    few = data.subset(range(EVALUATED))
    scores = evaluate(model, few, batch_size=EVALUATED)
    same = comes_back(model, [Path(few.images.where(i)) for i in range(2)])
    return {"loss": [before, after], scores.headline: scores.best, "same": same}


def learn(model: Any, data: Examples) -> tuple[float, float]:
    """The loss of one batch before the updates and after them, drawn alike."""
    plan = BatchPlan(length=len(data), batch_size=BATCH, size=SIZE, seed=0)
    own = model.preprocessing if model.preprocessing.mode == "edges" else None
    whole = Augmentation(crop="whole", flip=0.0)
    batch = next(iter(train_batches(data, plan, whole, epoch=0, own_sizes=own)))
    batch = batch.to(torch.device("cpu"), model.preprocessing)
    task = task_of(model.task)
    options = task.options(task.settings())
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    said = []
    for _ in range(UPDATES + 1):
        model.train()
        torch.manual_seed(0)  # boxes and paths are dropped alike each time
        losses = model.losses(batch.images, batch.targets, **batch.padding, **options)
        loss = total_loss(losses, model.weight(batch.targets))
        said.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return said[0], said[-1]


def comes_back(model: Any, images: list[Path]) -> bool:
    """Whether a saved model answers as it did, to the last bit."""
    task = task_of(model.task)
    before = list(Predictor(task.answering(model.eval(), None))(images))
    with tempfile.TemporaryDirectory() as folder:
        again = vitrail.load(vitrail.save(model, Path(folder) / "model"))
    after = list(Predictor(task.answering(again, None))(images))
    return all(
        one.to_dict() == other.to_dict() and np.array_equal(one.scores, other.scores)
        for one, other in zip(before, after, strict=True)
    )


def failed(found: dict[str, Any]) -> str:
    """What is wrong with a cell, or nothing."""
    if "refused" in found:
        return ""
    if "error" in found:
        return found["error"]
    before, after = found["loss"]
    if not after < before:  # nor where one of them is NaN
        return f"the loss does not fall: {before:.4g} to {after:.4g}"
    return "" if found["same"] else "answers otherwise once saved and loaded"


def write(known: dict[str, dict[str, Any]], path: Path) -> None:
    """A line for each cell."""
    rows = [
        f'"{head}": {{\n' + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in row.items()) + "}"
        for head, row in known.items()
    ]
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one family")
    parser.add_argument("--only", default="", help="heads whose names begin so, anew")
    parser.add_argument("--json", type=Path, default=Path("matrix.json"))
    parser.add_argument(
        "--digits", type=Path, help="folder of the digits (default: a temporary one)"
    )
    parser.add_argument("--threads", type=int, default=1)
    flags = parser.parse_args(argv)
    torch.set_num_threads(flags.threads)
    known = json.loads(flags.json.read_text()) if flags.json.is_file() else {}
    opened: dict[str, Examples] = {}
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        for head in (CLASSIFIER, *HEADS):
            task = DEFAULT if head == CLASSIFIER else HEADS[head].task
            row = known.setdefault(head, {})
            for family, backbone, config in names()[: 1 if flags.quick else None]:
                if family not in row or (flags.only and head.startswith(flags.only)):
                    if task not in opened:
                        folder = (flags.digits or Path(temporary)) / task
                        opened[task] = open_data(make_digits(folder, task=DIGITS[task]), "val")
                    start = time.perf_counter()
                    try:
                        row[family] = cell(head, backbone, config, opened[task])
                    except Exception as error:
                        row[family] = {"error": f"{type(error).__name__}: {error}"}
                    write(known, flags.json)
                    took = time.perf_counter() - start
                    print(f"{head}/{family}: {row[family]}  {took:.1f} s", flush=True)
                if said := failed(row[family]):
                    wrong += 1
                    print(f"{head}/{family} FAILED: {said}", file=sys.stderr)
    cells = sum(map(len, known.values()))
    refused = sum("refused" in found for row in known.values() for found in row.values())
    print(f"{cells} cells, {refused} refused, {wrong} failed")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
