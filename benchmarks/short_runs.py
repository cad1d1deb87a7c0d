"""Short trainings from nothing on one set of pictures, by one recipe: what a small budget buys each model.

python benchmarks/short_runs.py STUDY --data DIR --out DIR [--minutes M | --steps N] [--runs NAME ...]
    [--threads N] [--json FILE]

families: the smallest variant of each family, for the same minutes. deepvit: re-attention beside plain
attention at two depths, for the same updates, with the count of blocks whose attention maps repeat the block
before (collapse). cmt: CMT-Ti with each of its parts taken away, for the same updates.

One seed each. A run that stands in --out goes on, or is only read if it is finished; so --runs can split a
study over several commands, and the table holds what is there. Every model is trained as `vitrail train`
would and scored on the test split.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vitrail.analysis.attention import study_attention
from vitrail.bench.harness import machine
from vitrail.data import open_data
from vitrail.data.augmentation import Augmentation
from vitrail.models import load
from vitrail.train.config import TrainConfig
from vitrail.train.evaluate import evaluate
from vitrail.train.trainer import train
from vitrail.weights.files import write_text
from vitrail_runtime.preprocess import prepare

SCORE = "score.json"
COLLAPSED = 0.9  # similarity from which a block's maps repeat those of the block before
STUDIED = 32  # pictures that the similarity is averaged over


@dataclass(frozen=True)
class Short:
    """One run: a model of the catalogue with some fields changed."""

    model: str
    fields: dict[str, Any] = field(default_factory=dict)


def deepvit(depth: int, attention: str) -> Short:
    """Narrow (192, as ViT-Ti) so that two cores can train 32 blocks."""
    return Short(f"deepvit_{depth}b", {"embed_dim": 192, "attention": attention})


STUDIES: dict[str, dict[str, Short]] = {
    "families": {
        name: Short(name)
        for name in (
            "vit_tiny_patch16",
            "vit_small_patch14_dinov2",
            "vit_tiny_r_s16_p8",
            "deepvit_s",
            "cmt_ti",
            "swin_tiny_patch4_window7",
            "efficientvit_m0",
            "mobilevit_xxs",
            "mobilevitv2_050",
            "mobilenetv1_025",
            "mobilenetv2_035",
            "mobilenetv3_small_050",
            "efficientnet_b0",
            "resnet18",
        )
    },
    "deepvit": {
        f"{depth} blocks, {what}": deepvit(depth, attention)
        for depth in (16, 32)
        for what, attention in (("plain attention", "self"), ("re-attention", "re"))
    },
    "cmt": {
        "CMT-Ti": Short("cmt_ti"),
        "patches for the stem": Short("cmt_ti", {"stem": False}),
        "no local perception (LPU)": Short("cmt_ti", {"lpu": False}),
        "full attention for LMHSA": Short("cmt_ti", {"lmhsa": False}),
        "MLP for IRFFN": Short("cmt_ti", {"irffn": False}),
    },
}


def train_config(run: Short, folder: Path, flags: argparse.Namespace) -> TrainConfig:
    """The one recipe: 64 x 64 pixels, AdamW, crop and flip."""
    return TrainConfig(
        data=str(flags.data),
        out=str(folder),
        model=run.model,
        model_fields=run.fields,
        image_size=64,
        resize="squash",
        val_fraction=0.02,
        epochs=100,  # more than anyone gets done: minutes or updates end it
        max_minutes=flags.minutes,
        max_steps=flags.steps,
        batch_size=128,
        lr=1e-3,
        warmup_epochs=0.1,
        ema=0.98,
        augmentation=Augmentation(crop="simple", padding=8, interpolation="bilinear"),
        eval_every=100,
        device="cpu",
        workers=0,
        threads=flags.threads,
    )


def score(run: Short, folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    """Train, or go on, and measure on the test split; kept beside the run."""
    kept = folder / SCORE
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    config = train_config(run, folder, flags)
    result = train(config)
    if result.signal:
        raise SystemExit(128 + result.signal)
    model = load(folder / "last")
    test = open_data(flags.data, "test", classes=model.classes)
    rows = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    trained = [r for r in map(json.loads, rows) if r["kind"] == "train"]
    found = {
        "parameters": sum(p.numel() for p in model.parameters()),
        # Not the last row's, which is up to log_every updates behind.
        "images": result.steps * config.batch_size,
        "images_per_second": sorted(r["images_per_second"] for r in trained)[len(trained) // 2],
        "top1": evaluate(model, test)["top1"],
        "threads": flags.threads,
        "minutes": flags.minutes,
    }
    if flags.study == "deepvit":
        pictures = (
            torch.from_numpy(prepare(test.images.read(i), model.preprocessing)[0])
            for i in range(STUDIED)
        )
        study = study_attention(model.backbone, pictures)
        found["similar_blocks"] = len(study.similar(COLLAPSED))
        found["similarity"] = float(study.neighbours().mean())
    write_text(kept, json.dumps(found, indent=2))
    return found


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown, best first for a study of families, else in the study's order."""
    collapse = any("similar_blocks" in row for row in found.values())
    head = ["run", "parameters M", "pictures seen", "images/s", "top-1"]
    head += ["alike to the block before", "mean similarity"] if collapse else []
    lines = [" | ".join(["", *head, ""]).strip(), "|" + "---|" * len(head)]
    for name, row in found.items():
        cells = [
            name,
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['images']:,}",
            f"{row['images_per_second']:.0f}",
            f"{row['top1']:.3f}",
        ]
        if collapse:
            cells += [str(row["similar_blocks"]), f"{row['similarity']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", type=Path, required=True, help="class folders or tar shards")
    parser.add_argument("--out", type=Path, required=True, help="where the runs are kept")
    parser.add_argument("--runs", nargs="+", metavar="NAME", help="only these of the study")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float, help="wall clock of each run")
    budget.add_argument("--steps", type=int, help="updates of 128 pictures of each run")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the rows and the machine there")
    flags = parser.parse_args()
    study = STUDIES[flags.study]
    unknown = set(flags.runs or ()) - set(study)
    if unknown:
        parser.error(f"{flags.study} has no run {', '.join(sorted(unknown))}; it has {list(study)}")
    torch.set_num_threads(flags.threads)
    folder = flags.out / flags.study
    found = {}
    for name, run in study.items():
        at = folder / name.replace(" ", "_").replace(",", "")
        if name in (flags.runs or study) or (at / SCORE).exists():
            found[name] = score(run, at, flags)
    if flags.study == "families":
        found = dict(sorted(found.items(), key=lambda item: -item[1]["top1"]))
    print(table(found))
    if flags.json:
        told = {"study": flags.study, "machine": machine(), "runs": found}
        write_text(flags.json, json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
