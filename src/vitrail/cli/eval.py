"""`vitrail eval`: how good a trained model is on labelled pictures, or a backbone before any training."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vitrail_runtime.errors import InputError


@dataclass(frozen=True, kw_only=True)
class EvalFlags:
    """Measure a trained model: top-1, top-5, loss, and precision, recall and confusion of every class.

    The scores are also written to RUN/eval.json.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """A run folder (its best model) or a model folder."""
    data: str
    """Where the pictures are: class folders, tar shards or a CSV file."""
    split: Literal["val", "test", "train", "all"] = "val"
    """Which of them."""
    batch_size: int = 64
    """Pictures at a time."""
    workers: int = 0
    """Processes that read pictures."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    skip_broken: bool = False
    """Measure without the pictures that cannot be read, instead of stopping."""
    json: bool = False
    """All scores as one JSON object on stdout, instead of the table."""


def run(argv: list[str]) -> None:
    flags = tyro.cli(EvalFlags, args=argv, prog="vitrail eval")
    from vitrail.data import open_data
    from vitrail.models import load
    from vitrail.train.evaluate import evaluate, model_folder
    from vitrail.weights import write_text

    folder = model_folder(flags.run)
    model = load(folder).to(choose_device(flags.device))
    data = open_data(flags.data, flags.split, classes=model.classes, skip_broken=flags.skip_broken)
    for note in data.notes:
        print(f"vitrail: {note}", file=sys.stderr)
    scores = evaluate(model, data, batch_size=flags.batch_size, workers=flags.workers)
    scores = {"model": str(folder), "data": flags.data, "split": flags.split, **scores}
    text = json.dumps(scores, indent=2, ensure_ascii=False)
    write_text(flags.run / "eval.json", text + "\n")
    if flags.json:
        print(text)
    else:
        show(scores)


def show(scores: dict[str, Any]) -> None:
    """A table of classes, the commonest confusions, and the totals last."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("class")
    for heading in ("pictures", "precision", "recall", "F1"):
        table.add_column(heading, justify="right")
    for name, of in scores["per_class"].items():
        figures = (f"{of[key]:.3f}" for key in ("precision", "recall", "f1"))
        table.add_row(name, str(of["support"]), *figures)
    console.print(table)
    names, confusion = scores["classes"], scores["confusion"]
    wrong = [
        (count, names[truth], names[said])
        for truth, row in enumerate(confusion)
        for said, count in enumerate(row)
        if count and truth != said
    ]
    for count, truth, said in sorted(wrong, reverse=True)[:5]:
        console.print(f"{count} x {truth} taken for {said}", markup=False)
    console.print(
        f"top-1 {scores['top1']:.4f}  top-5 {scores['top5']:.4f}  loss {scores['loss']:.4f}  "
        f"{scores['num_images']} pictures"
    )


def choose_device(name: str) -> str:
    """ "auto" is a GPU where torch sees one."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device is 'cuda', but torch sees no GPU here; use --device cpu, or auto")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
