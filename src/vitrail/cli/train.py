"""`vitrail train`: train or fine-tune on your data; the same command goes on with a run that stopped."""

import argparse
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import yaml

from vitrail_runtime.errors import InputError

if TYPE_CHECKING:
    from vitrail.train.config import TrainConfig

DESCRIPTION = """Train or fine-tune a model. The same command goes on where the run in --out stopped.

Settings come from the defaults, then --recipe, then --config, then the flags."""


class StartParser(argparse.ArgumentParser):
    """Finds the flags that say where the settings of all others come from."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help tells what there is")


def run(argv: list[str]) -> int:
    given = start_flags(argv)
    if given.replay is not None and not {"-h", "--help"} & set(argv):
        return show_replay(given.replay)
    config = effective_config(argv)
    from vitrail.train.progress import counted
    from vitrail.train.trainer import train

    result = train(config)
    if os.environ.get("RANK", "0") != "0":  # one of many processes; the first one tells
        return 128 + result.signal if result.signal else 0
    if result.signal:
        command = f"vitrail train --config {result.folder / 'config.yaml'}"
        say(f"{result.reason}: stopped at update {result.steps}, all saved; go on with: {command}")
        return 128 + result.signal
    say(f"{result.reason}: {counted(result.steps, 'update')} in {result.seconds / 60:.1f} minutes")
    name = model_to_show(result.folder)
    say(f"report: {report_run(config, result.folder, name)}")
    if name == "best":
        print(
            f"best {result.shown} {result.best:.4f} on the validation images: {result.folder / name}"
        )
    else:
        print(f"the last model, instead of the best one: {result.folder / name}")
    return 0


def model_to_show(folder: Path) -> str:
    """ "best", or "last" where best/ is gone or damaged and there is another."""
    from vitrail.models import load

    try:
        load(folder / "best")
    except InputError as error:
        if not (folder / "last" / "model.safetensors").is_file():
            raise
        say(f"{error}; the report is about {folder / 'last'}")
        return "last"
    return "best"


def report_run(config: Any, folder: Path, name: str = "best") -> Path:
    """The page about a run's best model, from what it said of the validation images."""
    from vitrail.analysis.report import read_predictions, read_scores, write_report
    from vitrail.data import open_data
    from vitrail.models import load

    model = load(folder / name)
    how: dict[str, Any] = {"skip_broken": config.skip_broken, "drop_bad": config.drop_bad}
    how["val_fraction"] = config.val_fraction
    data = open_data(config.data, "val", classes=model.classes, **how)
    predictions = read_predictions(folder / name / "predictions.npz", data)
    scores = read_scores(folder / name / "metrics.json")
    page = folder / "report.html"
    return write_report(page, model, data, predictions, scores=scores, run=folder)


def start_flags(argv: list[str]) -> argparse.Namespace:
    """The flags that say where other settings come from, and whose task has settings of its own."""
    first = StartParser(prog="vitrail train", add_help=False, allow_abbrev=False)
    for flag in ("--recipe", "--config", "--replay", "--model", "--weights"):
        first.add_argument(flag)
    return first.parse_known_args(argv)[0]


def effective_config(argv: list[str]) -> "TrainConfig":
    """The configuration of a run: defaults < recipe < file < flags."""
    from tyro.conf import arg

    from vitrail.cli.flags import parse_flags
    from vitrail.configuration import from_dict, to_dict
    from vitrail.recipes import recipe_config
    from vitrail.tasks.task import task_of_model
    from vitrail.train.config import TrainConfig, model_name, read_config

    given = start_flags(argv)
    config = TrainConfig() if given.recipe is None else recipe_config(given.recipe)
    if given.config is not None:
        config = read_config(given.config, config)
    named = replace(
        config, model=given.model or config.model, weights=given.weights or config.weights
    )
    other = config.head_fields and config.model and given.model
    if other and head_config(given.model) != head_config(config.model):
        config = replace(config, head_fields={})  # those of another head
    task = task_of_model(model_name(named))
    where = f"settings of the task {task.name!r}, which {model_name(named)} does,"
    Settings = task.settings
    settings = from_dict(Settings, config.task, where=where)

    @dataclass(frozen=True, kw_only=True)
    class TrainFlags:
        recipe: Annotated[str | None, arg(metavar="NAME")] = None
        """Start from the settings of a recipe (docs/training.md lists them)."""
        config: Annotated[Path | None, arg(metavar="FILE")] = None
        """Start from the settings in a YAML file, such as a run's config.yaml."""
        model_fields: Annotated[tuple[str, ...], arg(metavar="FIELD=VALUE ...")] = ()
        """Fields of the model's own config, such as drop_path_rate=0.1."""
        head_fields: Annotated[tuple[str, ...], arg(metavar="FIELD=VALUE ...")] = ()
        """Fields of its head's config, where the model's name has one."""
        replay: Annotated[Path | None, arg(metavar="RUN")] = None
        """Train nothing; look at the batch that stopped a run with a loss that was not finite."""
        settings: Annotated[TrainConfig, arg(name="")]
        """Of the run."""
        task: Annotated[Settings, arg(name="task")]  # pyright: ignore[reportInvalidTypeForm]
        """Of what the model does."""

    flags = parse_flags(
        TrainFlags,
        argv,
        prog="vitrail train",
        description=DESCRIPTION,
        default=TrainFlags(
            settings=replace(config, model_fields={}, head_fields={}, task={}), task=settings
        ),
    )
    config = replace(
        flags.settings,
        model_fields=config.model_fields | dict(map(field_value, flags.model_fields)),
        head_fields=config.head_fields | dict(map(field_value, flags.head_fields)),
        task=to_dict(flags.task),
    )
    if not config.data:
        raise InputError("say which images to train on: vitrail train --data DIR")
    return config


def head_config(model: str) -> type | None:
    """The class of a model's head's config; None: a classifier."""
    from vitrail.assembly import parse_name

    head, _ = parse_name(model)
    return None if head is None else type(head.config)


def field_value(text: str) -> tuple[str, Any]:
    """("drop_path_rate", 0.1) of "drop_path_rate=0.1"; values are written as in YAML."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(
            f"--model-fields takes FIELD=VALUE, such as drop_path_rate=0.1, not {text!r}"
        )
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise InputError(f"--model-fields {text!r} has no value as in YAML: {error}") from error


def show_replay(folder: str) -> int:
    from vitrail.train.replay import replay, some, verdict

    found = replay(folder)
    print(f"update {found['step']}: loss {found['loss']}, gradient norm {found['gradient_norm']}")
    print(f"in full precision: loss {found['loss_fp32']}")
    print(f"weights that are not finite: {some(found['weights'])}")
    print(
        f"images whose answer is not finite: {some(found['images'], 20)} of {found['num_images']}"
    )
    print(verdict(found))
    return 0


def say(text: str) -> None:
    print(text, file=sys.stderr)
