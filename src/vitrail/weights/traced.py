"""Tensors that know which keys of a checkpoint they were made from."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

# Of what resampling is made; renaming, joining and folding do without.
RESAMPLING = {"matmul", "__matmul__", "__rmatmul__", "interpolate"}


class Traced(Tensor):
    """A tensor that knows which keys of a checkpoint it was made from, and whether by resampling, so that a
    key map stays a plain function and the report can still tell what it did and what it did not use."""

    origin: frozenset[str] = frozenset()
    resampled: bool = False

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = super().__torch_function__(func, types, args, kwargs)
        sources = list(traced([args, kwargs]))
        origin = frozenset().union(*(t.origin for t in sources))
        resampled = getattr(func, "__name__", "") in RESAMPLING or any(t.resampled for t in sources)
        for tensor in traced(out):
            tensor.origin = tensor.origin | origin
            tensor.resampled = tensor.resampled or resampled
        return out


def traced(value: Any) -> Iterator[Traced]:
    """Those within arguments or results."""
    if isinstance(value, Traced):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from traced(item)
    elif isinstance(value, dict):
        yield from traced(list(value.values()))


def trace(key: str, value: Tensor) -> Traced:
    """The tensor that a checkpoint has under this key."""
    out = value.detach().as_subclass(Traced)
    out.origin = frozenset([key])
    return out
