"""CIFAR-10 (Krizhevsky, 2009) on a CPU: small pictures, small budgets."""

from vitrail.data.augmentation import Augmentation
from vitrail.train.config import TrainConfig


def cifar10_efficientvit_m0() -> TrainConfig:
    """EfficientViT-M0 at 64 x 64 in seven minutes on two cores.

    Command: vitrail train --recipe cifar10_efficientvit_m0 --data $DATA/cifar10 --out runs/cifar10_m0, then
        vitrail eval runs/cifar10_m0 --data $DATA/cifar10 --split test.
    Cost: seven minutes by the clock.
    Expected: top-1 0.71 on two idle cores (one run, 344,000 images); see docs/results.md.
    """
    return TrainConfig(
        model="efficientvit_m0",
        image_size=64,
        resize="squash",  # the pictures are square: nothing is cut off
        val_fraction=0.02,
        epochs=20,  # more than anyone gets done: the clock ends it
        max_minutes=7.0,
        batch_size=128,
        lr=2e-3,
        weight_decay=0.05,
        warmup_epochs=0.5,
        task={"label_smoothing": 0.1},
        ema=0.995,
        # Pictures of 32 x 32 pixels are enlarged twice: the padding is the usual four pixels of theirs.
        augmentation=Augmentation(crop="simple", padding=8, interpolation="bilinear"),
        eval_every=2,
    )


def cifar10_vit_tiny() -> TrainConfig:
    """ViT-Ti, patches of 16 x 16 on pictures enlarged to 64 x 64: 16 tokens, cheap enough for a CPU.

    Command: vitrail train --recipe cifar10_vit_tiny --data $DATA/cifar10 --out runs/cifar10_vit_tiny.
    Cost: 45 minutes by the clock; two cores with bfloat16 instructions see up to 1.3 million pictures in it.
    Expected: see docs/results.md. More time goes on helping: --max-minutes 600 --epochs 300.
    """
    return TrainConfig(
        model="vit_tiny_patch16",
        model_fields={"drop_path_rate": 0.05},
        image_size=64,
        resize="squash",
        val_fraction=0.02,
        epochs=60,
        max_minutes=45.0,
        batch_size=128,
        lr=1e-3,
        weight_decay=0.05,
        warmup_epochs=2,
        task={"label_smoothing": 0.1},
        ema=0.998,
        precision="bf16",
        augmentation=Augmentation(crop="simple", padding=8, interpolation="bilinear"),
        eval_every=2,
    )
