"""MobileViT (Mehta and Rastegari, "MobileViT: Light-weight, General-purpose, and Mobile-friendly Vision
Transformer", ICLR 2022, https://arxiv.org/abs/2110.02178): ImageNet-1k from nothing, by crops and flips alone
and batches of many sizes. Section 4.1 and the official configuration."""

from vitrail.data.augmentation import Augmentation
from vitrail.train.config import TrainConfig


def imagenet_mobilevit(model: str) -> TrainConfig:
    """What all sizes share. Normalisation and evaluation crop are the model's own.

    The paper's section 4.1: eight GPUs, batch 1024 at 256 pixels, five sizes, 2e-4 to 2e-3 in 3,000 updates
    and back by a cosine, decay 0.01, label smoothing 0.1. The official configuration of today
    (config/classification/imagenet/mobilevit.yaml of ml-cvnets 0.3) is the same but for a longer warm-up of
    20,000 updates (warmup_epochs=21.7); its average of the weights, 0.9995, is taken from there. Unlike
    there, biases and norms are not decayed.
    """
    return TrainConfig(
        model=model,
        image_size=256,
        sizes=(160, 192, 256, 288, 320),
        epochs=300,
        batch_size=1024,
        lr=2e-3,
        weight_decay=0.01,
        warmup_epochs=3.25,  # 3,000 updates: these sizes make about 920 of an epoch
        warmup_lr=2e-4,
        min_lr=2e-4,
        clip_grad=None,
        task={"label_smoothing": 0.1},
        ema=0.9995,
        augmentation=Augmentation(interpolation="bilinear"),
        precision="bf16",
    )


def mobilevit_xxs() -> TrainConfig:
    """MobileViT-XXS on ImageNet-1k.

    Command: torchrun --nproc-per-node 8 -m vitrail train --recipe mobilevit_xxs --data IMAGENET --out
        runs/mobilevit_xxs.
    Cost: about two days on eight A100 (official README, which says so of no particular size).
    Expected: top-1 69.0 (official model zoo), plus or minus 0.3 from run to run (official README).
    """
    return imagenet_mobilevit("mobilevit_xxs")


def mobilevit_xs() -> TrainConfig:
    """MobileViT-XS: as mobilevit_xxs. Expected: top-1 74.8 (paper, table 3; 74.7 in the zoo)."""
    return imagenet_mobilevit("mobilevit_xs")


def mobilevit_s() -> TrainConfig:
    """MobileViT-S: as mobilevit_xxs. Expected: top-1 78.4 (MobileViTv2's table 2; 78.3 in the zoo)."""
    return imagenet_mobilevit("mobilevit_s")
