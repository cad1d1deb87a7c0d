"""Activation checkpointing that leaves running statistics alone."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpointed(module: nn.Module, *args: Any, run: Callable[..., Any] | None = None) -> Any:
    """`module(*args)`, or its method `run`, whose intermediates are not kept but computed again in the
    backward pass.

    The second run must not move BatchNorm's running statistics again, or training with checkpointing would
    differ from training without.
    """
    if torch.compiler.is_compiling():  # the compiler takes only its own context managers here
        return checkpoint(run or module, *args, use_reentrant=False)
    return checkpoint(
        run or module,
        *args,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _statistics_held(module)),
    )


@contextmanager
def _statistics_held(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm write into copies: its graph, and so what autograd saves, must stay the same."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    kept = [dict(norm._buffers) for norm in norms]
    try:
        for norm in norms:
            for name, value in norm._buffers.items():
                norm._buffers[name] = None if value is None else value.clone()
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm._buffers.update(buffers)
