"""The training loop: forward, backward, step; evaluate, save."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from vitrail.data.batch import Batch
from vitrail.train.clip import clip_gradients
from vitrail.train.evaluate import evaluate
from vitrail.train.interrupt import Interrupt
from vitrail.train.ranks import (
    SharedError,
    mean_over_ranks,
    report_once,
    share,
    share_buffers,
    total_loss,
)
from vitrail.train.replay import keep_batch, not_finite
from vitrail.train.run import Run, seed_update
from vitrail_runtime.errors import InputError, NotFinite


def loop(run: Run, interrupt: Interrupt) -> int:
    """Epochs of updates, each closed by an evaluation; the signal that stopped it, or 0.

    Raises SharedError when a process cannot read an image; `run.at` is then a position to go on from.
    """
    config, at, asked = run.config, run.at, 0
    while not run.at.finished and not asked:
        batches = run.batches()
        over = run.stop_reason  # at once where the last evaluation of all could not be made
        while not over and not asked and (coming := next_batch(run, batches)) is not None:
            asked = update(run, *coming, interrupt)
            if at.step % config.log_every == 0:
                run.log_training()
            over = run.stop_reason
            if not over and not asked and at.seconds - run.saved_at >= 60 * config.save_every:
                run.save_state()
        before = replace(at)
        if at.batch == run.plan.steps(at.epoch) and (over or not asked):
            at.epoch, at.batch = at.epoch + 1, 0
        at.finished = over
        if over or (at.batch == 0 and at.epoch % config.eval_every == 0):
            try:
                score(run)
            except SharedError:
                run.at = before  # the evaluation, which is then made first
                raise
        if at.finished or asked:
            run.save_state()
    return asked


def next_batch(run: Run, batches: Iterator[Batch]) -> tuple[Batch, Tensor] | None:
    """This process's share of the next batch, and the weights of all shares, which its losses are divided by;
    None behind the last one. Raises SharedError, on every process, when any cannot read its share, or it
    holds what the model cannot learn from."""
    batch = weights = problem = None
    try:
        if (batch := next(batches, None)) is not None:
            batch = run.prepared(batch)  # before it is weighed: a mosaic has other objects
            weights = run.model.weight(batch.targets)
    except InputError as error:
        problem = error
    # Told before each update: the others must not wait in it for the gradients of one who cannot come.
    (failed,) = mean_over_ranks(run.accelerator, float(problem is not None))
    if failed and (shared := share(problem)) is not None:
        raise shared from problem
    if batch is None or weights is None:
        return None
    means = mean_over_ranks(run.accelerator, *weights.flatten())
    return batch, torch.tensor(means) * run.world


def update(run: Run, batch: Batch, weight: Tensor, interrupt: Interrupt) -> int:
    """One optimiser step on one global batch. Returns the signal that any process received, or 0.

    Raises InputError, before any weight is changed, when loss or gradient is not finite.
    """
    rate = run.set_rate()
    seed_update(run.config, run.at.step, run.rank)
    own_loss = backward(run, batch, weight)
    own_norm = clip_gradients(run.model, run.config)
    loss, norm, seconds, asked = mean_over_ranks(
        run.accelerator, own_loss, own_norm, time.monotonic() - run.started, interrupt.asked
    )
    if not math.isfinite(loss + norm):
        raise report_once(keep_batch(run, batch))
    run.optimizer.step()
    run.optimizer.zero_grad()
    if run.ema is not None:
        run.ema.update(run.model, run.at.step)
    run.count(batch, rate, norm, loss, seconds)
    return (interrupt.asked or signal.SIGTERM) if asked else 0


def backward(run: Run, batch: Batch, weight: Tensor) -> Tensor:
    """Gradients of the loss over this process's share of a batch, in `accumulate` parts; the loss. weight: of
    all shares and parts."""
    total = torch.zeros((), device=batch.images.device)
    parts = batch.split(run.config.accumulate)
    bf16 = run.config.precision == "bf16"
    for i, part in enumerate(parts):
        alone = i + 1 < len(parts)  # processes add up their gradients once, with the last part
        with run.accelerator.no_sync(run.objective) if alone else nullcontext():
            with torch.autocast(part.images.device.type, torch.bfloat16, enabled=bf16):
                losses = run.objective(part.images, part.targets, **part.padding)
            # Processes take the mean of their gradients, where the sum is meant.
            loss = total_loss(losses, weight) * run.world
            run.accelerator.backward(loss)
        total += loss.detach()
    return total


def score(run: Run) -> None:
    """Evaluate what is to be used (the average, where one is kept); save it as last/ and perhaps best/."""
    with run.ema.applied(run.model) if run.ema is not None else nullcontext():
        share_buffers(run.model)
        how = {"rank": run.rank, "world": run.world, "workers": run.workers, "predictions": True}
        size = max(1, run.config.batch_size // run.world)
        try:
            scores = evaluate(run.model, run.val_data, batch_size=size, **how)
        except NotFinite:
            raise report_once(not_finite(run)) from None
        if not all(map(math.isfinite, scores.values.values())):
            raise report_once(not_finite(run))
        run.save_model(run.rank_scores(scores), scores)
    run.log_evaluation(scores)
    patience, at = run.config.early_stopping, run.at
    if patience is not None and at.stale >= patience and not at.finished:
        at.finished = f"no better score in {at.stale} evaluations"
