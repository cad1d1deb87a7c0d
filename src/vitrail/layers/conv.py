"""Parts of mobile convolutional networks: normalised convolutions and squeeze-and-excitation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class ConvNormAct(nn.Sequential):
    """Convolution without bias, BatchNorm and, unless `act` is None, an activation.
    (B, C, H, W) -> (B, out, ceil(H / stride), ceil(W / stride)) for odd kernels."""

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        act: Callable[[], nn.Module] | None = nn.SiLU,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_chans,
            out_chans,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            groups=groups,
            bias=False,
        )
        self.bn = nn.BatchNorm2d(out_chans, eps=eps, momentum=momentum)
        if act is not None:
            self.act = act()


class SqueezeExcite(nn.Module):
    """Channel gates from the pooled map (Hu et al., CVPR 2018). (B, C, H, W) -> same."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        act: Callable[[], nn.Module] = nn.SiLU,
        gate: Callable[[Tensor], Tensor] = torch.sigmoid,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.act = act()
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.fc2(self.act(self.fc1(s))))
