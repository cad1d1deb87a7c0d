"""A run: what it is made of, where it stands, and what it writes."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from vitrail import models
from vitrail.adapt.freeze import train_mode
from vitrail.configuration import to_dict
from vitrail.data.batch import Batch
from vitrail.data.examples import Examples
from vitrail.data.loader import TrainLoader
from vitrail.data.pack_plan import PackPlan
from vitrail.data.plan import BatchPlan
from vitrail.tasks.task import Scores, Task
from vitrail.train.build import build_model
from vitrail.train.config import TrainConfig
from vitrail.train.ema import Ema
from vitrail.train.folder import RunFolder, explained
from vitrail.train.progress import Progress
from vitrail.train.ranks import choose_workers, on_rank_zero
from vitrail.train.scalars import Scalars
from vitrail.train.schedule import learning_rate
from vitrail.train.state import Position, gather, whole, write_state


@dataclass
class Run:
    """A run that stands somewhere. `objective` gives the losses of `model` as the processes train it."""

    config: TrainConfig
    accelerator: Accelerator
    folder: RunFolder
    task: Task
    settings: Any  # the task's
    train_data: Examples
    val_data: Examples
    plan: BatchPlan | PackPlan
    loader: TrainLoader
    model: Any
    objective: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    progress: Progress
    at: Position
    total_steps: int  # an estimate before the last epoch, where packs are still to be planned
    first_total: int  # the one that was told before the first update
    warmup_steps: int
    notes: list[str]  # what became of files of earlier starts
    scalars: Scalars | None = None  # of the main process
    started: float = 0.0  # on the monotonic clock, moved back by the time of earlier starts
    saved_at: float = 0.0  # training seconds
    rate: float = 0.0  # learning rate and gradient norm of the last update
    norm: float = 0.0
    padded: float = 0.0  # share of what the last update computed that was no image

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
        """How much of the run is over, by steps or by time, whichever is further.

        By epochs where the number of steps is an estimate: an epoch that has fewer than were told must not
        take the learning rate up again.
        """
        at, config = self.at, self.config
        if self.plan.estimates:
            share = max(self.epochs_done / config.epochs, at.step / (config.max_steps or math.inf))
        else:
            share = at.step / self.total_steps
        limit = config.max_minutes
        return share if limit is None else max(share, at.seconds / (60 * limit))

    @property
    def epochs_done(self) -> float:
        at = self.at  # behind the last epoch the plan may have none
        return at.epoch + (at.batch / self.plan.steps(at.epoch) if at.batch else 0.0)

    @property
    def stop_reason(self) -> str:
        """Why no further update is to be made, or ""."""
        if self.at.step >= self.total_steps:
            return "all epochs" if self.config.max_steps is None else "all steps"
        return "time limit" if self.share_done >= 1 else ""

    def batches(self) -> Iterator[Batch]:
        """What is left of the epoch that the run stands in: this process's share of each batch."""
        self.total_steps = total_updates(self.config, self.plan, self.at)
        self.progress.begin_epoch(self.total_steps)
        train_mode(self.model)
        return self.loader.epoch(self.at.epoch, self.at.batch)

    def prepared(self, batch: Batch) -> Batch:
        """The batch on the device, normalised, with what the task does to a whole batch."""
        batch = batch.to(self.accelerator.device, self.model.preprocessing)
        key = (self.config.seed, self.at.epoch, batch.step)
        return self.task.prepare(batch, key, self.settings, len(self.model.classes))

    def set_rate(self) -> float:
        """Give the optimiser the learning rate of this update."""
        rate = learning_rate(
            self.config,
            self.at.step,
            done=self.share_done,
            warmup_steps=self.warmup_steps,
            total_steps=self.first_total,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        return rate

    def count(self, batch: Batch, rate: float, norm: float, loss: float, seconds: float) -> None:
        """An update more has been made."""
        at, images = self.at, batch.num_images * self.world
        at.step, at.batch = at.step + 1, batch.step + 1
        at.images += images
        at.seconds = seconds
        at.losses = (*at.losses, loss)
        self.rate, self.norm, self.padded = rate, norm, batch.padded
        epoch = f"epoch {at.epoch + 1}/{self.config.epochs}"
        self.progress.step(at.step, epoch, images, loss, seconds, batch.padded)

    def rank_scores(self, scores: Scores) -> list[str]:
        """Take an evaluation into account; the names under which its model is to be saved."""
        config, at, names = self.config, self.at, ["last"]
        self.forget_lost_best()
        if at.best is None or scores.best > at.best:
            at.best, at.best_step, at.stale = scores.best, at.step, 0
            names.append("best")
        else:
            at.stale += 1
        if config.keep_every and at.batch == 0 and at.epoch % config.keep_every == 0:
            names.append(f"epoch-{at.epoch:04d}")
        return names

    def log_training(self) -> None:
        """A row with the mean loss since the last one."""
        at = self.at
        self._add_row(
            kind="train",
            loss=sum(at.losses) / len(at.losses),
            lr=self.rate,
            grad_norm=self.norm,
            images_per_second=round(self.progress.rate, 1),
            **({"padding": round(self.padded, 4)} if self.padded else {}),
        )
        at.losses = ()

    def log_evaluation(self, scores: Scores) -> None:
        """A row with the scores, and a line for the person who waits."""
        self._add_row(kind="eval", **scores.values, best=self.at.best)
        mark = " (best)" if self.at.best_step == self.at.step else ""
        loss = f"val loss {scores['loss']:.4f}  " if "loss" in scores.values else ""
        self.progress.say(
            f"epoch {self.epochs_done:.1f}  step {self.at.step}  {loss}"
            f"{self.task.shown} {scores.best:.4f}{mark}"
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

        on_rank_zero(self.accelerator, add)
        at.rows += 1

    def forget_lost_best(self) -> None:
        """Where best/ was deleted, the best model is the best of those still to come."""
        at = self.at
        if at.best is None or on_rank_zero(self.accelerator, lambda: self.folder.has("best")):
            return
        self.progress.say(
            f"{self.folder.path / 'best'}, of {self.task.shown} {at.best:.4f}, is gone: the best model from "
            "here on takes its place"
        )
        at.best, at.best_step, at.stale = None, 0, 0

    def save_state(self) -> None:
        """Write where the run stands, so that it can go on from here."""
        tensors = gather(self.model, self.optimizer, self.ema)

        def write() -> None:
            with explained(self.folder):
                if not self.folder.config.is_file():  # deleted meanwhile; to go on is by its name
                    self.folder.write_config(self.config)
                about = identity(self.config, self.train_data, self.val_data)
                write_state(self.folder.state, tensors, self.at, about, keep=self.config.keep)

        on_rank_zero(self.accelerator, write)
        self.saved_at = self.at.seconds

    def save_model(self, names: list[str], scores: Scores) -> None:
        """Write the model as it stands, with its scores and what it said, to folders of these names."""
        state = {key: whole(value) for key, value in self.model.state_dict().items()}

        def write() -> None:
            with torch.device("meta"):
                model = build_model(replace(self.config, weights=None), self.train_data.classes)
            model.load_state_dict(state, assign=True)
            options = self.task.model_options(self.settings, self.train_data.truth)
            for name, value in options.items():
                setattr(model, name, value)
            said: dict[str, Any] = dict(scores.said or {})
            for name in names:
                with explained(self.folder), self.folder.replacing(name) as new:
                    models.save(model, new, metrics=scores.to_dict())
                    np.savez_compressed(new / "predictions.npz", **said)

        on_rank_zero(self.accelerator, write)


def identity(config: TrainConfig, train_data: Examples, val_data: Examples) -> dict[str, Any]:
    """What must agree where a run goes on."""
    return {
        "config": to_dict(config),
        "data": train_data.content_hash,
        "val": val_data.content_hash,
        "counts": [len(train_data), len(val_data)],
        "classes": list(train_data.classes),
        "threads": torch.get_num_threads(),
    }


def total_updates(config: TrainConfig, plan: BatchPlan | PackPlan, at: Position) -> int:
    """Of the whole run, as its plan tells it in the epoch where it stands."""
    total = at.step + plan.steps_between(at.epoch, config.epochs) - at.batch
    return min(total, config.max_steps or total)


def seed_update(config: TrainConfig, step: int, rank: int) -> None:
    """Let dropout and stochastic depth draw by the number of the update: no random state to keep."""
    key = np.random.SeedSequence([config.seed, step, rank]).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(key >> 1))
