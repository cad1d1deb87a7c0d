"""One process or many: all that is agreed between the ranks of a run, and what is asked of Accelerate.

The same command runs alone, under `torchrun -m vitrail train ...` and under `accelerate launch`. Data
parallel on CPU (gloo) and GPU: gradients are averaged, so a global batch gives the same update however many
share it. BatchNorm normalises by the whole batch on GPUs (SyncBatchNorm); on a CPU every process normalises
by its own share, and rank 0's running statistics are kept, because torch has no synchronised form there.

An error that one rank meets must end all of them, with one message: whoever waits for a rank that has gone
waits for ever.
"""

import atexit
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vitrail.data.plan import BatchPlan
from vitrail.device import choose_device
from vitrail.train.config import TrainConfig
from vitrail.train.optim import is_block
from vitrail.train.progress import counted
from vitrail_runtime.errors import InputError

if TYPE_CHECKING:
    from accelerate import Accelerator  # seconds to import, like what shards weights

T = TypeVar("T")

_left_groups: list[dist.ProcessGroup | None] = []
atexit.register(_left_groups.clear)


@contextmanager
def processes(config: TrainConfig) -> Iterator["Accelerator"]:
    """Join the other processes, where a launcher started some, settle device and threads; part at the end."""
    from accelerate import Accelerator

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


def choose_workers(config: TrainConfig, accelerator: "Accelerator") -> int:
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
    have, what, flag = config.batch_size, f"a batch of {config.batch_size}", "batch-size"
    if config.native:
        have, flag = config.packing.packs, "packing.packs"
        what = counted(have, "pack")
    if have % shares:
        nearest = max(shares, round(have / shares) * shares)
        parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
        parts += " each" if parts and world > 1 else ""
        who = counted(world, "process", "processes") + parts
        raise InputError(
            f"{who} cannot share {what} equally; "
            f"the nearest {'number' if config.native else 'batch size'} that they can is {nearest}: "
            f"--{flag} {nearest}"
        )


def check_shares(config: TrainConfig, plan: BatchPlan, world: int, multiple: int = 1) -> None:
    """Raise InputError unless the processes can share the batches of every size in such multiples."""
    odd = _not_shared(plan, world, multiple)
    if not odd:
        return
    batches = ", ".join(f"{counted(n, 'picture')} of {h} x {w}" for (h, w), n in odd.items())
    how = (
        "equally" if multiple == 1 else f"in shares of a multiple of {multiple}, as the task needs"
    )
    nearest = _nearest_batch_size(config, plan, world, multiple)
    fewer = next(w for w in range(world - 1, 0, -1) if not _not_shared(plan, w, multiple))
    they_can = f"--batch-size {nearest}, the nearest that they can, or " if nearest else ""
    raise InputError(
        f"{world} processes cannot share batches of {batches} {how}; take {they_can}"
        f"{counted(fewer, 'process', 'processes')}" + (", or other --sizes" if config.sizes else "")
    )


def _not_shared(plan: BatchPlan, world: int, multiple: int) -> dict[tuple[int, int], int]:
    """The batches, by size, of which the processes cannot have such shares."""
    unit = 1 if world == 1 else multiple * world
    return {size: n for size, n in plan.batch_sizes().items() if n % unit}


def _nearest_batch_size(
    config: TrainConfig, plan: BatchPlan, world: int, multiple: int
) -> int | None:
    shares = world * config.accumulate
    sizes = range(shares, 2 * config.batch_size + 1, shares)
    for size in sorted(sizes, key=lambda n: (abs(n - config.batch_size), n)):
        try:
            other = replace(plan, batch_size=size, weights=None, strata=None)
        except InputError:  # too large for the data, or too small for a scale
            continue
        if not _not_shared(other, world, multiple):
            return size
    return None


class Objective(nn.Module):
    """What the processes wrap: a model whose forward gives its losses."""

    def __init__(self, model: Any, options: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.options = options

    def forward(self, images: Any, targets: Any, **padding: Any) -> dict[str, Tensor]:
        """{name: sum over the batch}; with the model's `weight` of the targets `total_loss` of them is the
        loss."""
        return self.model.losses(images, targets, **padding, **self.options)


def total_loss(losses: Mapping[str, Tensor], weight: Tensor) -> Tensor:
    """The sum of all losses, each over its weight.

    weight: of one number for all of them, or of one for each in their order, added up over all that shares a
        batch; what it counts may be nowhere in it, and then there is nothing to divide.
    """
    sums = torch.stack(list(losses.values()))
    weight = weight.to(sums)
    return (sums / torch.where(weight == 0, 1, weight)).sum()


def distribute(
    model: Any, options: dict[str, Any], config: TrainConfig, accelerator: "Accelerator"
) -> nn.Module:
    """The objective as this process trains it. Parameters must be on the device already."""
    if accelerator.num_processes > 1 and config.parallel == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for name, module in list(model.named_modules()):
            if is_block(name):  # gathered one block at a time, so no process ever holds the whole
                fully_shard(module, mesh=mesh)
        register_fsdp_forward_method(fully_shard(model, mesh=mesh), "losses")
        return Objective(model, options)
    objective = Objective(model, options)
    return accelerator.prepare(objective) if accelerator.num_processes > 1 else objective


def synchronised_batchnorm(model: Any, accelerator: "Accelerator") -> Any:
    """BatchNorm over the whole global batch where the device has it: on GPUs."""
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def share_buffers(model: nn.Module) -> None:
    """Give every process rank 0's running statistics, before all of them evaluate."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def on_rank_zero(accelerator: "Accelerator", action: Callable[[], T]) -> T:
    """What rank 0 gets from doing something that only it may do, on every rank.

    An InputError there ends every process: rank 0 tells, the others leave quietly.
    """
    answer: list[Any] = [None, None]  # result, message
    problem: InputError | None = None
    if accelerator.is_main_process:
        try:
            answer[0] = action()
        except InputError as error:
            problem, answer[1] = error, str(error)
    if accelerator.num_processes > 1:
        dist.broadcast_object_list(answer, src=0)
    result, message = answer
    if message is not None:
        raise report_once(problem or InputError(message))
    return result


def mean_over_ranks(accelerator: "Accelerator", *values: float | Tensor) -> list[float]:
    """The mean of each value over all processes, so that all of them decide alike. NaN stays NaN."""
    stacked = torch.stack(
        [torch.as_tensor(v).to(accelerator.device, torch.float64) for v in values]
    )
    if accelerator.num_processes > 1:
        dist.all_reduce(stacked)
        stacked /= accelerator.num_processes
    return stacked.tolist()


class SharedError(InputError):
    """An InputError that every process raises at the same point: they may still act together."""


def together(action: Callable[[], T]) -> T:
    """What each process gets from its own `action`, in which none waits for another.

    An InputError of any ends all: the first process tells it, the others leave with exit code 2.
    """
    result: T | None = None
    problem: InputError | None = None
    try:
        result = action()
    except InputError as error:
        problem = error
    shared = share(problem)
    if shared is not None:
        raise report_once(shared) from problem
    return cast(T, result)


def share(problem: InputError | None) -> SharedError | None:
    """One error for all processes of what any of them met; None where none did. All must call it."""
    if not _many():
        return None if problem is None else SharedError(str(problem))
    mine = None if problem is None else (str(problem), socket.gethostname())
    met: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(met, mine)
    if not any(met):
        return None
    texts = {m and m[0] for m in met}
    if len(texts) == 1:
        return SharedError(*texts)
    return SharedError(
        "\n".join(f"process {i} on {m[1]}: {m[0]}" for i, m in enumerate(met) if m is not None)
    )


def report_once(error: InputError) -> InputError | SystemExit:
    """What to raise on every process for an error that all have: the first tells, the others are quiet."""
    return SystemExit(2) if _many() and dist.get_rank() else error


def report_alone(error: InputError) -> InputError | SystemExit:
    """What to raise for an error that this process may be alone with, while the others wait for it.

    Whatever its rank, it tells: nobody else can. Once it has ended, so does the launcher end the others.
    """
    if not _many():
        return error
    where = f"process {dist.get_rank()} on {socket.gethostname()}"
    print(f"vitrail: {where}: {error}", file=sys.stderr, flush=True)
    return SystemExit(2)


def peer_lost(error: Exception) -> bool:
    """Whether a collective failed because another process has ended: in the words of gloo, or of NCCL."""
    signs = ("closed by peer", "reset by peer", "remote process exited")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _many() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
