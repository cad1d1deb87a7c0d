"""The transformer's feed-forward parts."""

from collections.abc import Callable

from torch import Tensor, nn

from vitrail.ops.linear import Linear


class Mlp(nn.Module):
    """Linear, activation, linear. (..., C) -> (..., C)."""

    def __init__(
        self, dim: int, hidden_dim: int, act: Callable[[], nn.Module] = nn.GELU, drop: float = 0.0
    ) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden_dim)
        self.act = act()
        self.fc2 = Linear(hidden_dim, dim)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
