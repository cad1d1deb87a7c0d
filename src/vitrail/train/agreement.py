"""What many processes do about a mistake that any of them met: all stop, one tells.

Processes wait for each other in every collective, so one that leaves alone leaves the others waiting, or
dying of a broken connection. Errors are therefore exchanged at points that all of them reach.
"""

import socket
import sys
from collections.abc import Callable
from typing import TypeVar, cast

import torch.distributed as dist

from vitrail_runtime.errors import InputError

T = TypeVar("T")


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
        raise told_once(shared) from problem
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


def told_once(error: InputError) -> InputError | SystemExit:
    """What to raise on every process for an error that all have: the first tells, the others are quiet."""
    return SystemExit(2) if _many() and dist.get_rank() else error


def told_alone(error: InputError) -> InputError | SystemExit:
    """What to raise for an error that this process may be alone with, while the others wait for it.

    Whatever its rank, it tells: nobody else can. Once it has ended, so does the launcher end the others.
    """
    if not _many():
        return error
    where = f"process {dist.get_rank()} on {socket.gethostname()}"
    print(f"vitrail: {where}: {error}", file=sys.stderr, flush=True)
    return SystemExit(2)


def lost_another(error: Exception) -> bool:
    """Whether a collective failed because another process has ended: in the words of gloo, or of NCCL."""
    signs = ("closed by peer", "reset by peer", "remote process exited")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _many() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
