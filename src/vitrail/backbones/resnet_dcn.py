"""ResNet with deformable convolutions in its last three stages (Dai et al., "Deformable Convolutional
Networks", ICCV 2017, https://arxiv.org/abs/1703.06211; modulated: Zhu et al., "Deformable ConvNets v2", CVPR
2019, https://arxiv.org/abs/1811.11168), a backbone of detectors.

Every 3x3 convolution of the stages c3 to c5 says by itself where it reads, as in the second paper and in
mmdetection's released files; the first paper did so in the last three of c5 alone. With the weights of a
plain ResNet it starts as that network ("v1"; of "v2" see `layers.deform_conv`).
"""

from dataclasses import dataclass
from typing import Any

from vitrail.backbones import resnet
from vitrail.backbones.resnet import ResNet, ResNetConfig
from vitrail.layers.deform_conv import DeformConv2d
from vitrail.registry import Layout, Tensors, register_backbone
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing


@dataclass(frozen=True, kw_only=True)
class ResNetDCNConfig(ResNetConfig):
    modulated: bool = False  # the second paper's form
    deformable: tuple[bool, bool, bool, bool] = (False, True, True, True)  # stages c2 to c5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.bottleneck:
            raise InputError(
                "deformable convolutions need a ResNet of bottlenecks: resnet50, resnet101 or resnet152"
            )


VARIANTS = {
    f"{name}_{form}": ResNetDCNConfig(
        depths=resnet.VARIANTS[name].depths, modulated=form == "dcnv2"
    )
    for name in ("resnet50", "resnet101")
    for form in ("dcn", "dcnv2")
}


class ResNetDCN(ResNet):
    """images (B, 3, H, W) -> Features with "c2" to "c5", as ResNet."""

    def __init__(self, config: ResNetDCNConfig) -> None:
        super().__init__(config)
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        for stage, deformable in zip(stages, config.deformable, strict=True):
            for block in stage.children() if deformable else ():
                block.conv2 = deformed(block.conv2, modulated=config.modulated)


def deformed(conv: Any, *, modulated: bool) -> DeformConv2d:
    """A deformable convolution of the shape and weights of an `nn.Conv2d` without a bias."""
    shape = (conv.in_channels, conv.out_channels, conv.kernel_size[0])
    grid = (conv.stride[0], conv.padding[0], conv.dilation[0], conv.groups)
    out = DeformConv2d(*shape, *grid, bias=False, modulated=modulated)
    out.weight = conv.weight
    return out


def from_mmdetection(state: Tensors, config: ResNetDCNConfig) -> Tensors:
    """A whole detector's file of mmdetection (its style "pytorch"), of which the backbone is taken."""
    own = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    rest = {k: v for k, v in state.items() if not k.startswith("backbone.")}
    return {**resnet.from_torchvision(own, config), **rest}


_NEW = ("backbone.layer*.conv2.conv_offset.*",)

register_backbone(
    ResNetDCN,
    VARIANTS,
    tiny=ResNetDCNConfig(depths=(1, 1, 1, 1), modulated=True, dilated_c5=True),
    layouts={
        "mmdetection": Layout(
            from_mmdetection,
            marks=("backbone.conv1.weight", "backbone.layer4.0.conv2.conv_offset.weight"),
            may_leave=("neck.*", "rpn_head.*", "roi_head.*", "bbox_head.*"),
            source="mmdetection, configs/dcn and configs/dcnv2: files of whole detectors",
        ),
        **{
            name: Layout(plain.convert, plain.marks, may_be_new=_NEW, source=plain.source)
            for name, plain in resnet.LAYOUTS.items()
        },
    },
    preprocessing=Preprocessing(interpolation="bilinear"),
)
