"""vitrail adapt train|list|eval|predict: many tasks on one frozen backbone, each a small file, a capsule."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from vitrail.cli.flags import act, parse_flags
from vitrail.cli.train import StartParser, effective_config, say
from vitrail.data.packing import Packing
from vitrail.train.config import TrainConfig
from vitrail_runtime.errors import InputError, listed

if TYPE_CHECKING:
    from vitrail.adapt.capsules import Capsules
    from vitrail.predictor import Prepared
    from vitrail.tasks.task import Scores
    from vitrail.train.trainer import RunResult
    from vitrail_runtime.prediction import Prediction

HELP = """usage: vitrail adapt train BASE --data DIR --out FILE.capsule  learn a task beside a frozen backbone
       vitrail adapt list FILE...                             what is in capsules
       vitrail adapt eval BASE --capsules FILE... --data DIR  measure them
       vitrail adapt predict BASE --capsules FILE... IMAGE... ask all of them in one pass

BASE is the folder of a classifier on a plain ViT, or of the run that trained it; it stays as it is.
vitrail adapt ACTION --help tells an action's options."""

TRAIN_HELP = """usage: vitrail adapt train BASE --data DIR --out FILE.capsule [options]

Learn a task beside a frozen backbone: a class token, rows of memory in each block and a classifier (Sandler
et al. 2022, arXiv 2203.15243). BASE answers as before. The same command goes on where a run stopped.

  BASE           the folder of a classifier on a plain ViT, or of the run that trained it
  --data DIR     where the images are, in any form that vitrail train takes
  --out FILE     where the capsule goes; it ends in .capsule
  --rows N       rows of memory in each block (default: {rows})
  --name NAME    what the task is called (default: the name of FILE)
  --run DIR      the folder of the run, whose best model the capsule is taken from (default: FILE-run)

and all options of vitrail train ({recipe} is the recipe unless another, or --config, is given), but
those that the base decides: {decided}"""

# Of vitrail train, which the base decides.
DECIDED = (
    *("--model", "--weights", "--train-only", "--model-fields", "--image-size", "--resize"),
    *("--crop-pct", "--native", "--no-native", "--packing", "--patch-sizes"),
)
RECIPE = "memory_small"
ROWS = 5


@dataclass(frozen=True, kw_only=True)
class ListFlags:
    """Say what is in capsules: their task, what they stand on, and how good they were."""

    files: Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE...")]
    """Capsules."""


@dataclass(frozen=True, kw_only=True)
class AskFlags:
    base: Annotated[Positional[Path], arg(metavar="BASE")]
    """The folder of a classifier on a plain ViT, or of the run that trained it."""
    capsules: Annotated[tuple[str, ...], arg(metavar="FILE...")]
    """Capsules that were trained on it; NAME=FILE gives one another name."""
    batch_size: int = 16
    """Images at a time."""
    device: str = "auto"
    """Where the base runs, such as cpu or cuda; auto: a GPU where there is one."""
    skip_broken: bool = False
    """Leave out images that cannot be read, instead of ending with an error that lists them."""
    json: bool = False
    """JSON on stdout, instead of a table."""


@dataclass(frozen=True, kw_only=True)
class EvalFlags(AskFlags):
    """Measure capsules on labelled images, all of them in one pass of the base."""

    data: str
    """Where the images are, in any form that vitrail train takes. Their classes are those of each capsule."""
    split: Literal["val", "test", "train", "all"] = "val"
    """Which of them."""
    val_fraction: float = TrainConfig().val_fraction
    """The share of "train" that is "val" where the data has no such split."""
    workers: int = 0
    """Processes that read images."""


@dataclass(frozen=True, kw_only=True)
class PredictFlags(AskFlags):
    """Say what each task sees on images: vitrail adapt predict BASE --capsules a.capsule b.capsule photo.jpg

    One pass of the base serves all capsules; it answers as well. With --json a line for each image.
    """

    inputs: Annotated[Positional[tuple[str, ...]], arg(metavar="INPUT...")] = ()
    """Images, folders (searched at any depth) and glob patterns; they may follow the capsules."""
    top_k: int = 5
    """How many classes of each task --json tells."""


def run(argv: list[str]) -> int | None:
    actions = {"train": train, "list": list_capsules, "eval": evaluate, "predict": predict}
    return act("adapt", actions, HELP, argv)


def train(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(TRAIN_HELP.format(rows=ROWS, recipe=RECIPE, decided=", ".join(DECIDED)))
        return 0
    given, rest = train_flags(argv)

    from vitrail.adapt.capsules import Capsules, capsule_of, check_place, save_capsule
    from vitrail.models import load, model_folder
    from vitrail.weights.files import read_json

    check_place(given.out)
    folder, name = model_folder(given.base), given.name or given.out.stem
    tasks = Capsules(folder)
    config = run_config(given, rest, folder, tasks.info)
    check_attachable(tasks, config, name)
    check_same_base(tasks, config)
    result = trained(config)
    if os.environ.get("RANK", "0") != "0":  # one of many processes; the first one tells
        return 128 + result.signal if result.signal else 0
    if result.signal:
        run = result.folder
        say(f"stopped at update {result.steps}, all saved; the same command goes on with {run}")
        return 128 + result.signal
    best = result.folder / "best"
    model, metrics = load(best), read_json(best / "metrics.json")
    tasks.attach(capsule_of(model, name))  # what is written is what can be attached
    capsule = save_capsule(model, given.out, name, metrics=metrics)
    size = f"{given.out.stat().st_size / 1000:.0f} kB"
    print(
        f"{given.out}: {name!r}, {len(capsule.classes)} classes, {size}, best {result.shown} "
        f"{result.best:.4f} on the validation images; the run is in {result.folder}"
    )
    return 0


def trained(config: TrainConfig) -> "RunResult":
    """What becomes of a run. What the trainer advises names the flags of vitrail train."""
    from vitrail.train.setup import OtherRun
    from vitrail.train.state import states
    from vitrail.train.trainer import train as train_model

    run = Path(config.out)
    try:
        return train_model(config)
    except OtherRun as error:
        todo = "give another --run"
        if states(run / "state"):
            todo += (
                " to start anew; to go on with that one, give the base, the settings and the images that it "
                f"had (--config {run / 'config.yaml'} has its settings)"
            )
        raise InputError(f"{error.what}\n{todo}") from error
    except InputError as error:
        raise InputError(str(error).replace("--out", "--run")) from error


def train_flags(argv: list[str]) -> tuple[Any, list[str]]:
    """What is the capsule's own, and the flags of the training."""
    if argv[0].startswith("-"):
        raise InputError(
            f"say on which base first: vitrail adapt train BASE --data DIR, not {argv[0]}"
        )
    parser = StartParser(prog="vitrail adapt train", add_help=False, allow_abbrev=False)
    parser.add_argument("base", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--name")
    parser.add_argument("--run", type=Path)
    given, rest = parser.parse_known_args(argv)
    rest = [dashed(text) for text in rest]
    flags = [text.partition("=")[0] for text in rest]
    decided = [flag for flag in flags if flag.partition(".")[0] in DECIDED]
    if decided:
        raise InputError(
            f"{listed(decided)} cannot be given: the base decides that, which stays as it is"
        )
    if "--replay" in flags:
        raise InputError("--replay trains nothing; look at a run with vitrail train --replay RUN")
    fields = [text.removeprefix("--head-fields=") for text in rest]
    twice = [text for text in fields if text.startswith("rows=")]
    if twice and given.rows is not None:
        raise InputError(
            f"--rows {given.rows} and --head-fields {twice[0]} are one setting; give one"
        )

    from vitrail.weights.files import WRITTEN

    if given.out.suffix not in WRITTEN:
        raise InputError(f"--out {given.out} must end in {' or '.join(WRITTEN)}")
    if given.out.is_dir():
        raise InputError(
            f"--out {given.out} is a folder; name a file, such as {given.out}/birds.capsule"
        )
    return given, rest


def dashed(text: str) -> str:
    """ "--image-size=A_B" of "--image_size=A_B": vitrail train takes its flags in both spellings."""
    flag, *value = text.split("=", 1)
    return "=".join([flag.replace("_", "-") if flag.startswith("--") else flag, *value])


def run_config(given: Any, rest: list[str], base: Path, info: Any) -> TrainConfig:
    """The run that a capsule comes from, with what the base settles of it."""
    from vitrail.train.build import resolve

    named = ["--model", f"memory/{info.name}"]
    if not {"--recipe", "--config"} & {text.partition("=")[0] for text in rest}:
        named += ["--recipe", RECIPE]
    config = effective_config([*named, *rest])
    rows = {} if given.rows is None else {"rows": given.rows}
    return resolve(
        replace(
            config,
            weights=str(base),
            train_only="capsule",
            out=str(given.run or given.out.with_name(f"{given.out.stem}-run")),
            head_fields={"rows": ROWS} | config.head_fields | rows,
            model_fields={},  # these and what follows: as the base has them
            image_size=None,
            crop_pct=None,
            resize=None,
            native=False,
            packing=Packing(),
            patch_sizes=(),
        )
    )


def check_attachable(tasks: "Capsules", config: TrainConfig, name: str) -> None:
    """Raise InputError where what a run starts from could not be attached, before it takes its time."""
    from vitrail.adapt.capsules import capsule_of
    from vitrail.train.build import build_model

    capsule = capsule_of(build_model(config, ("any",)), name)
    try:
        tasks.detach(tasks.attach(capsule))
    except InputError as error:
        raise InputError(f"what is trained so could not be attached: {error}") from error


def check_same_base(tasks: "Capsules", config: TrainConfig) -> None:
    """Raise InputError where a run would go on with another backbone than its base has by now: a run keeps
    the weights that it began with, and what it learns beside them could not be attached."""
    from vitrail.models import weights_hash
    from vitrail.train.state import newest_whole, read_header, read_state

    path = newest_whole(Path(config.out) / "state")
    if path is None:
        return
    began = read_header(path)[1]["config"]
    if any(began.get(key) != getattr(config, key) for key in ("model", "weights")):
        return  # another run, of which the trainer tells
    prefix = "model.backbone."
    tensors = {k: v for k, v in read_state(path).items() if k.startswith(prefix)}
    there = weights_hash({key.removeprefix(prefix): value for key, value in tensors.items()})
    if there != weights_hash(tasks.backbone.state_dict()):
        raise InputError(
            f"the base has changed since the run in {config.out} began (sha256 of their backbones differs): "
            "its capsule could not be attached; give another --run"
        )


def list_capsules(argv: list[str]) -> None:
    flags = parse_flags(ListFlags, argv, prog="vitrail adapt list")
    if not flags.files:
        raise InputError("say which capsules: vitrail adapt list FILE...")

    from vitrail.adapt.capsules import read_capsule
    from vitrail.tasks.task import task_of

    rows = []
    for path in flags.files:
        capsule = read_capsule(path)
        task, score = task_of(capsule.task), ""
        if task.headline in capsule.metrics:
            score = f"{task.shown} {capsule.metrics[task.headline]:.4f}"
        base = f"{capsule.base.name} {capsule.base.sha256[:8]}"
        more = ", ..." if len(capsule.classes) > 4 else ""
        classes = f"{len(capsule.classes)}: {', '.join(capsule.classes[:4])}{more}"
        size = f"{path.stat().st_size / 1000:.0f} kB"
        rows.append((capsule.name, classes, str(capsule.head.rows), size, base, score, str(path)))
    print_rows(("name", "classes", "rows", "size", "base", "score", "file"), rows)


def evaluate(argv: list[str]) -> None:
    flags = parse_flags(EvalFlags, argv, prog="vitrail adapt eval")

    from vitrail.data import open_data
    from vitrail.memory import enough_memory

    tasks = attached(flags.base, flags.capsules, flags.device)
    how: dict[str, Any] = {"skip_broken": flags.skip_broken, "val_fraction": flags.val_fraction}
    data = open_data(flags.data, flags.split, **how)
    for note in data.notes:
        say(f"vitrail: {note}")
    for where, what in data.broken:
        say(f"vitrail: left out {where}: {what}")
    with enough_memory(f"{flags.batch_size} images at a time", "give a smaller --batch-size"):
        found = measure(tasks, data, flags.batch_size, flags.workers)
    if flags.json:
        about = {"base": str(flags.base), "data": flags.data, "split": flags.split}
        scores = {name: of.to_dict() for name, of in found.items()}
        print(json.dumps(about | {"tasks": scores}, indent=2))
    else:
        print_rows(("task", "scores"), [(name, of.line()) for name, of in found.items()])


def measure(tasks: "Capsules", data: Any, batch_size: int, workers: int = 0) -> "dict[str, Scores]":
    """Scores of each capsule, all of them in one pass. Raises InputError where the data's classes are not a
    capsule's."""
    from vitrail.data.loader import eval_batches
    from vitrail.tasks.task import fitting, task_of

    evaluators = {}
    for name in tasks.names:
        model = tasks.model(name)
        task = task_of(model.task)
        try:
            evaluators[name] = task.evaluator(model, fitting(task, data, model.info.name))
        except InputError as error:
            raise InputError(f"the capsule {name!r}: {error}") from error
    assert tasks.preprocessing is not None
    for batch in eval_batches(data, tasks.preprocessing, batch_size, workers=workers):
        found = tasks.predict(batch.images)
        for name, evaluator in evaluators.items():
            evaluator.update({"logits": found[name]}, batch)
    return {name: evaluator.compute() for name, evaluator in evaluators.items()}


def predict(argv: list[str]) -> None:
    flags = parse_flags(FlagCreatePairsOff[PredictFlags], argv, prog="vitrail adapt predict")

    from vitrail.cli.predict import printable, watched
    from vitrail.predictor import broken_pictures
    from vitrail.weights.files import WRITTEN
    from vitrail_runtime.pictures import find_pictures

    # Whatever is wrong with the flags and inputs is said before a model is loaded.
    files = [text for text in flags.capsules if text.endswith(WRITTEN)]
    inputs = [text for text in flags.capsules if text not in files] + list(flags.inputs)
    if not inputs:
        raise InputError(
            "say which images: vitrail adapt predict BASE --capsules FILE... photo.jpg folder"
        )
    if min(flags.top_k, flags.batch_size) < 1:
        raise InputError("--top-k and --batch-size must be at least 1")
    images = list(dict.fromkeys(path for given in inputs for path in find_pictures(given)))
    tasks = attached(flags.base, files, flags.device)
    skipped: list[tuple[str, str]] = []
    rows = []
    found = answers(tasks, images, flags.batch_size, flags.top_k, skipped)
    for path, said in watched(found, len(images), bar=not flags.json):
        if flags.json:
            parts = {name: prediction.to_dict() for name, prediction in said.items()}
            told = {name: {"top": part["top"]} for name, part in parts.items()}
            print(json.dumps({"path": path, "tasks": told}))
        else:
            best = (f"{p.names[0]} {p.scores[0]:.1%}" for p in said.values())
            rows.append((printable(path), *best))
    if rows:
        print_rows(("image", *tasks.classes), rows)
    if skipped and not flags.skip_broken:
        raise broken_pictures(skipped, len(images) - len(skipped))
    for name, problem in skipped:
        say(f"left out {name} {problem}")
    if len(skipped) == len(images):
        raise InputError("none of the images could be read")


def attached(base: Path, capsules: Sequence[str], device: str) -> "Capsules":
    """Capsules, each FILE or NAME=FILE, on the base in a folder."""
    from vitrail.adapt.capsules import Capsules
    from vitrail.device import choose_device

    if not capsules:
        raise InputError(
            "say which capsules: --capsules FILE..., as vitrail adapt train writes them"
        )
    tasks = Capsules(base)
    for text in capsules:
        name, equals, file = text.partition("=")
        given = equals and not Path(text).exists()
        tasks.attach(file if given else text, name if given else None)
    return tasks.to(choose_device(device))


def answers(
    tasks: "Capsules",
    images: Sequence[Path],
    batch_size: int,
    top_k: int,
    skipped: list[tuple[str, str]],
) -> "Iterator[tuple[str, dict[str, Prediction]]]":
    """Of each image what each task says, in order; those that cannot be read are added to `skipped`."""
    from vitrail.predictor import read_ahead

    def readable() -> "Iterator[Prepared]":
        assert tasks.preprocessing is not None
        for one in read_ahead(iter(images), tasks.preprocessing, batch_size):
            if isinstance(one, tuple):
                skipped.append(one)
            else:
                yield one

    for _, group in groupby(readable(), key=lambda one: one.pixels.shape):
        while batch := list(islice(group, batch_size)):
            yield from asked(tasks, batch, top_k)


def asked(
    tasks: "Capsules", batch: "list[Prepared]", top_k: int
) -> "Iterator[tuple[str, dict[str, Prediction]]]":
    """What each task says of images of one size: one pass."""
    import numpy as np
    import torch

    from vitrail.memory import enough_memory
    from vitrail_runtime.finish import FINISH

    with enough_memory(f"{len(batch)} images at a time", "give a smaller --batch-size"):
        found = tasks.predict(torch.from_numpy(np.stack([one.pixels for one in batch])))
    geometries = [one.geometry for one in batch]
    said = {
        name: FINISH[tasks.task]({"logits": found[name].cpu().numpy()}, geometries, classes, top_k)
        for name, classes in tasks.classes.items()
    }
    for i, one in enumerate(batch):
        yield str(one.source), {name: predictions[i] for name, predictions in said.items()}


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # Without a terminal lines are as long as they need to be, for grep and the like.
    console = Console(width=None if sys.stdout.isatty() else 1000, highlight=False)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in header:
        table.add_column(Text(heading), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    with console.capture() as printed:
        console.print(table)
    for line in printed.get().splitlines():
        print(line.rstrip())
