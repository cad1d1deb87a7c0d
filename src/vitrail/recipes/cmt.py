"""CMT (Guo et al., "CMT: Convolutional Neural Networks Meet Vision Transformers", CVPR 2022,
https://arxiv.org/abs/2107.06263): ImageNet-1k from nothing, by the commands of the official README.

There the rate is --lr * batch / 512, and ten more epochs at the lowest rate follow the cosine; ours ends with
the cosine, as deit_tiny's does behind its warm-up. The augmentation, repeated three times, is DeiT's.
"""

from dataclasses import replace

from vitrail.recipes.deit import imagenet_deit
from vitrail.train.config import TrainConfig


def cmt_ti() -> TrainConfig:
    """CMT-Ti at 160 x 160 on ImageNet-1k.

    Command: torchrun --nproc-per-node 8 -m vitrail train --recipe cmt_ti --data IMAGENET --out runs/cmt_ti.
    Cost: 800 epochs on eight GPUs (official README, which gives no time).
    Expected: top-1 79.0 (official README).
    """
    return replace(
        imagenet_deit("cmt_ti"),
        image_size=160,
        epochs=800,
        batch_size=2048,
        lr=3.2e-3,  # 8e-4 * batch / 512
        warmup_epochs=20,
        warmup_lr=1e-7,
        ema=0.0,
    )


def cmt_xs() -> TrainConfig:
    """CMT-XS at 192 x 192: 400 epochs, else as cmt_ti. Expected: top-1 81.8 (official README)."""
    return replace(
        imagenet_deit("cmt_xs"),
        model_fields={"drop_path_rate": 0.08},
        image_size=192,
        epochs=400,
        batch_size=2048,
        lr=2.8e-3,  # 7e-4 * batch / 512
        weight_decay=0.04,
        warmup_epochs=20,
        warmup_lr=1e-6,
        min_lr=2e-5,
        ema=0.9998,
    )


def cmt_s() -> TrainConfig:
    """CMT-S at 224 x 224: 300 epochs, else as cmt_ti. Expected: top-1 83.5 (official README)."""
    return replace(
        imagenet_deit("cmt_s"),
        batch_size=1024,
        lr=1e-3,  # 5e-4 * batch / 512
        warmup_epochs=20,
        warmup_lr=1e-7,
    )


def cmt_b() -> TrainConfig:
    """CMT-B at 256 x 256: 300 epochs, else as cmt_ti. Expected: top-1 84.5 (official README)."""
    return replace(
        imagenet_deit("cmt_b"),
        model_fields={"drop_path_rate": 0.25},
        image_size=256,
        batch_size=512,
        lr=5e-4,  # 5e-4 * batch / 512
        warmup_epochs=20,
        warmup_lr=1e-6,
        min_lr=2e-5,
    )
