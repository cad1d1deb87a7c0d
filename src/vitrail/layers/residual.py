"""What stands on the residual branches of many papers: stochastic depth and LayerScale."""

import torch
from torch import Tensor, nn

from vitrail_runtime.errors import InputError


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., ECCV 2016): in training a sample's whole branch is zeroed with
    probability `rate` and kept ones are scaled by 1 / (1 - rate). Any shape with the batch first."""

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise InputError(f"a drop path rate is {rate}, but must be from 0 to below 1")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * (mask / keep)

    def extra_repr(self) -> str:
        return f"rate={self.rate:g}"


def drop_path_schedule(last: float, depth: int) -> list[float]:
    """Rates of `depth` blocks, growing linearly from 0 to `last`."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]


class LayerScale(nn.Module):
    """A learnt factor per channel (Touvron et al., "Going deeper with image transformers", ICCV 2021).
    Tokens: (..., C)."""

    def __init__(self, dim: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma
