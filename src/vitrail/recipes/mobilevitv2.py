"""MobileViTv2 (Mehta and Rastegari, "Separable Self-attention for Mobile Vision Transformers", TMLR 2023,
https://arxiv.org/abs/2206.02680): ImageNet-1k from nothing, at one size and with strong augmentation. The
paper's table 8, ml-cvnets' config/classification/imagenet/mobilevit_v2.yaml and the commands of its README,
which give every width its own rate and decay."""

from vitrail.data.augmentation import Augmentation
from vitrail.train.config import TrainConfig


def imagenet_mobilevitv2(model: str, lr: float, weight_decay: float) -> TrainConfig:
    """What all widths share; the narrower a model, the higher its rate and the lower its decay. The last rate
    is a tenth of the highest. Normalisation and evaluation crop are the model's own.

    The official code's RandAugment is torchvision's: two operations, always at the magnitude 9 of 0 to 30.
    Ours has the same strength, which is 3 of 0 to 10, but does each operation with probability one half.
    """
    return TrainConfig(
        model=model,
        image_size=256,
        epochs=300,
        batch_size=1024,
        lr=lr,
        weight_decay=weight_decay,
        warmup_epochs=16,  # 20,000 updates
        warmup_lr=1e-6,
        min_lr=lr / 10,
        clip_grad=10.0,
        task={"label_smoothing": 0.1, "mixup": 0.2, "cutmix": 1.0},
        ema=0.9995,
        augmentation=Augmentation(
            randaugment_ops=2, randaugment_magnitude=3, randaugment_std=0.0, random_erasing=0.25
        ),
        precision="bf16",
    )


def mobilevitv2_050() -> TrainConfig:
    """MobileViTv2-0.5 on ImageNet-1k.

    Command: torchrun --nproc-per-node 8 -m vitrail train --recipe mobilevitv2_050 --data IMAGENET --out
        runs/mobilevitv2_050.
    Cost: about two days on eight A100 (official README, of the widest).
    Expected: top-1 70.18 (official model zoo).
    """
    return imagenet_mobilevitv2("mobilevitv2_050", lr=9e-3, weight_decay=0.004)


def mobilevitv2_075() -> TrainConfig:
    """MobileViTv2-0.75 on ImageNet-1k: as mobilevitv2_050. Expected: top-1 75.56 (official model zoo)."""
    return imagenet_mobilevitv2("mobilevitv2_075", lr=9e-3, weight_decay=0.008)


def mobilevitv2_100() -> TrainConfig:
    """MobileViTv2-1.0 on ImageNet-1k: as mobilevitv2_050. Expected: top-1 78.09 (official model zoo)."""
    return imagenet_mobilevitv2("mobilevitv2_100", lr=7.5e-3, weight_decay=0.013)


def mobilevitv2_125() -> TrainConfig:
    """MobileViTv2-1.25 on ImageNet-1k: as mobilevitv2_050. Expected: top-1 79.65 (official model zoo)."""
    return imagenet_mobilevitv2("mobilevitv2_125", lr=4.9e-3, weight_decay=0.020)


def mobilevitv2_150() -> TrainConfig:
    """MobileViTv2-1.5 on ImageNet-1k: as mobilevitv2_050. Expected: top-1 80.38 (official model zoo)."""
    return imagenet_mobilevitv2("mobilevitv2_150", lr=3.5e-3, weight_decay=0.029)


def mobilevitv2_175() -> TrainConfig:
    """MobileViTv2-1.75 on ImageNet-1k: as mobilevitv2_050. Expected: top-1 80.84 (official model zoo)."""
    return imagenet_mobilevitv2("mobilevitv2_175", lr=2.6e-3, weight_decay=0.039)


def mobilevitv2_200() -> TrainConfig:
    """MobileViTv2-2.0 on ImageNet-1k: as mobilevitv2_050. Expected: top-1 81.17 (official model zoo)."""
    return imagenet_mobilevitv2("mobilevitv2_200", lr=2e-3, weight_decay=0.050)
