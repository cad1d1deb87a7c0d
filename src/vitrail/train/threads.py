"""How many math threads a run takes on a CPU: measured once, at its start, and kept when it is resumed.

Threads wait for each other at every layer. On free cores two are faster than one; on cores that other
programs use as well they can be several times slower (docs/benchmarks.md). The number decides how sums are
split, and so the last bits of the weights: hence a state tells it, and a resumed run takes the same.
"""

import copy
import os
import time
from pathlib import Path
from typing import Any

import torch

from vitrail.data.pack_plan import PackPlan
from vitrail.data.plan import BatchPlan
from vitrail.train.config import TrainConfig
from vitrail.train.state import read_header

LARGEST_TRIAL = 32  # images
ROUNDS = 3  # the first one warms up
WORTH_IT = 50  # updates of a run, fewer of which are over sooner than a trial


def choose_threads(
    config: TrainConfig, model: Any, plan: BatchPlan | PackPlan, *, updates: int, saved: Path | None
) -> None:
    """Take fewer threads than there are free cores for where the run began so, or where fewer are faster.

    --threads and OMP_NUM_THREADS decide before, and GPUs and several processes are left as they are.
    """
    if config.threads is not None or "OMP_NUM_THREADS" in os.environ:
        return
    most = torch.get_num_threads()
    kept = None if saved is None else read_header(saved)[1].get("threads")
    if kept is not None:
        torch.set_num_threads(min(kept, most))
    elif most > 1 and updates >= WORTH_IT and next(model.parameters()).device.type == "cpu":
        torch.set_num_threads(fastest(model, config, plan, most))


def fastest(model: Any, config: TrainConfig, plan: BatchPlan | PackPlan, most: int) -> int:
    """Of `most` threads, half of them, and so on to one: with which a copy of the model learns fastest."""
    trial = copy.deepcopy(model).train()
    count = min(LARGEST_TRIAL, max(1, plan.batch_size // config.accumulate))
    images = torch.rand(count, 3, *plan.size, generator=torch.Generator().manual_seed(0))
    numbers = [most >> halved for halved in range(most.bit_length())]
    taken: dict[int, float] = {}
    with torch.random.fork_rng(devices=[]):  # dropout draws
        for _ in range(ROUNDS):
            for number in numbers:  # in turn, so that a machine that slows down slows all alike
                torch.set_num_threads(number)
                seconds = seconds_of(trial, images, config)
                taken[number] = min(seconds, taken.get(number, seconds))
    torch.set_num_threads(most)
    return min(numbers, key=taken.__getitem__)


def seconds_of(trial: Any, images: torch.Tensor, config: TrainConfig) -> float:
    """Of one forward and backward pass."""
    begun = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
        outputs = trial.forward_tensors(images)
    torch.stack([output.float().mean() for output in outputs.values()]).sum().backward()
    trial.zero_grad()
    return time.perf_counter() - begun
