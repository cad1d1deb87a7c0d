"""What a run is made of, from its configuration: data, plan, model, optimiser, and where it stands."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from vitrail import models
from vitrail.configuration import from_dict, to_dict
from vitrail.data.images import ImageData, open_data, open_source
from vitrail.data.loader import TrainBatch, TrainLoader
from vitrail.data.plan import BatchPlan, balanced_weights
from vitrail.memory import enough_memory
from vitrail.train.agreement import together
from vitrail.train.build import build_model, check_parts
from vitrail.train.config import TrainConfig, differences, read_config
from vitrail.train.ema import Ema
from vitrail.train.folder import RunFolder, explained
from vitrail.train.optim import create_optimizer
from vitrail.train.parallel import (
    check_shares,
    check_world,
    choose_workers,
    distribute,
    on_main,
    synchronised_batchnorm,
)
from vitrail.train.progress import Progress, counted
from vitrail.train.scalars import Scalars, check_tensorboard
from vitrail.train.state import (
    NewerState,
    Position,
    gather,
    read_header,
    read_state,
    restore,
    states,
    whole,
    write_state,
)
from vitrail.train.threads import settle_threads
from vitrail.weights.catalogue import weight_sources
from vitrail_runtime.errors import InputError

SMALL = 10_000  # training pictures under which a start from random weights deserves a word

NOTICEABLE = 0.05  # share of the pictures, left out of an epoch, from which it deserves a word


@dataclass
class Run:
    """A run that stands somewhere. `net` is `model` as the processes train it: the same parameters."""

    config: TrainConfig
    accelerator: Accelerator
    folder: RunFolder
    train_data: ImageData
    val_data: ImageData
    plan: BatchPlan
    loader: TrainLoader
    model: Any
    net: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    progress: Progress
    at: Position
    total_steps: int
    warmup_steps: int
    notes: list[str]  # what became of files of earlier starts
    scalars: Scalars | None = None  # of the main process
    started: float = 0.0  # on the monotonic clock, moved back by the time of earlier starts
    saved_at: float = 0.0  # training seconds
    rate: float = 0.0  # learning rate and gradient norm of the last update
    norm: float = 0.0

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world(self) -> int:
        return self.accelerator.num_processes

    @property
    def workers(self) -> int:
        return choose_workers(self.config, self.accelerator)

    @property
    def share_done(self) -> float:
        """How much of the run is over, by steps or by time, whichever is further."""
        by_steps = self.at.step / self.total_steps
        limit = self.config.max_minutes
        return by_steps if limit is None else max(by_steps, self.at.seconds / (60 * limit))

    @property
    def epochs_done(self) -> float:
        return self.at.epoch + self.at.batch / self.plan.steps(self.at.epoch)

    def batches(self) -> Iterator[TrainBatch]:
        """What is left of the epoch that the run stands in: this process's share of each batch."""
        return self.loader.epoch(self.at.epoch, self.at.batch)

    def begin_epoch(self) -> None:
        """Training mode, save for a frozen backbone: its dropout and running statistics stay still."""
        self.progress.begin_epoch()
        self.net.train()
        if self.config.train_only == "head":
            self.model.backbone.eval()

    def log_training(self) -> None:
        """A row with the mean loss since the last one."""
        at = self.at
        self._add_row(
            kind="train",
            loss=sum(at.losses) / len(at.losses),
            lr=self.rate,
            grad_norm=self.norm,
            images_per_second=round(self.progress.rate, 1),
        )
        at.losses = ()

    def log_evaluation(self, scores: dict[str, Any]) -> None:
        """A row with the scores, and a line for the person who waits."""
        figures = {k: scores[k] for k in ("top1", "top5", "loss", "num_images")}
        self._add_row(kind="eval", **figures, best=self.at.best)
        mark = " (best)" if self.at.best_step == self.at.step else ""
        self.progress.say(
            f"epoch {self.epochs_done:.1f}  step {self.at.step}  "
            f"val loss {scores['loss']:.4f}  top-1 {scores['top1']:.4f}{mark}"
        )

    def _add_row(self, *, kind: str, **figures: Any) -> None:
        at = self.at
        row = {"kind": kind, "step": at.step, "epoch": at.epoch, "images": at.images}

        def add() -> None:
            if at.rows and not self.folder.metrics.exists():
                self.progress.say(f"{self.folder.metrics} is gone; a new one begins here")
            with explained(self.folder):
                self.folder.add_row(row | figures | {"seconds": round(at.seconds, 3)})
                if self.scalars is not None:
                    self.scalars.add(kind, at.step, figures)

        on_main(self.accelerator, add)
        at.rows += 1

    def forget_lost_best(self) -> None:
        """Where best/ was deleted, the best model is the best of those still to come."""
        at = self.at
        if at.best is None or on_main(self.accelerator, lambda: self.folder.has("best")):
            return
        self.progress.say(
            f"{self.folder.path / 'best'}, of top-1 {at.best:.4f}, is gone: the best model from here on "
            "takes its place"
        )
        at.best, at.best_step, at.stale = None, 0, 0

    def save_state(self) -> None:
        """Write where the run stands, so that it can go on from here."""
        tensors = gather(self.model, self.optimizer, self.ema)

        def write() -> None:
            with explained(self.folder):
                if not self.folder.config.is_file():  # deleted meanwhile; to go on is by its name
                    self.folder.write_config(self.config)
                about = _identity(self.config, self.train_data, self.val_data)
                write_state(self.folder.state, tensors, self.at, about, keep=self.config.keep)

        on_main(self.accelerator, write)
        self.saved_at = self.at.seconds

    def save_model(self, names: list[str], scores: dict[str, Any]) -> None:
        """Write the model as it stands, with its scores and predictions, to folders of these names."""
        state = {key: whole(value) for key, value in self.model.state_dict().items()}

        def write() -> None:
            with torch.device("meta"):
                model = build_model(replace(self.config, weights=None), self.train_data.classes)
            model.load_state_dict(state, assign=True)
            figures = {key: value for key, value in scores.items() if key != "predictions"}
            for name in names:
                with explained(self.folder), self.folder.replacing(name) as new:
                    models.save(model, new, metrics=figures)
                    np.savez_compressed(new / "predictions.npz", **scores["predictions"])

        on_main(self.accelerator, write)


def set_up(config: TrainConfig, accelerator: Accelerator, folder: RunFolder) -> Run:
    """Build everything and bring it to where the run in `folder` stopped, if one did."""
    train_data, val_data = together(lambda: open_splits(config, accelerator.num_processes))
    saved, notes = on_main(accelerator, lambda: find_state(config, folder, train_data, val_data))

    torch.manual_seed(config.seed)
    # A run that goes on has its own weights: where it started from need not be there any more.
    start = config if saved is None else replace(config, weights=None)
    model, plan = together(lambda: build(start, train_data, accelerator.num_processes))
    if saved is None:  # only now: a start that is refused leaves nothing behind
        on_main(accelerator, lambda: begin(config, folder))
    model = model.to(accelerator.device)
    if config.train_only == "head":
        model.backbone.requires_grad_(False)
    model = synchronised_batchnorm(model, accelerator)
    net = distribute(model, config, accelerator)
    optimizer = create_optimizer(model, config)
    ema = Ema(model, config.ema) if config.ema else None
    position = Position()
    if saved is not None:
        position = together(lambda: bring_back(saved, model, optimizer, ema))
        position.rows, lost = on_main(accelerator, lambda: folder.keep_rows(position.rows))
        notes += lost
        if not on_main(accelerator, lambda: folder.config_is(config)):
            on_main(accelerator, lambda: folder.write_config(config))
            notes.append(f"{folder.config} was not that of this run any more, and is written anew")

    per_epoch = [plan.steps(epoch) for epoch in range(config.epochs)]
    total = min(sum(per_epoch), config.max_steps or sum(per_epoch))
    warmup = min(round(config.warmup_epochs * sum(per_epoch) / config.epochs), total // 2)
    if accelerator.num_processes == 1:
        settle_threads(config, model, plan, updates=total, saved=saved)
    progress = Progress(total, minutes=config.max_minutes, speaks=accelerator.is_main_process)
    augmentation = replace(
        config.augmentation, mean=model.preprocessing.mean, std=model.preprocessing.std
    )
    loader = TrainLoader(
        train_data,
        plan,
        augmentation,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=choose_workers(config, accelerator),
        pin_memory=accelerator.device.type == "cuda",
    )
    run = Run(
        config=config,
        accelerator=accelerator,
        folder=folder,
        train_data=train_data,
        val_data=val_data,
        plan=plan,
        loader=loader,
        model=model,
        net=net,
        optimizer=optimizer,
        ema=ema,
        progress=progress,
        at=position,
        total_steps=total,
        warmup_steps=warmup,
        notes=notes,
    )
    run.started = time.monotonic() - position.seconds
    run.saved_at = position.seconds
    if config.tensorboard and accelerator.is_main_process:
        with explained(folder):
            run.scalars = Scalars(folder.path / "tensorboard", position.step)
    return run


def open_splits(config: TrainConfig, world: int) -> tuple[ImageData, ImageData]:
    """Training and validation pictures, after what can be checked without them."""
    check_world(config, world)
    if config.tensorboard:
        check_tensorboard()
    how: dict[str, Any] = {"skip_broken": config.skip_broken, "val_fraction": config.val_fraction}
    source = open_source(config.data)
    train_data = open_data(source, "train", **how)
    return train_data, open_data(source, "val", classes=train_data.classes, **how)


def build(config: TrainConfig, data: ImageData, world: int) -> tuple[Any, BatchPlan]:
    """The model, on the CPU, and the batches that its processes share."""
    side = config.image_size
    size = f" for pictures of {side} x {side}" if side else ""
    with enough_memory(f"{config.model}{size}", "take a smaller model or --image-size"):
        model = build_model(config, data.classes)
    plan = build_plan(config, data, model.preprocessing.size, world)
    check_shares(config, plan, world)
    check_parts(config, data.classes, plan.batch_sizes(), world)
    return model, plan


def introduce(run: Run) -> None:
    """Tell what a person should know before she waits: what was decided for her, and where the run stands."""
    for note in dict.fromkeys(run.train_data.notes + run.val_data.notes):
        run.progress.say(note)
    for key, problem in dict.fromkeys(run.train_data.broken + run.val_data.broken):
        run.progress.say(f"left out {key}: {problem}")
    at, config = run.at, run.config
    report = getattr(run.model, "weights_report", None)
    if run.plan.batch_size < run.config.batch_size:
        run.progress.say(
            f"batches of all {run.plan.batch_size} pictures there are, instead of {run.config.batch_size}"
        )
    left_out = run.plan.left_out(at.epoch)
    once = config.sampling == "uniform" and config.repeats == 1  # else no epoch has every picture
    if once and left_out >= NOTICEABLE * run.plan.length:
        run.progress.say(
            f"{left_out} of {run.plan.length} pictures fill no batch in an epoch, others each time"
        )
    if config.weights is not None and not at.step:
        start = models.model_folder(config.weights)
        if start.name == "best" and start != Path(config.weights):
            run.progress.say(f"{config.weights} is a run; starting from its best model, {start}")
    if report is not None:
        run.progress.say(str(report))
    elif config.weights is None and not at.step and len(run.train_data) < SMALL:
        known = weight_sources(config.model)
        known = f", such as --weights {known[0]}" if known else ""
        run.progress.say(
            f"starting from random weights; on {len(run.train_data)} pictures, weights trained on many "
            f"do far better{known}"
        )
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    trained = f"{trained / 1e6:.2f} M" if trained >= 1e5 else f"{trained:,}"
    height, width = run.model.preprocessing.size
    processes = f"{counted(run.world, 'process', 'processes')}, " if run.world > 1 else ""
    threads, workers = counted(torch.get_num_threads(), "thread"), counted(run.workers, "worker")
    pictures = counted(len(run.train_data), "picture")
    run.progress.say(
        f"{config.model}: {trained} parameters to train on {pictures} at {height} x {width}, "
        f"{len(run.model.classes)} classes; {counted(run.total_steps, 'update')}; "
        f"{processes}{run.accelerator.device}, {threads}, {workers}"
    )
    for note in run.notes:
        run.progress.say(note)
    if at.step and not at.finished:
        run.progress.say(f"going on at update {at.step}, epoch {at.epoch + 1}")


def build_plan(
    config: TrainConfig, data: ImageData, size: tuple[int, int], world: int
) -> BatchPlan:
    """Which pictures in which step. A data set smaller than a batch is one batch, where one process computes
    it in one part; elsewhere it is an InputError of the plan."""
    balanced = config.sampling == "balanced"
    whole = config.accumulate == world == 1 and not config.sizes
    return BatchPlan(
        length=len(data),
        batch_size=min(config.batch_size, len(data)) if whole else config.batch_size,
        size=size,
        seed=config.seed,
        scales=tuple((side, side) for side in config.sizes),
        weights=balanced_weights(data.labels) if balanced else None,
        strata=data.labels if balanced else None,
        repeats=config.repeats,
    )


def seed_update(config: TrainConfig, step: int, rank: int) -> None:
    """Let dropout and stochastic depth draw by the number of the update: no random state to keep."""
    key = np.random.SeedSequence([config.seed, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(key >> 1))


def find_state(
    config: TrainConfig, folder: RunFolder, train_data: ImageData, val_data: ImageData
) -> tuple[Path | None, list[str]]:
    """The newest whole state in a run folder, None in a new one; and what a person should know about it.

    Raises InputError when the folder is another run's (saying what differs), or a newer version's, or when no
    state in it is whole.
    """
    problems = []
    for path in states(folder.state):
        try:
            position, about = read_header(path)
            _check_run(config, folder, position, about, _identity(config, train_data, val_data))
            read_state(path)
        except (NewerState, OtherRun):
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
    """A folder that holds the run of another configuration, or on other pictures."""


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
            f"{error}; another version of vitrail trained it; give another --out"
        ) from error
    settings = differences(config, theirs)
    pictures = _other_pictures(about, ours)
    if settings or pictures:
        there = f"the configuration of that run, --config {folder.config}"
        if not folder.config_is(theirs):
            there = f"these settings as they are there ({folder.config} is no longer that run's)"
        back = [there] * bool(settings)
        back += ["its pictures as they were"] * bool(pictures)
        raise OtherRun(
            f"{folder.path} holds another run, {position.step} steps on:\n  "
            + "\n  ".join(settings + pictures)
            + f"\nto go on with it: {' and '.join(back)}; to start anew: another --out, and to start "
            f"anew from its weights --weights {folder.path / 'last'} as well"
        )


def bring_back(
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
    """Raise InputError where a start from nothing would write over models that it would not make again.

    A run that died before its first state may have evaluated: the same settings make the same models.
    """
    models = folder.models()
    if not models:
        return
    there = f"{folder.path} holds models ({', '.join(models)}), but no state to go on from"
    hint = f"give another --out; to start from its weights, --weights {folder.path / models[0]} as well"
    if not folder.config.is_file():
        raise InputError(f"{there}, and no config.yaml: it is no run folder; {hint}")
    if (folder.path / "report.html").is_file():
        raise InputError(f"{there}: a finished run whose state is gone; {hint}")
    settings = differences(config, read_config(folder.config))
    if settings:
        raise InputError(
            f"{there}, of a run with other settings:\n  " + "\n  ".join(settings) + f"\n{hint}"
        )


def _identity(config: TrainConfig, train_data: ImageData, val_data: ImageData) -> dict[str, Any]:
    return {
        "config": to_dict(config),
        "data": train_data.content_hash,
        "val": val_data.content_hash,
        "counts": [len(train_data), len(val_data)],
        "classes": list(train_data.classes),
        "threads": torch.get_num_threads(),
    }


def _other_pictures(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Scores on other validation pictures cannot be compared: they too make another run."""
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
        lines.append(f"{what} pictures: not the same ({counts})")
    return lines
