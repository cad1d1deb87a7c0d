"""EfficientViT (Liu et al., "EfficientViT: Memory Efficient Vision Transformer with Cascaded Group
Attention", CVPR 2023, https://arxiv.org/abs/2305.07027): ImageNet-1k from nothing. Section 4.1."""

from dataclasses import replace

from vitrail.recipes.deit import imagenet_deit
from vitrail.train.config import TrainConfig


def imagenet_efficientvit(model: str) -> TrainConfig:
    """DeiT's augmentation; batch 2048 and decay 2.5e-2 as the paper says, and what the official code makes of
    the paper's rate of 1e-3: times batch / 512, under adaptive clipping (main.py's defaults, which its
    README's commands keep).

    Not as there: adaptive clipping leaves the classifier's last layer alone, as its own paper does, where the
    official engine clips all parameters; and training is in bf16, there in float32.
    """
    return replace(
        imagenet_deit(model),
        model_fields={},  # no stochastic depth
        batch_size=2048,
        lr=4e-3,  # 1e-3 * batch / 512
        weight_decay=2.5e-2,
        clip_grad=0.02,
        clip_mode="agc",
    )


def efficientvit_m0() -> TrainConfig:
    """EfficientViT-M0 on ImageNet-1k.

    Command: torchrun --nproc-per-node 8 -m vitrail train --recipe efficientvit_m0 --data IMAGENET --out
        runs/m0.
    Cost: under 30 hours on eight V100, which M5 takes (official README).
    Expected: top-1 63.2 (paper, Table 2).
    """
    return imagenet_efficientvit("efficientvit_m0")


def efficientvit_m1() -> TrainConfig:
    """EfficientViT-M1 on ImageNet-1k: as efficientvit_m0. Expected: top-1 68.4 (paper, Table 2)."""
    return imagenet_efficientvit("efficientvit_m1")


def efficientvit_m2() -> TrainConfig:
    """EfficientViT-M2 on ImageNet-1k: as efficientvit_m0. Expected: top-1 70.8 (paper, Table 2)."""
    return imagenet_efficientvit("efficientvit_m2")


def efficientvit_m3() -> TrainConfig:
    """EfficientViT-M3 on ImageNet-1k: as efficientvit_m0. Expected: top-1 73.4 (paper, Table 2)."""
    return imagenet_efficientvit("efficientvit_m3")


def efficientvit_m4() -> TrainConfig:
    """EfficientViT-M4 on ImageNet-1k: as efficientvit_m0. Expected: top-1 74.3 (paper, Table 2)."""
    return imagenet_efficientvit("efficientvit_m4")


def efficientvit_m5() -> TrainConfig:
    """EfficientViT-M5: as efficientvit_m0; 30 hours on eight V100. Expected: top-1 77.1 (Table 2)."""
    return imagenet_efficientvit("efficientvit_m5")
