"""Parts of mobile convolutional networks: normalised convolutions, squeeze-and-excitation, the
inverted residual, their order in stages, and their initialisation."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.features import Features, FeatureSpec, check_images, level_name
from vitrail.layers.checkpoint import checkpointed
from vitrail.layers.residual import DropPath

Activation = Callable[[], nn.Module]


class SamePadConv2d(nn.Conv2d):
    """A convolution padded as TensorFlow's "SAME": zeros are split between both sides and the odd one
    goes right and bottom. (B, C, H, W) -> (B, out, ceil(H / stride), ceil(W / stride)).

    Differs from `padding=kernel // 2` only for strides above 1, where the split depends on the size:
    a 3x3 convolution of stride 2 pads an even side by (0, 1) and an odd one by (1, 1).
    """

    def forward(self, input: Tensor) -> Tensor:
        (kh, kw), (sh, sw) = self.kernel_size, self.stride
        # ceil(H / s) windows span H + (-H % s) + k - s: arithmetic only, so that sizes stay dynamic.
        pad_h = kh - sh + -input.shape[-2] % sh
        pad_w = kw - sw + -input.shape[-1] % sw
        top, left = pad_h // 2, pad_w // 2
        return super().forward(F.pad(input, (left, pad_w - left, top, pad_h - top)))


class ConvNormAct(nn.Sequential):
    """Convolution without bias, BatchNorm and, unless `act` is None, an activation.
    (B, C, H, W) -> (B, out, ceil(H / stride), ceil(W / stride)) for odd kernels.

    same_pad: pad strided convolutions as TensorFlow does, see `SamePadConv2d`.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        act: Activation | None = nn.SiLU,
        eps: float = 1e-5,
        momentum: float = 0.1,
        same_pad: bool = False,
    ) -> None:
        super().__init__()
        # With stride 1 both rules pad alike, and the plain convolution pads for nothing.
        same = same_pad and stride > 1
        conv = SamePadConv2d if same else nn.Conv2d
        self.conv = conv(
            in_chans,
            out_chans,
            kernel_size,
            stride,
            padding=0 if same else kernel_size // 2,
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
        act: Activation = nn.SiLU,
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


class InvertedResidual(nn.Module):
    """Widen by a 1x1 convolution, filter each channel alone, narrow linearly; a shortcut joins the narrow
    ends where their shapes agree (Sandler et al., "MobileNetV2", CVPR 2018, arXiv 1801.04381, fig. 3b).
    (B, C, H, W) -> (B, out, ceil(H / stride), ceil(W / stride)).

    hidden_dim: the wide width; equal to `in_chans`, the widening is left out.
    se: squeeze-and-excitation over the wide map, or None.
    """

    def __init__(
        self,
        in_chans: int,
        out_chans: int,
        hidden_dim: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        act: Activation = nn.SiLU,
        se: nn.Module | None = None,
        drop_path: float = 0.0,
        eps: float = 1e-5,
        momentum: float = 0.1,
        same_pad: bool = False,
    ) -> None:
        super().__init__()
        self.expand = (
            ConvNormAct(in_chans, hidden_dim, 1, act=act, eps=eps, momentum=momentum)
            if hidden_dim != in_chans
            else nn.Identity()
        )
        self.depthwise = ConvNormAct(
            hidden_dim,
            hidden_dim,
            kernel_size,
            stride,
            groups=hidden_dim,
            act=act,
            eps=eps,
            momentum=momentum,
            same_pad=same_pad,
        )
        self.se = nn.Identity() if se is None else se
        self.project = ConvNormAct(hidden_dim, out_chans, 1, act=None, eps=eps, momentum=momentum)
        self.drop_path = DropPath(drop_path)
        self.shortcut = stride == 1 and in_chans == out_chans

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.se(self.depthwise(self.expand(x))))
        # In place: a branch ends in a BatchNorm, which does not need its result again.
        return self.drop_path(y).add_(x) if self.shortcut else y


class ConvPoolHead(nn.Module):
    """A 1x1 convolution widens the coarsest map before it is pooled and classified. Features -> (B, K)."""

    def __init__(
        self,
        in_chans: int,
        hidden_dim: int,
        num_classes: int,
        *,
        act: Activation,
        drop: float,
        eps: float = 1e-5,
        momentum: float = 0.1,
    ) -> None:
        super().__init__()
        self.conv = ConvNormAct(in_chans, hidden_dim, 1, act=act, eps=eps, momentum=momentum)
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(hidden_dim, num_classes)
        init_conv_weights(self)

    def forward(self, features: Features) -> Tensor:
        last = list(features.maps.values())[-1]
        return self.fc(self.drop(self.conv(last).mean((2, 3))))


def run_stages(
    x: Tensor,
    stages: nn.ModuleList,
    outputs: Mapping[int, str],
    record: dict[str, Tensor] | None = None,
    checkpointing: bool = False,
    *,
    recording: type[nn.Module] | None = None,
) -> dict[str, Tensor]:
    """Pass `x` through stages of blocks. -> {outputs[i]: the map after stage i}.

    record: takes every block's map as "stages.I.J". checkpointing: recompute blocks in the backward pass.
    recording: the class of blocks that have more to record; called as block(x, record, "stages.I.J").
    """
    maps = {}
    for i, stage in enumerate(stages):
        for j, block in enumerate(stage.children()):
            name = f"stages.{i}.{j}"
            args = (x, record, name) if recording and isinstance(block, recording) else (x,)
            x = checkpointed(block, *args) if checkpointing else block(*args)
            if record is not None:
                record[name] = x
        if i in outputs:
            maps[outputs[i]] = x
    return maps


def stem_and_stages(
    model: Any,
    images: Tensor,
    record: dict[str, Tensor] | None,
    recording: type[nn.Module] | None = None,
) -> Features:
    """The forward of a network of `stem`, `stages` and `outputs`; see `run_stages`."""
    check_images(images, model)
    x = model.stem(fast_layout(images))
    checkpointing = model.grad_checkpointing and model.training
    maps = run_stages(x, model.stages, model.outputs, record, checkpointing, recording=recording)
    return Features(maps)


def inverted_residuals(
    in_chans: int, dim: int, depth: int, expand_ratio: float, stride: int, act: Activation
) -> nn.ModuleList:
    """`depth` blocks to `dim` channels, of which the first has the stride."""
    blocks = nn.ModuleList()
    for j in range(depth):
        hidden_dim = make_divisible(in_chans * expand_ratio)
        block_stride = stride if j == 0 else 1
        blocks.append(InvertedResidual(in_chans, dim, hidden_dim, stride=block_stride, act=act))
        in_chans = dim
    return blocks


def stage_specs(
    dims: Sequence[int], strides: Sequence[int], stem_stride: int = 2
) -> tuple[dict[str, FeatureSpec], dict[int, str]]:
    """Specs of the last stage at each stride from 4 up, and {stage index: map name} for `run_stages`."""
    stride, last = stem_stride, {}
    for i, factor in enumerate(strides):
        stride *= factor
        last[stride] = i
    kept = {s: i for s, i in last.items() if s >= 4}
    specs = {level_name(s): FeatureSpec(dims[i], s) for s, i in kept.items()}
    return specs, {i: level_name(s) for s, i in kept.items()}


def absorb_eps(state: dict[str, Tensor], theirs: float, ours: float) -> dict[str, Tensor]:
    """Weights of a network whose BatchNorms have `eps=theirs`, for one with `ours`: the running variances
    take up the difference, and inference is the same to rounding. `theirs` is the larger."""
    return {k: v + (theirs - ours) if k.endswith("running_var") else v for k, v in state.items()}


def make_divisible(width: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `width`, but never below 90 % of it (every MobileNet's rule)."""
    rounded = max(divisor, int(width + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * width else rounded


def init_conv_weights(model: nn.Module, linear_std: float = 0.01) -> None:
    """Initialise a convolutional network for training: convolutions normal with variance
    2 / fan_out (per group, as the MobileNets' and EfficientNet's code), linear layers normal with
    `linear_std`, biases zero, norms one and zero."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = math.prod(module.kernel_size) * module.out_channels // module.groups
            nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=linear_std)
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def fast_layout(x: Tensor) -> Tensor:
    """The same (B, C, H, W) in channels-last memory where that is faster, eagerly on a CPU: the convolutions
    after it keep the layout. EfficientViT ran 1.1 to 1.6 times faster on one core, training most."""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return x.contiguous(memory_format=torch.channels_last)
    return x
