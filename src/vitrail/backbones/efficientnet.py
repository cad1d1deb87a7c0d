"""EfficientNet (Tan and Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks",
ICML 2019, https://arxiv.org/abs/1905.11946).

A searched network of inverted residuals with squeeze-and-excitation (B0, Table 1), grown in depth, width and
resolution together: alpha^phi, beta^phi, gamma^phi with alpha * beta^2 * gamma^2 close to 2, so that the cost
doubles with each step of phi (eq. 3). `compound_scale` makes the config of any phi.

Where weights come from matters. Two families exist, with equal keys:
- "tf_efficientnet_*" (padding="tf"): converted from the official TensorFlow code, which pads strided
  convolutions at the right and bottom where the size is even, with a BatchNorm epsilon of 1e-3.
- "efficientnet_*" (padding="native"): trained in PyTorch, padded evenly, epsilon 1e-5. torchvision's B5 to B7
  have an epsilon of 1e-3, which their key map adds to the running variances: the same function.
Weights of one under the name of the other load without complaint and predict a little worse.

"c5" is the map of the last block; the 1x1 convolution after it belongs to the classifier's tail.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from vitrail.features import Features, FeatureSpec
from vitrail.layers.conv import (
    ConvNormAct,
    ConvPoolHead,
    InvertedResidual,
    SqueezeExcite,
    absorb_eps,
    init_conv_weights,
    make_divisible,
    stage_specs,
    stem_and_stages,
)
from vitrail.layers.conv_keys import TIMM_HEAD, timm_stages, torchvision_head, torchvision_stages
from vitrail.registry import Layout, Tensors, register_backbone, rename_keys
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

_silu = partial(nn.SiLU, inplace=True)


@dataclass(frozen=True, kw_only=True)
class EfficientNetConfig:
    depth: float = 1.0  # factor of the blocks per stage, rounded up
    width: float = 1.0  # factor of all widths, rounded to multiples of 8
    image_size: int = 224  # what the scaling is meant for; any other size works
    padding: Literal["native", "tf"] = "native"
    stages: tuple[tuple[int, int, int, int, int], ...] = (
        # (kernel, expansion, width, blocks, stride) of B0, Table 1
        (3, 1, 16, 1, 1),
        (3, 6, 24, 2, 2),
        (5, 6, 40, 2, 2),
        (3, 6, 80, 3, 2),
        (5, 6, 112, 3, 1),
        (5, 6, 192, 4, 2),
        (3, 6, 320, 1, 1),
    )
    drop_path_rate: float = 0.2  # of a block after the last; earlier ones grow linearly from zero
    head_drop_rate: float = 0.2

    def __post_init__(self) -> None:
        if self.padding not in ("native", "tf"):
            raise InputError(
                f"EfficientNet's padding is 'native' or 'tf', but got {self.padding!r}"
            )

    def depths(self) -> list[int]:
        """Blocks per stage."""
        return [math.ceil(self.depth * blocks) for _, _, _, blocks, _ in self.stages]

    @property
    def norm(self) -> dict[str, Any]:
        """epsilon and momentum of every BatchNorm."""
        if self.padding == "tf":
            return {"eps": 1e-3, "momentum": 0.01}
        return {"eps": 1e-5, "momentum": 0.1}


def compound_scale(
    phi: float, alpha: float = 1.2, beta: float = 1.1, gamma: float = 1.15
) -> EfficientNetConfig:
    """B0 grown by the compound coefficient: depth alpha^phi, width beta^phi, resolution gamma^phi (eq. 3).

    The cost grows by (alpha * beta^2 * gamma^2)^phi, with the defaults 1.92^phi, times 1.1 to 1.4 for
    rounding depths up. The resolution is rounded to
    a multiple of 4, as the paper's are. phi below 0 makes smaller networks. The published B1 to B7 are near
    phi 0.5, 1, 2, 3.5, 4.5, 5.5 and 6.5, with coefficients rounded by hand.
    Raises InputError when a factor is below 1 or alpha * beta^2 * gamma^2 is not within 10 % of 2.
    """
    growth = alpha * beta**2 * gamma**2
    if min(alpha, beta, gamma) < 1:
        raise InputError(
            f"compound scaling needs alpha, beta and gamma of at least 1, but got {alpha}, {beta}, {gamma}"
        )
    if abs(growth - 2) > 0.2:
        fitting = math.sqrt(2 / alpha) / beta
        hint = f"; gamma={fitting:.3f} would fit" if fitting >= 1 else ""
        raise InputError(
            f"alpha * beta^2 * gamma^2 is {growth:.3f}, but must be close to 2, so that each step of phi "
            f"doubles the cost{hint}"
        )
    return EfficientNetConfig(
        depth=alpha**phi, width=beta**phi, image_size=max(4, round(224 * gamma**phi / 4) * 4)
    )


def _b(depth: float, width: float, image_size: int, drop: float) -> EfficientNetConfig:
    return EfficientNetConfig(depth=depth, width=width, image_size=image_size, head_drop_rate=drop)


NATIVE = {  # the official code's coefficients
    "efficientnet_b0": _b(1.0, 1.0, 224, 0.2),
    "efficientnet_b1": _b(1.1, 1.0, 240, 0.2),
    "efficientnet_b2": _b(1.2, 1.1, 260, 0.3),
    "efficientnet_b3": _b(1.4, 1.2, 300, 0.3),
    "efficientnet_b4": _b(1.8, 1.4, 380, 0.4),
    "efficientnet_b5": _b(2.2, 1.6, 456, 0.4),
    "efficientnet_b6": _b(2.6, 1.8, 528, 0.5),
    "efficientnet_b7": _b(3.1, 2.0, 600, 0.5),
}
VARIANTS = NATIVE | {f"tf_{name}": replace(c, padding="tf") for name, c in NATIVE.items()}


class EfficientNet(nn.Module):
    """images (B, 3, H, W) -> Features with "c2" to "c5" (strides 4 to 32). record: "stages.I.J"."""

    def __init__(self, config: EfficientNetConfig) -> None:
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        same_pad = config.padding == "tf"
        in_chans = make_divisible(32 * config.width)
        norm = config.norm
        self.stem = ConvNormAct(3, in_chans, 3, stride=2, act=_silu, same_pad=same_pad, **norm)
        depths = config.depths()
        dims = [make_divisible(dim * config.width) for _, _, dim, _, _ in config.stages]
        strides = [stride for *_, stride in config.stages]
        self.feature_specs, self.outputs = stage_specs(dims, strides)
        self.stages = nn.ModuleList()
        index = 0
        for i, (kernel_size, ratio, _, _, stride) in enumerate(config.stages):
            blocks = nn.ModuleList()
            for j in range(depths[i]):
                hidden_dim = in_chans * ratio
                blocks.append(
                    InvertedResidual(
                        in_chans,
                        dims[i],
                        hidden_dim,
                        kernel_size=kernel_size,
                        stride=stride if j == 0 else 1,
                        act=_silu,
                        # A quarter of the narrow width, not of the wide one.
                        se=SqueezeExcite(hidden_dim, max(1, in_chans // 4), act=_silu),
                        drop_path=config.drop_path_rate * index / sum(depths),
                        same_pad=same_pad,
                        **norm,
                    )
                )
                in_chans = dims[i]
                index += 1
            self.stages.append(blocks)
        init_conv_weights(self)

    def forward(self, images: Tensor, record: dict[str, Tensor] | None = None) -> Features:
        return stem_and_stages(self, images, record)


def efficientnet_head(
    config: EfficientNetConfig, specs: Mapping[str, FeatureSpec], num_classes: int
) -> ConvPoolHead:
    """The tail of Table 1: a 1x1 convolution to 1280 channels (times the width), pooling, a linear layer."""
    return ConvPoolHead(
        list(specs.values())[-1].channels,
        make_divisible(1280 * config.width),
        num_classes,
        act=_silu,
        drop=config.head_drop_rate,
        **config.norm,
    )


def from_timm(state: Tensors, config: EfficientNetConfig) -> Tensors:
    """timm: `blocks.1.0.conv_pw.weight`, ..., `conv_head.weight`, `bn2.weight`, `classifier.weight`."""
    return rename_keys(timm_stages(state), TIMM_HEAD)


def from_torchvision(state: Tensors, config: EfficientNetConfig) -> Tensors:
    """torchvision: `features.2.0.block.0.0.weight`, ..., `features.8.0.weight`, `classifier.1.weight`."""
    if config.padding == "tf":
        raise InputError("torchvision's weights are padded evenly; take efficientnet_*, not tf_*")
    depths = config.depths()
    places = {
        f"features.{i + 1}.{j}": f"stages.{i}.{j}"
        for i, depth in enumerate(depths)
        for j in range(depth)
    }
    rules = torchvision_head(len(depths) + 1)
    out = rename_keys(torchvision_stages(state, places, "block"), rules)
    return absorb_eps(out, 1e-3, 1e-5) if config.width >= 1.6 else out  # B5 to B7


CROP_PCT = (0.875, 0.882, 0.890, 0.904, 0.922, 0.934, 0.942, 0.949)

register_backbone(
    EfficientNet,
    VARIANTS,
    tiny=EfficientNetConfig(
        width=0.5,
        padding="tf",
        stages=(
            (3, 1, 16, 1, 1),
            (3, 2, 24, 2, 2),
            (5, 2, 32, 1, 2),
            (3, 2, 48, 1, 2),
            (5, 2, 64, 1, 2),
        ),
        drop_path_rate=0.0,
        head_drop_rate=0.0,
    ),
    tail=efficientnet_head,
    layouts={
        "timm": Layout(
            from_timm,
            marks=("conv_stem.weight", "blocks.6.0.se.conv_reduce.weight"),
            source="timm/efficientnet_*, timm/tf_efficientnet_*",
        ),
        "torchvision": Layout(
            from_torchvision,
            marks=("features.0.0.weight", "features.7.0.block.2.fc1.weight"),
            source="torchvision EfficientNet_B*_Weights",
        ),
    },
    preprocessing={
        prefix + name: Preprocessing(size=(config.image_size, config.image_size), crop_pct=crop)
        for (name, config), crop in zip(NATIVE.items(), CROP_PCT, strict=True)
        for prefix in ("", "tf_")
    },
)
