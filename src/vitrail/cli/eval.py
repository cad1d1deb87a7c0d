"""`vitrail eval`: how good a trained model is on labelled images, or a frozen backbone."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from vitrail.cli.flags import InferenceFlags, parse_flags
from vitrail.train.config import TrainConfig, read_config
from vitrail_runtime.errors import InputError

if TYPE_CHECKING:
    from vitrail.tasks.task import Scores


@dataclass(frozen=True, kw_only=True)
class EvalFlags(InferenceFlags):
    """Measure a trained model: the scores of its task, in all and by class.

    The scores are also written to RUN/eval.json. With --probe, measure how good the frozen backbone is on the
    data before any training; then a model's name does too, with --weights.
    """

    run: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run folder (its best model) or a model folder; with --probe also a name from `vitrail models`."""
    data: str
    """Where the pictures are, in any form that vitrail train takes."""
    split: Literal["val", "test", "train", "all"] = "val"
    """Which of them."""
    val_fraction: float | None = None
    """The share of "train" that is "val" where the data has no such split; none: as in training, or 0.2."""
    report: Path | None = None
    """Also write a page with pictures to this HTML file: mistakes, calibration, where the model looks."""
    probe: Literal["knn", "linear"] | None = None
    """Classify by the frozen features of the training pictures: their neighbours, or a linear layer."""
    weights: str | None = None
    """With --probe and a model's name: a file, or hf:owner/name@revision."""
    image_size: int | None = None
    """With --probe: height and width in pixels, instead of the model's own."""
    batch_size: int = 64
    """Pictures at a time."""
    workers: int = 0
    """Processes that read pictures."""
    device: str = "auto"
    """Where the model runs, such as cpu or cuda; auto: a GPU where there is one."""
    skip_broken: bool = False
    """Measure without the pictures that cannot be read, instead of stopping."""
    drop_bad: bool = False
    """Measure without the annotations that cannot be used, and with boxes cut at their image's edge, instead
    of stopping."""
    json: bool = False
    """All scores as one JSON object on stdout, instead of the table."""


def run(argv: list[str]) -> None:
    flags = parse_flags(EvalFlags, argv, prog="vitrail eval")
    if flags.probe is None and (flags.weights or flags.image_size):
        raise InputError("--weights and --image-size go with --probe; a trained model has its own")
    if flags.probe is not None and flags.asked():
        raise InputError(
            "--window, --stride, --scales, --flip, --tokens-per-image and --patch-size ask a trained model; "
            "they do not go with --probe"
        )
    if flags.report is not None and flags.probe is not None:
        raise InputError("--report shows a trained model's answers; it does not go with --probe")
    if flags.report is not None and flags.patch_size is not None:
        raise InputError(
            "--report draws where the model looks by its own patches; leave --patch-size or --report away"
        )
    if flags.report is not None and flags.report.is_dir():
        raise InputError(
            f"--report {flags.report} is a folder; name a file, such as {flags.report}/report.html"
        )
    if flags.probe is not None and flags.split in ("train", "all"):
        raise InputError(
            f"--probe learns from the pictures of train, so --split {flags.split} would measure it on what "
            "it has seen; use --split val or --split test"
        )
    from vitrail.memory import enough_memory
    from vitrail.models import model_folder
    from vitrail.weights import write_text

    folder = model_folder(Path(flags.run))
    less = "give a smaller --batch-size" + (" or --image-size" if flags.probe else "")
    with enough_memory(f"{flags.run} on {flags.batch_size} pictures at a time", less):
        scores = probe(flags, folder) if flags.probe else measure(flags, folder)
    about = {"model": flags.run, "data": flags.data, "split": flags.split, "probe": flags.probe}
    found = about | scores.to_dict()
    if flags.json:
        print(json.dumps(found, indent=2))  # in ASCII: whole on every terminal
    else:
        show(scores)
    # Last: what cannot be kept, because the model lies in another's folder, has been shown.
    if Path(flags.run).is_dir():
        name = f"eval-{flags.probe}.json" if flags.probe else "eval.json"
        write_text(Path(flags.run) / name, json.dumps(found, indent=2, ensure_ascii=False) + "\n")


def measure(flags: EvalFlags, folder: Path) -> "Scores":
    """Scores of a trained model."""
    from vitrail.data.opening import open_source
    from vitrail.data.pack_plan import counted_too_long
    from vitrail.device import choose_device
    from vitrail.models import load
    from vitrail.tasks.task import label_map, task_of
    from vitrail.train.evaluate import evaluate

    model = flags.applied(load(folder)).to(choose_device(flags.device))
    task = task_of(model.task)
    if not task.any_names:  # shows both lists where they differ
        label_map(open_source(flags.data).classes(), model.classes)
    data = open_pictures(flags, flags.split, None if task.any_names else model.classes)
    model = task.answering(model, None, data)
    if model.preprocessing.patches is not None:
        most, patch_size = model.preprocessing.patches
        long = counted_too_long(data.images.sizes, most, patch_size, data.images.where)
        if long:
            print(f"vitrail: {long}: shown smaller, their ratio kept", file=sys.stderr)
    show_report = flags.report is not None
    how: dict[str, Any] = {"batch_size": flags.batch_size, "workers": flags.workers}
    scores = evaluate(model, data, predictions=show_report, **how)
    if flags.report is not None:
        from vitrail.analysis.report import write_report

        assert scores.said is not None
        about: dict[str, Any] = {"run": flags.run, "split": flags.split}
        write_report(flags.report, model, data, scores.said, scores=scores.to_dict(), **about)
        print(f"vitrail: wrote {flags.report}", file=sys.stderr)
    return scores


def probe(flags: EvalFlags, folder: Path) -> "Scores":
    """Scores of a frozen backbone's features."""
    from dataclasses import replace

    from vitrail.device import choose_device
    from vitrail.models import create_model, load
    from vitrail.tasks.probe import extract_features, probe_scores

    if flags.weights is not None and (folder / "config.json").is_file():
        raise InputError(f"{folder} has weights of its own; drop --weights, or name a model")
    train = open_pictures(flags, "train", None)
    test = open_pictures(flags, flags.split, train.classes)
    if (folder / "config.json").is_file():
        model = load(folder)
    else:
        if flags.weights is None:
            print(
                "vitrail: without --weights the features are those of random weights",
                file=sys.stderr,
            )
        source = None if flags.weights is None else {"backbone": flags.weights}
        model = create_model(flags.run, weights=source)
    preprocessing = model.preprocessing
    if flags.image_size is not None:
        preprocessing = replace(preprocessing, size=(flags.image_size, flags.image_size))
    backbone = model.backbone.to(choose_device(flags.device))
    how: dict[str, Any] = {"batch_size": flags.batch_size, "workers": flags.workers}
    features = [extract_features(backbone, data, preprocessing, **how) for data in (train, test)]
    assert flags.probe is not None
    return probe_scores(flags.probe, features[0], features[1], train.classes, train.images.digests)


def open_pictures(flags: EvalFlags, split: str, classes: Any) -> Any:
    """The split of the data, with what was decided on the way said."""
    from vitrail.data import open_data

    share = held_out(Path(flags.run)) if flags.val_fraction is None else flags.val_fraction
    how: dict[str, Any] = {"skip_broken": flags.skip_broken, "drop_bad": flags.drop_bad}
    how["val_fraction"] = share
    data = open_data(flags.data, split, classes=classes, **how)
    for note in data.notes:
        print(f"vitrail: {note}", file=sys.stderr)
    if split == "val" and flags.probe is None and "val" not in data.images.source.splits():
        print(
            "vitrail: only these are measured; --split all measures every picture", file=sys.stderr
        )
    for where, what in data.broken:
        print(f"vitrail: left out {where}: {what}", file=sys.stderr)
    for where, what in data.bad:
        print(f"vitrail: left out or cut {where}: {what}", file=sys.stderr)
    return data


def held_out(run: Path) -> float:
    """The share of "train" that a run kept for validation: another would measure what it learnt from."""
    for folder in (run, run.parent):  # a run folder, or its best/
        if (folder / "config.yaml").is_file():
            return read_config(folder / "config.yaml").val_fraction
    return TrainConfig().val_fraction


def show(scores: "Scores") -> None:
    """Tables, what is worth a line, and the totals last."""
    from rich.console import Console
    from rich.table import Table

    # Names are no markup. Without a terminal lines are as long as they need to be.
    width = None if sys.stdout.isatty() else 1000
    console = Console(highlight=False, markup=False, emoji=False, width=width)
    for of in scores.tables:
        table = Table(box=None, pad_edge=False, title=of.title or None)
        for heading, cell in zip(of.header, of.rows[0] if of.rows else of.header, strict=True):
            table.add_column(heading, justify="left" if isinstance(cell, str) else "right")
        for row in of.rows:
            table.add_row(*(f"{v:.3f}" if isinstance(v, float) else str(v) for v in row))
        console.print(table)
    for note in scores.notes:
        console.print(note)
    console.print(scores.line())
