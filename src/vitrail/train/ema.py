"""The exponential moving average of the weights: smoother than the weights, and usually better."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """A shadow of every float in a model's state; counters are copied.

    The decay of update t is min(decay, (1 + t) / (10 + t)), so that the random start is forgotten within
    the first steps instead of weighing decay**t for thousands of them.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.shadow = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take in the weights after update number `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        floats, others = [], []
        for key, value in model.state_dict().items():
            (floats if value.is_floating_point() else others).append((self.shadow[key], value))
        shadows, values = zip(*floats, strict=True)
        # One kernel for hundreds of small tensors; torch's own averaging calls it by this name too.
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            list(shadows), list(values), 1.0 - decay
        )
        for shadow, value in others:
            shadow.copy_(value)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model holds the average; afterwards its own weights again, bit for bit."""
        own = {k: v.detach().clone() for k, v in model.state_dict().items()}
        _fill(model, self.shadow)
        try:
            yield
        finally:
            _fill(model, own)


@torch.no_grad()
def _fill(model: nn.Module, state: dict[str, Tensor]) -> None:
    for key, value in model.state_dict().items():
        value.copy_(state[key])
