"""What a run is made of, from its configuration: data, plan, model, optimiser, and where it stands."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from vitrail.adapt.freeze import freeze
from vitrail.configuration import from_dict
from vitrail.data.examples import Examples
from vitrail.data.loader import TrainLoader
from vitrail.data.opening import open_data, open_source
from vitrail.data.pack_plan import PackPlan
from vitrail.data.plan import BatchPlan, shape_groups
from vitrail.memory import enough_memory
from vitrail.tasks.task import fitting, task_of_model
from vitrail.train.build import build_model, check_parts, task_and_settings
from vitrail.train.config import TrainConfig, differences, read_config
from vitrail.train.ema import Ema
from vitrail.train.folder import RunFolder, explained
from vitrail.train.optim import create_optimizer
from vitrail.train.progress import Progress
from vitrail.train.ranks import (
    check_shares,
    check_world,
    choose_workers,
    distribute,
    on_rank_zero,
    synchronised_batchnorm,
    together,
)
from vitrail.train.run import Run, identity, total_updates
from vitrail.train.scalars import Scalars, check_tensorboard
from vitrail.train.state import Position, read_header, read_state, restore, states
from vitrail.train.threads import choose_threads
from vitrail_runtime.errors import InputError, NewerVersion
from vitrail_runtime.preprocess import Preprocessing


def set_up(config: TrainConfig, accelerator: Accelerator, folder: RunFolder) -> Run:
    """Build everything and bring it to where the run in `folder` stopped, if one did."""
    task, settings = task_and_settings(config)
    task.check(config)
    train_data, val_data = together(lambda: open_splits(config, accelerator.num_processes))
    saved, notes = on_rank_zero(
        accelerator, lambda: find_state(config, folder, train_data, val_data)
    )

    torch.manual_seed(config.seed)
    # A run that goes on has its own weights: where it started from need not be there any more.
    start = config if saved is None else replace(config, weights=None)
    model, plan = together(lambda: build(start, train_data, accelerator.num_processes))
    if saved is None:  # only now: a start that is refused leaves nothing behind
        on_rank_zero(accelerator, lambda: begin(config, folder))
    model = model.to(accelerator.device)
    freeze(model, config.train_only)
    model = synchronised_batchnorm(model, accelerator)
    objective = distribute(model, task.options(settings), config, accelerator)
    optimizer = create_optimizer(model, config)
    ema = Ema(model, config.ema) if config.ema else None
    position = Position()
    if saved is not None:
        position = together(lambda: restored(saved, model, optimizer, ema))
        position.rows, lost = on_rank_zero(accelerator, lambda: mended(folder, config, position))
        notes += lost
    warmup, total = warmup_updates(config, plan), total_updates(config, plan, position)
    if accelerator.num_processes == 1:
        choose_threads(config, model, plan, updates=total, saved=saved)
    run = Run(
        config=config,
        accelerator=accelerator,
        folder=folder,
        task=task,
        settings=settings,
        train_data=train_data,
        val_data=val_data,
        plan=plan,
        loader=build_loader(config, train_data, plan, model.preprocessing, accelerator),
        model=model,
        objective=objective,
        optimizer=optimizer,
        ema=ema,
        progress=Progress(total, minutes=config.max_minutes, speaks=accelerator.is_main_process),
        at=position,
        total_steps=total,
        first_total=total_updates(config, plan, Position()),
        warmup_steps=warmup,
        notes=notes,
    )
    run.started = time.monotonic() - position.seconds
    run.saved_at = position.seconds
    if config.tensorboard and accelerator.is_main_process:
        with explained(folder):
            run.scalars = Scalars(folder.path / "tensorboard", position.step)
    return run


def mended(folder: RunFolder, config: TrainConfig, position: Position) -> tuple[int, list[str]]:
    """Bring the folder's rows and config.yaml to where the run goes on; how many rows there are, and what a
    person should know."""
    rows, notes = folder.keep_rows(position.rows)
    if not folder.config_is(config):
        folder.write_config(config)
        notes.append(f"{folder.config} was not that of this run any more, and is written anew")
    return rows, notes


def warmup_updates(config: TrainConfig, plan: BatchPlan | PackPlan) -> int:
    """Told from the run's start, wherever it goes on."""
    every = plan.steps_between(0, config.epochs)
    total = min(every, config.max_steps or every)
    return min(round(config.warmup_epochs * every / config.epochs), total // 2)


def build_loader(
    config: TrainConfig,
    data: Examples,
    plan: BatchPlan | PackPlan,
    preprocessing: Preprocessing,
    accelerator: Accelerator,
) -> TrainLoader:
    """Of this process's share of every batch."""
    return TrainLoader(
        data,
        plan,
        replace(config.augmentation, mean=preprocessing.mean, std=preprocessing.std),
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=choose_workers(config, accelerator),
        pin_memory=accelerator.device.type == "cuda",
        own_sizes=preprocessing if preprocessing.mode == "edges" else None,
    )


def open_splits(config: TrainConfig, world: int) -> tuple[Examples, Examples]:
    """Training and validation images, after what can be checked without them."""
    check_world(config, world)
    if config.tensorboard:
        check_tensorboard()
    how: dict[str, Any] = {"skip_broken": config.skip_broken, "drop_bad": config.drop_bad}
    how["val_fraction"] = config.val_fraction
    source = open_source(config.data)
    task = task_of_model(config.model)
    train_data = fitting(task, open_data(source, "train", **how), config.model)
    val_data = open_data(source, "val", classes=train_data.classes, **how)
    return train_data, fitting(task, val_data, config.model)


def build(config: TrainConfig, data: Examples, world: int) -> tuple[Any, BatchPlan | PackPlan]:
    """The model, on the CPU, and the batches that its processes share."""
    size = " for images of {} x {}".format(*config.size) if config.size else ""
    with enough_memory(f"{config.model}{size}", "take a smaller model or --image-size"):
        model = build_model(config, data.classes)
    task, settings = task_and_settings(config)
    for name, value in task.model_options(settings, data.truth).items():
        setattr(model, name, value)
    plan = build_plan(config, data, model.preprocessing.size, world)
    if config.native:
        plan = pack_plan(config, data, model, plan)
    if model.preprocessing.mode == "edges":  # images at their own sizes, padded to one
        plan = replace(plan, groups=shape_groups(data.images.sizes))
    if isinstance(plan, PackPlan):
        return model, plan
    check_shares(config, plan, world, task.multiple(settings))
    check_parts(config, data.classes, plan.batch_sizes(), world)
    return model, plan


def build_plan(config: TrainConfig, data: Examples, size: tuple[int, int], world: int) -> BatchPlan:
    """Which images in which step. A data set smaller than a batch is one batch, where one process computes
    it in one part; elsewhere it is an InputError of the plan."""
    task, settings = task_and_settings(config)
    weights = task.weights(settings, data.truth)
    whole = config.accumulate == world == 1 and not config.sizes
    batch_size = min(config.batch_size, len(data)) if whole else config.batch_size
    if config.native:  # a sample comes when it fits
        batch_size = 1
    return BatchPlan(
        length=len(data),
        batch_size=batch_size,
        size=size,
        seed=config.seed,
        scales=tuple((side, side) for side in config.sizes),
        weights=weights,
        strata=None if weights is None else data.truth.strata(),
        repeats=config.repeats,
        patch_sizes=config.patch_sizes,
    )


def pack_plan(config: TrainConfig, data: Examples, model: Any, samples: BatchPlan) -> PackPlan:
    """The packs of every epoch; `samples` says in which order images come."""
    task, settings = task_and_settings(config)
    if task.multiple(settings) > 1:
        raise InputError(
            "images of several shapes cannot be mixed with each other: leave MixUp, CutMix and mosaics away "
            "(--task.mixup 0 --task.cutmix 0, or --task.mosaic 0), or --native"
        )
    plan = PackPlan(
        samples=samples,
        sizes=data.images.sizes,
        packing=config.packing,
        patch_size=model.backbone.config.patch_size,
        num_prefix_tokens=model.backbone.num_prefix_tokens,
        epochs=config.epochs,
        where=data.images.where,
        patch_sizes=config.patch_sizes,
    )
    plan.check()
    return plan


def find_state(
    config: TrainConfig, folder: RunFolder, train_data: Examples, val_data: Examples
) -> tuple[Path | None, list[str]]:
    """The newest whole state in a run folder, None in a new one; and what a person should know about it.

    Raises InputError when the folder is another run's (saying what differs), or a newer version's, or when no
    state in it is whole.
    """
    problems = []
    for path in states(folder.state):
        try:
            position, about = read_header(path)
            _check_run(config, folder, position, about, identity(config, train_data, val_data))
            read_state(path)
        except (NewerVersion, OtherRun):
            raise
        except InputError as error:
            problems.append(str(error))  # damaged after it was written; the one before will do
            continue
        notes = [*problems]
        if problems:
            notes.append(f"going on from the state before, {path}")
        if about["schema_version"] == 1:
            notes.append(
                f"{path} is of an older vitrail and carries no digest: whether it is as it was written "
                "cannot be told; the next state will carry one"
            )
        return path, notes
    if problems:
        raise InputError(
            "\n".join(problems)
            + f"\nno whole state is left in {folder.state}: put one back from a copy of "
            "it, or delete that folder to start over"
        )
    keep_models(config, folder)
    return None, []


class OtherRun(InputError):
    """A folder that holds the run of another configuration, or on other images: what is there, and what flags
    of vitrail train there are for it."""

    def __init__(self, what: str, todo: str) -> None:
        super().__init__(what, todo)
        self.what, self.todo = what, todo

    def __str__(self) -> str:
        return self.what + self.todo


def _check_run(
    config: TrainConfig,
    folder: RunFolder,
    position: Position,
    about: dict[str, Any],
    ours: dict[str, Any],
) -> None:
    """Raise OtherRun unless a state is one of this run."""
    try:
        theirs = from_dict(TrainConfig, about["config"], where=f"the run in {folder.path}")
    except InputError as error:
        raise OtherRun(
            f"{error}; another version of vitrail trained it", "; give another --out"
        ) from error
    settings = differences(config, theirs)
    images = _other_images(about, ours)
    if settings or images:
        there = f"the configuration of that run, --config {folder.config}"
        if not folder.config_is(theirs):
            there = f"these settings as they are there ({folder.config} is no longer that run's)"
        back = [there] * bool(settings)
        back += ["its images as they were"] * bool(images)
        raise OtherRun(
            f"{folder.path} holds another run, {position.step} steps on:\n  "
            + "\n  ".join(settings + images),
            f"\nto go on with it: {' and '.join(back)}; to start anew: another --out, and to start "
            f"anew from its weights --weights {folder.path / 'last'} as well",
        )


def restored(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None
) -> Position:
    """Fill model, optimiser and average from a state file; where the run stood."""
    position, _ = read_header(path)
    tensors = read_state(path)
    try:
        restore(tensors, model, optimizer, ema)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return position


def begin(config: TrainConfig, folder: RunFolder) -> None:
    """Make a folder that of this run, which starts from nothing."""
    with explained(folder):
        if folder.metrics.is_file():
            folder.keep_rows(0)  # stopped before the first state: starts over
        folder.write_config(config)


def keep_models(config: TrainConfig, folder: RunFolder) -> None:
    """Raise OtherRun where a start from nothing would write over models that it would not make again.

    A run that died before its first state may have evaluated: the same settings make the same models.
    """
    models = folder.models()
    if not models:
        return
    there = f"{folder.path} holds models ({', '.join(models)}), but no state to go on from"
    hint = f"; give another --out; to start from its weights, --weights {folder.path / models[0]} as well"
    if not folder.config.is_file():
        raise OtherRun(f"{there}, and no config.yaml: it is no run folder", hint)
    if (folder.path / "report.html").is_file():
        raise OtherRun(f"{there}: a finished run whose state is gone", hint)
    settings = differences(config, read_config(folder.config))
    if settings:
        listing = "\n  ".join(settings)
        raise OtherRun(f"{there}, of a run with other settings:\n  {listing}", hint)


def _other_images(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Scores on other validation images cannot be compared: they too make another run."""
    lines = []
    for i, (key, what) in enumerate((("data", "training"), ("val", "validation"))):
        if theirs.get(key, ours[key]) == ours[key]:  # the first states had no "val"
            continue
        there, here = theirs.get("counts", ours["counts"])[i], ours["counts"][i]
        counts = (
            f"{there} there, {here} now"
            if there != here
            else f"{here} as before, but a name, a label or a content differs"
        )
        lines.append(f"{what} images: not the same ({counts})")
    return lines
