"""Swin Transformer (Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows",
ICCV 2021, https://arxiv.org/abs/2103.14030): ImageNet-1k from nothing. Section 4.1 and the official
configuration."""

from dataclasses import replace

from vitrail.recipes.deit import imagenet_deit
from vitrail.train.config import TrainConfig


def imagenet_swin(model: str, drop_path_rate: float) -> TrainConfig:
    """DeiT's augmentation, without repeated copies and without an average of the weights; what the official
    config.py and the configs/swin_*_patch4_window7_224.yaml say: rate 5e-4 for 512 images, warm-up of 20
    epochs from 5e-7, down to 5e-6, all three times batch / 512; gradients clipped at 5, stochastic depth by
    size.
    """
    return replace(
        imagenet_deit(model),
        model_fields={"drop_path_rate": drop_path_rate},
        warmup_epochs=20,
        clip_grad=5.0,
        repeats=1,
        ema=0.0,
    )


def swin_tiny() -> TrainConfig:
    """Swin-T on ImageNet-1k.

    Command: torchrun --nproc-per-node 8 -m vitrail train --recipe swin_tiny --data IMAGENET --out
        runs/swin_tiny.
    Cost: 300 epochs of 4.5 G multiply-adds; on eight GPUs 128 pictures each (official configuration, which
        gives no time).
    Expected: top-1 81.3 (paper, table 1; 81.2 in the official README).
    """
    return imagenet_swin("swin_tiny_patch4_window7", 0.2)


def swin_small() -> TrainConfig:
    """Swin-S: as swin_tiny, at twice the cost. Expected: top-1 83.0 (paper, table 1; README 83.2)."""
    return imagenet_swin("swin_small_patch4_window7", 0.3)


def swin_base() -> TrainConfig:
    """Swin-B: as swin_tiny, at 3.4 times the cost. Expected: top-1 83.5 (paper, table 1)."""
    return imagenet_swin("swin_base_patch4_window7", 0.5)
