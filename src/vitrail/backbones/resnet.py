"""ResNet (He et al., "Deep Residual Learning for Image Recognition", CVPR 2016,
https://arxiv.org/abs/1512.03385), torchvision's, as the backbone of detectors.

The blocks, and so the keys, are torchvision's; here they return the four stage maps. Two options for
detectors: `frozen_norm` keeps every BatchNorm at its pre-trained statistics and affine values, because
batches of two large images are too small to estimate them; `dilated_c5` trades the stride of the last stage
for dilation (DETR's DC5), so that "c5" has stride 16 like "c4".

Unlike the paper, as torchvision and timm ("v1.5"): a bottleneck downsamples in its 3x3 convolution and not in
the first 1x1, which costs ResNet-50 8 % more multiply-adds and gains about half a point of accuracy.
"""

from dataclasses import dataclass

from torch import Tensor, nn

from vitrail.features import Features, FeatureSpec, check_images
from vitrail.layers.checkpoint import checkpointed
from vitrail.layers.conv import fast_layout
from vitrail.registry import Layout, Tensors, register_backbone, rename_keys
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing


@dataclass(frozen=True, kw_only=True)
class ResNetConfig:
    depths: tuple[int, int, int, int]
    bottleneck: bool = True  # three convolutions per block, else two
    frozen_norm: bool = False
    dilated_c5: bool = False  # needs bottlenecks

    def __post_init__(self) -> None:
        if self.dilated_c5 and not self.bottleneck:
            raise InputError(
                "dilated_c5 needs a ResNet of bottlenecks (resnet50, resnet101 or resnet152); "
                "torchvision's two-convolution blocks have no dilation"
            )


VARIANTS = {  # Table 1
    "resnet18": ResNetConfig(depths=(2, 2, 2, 2), bottleneck=False),
    "resnet34": ResNetConfig(depths=(3, 4, 6, 3), bottleneck=False),
    "resnet50": ResNetConfig(depths=(3, 4, 6, 3)),
    "resnet101": ResNetConfig(depths=(3, 4, 23, 3)),
    "resnet152": ResNetConfig(depths=(3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """images (B, 3, H, W) -> Features with "c2" to "c5" (strides 4 to 32; "c5" 16 where dilated).

    record: "layerI.J", every block's map.
    """

    def __init__(self, config: ResNetConfig) -> None:
        from torchvision.models import resnet  # takes seconds to import
        from torchvision.ops import FrozenBatchNorm2d

        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        block = resnet.Bottleneck if config.bottleneck else resnet.BasicBlock
        whole = resnet.ResNet(
            block,
            list(config.depths),
            num_classes=1,
            replace_stride_with_dilation=[False, False, config.dilated_c5],
            norm_layer=FrozenBatchNorm2d if config.frozen_norm else nn.BatchNorm2d,
        )
        self.conv1, self.bn1 = whole.conv1, whole.bn1
        self.relu, self.maxpool = whole.relu, whole.maxpool
        self.layer1, self.layer2 = whole.layer1, whole.layer2
        self.layer3, self.layer4 = whole.layer3, whole.layer4
        strides = (4, 8, 16, 16 if config.dilated_c5 else 32)
        self.feature_specs = {
            f"c{i + 2}": FeatureSpec(64 * 2**i * block.expansion, stride)
            for i, stride in enumerate(strides)
        }

    def forward(self, images: Tensor, record: dict[str, Tensor] | None = None) -> Features:
        check_images(images, self)
        x = self.maxpool(self.relu(self.bn1(self.conv1(fast_layout(images)))))
        stages = (self.layer1, self.layer2, self.layer3, self.layer4)
        checkpointing = self.grad_checkpointing and self.training
        maps = {}
        for i, (name, stage) in enumerate(zip(self.feature_specs, stages, strict=True), 1):
            for j, block in enumerate(stage.children()):
                x = checkpointed(block, x) if checkpointing else block(x)
                if record is not None:
                    record[f"layer{i}.{j}"] = x
            maps[name] = x
        return Features(maps)


def from_torchvision(state: Tensors, config: ResNetConfig) -> Tensors:
    """torchvision and timm: our names, with "fc" beside them."""
    rules = [(r"^fc\.", "head.fc."), (r"^(conv1|bn1|layer[1-4])\.", r"backbone.\1.")]
    return rename_keys(state, rules)


MARKS = ("conv1.weight", "layer1.0.conv1.weight", "layer4.1.conv2.weight")

LAYOUTS = {
    "torchvision": Layout(from_torchvision, marks=MARKS, source="torchvision ResNet*_Weights"),
    "timm": Layout(from_torchvision, marks=MARKS, source="timm/resnet*"),
}

register_backbone(
    ResNet,
    VARIANTS,
    tiny=ResNetConfig(depths=(1, 1, 1, 1), dilated_c5=True),
    layouts=LAYOUTS,
    preprocessing=Preprocessing(interpolation="bilinear"),
)
