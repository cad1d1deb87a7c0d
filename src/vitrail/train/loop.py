"""The training loop."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from vitrail.data.augment import mix
from vitrail.data.loader import TrainBatch
from vitrail.memory import does_not_fit, ran_out
from vitrail.train.agreement import SharedError, lost_another, share, told_alone, told_once
from vitrail.train.build import check_place, settled
from vitrail.train.clip import clip_gradients
from vitrail.train.config import TrainConfig
from vitrail.train.evaluate import evaluate
from vitrail.train.folder import RunFolder
from vitrail.train.interrupt import Interrupt
from vitrail.train.losses import loss_of
from vitrail.train.parallel import (
    mean_over_processes,
    on_main,
    processes,
    share_buffers,
)
from vitrail.train.progress import counted
from vitrail.train.replay import keep_batch, not_finite
from vitrail.train.schedule import learning_rate
from vitrail.train.setup import Run, introduce, seed_update, set_up
from vitrail.train.state import newest_whole
from vitrail_runtime.errors import InputError, NotFinite


@dataclass(frozen=True)
class RunResult:
    """How a run ended: best/ and last/ in `folder` are the models, metrics.jsonl what was measured."""

    folder: Path
    reason: str  # "all epochs", "time limit", ..., or the signal that stopped it
    signal: int  # the signal's number; 0: the run is over
    steps: int
    best: float | None  # top-1 of best/ on the validation pictures
    seconds: float


def train(config: TrainConfig) -> RunResult:
    """Train to the end, or on from where the run in `config.out` stopped.

    On a CPU with as many threads the weights are the same bit for bit, stopped or not. Raises InputError for
    whatever a person can put right; what was saved before is then still there.
    """
    config = settled(config)
    check_place(config)
    folder = RunFolder(config.out)
    with ExitStack() as stack:
        accelerator = stack.enter_context(processes(config))
        stack.enter_context(failures_told(config, folder, accelerator.num_processes))
        on_main(accelerator, lambda: stack.enter_context(folder.locked()))
        run = set_up(config, accelerator, folder)
        if run.scalars is not None:
            stack.callback(run.scalars.close)
        interrupt = stack.enter_context(Interrupt())
        stack.enter_context(run.progress)
        introduce(run)
        return fit(run, interrupt)


@contextmanager
def failures_told(config: TrainConfig, folder: RunFolder, world: int) -> Iterator[None]:
    """Tell, in one message, of memory that ran out where the processes cannot speak about it first, and of
    another process that has ended so.

    In an update one may run out alone while the others wait for its gradients: to ask all of them after every
    forward and every bucket of gradients would cost each update more than it is worth. Nothing is saved then:
    the weights are as before, but the running statistics have seen a part of the batch.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if world > 1 and lost_another(error):
            raise told_alone(
                InputError(
                    "another process of the run has ended; what it told, or the system's log, says why"
                )
            ) from error
        if not ran_out(error):
            raise
        pictures = counted(config.batch_size, "picture")
        at_a_time = config.batch_size // (world * config.accumulate)
        parts = f" ({at_a_time} at a time)" if at_a_time < config.batch_size else ""
        side = config.image_size
        size = f"{side} x {side}" if side else "the model's own size"
        less = "give a smaller --batch-size, a larger --accumulate, a smaller --image-size"
        less += "" if config.grad_checkpointing else ", or --grad-checkpointing"
        saved = newest_whole(folder.state)
        if saved:
            less += (
                f" (another run then, with another --out)\n{saved} is complete: once there is memory, the "
                "same command goes on from it"
            )
        what = f"an update on {pictures} of {size}{parts}"
        raise told_alone(does_not_fit(what, error, less)) from error


def fit(run: Run, interrupt: Interrupt) -> RunResult:
    """The loop, which leaves its state behind where a picture cannot be read: what was learnt is kept."""
    try:
        return loop(run, interrupt)
    except SharedError as problem:
        saved = ""
        if run.at.step:
            run.save_state()
            saved = (
                f"\nthe run is saved at update {run.at.step}; put this right and give the same command again "
                f"to go on: vitrail train --config {run.folder.config}"
            )
        raise told_once(InputError(f"{problem}{saved}")) from problem


def loop(run: Run, interrupt: Interrupt) -> RunResult:
    """Epochs of updates, each closed by an evaluation.

    Raises SharedError when a process cannot read a picture; `run.at` is then a position to go on from.
    """
    config, at, asked = run.config, run.at, 0
    if at.finished:
        run.progress.say(f"{run.folder.path} is finished: {at.finished}")
    while not at.finished and not asked:
        run.begin_epoch()
        batches = run.batches()
        over = why_over(run)  # at once where the last evaluation of all could not be made
        while not over and not asked and (batch := next_batch(run, batches)) is not None:
            asked = update(run, batch, interrupt)
            if at.step % config.log_every == 0:
                run.log_training()
            over = why_over(run)
            if not over and not asked and at.seconds - run.saved_at >= 60 * config.save_every:
                run.save_state()
        stood = replace(at)
        if at.batch == run.plan.steps(at.epoch) and (over or not asked):
            at.epoch, at.batch = at.epoch + 1, 0
        at.finished = over
        if over or (at.batch == 0 and at.epoch % config.eval_every == 0):
            try:
                score(run)
            except SharedError:
                run.at = stood  # before the evaluation, which is then made first
                raise
        if at.finished or asked:
            run.save_state()
    reason = at.finished or signal.Signals(asked).name
    return RunResult(
        run.folder.path, reason, 0 if at.finished else asked, at.step, at.best, at.seconds
    )


def why_over(run: Run) -> str:
    """Why no further update is to be made, or ""."""
    if run.at.step >= run.total_steps:
        return "all epochs" if run.config.max_steps is None else "all steps"
    return "time limit" if run.share_done >= 1 else ""


def next_batch(run: Run, batches: Iterator[TrainBatch]) -> TrainBatch | None:
    """This process's share of the next batch, None behind the last one.

    Raises SharedError, on every process, when any cannot read its share.
    """
    batch = problem = None
    try:
        batch = next(batches, None)
    except InputError as error:
        problem = error
    if run.world > 1:
        # A word before each update: the others must not wait in it for the gradients of one who cannot come.
        (failed,) = mean_over_processes(run.accelerator, float(problem is not None))
    else:
        failed = problem is not None
    shared = share(problem) if failed else None
    if shared is not None:
        raise shared from problem
    return batch


def update(run: Run, batch: TrainBatch, interrupt: Interrupt) -> int:
    """One optimiser step on one global batch. Returns the signal that any process received, or 0.

    Raises InputError, before any weight is changed, when loss or gradient is not finite.
    """
    config, at = run.config, run.at
    rate = learning_rate(
        config,
        at.step,
        done=run.share_done,
        warmup_steps=run.warmup_steps,
        total_steps=run.total_steps,
    )
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    seed_update(config, at.step, run.rank)
    images, targets = to_device(run, batch)
    own_loss = backward(run, images, targets)
    own_norm = clip_gradients(run.model, config)
    loss, norm, seconds, asked = mean_over_processes(
        run.accelerator, own_loss, own_norm, time.monotonic() - run.started, interrupt.asked
    )
    if not math.isfinite(loss + norm):
        raise told_once(keep_batch(run, batch, images, targets))
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.ema is not None:
        run.ema.update(run.model, at.step)
    at.step, at.batch = at.step + 1, batch.step + 1
    at.images += len(images) * run.world
    at.seconds = seconds
    at.losses = (*at.losses, loss)
    run.rate, run.norm = rate, norm
    epoch = f"epoch {at.epoch + 1}/{config.epochs}"
    run.progress.step(at.step, epoch, len(images) * run.world, loss, seconds)
    return (interrupt.asked or signal.SIGTERM) if asked else 0


def backward(run: Run, images: Tensor, targets: Tensor) -> Tensor:
    """Gradients of the mean loss over this process's share of a batch, in `accumulate` parts; the loss."""
    total = torch.zeros((), device=images.device)
    parts = list(
        zip(images.chunk(run.config.accumulate), targets.chunk(run.config.accumulate), strict=True)
    )
    for i, (x, y) in enumerate(parts):
        alone = i + 1 < len(parts)  # processes add up their gradients once, with the last part
        with run.accelerator.no_sync(run.net) if alone else nullcontext():
            with torch.autocast(
                x.device.type, torch.bfloat16, enabled=run.config.precision == "bf16"
            ):
                logits = run.net(x)
            loss = loss_of(logits, y, run.config) * (len(x) / len(images))
            run.accelerator.backward(loss)
        total += loss.detach()
    return total


def to_device(run: Run, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """Normalised pictures (b, 3, h, w) and targets, on the device."""
    device, p = run.accelerator.device, run.model.preprocessing
    images = batch.images.to(device, non_blocking=True).float()
    mean = images.new_tensor(p.mean)[:, None, None] * 255
    std = images.new_tensor(p.std)[:, None, None] * 255
    images = (images - mean) / std
    labels = batch.labels.to(device, non_blocking=True)
    key = (run.config.seed, run.at.epoch, batch.step)
    classes = len(run.model.classes)
    return mix(images, labels, run.config.augmentation, key, num_classes=classes)


def score(run: Run) -> None:
    """Evaluate what is to be used (the average, where one is kept); save it as last/ and perhaps best/."""
    config, at = run.config, run.at
    with run.ema.applied(run.model) if run.ema is not None else nullcontext():
        share_buffers(run.model)
        try:
            scores = evaluate(
                run.model,
                run.val_data,
                batch_size=max(1, config.batch_size // run.world),
                workers=run.workers,
                rank=run.rank,
                world=run.world,
                predictions=True,
            )
        except NotFinite:
            raise told_once(not_finite(run)) from None
        if not math.isfinite(scores["loss"]):
            raise told_once(not_finite(run))
        names = ["last"]
        run.forget_lost_best()
        if at.best is None or scores["top1"] > at.best:
            at.best, at.best_step, at.stale = scores["top1"], at.step, 0
            names.append("best")
        else:
            at.stale += 1
        if config.keep_every and at.batch == 0 and at.epoch % config.keep_every == 0:
            names.append(f"epoch-{at.epoch:04d}")
        run.save_model(names, scores)
    run.log_evaluation(scores)
    if config.early_stopping is not None and at.stale >= config.early_stopping and not at.finished:
        at.finished = f"no better score in {at.stale} evaluations"
