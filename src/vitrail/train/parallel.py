"""One process or many: what a run asks of Accelerate and torch.distributed.

The same command runs alone, under `torchrun -m vitrail train ...` and under `accelerate launch`. Data
parallel on CPU (gloo) and GPU: gradients are averaged, so a global batch gives the same update however many
share it. BatchNorm normalises by the whole batch on GPUs (SyncBatchNorm); on a CPU every process normalises
by its own share, and rank 0's running statistics are kept, because torch has no synchronised form there.
"""

import atexit
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from vitrail.data.plan import BatchPlan
from vitrail.device import choose_device
from vitrail.train.agreement import told_once
from vitrail.train.config import TrainConfig
from vitrail.train.optim import is_block
from vitrail.train.progress import counted
from vitrail_runtime.errors import InputError

T = TypeVar("T")

_left_groups: list[dist.ProcessGroup | None] = []
atexit.register(_left_groups.clear)


@contextmanager
def processes(config: TrainConfig) -> Iterator[Accelerator]:
    """Join the other processes, where a launcher started some, settle device and threads; part at the end."""
    accelerator = Accelerator(cpu=choose_device(config.device).type == "cpu")
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Math threads that share cores with the workers, or with another process's math threads, wait
        # for each other at every layer: give every process its own cores.
        local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        share = cores() // local_world - choose_workers(config, accelerator)
        torch.set_num_threads(max(1, share))
    try:
        yield accelerator
    finally:
        if dist.is_initialized():  # else the interpreter waits for ever for the group's threads
            # Who drops a group last waits for its threads. DistributedDataParallel holds the interpreter's
            # lock meanwhile, for which in torch 2.11 a thread may wait: it must not be the last.
            _left_groups.append(dist.group.WORLD)
            dist.destroy_process_group()


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux alone has it
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_workers(config: TrainConfig, accelerator: Accelerator) -> int:
    """Reading processes: as configured; else some cores beside a GPU, and none beside the math of a CPU."""
    if config.workers is not None:
        return config.workers
    if accelerator.device.type == "cpu":
        return 0
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, cores() // local_world - 1))


def check_world(config: TrainConfig, world: int) -> None:
    """Raise InputError unless every process gets an equal share of every part of a batch."""
    shares = world * config.accumulate
    if config.batch_size % shares:
        nearest = max(shares, round(config.batch_size / shares) * shares)
        parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
        parts += " each" if parts and world > 1 else ""
        who = counted(world, "process", "processes") + parts
        raise InputError(
            f"{who} cannot share a batch of {config.batch_size} equally; "
            f"the nearest batch size that they can is {nearest}: --batch-size {nearest}"
        )


def check_shares(config: TrainConfig, plan: BatchPlan, world: int) -> None:
    """Raise InputError unless the processes can share the batches of every size.

    MixUp and CutMix pair neighbours of a share, so odd shares would make other pairs than one process does.
    """
    mixes = config.augmentation.mixup > 0 or config.augmentation.cutmix > 0
    odd = _not_shared(plan, world, mixes)
    if not odd:
        return
    batches = ", ".join(f"{counted(n, 'picture')} of {h} x {w}" for (h, w), n in odd.items())
    how = "in even shares, as the pairs of MixUp and CutMix need" if mixes else "equally"
    nearest = _nearest_batch_size(config, plan, world, mixes)
    fewer = next(w for w in range(world - 1, 0, -1) if not _not_shared(plan, w, mixes))
    they_can = f"--batch-size {nearest}, the nearest that they can, or " if nearest else ""
    raise InputError(
        f"{world} processes cannot share batches of {batches} {how}; take {they_can}"
        f"{counted(fewer, 'process', 'processes')}" + (", or other --sizes" if config.sizes else "")
    )


def _not_shared(plan: BatchPlan, world: int, mixes: bool) -> dict[tuple[int, int], int]:
    """The batches, by size, of which the processes cannot have equal shares, and even ones to mix."""
    unit = 1 if world == 1 else 2 * world if mixes else world
    return {size: n for size, n in plan.batch_sizes().items() if n % unit}


def _nearest_batch_size(
    config: TrainConfig, plan: BatchPlan, world: int, mixes: bool
) -> int | None:
    shares = world * config.accumulate
    sizes = range(shares, 2 * config.batch_size + 1, shares)
    for size in sorted(sizes, key=lambda n: (abs(n - config.batch_size), n)):
        try:
            other = replace(plan, batch_size=size, weights=None, strata=None)
        except InputError:  # too large for the data, or too small for a scale
            continue
        if not _not_shared(other, world, mixes):
            return size
    return None


def distribute(model: Any, config: TrainConfig, accelerator: Accelerator) -> nn.Module:
    """The model as this process trains it. Parameters must be on the device already."""
    if accelerator.num_processes == 1:
        return model
    if config.parallel == "data":
        return accelerator.prepare(model)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for name, module in list(model.named_modules()):
        if is_block(name):  # gathered one block at a time, so no process ever holds the whole
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def synchronised_batchnorm(model: Any, accelerator: Accelerator) -> Any:
    """BatchNorm over the whole global batch where the device has it: on GPUs."""
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def share_buffers(model: nn.Module) -> None:
    """Give every process rank 0's running statistics, before all of them evaluate."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def on_main(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """What rank 0 gets from doing something that only it may do, on every rank.

    An InputError there ends every process: rank 0 tells, the others leave quietly.
    """
    answer: list[Any] = [None, None]  # result, message
    if accelerator.is_main_process:
        try:
            answer[0] = action()
        except InputError as problem:
            answer[1] = str(problem)
    if accelerator.num_processes > 1:
        dist.broadcast_object_list(answer, src=0)
    result, message = answer
    if message is not None:
        raise told_once(InputError(message))
    return result


def mean_over_processes(accelerator: Accelerator, *values: float | Tensor) -> list[float]:
    """The mean of each value over all processes, so that all of them decide alike. NaN stays NaN."""
    stacked = torch.stack(
        [torch.as_tensor(v).to(accelerator.device, torch.float64) for v in values]
    )
    if accelerator.num_processes > 1:
        dist.all_reduce(stacked)
        stacked /= accelerator.num_processes
    return stacked.tolist()
