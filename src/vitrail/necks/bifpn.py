"""Weighted bidirectional feature pyramid (Tan, Pang and Le, "EfficientDet: Scalable and Efficient Object
Detection", CVPR 2020, https://arxiv.org/abs/1911.09070, section 3).

An FPN lets coarse maps speak to fine ones. Here fine maps answer: each cell passes down and then up again,
and cells follow one another. Maps do not matter alike, so every sum has learnt weights, kept positive and
divided by their total (fast normalised fusion, section 3.3), which costs less than a softmax over them.

Where the paper is silent, or says it otherwise, this follows the official code: the activation stands before
a node's convolution and the norm behind it; coarser levels are a 1x1 convolution and a norm, then max pooling
of 3x3; maps of the backbone are brought to the common width once for each node that reads them; D6 and D7 sum
without weights. Upsampling is to the nearest, to whatever size the finer map has.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.features import FeatureSpec

Fusion = Literal["fast", "softmax", "sum"]
EPS = 1e-4  # of fast normalised fusion


class SeparableConv2d(nn.Module):
    """A 3x3 convolution of each channel alone, then a 1x1 convolution. (B, C, H, W) -> (B, out, H, W)."""

    def __init__(self, dim: int, out_chans: int, *, bias: bool) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.pointwise = nn.Conv2d(dim, out_chans, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(self.depthwise(x))


class Shrink(nn.Module):
    """A map at half its size, by 3x3 max pooling of stride 2. (B, C, H, W) -> (B, C, ceil(H / 2), ceil(W /
    2)).

    same_pad: pad as TensorFlow does, where an even side has its padding at the end alone.
    """

    def __init__(self, same_pad: bool) -> None:
        super().__init__()
        self.same_pad = same_pad

    def forward(self, x: Tensor) -> Tensor:
        if not self.same_pad:
            return F.max_pool2d(x, 3, 2, padding=1)
        top, left = x.shape[-2] % 2, x.shape[-1] % 2  # the other side has one always
        return F.max_pool2d(F.pad(x, (left, 1, top, 1), value=float("-inf")), 3, 2)


class Lateral(nn.Module):
    """A map brought to `dim` channels by a 1x1 convolution and a norm; one that has them stays as it is."""

    def __init__(self, in_chans: int, dim: int, *, bias: bool, norm_momentum: float) -> None:
        super().__init__()
        self.changes = in_chans != dim
        if self.changes:
            self.conv = nn.Conv2d(in_chans, dim, 1, bias=bias)
            self.norm = nn.BatchNorm2d(dim, eps=1e-3, momentum=norm_momentum)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) if self.changes else x


class Node(nn.Module):
    """Maps of one size -> their weighted sum, activated, convolved and normed. n x (B, C, H, W) -> (B, C, H,
    W).

    number: of the maps. fusion: "fast", weights through a ReLU over their sum; "softmax", the paper's
    costlier form; "sum", none.
    """

    def __init__(
        self, dim: int, number: int, fusion: Fusion, *, bias: bool, norm_momentum: float
    ) -> None:
        super().__init__()
        self.fusion = fusion
        self.weights = None if fusion == "sum" else nn.Parameter(torch.ones(number))
        self.conv = SeparableConv2d(dim, dim, bias=bias)
        self.norm = nn.BatchNorm2d(dim, eps=1e-3, momentum=norm_momentum)

    def shares(self) -> Tensor | None:
        """(number,) what each map counts for, 1 in all (but for EPS); None: each counts in full."""
        if self.weights is None:
            return None
        if self.fusion == "softmax":
            return self.weights.softmax(0)
        weights = self.weights.relu()
        return weights / (weights.sum() + EPS)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        shares = self.shares()
        parts = maps if shares is None else [x * w for x, w in zip(maps, shares, strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return self.norm(self.conv(F.silu(total)))


class Cell(nn.Module):
    """Once down and once up (figure 2d). dims: channels of each map that comes in, finest first."""

    def __init__(
        self,
        dims: Sequence[int],
        dim: int,
        fusion: Fusion,
        *,
        same_pad: bool,
        bias: bool,
        norm_momentum: float,
    ) -> None:
        super().__init__()
        lateral = partial(Lateral, dim=dim, bias=bias, norm_momentum=norm_momentum)
        node = partial(Node, dim, fusion=fusion, bias=bias, norm_momentum=norm_momentum)
        last = len(dims) - 1
        self.shrink = Shrink(same_pad)
        # down[i] makes level i; up[i] level i + 1, and reads down's but at the coarsest, which has none.
        self.down_laterals = nn.ModuleList(lateral(d) for d in dims[:-1])
        self.down = nn.ModuleList(node(2) for _ in range(last))
        self.up_laterals = nn.ModuleList(lateral(d) for d in dims[1:])
        self.up = nn.ModuleList(node(3 if i + 1 < last else 2) for i in range(last))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        last = len(maps) - 1
        between = [maps[-1]]  # the coarsest is not changed on the way down
        for i in range(last - 1, -1, -1):
            own = self.down_laterals[i](maps[i])
            coarse = F.interpolate(between[0], own.shape[-2:], mode="nearest")
            between.insert(0, self.down[i]((own, coarse)))
        out = between[:1]
        for i in range(1, last + 1):
            own = self.up_laterals[i - 1](maps[i])
            inputs = (own, between[i]) if i < last else (own,)
            out.append(self.up[i - 1]((*inputs, self.shrink(out[-1]))))
        return out


class BiFPN(nn.Module):
    """Maps of any widths -> maps of `dim` channels, "c3".. becoming "p3"..., with coarser levels beyond.

    specs: what comes in, finest first, each of half the size of the one before. levels: how many go out.
    cells: how often the maps pass down and up. bias: convolutions before a norm have biases too, as the
    official code's. The rest as in `Node` and `Shrink`.
    """

    def __init__(
        self,
        specs: Mapping[str, FeatureSpec],
        dim: int = 64,
        cells: int = 3,
        *,
        levels: int = 5,
        fusion: Fusion = "fast",
        same_pad: bool = True,
        bias: bool = True,
        norm_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        dims = [spec.channels for spec in specs.values()]
        beyond = levels - len(dims)
        self.extra = Lateral(dims[-1], dim, bias=bias, norm_momentum=norm_momentum)
        self.shrink = Shrink(same_pad)
        self.feature_specs = {
            f"p{name[1:]}": FeatureSpec(dim, spec.stride) for name, spec in specs.items()
        }
        for _ in range(beyond):
            level, spec = list(self.feature_specs.items())[-1]
            self.feature_specs[f"p{int(level[1:]) + 1}"] = FeatureSpec(dim, 2 * spec.stride)
        self.cells = nn.ModuleList(
            Cell(
                [*dims, *[dim] * beyond] if i == 0 else [dim] * levels,
                dim,
                fusion,
                same_pad=same_pad,
                bias=bias,
                norm_momentum=norm_momentum,
            )
            for i in range(cells)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _glorot(module)

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """name -> (B, C, h, w), finest first -> "p3" ... -> (B, dim, h, w)."""
        out = list(maps.values())
        coarse = self.extra(out[-1])
        while len(out) < len(self.feature_specs):
            out.append(coarse := self.shrink(coarse))
        for cell in self.cells:
            out = cell(out)
        return dict(zip(self.feature_specs, out, strict=True))


def _glorot(conv: nn.Conv2d) -> None:
    """Uniform, of variance 2 / (fan_in + fan_out), of each group; biases zero."""
    _, fan_in, height, width = conv.weight.shape
    fans = height * width * (fan_in + conv.out_channels // conv.groups)
    bound = (6 / fans) ** 0.5
    nn.init.uniform_(conv.weight, -bound, bound)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
