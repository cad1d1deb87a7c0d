"""`train`: a run from its configuration to its end, and what is told where it cannot go on."""

import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from vitrail.memory import does_not_fit, ran_out
from vitrail.train.build import check_place, resolve
from vitrail.train.config import TrainConfig
from vitrail.train.folder import RunFolder
from vitrail.train.interrupt import Interrupt
from vitrail.train.introduction import introduce
from vitrail.train.loop import loop
from vitrail.train.progress import counted
from vitrail.train.ranks import (
    SharedError,
    on_rank_zero,
    peer_lost,
    processes,
    report_alone,
    report_once,
)
from vitrail.train.run import Run
from vitrail.train.setup import set_up
from vitrail.train.state import newest_whole
from vitrail_runtime.errors import InputError


@dataclass(frozen=True)
class RunResult:
    """How a run ended: best/ and last/ in `folder` are the models, metrics.jsonl what was measured."""

    folder: Path
    reason: str  # "all epochs", "time limit", ..., or the signal that stopped it
    signal: int  # the signal's number; 0: the run is over
    steps: int
    best: float | None  # headline score of best/ on the validation images
    shown: str  # what that score is called
    seconds: float


def train(config: TrainConfig) -> RunResult:
    """Train to the end, or on from where the run in `config.out` stopped.

    On a CPU with as many threads the weights are the same bit for bit, stopped or not. Raises InputError for
    whatever a person can put right; what was saved before is then still there.
    """
    config = resolve(config)
    check_place(config)
    folder = RunFolder(config.out)
    with ExitStack() as stack:
        accelerator = stack.enter_context(processes(config))
        stack.enter_context(failures_told(config, folder, accelerator.num_processes))
        on_rank_zero(accelerator, lambda: stack.enter_context(folder.locked()))
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
        if world > 1 and peer_lost(error):
            raise report_alone(
                InputError(
                    "another process of the run has ended; what it told, or the system's log, says why"
                )
            ) from error
        if not ran_out(error):
            raise
        images = counted(config.batch_size, "image")
        at_a_time = config.batch_size // (world * config.accumulate)
        parts = f" ({at_a_time} at a time)" if at_a_time < config.batch_size else ""
        size = "{} x {}".format(*config.size) if config.size else "the model's own size"
        less = "give a smaller --batch-size, a larger --accumulate, a smaller --image-size"
        less += "" if config.grad_checkpointing else ", or --grad-checkpointing"
        saved = newest_whole(folder.state)
        if saved:
            less += (
                f" (another run then, with another --out)\n{saved} is complete: once there is memory, the "
                "same command goes on from it"
            )
        what = f"an update on {images} of {size}{parts}"
        if config.native:
            packs, tokens = counted(config.packing.packs, "pack"), config.packing.max_tokens
            what = f"an update on {packs} of {tokens} tokens"
            less = "give smaller --packing.max-tokens, or fewer --packing.packs; or " + less
        raise report_alone(does_not_fit(what, error, less)) from error


def fit(run: Run, interrupt: Interrupt) -> RunResult:
    """The loop, which leaves its state behind where a image cannot be read: what was learnt is kept."""
    try:
        asked = loop(run, interrupt)
    except SharedError as problem:
        saved = ""
        if run.at.step:
            run.save_state()
            saved = (
                f"\nthe run is saved at update {run.at.step}; put this right and give the same command again "
                f"to go on: vitrail train --config {run.folder.config}"
            )
        raise report_once(InputError(f"{problem}{saved}")) from problem
    at = run.at
    reason, asked = (at.finished, 0) if at.finished else (signal.Signals(asked).name, asked)
    return RunResult(run.folder.path, reason, asked, at.step, at.best, run.task.shown, at.seconds)
