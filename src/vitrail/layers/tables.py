"""Tables that are a function of a shape: computed once, never a buffer."""

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

P = ParamSpec("P")


def cached_table(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Keep what a pure function of sizes, dtype and device returns; callers must not write to it.

    While a graph is traced nothing is kept or reused: the result would be a fake tensor, or a constant of
    one size. Kept tables are ordinary tensors even if first asked for under `torch.inference_mode`, so that
    training may save them for its backward pass.
    """

    @functools.lru_cache(maxsize=256)
    def kept(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        with torch.inference_mode(False):
            return make(*args, **kwargs)

    @functools.wraps(make)
    def table(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        # A dispatch mode (fake tensors, FLOP counters) may hand out tensors that hold no numbers.
        if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
            return make(*args, **kwargs)
        return kept(*args, **kwargs)

    return table
