"""DeiT (Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML
2021, https://arxiv.org/abs/2012.12877): ImageNet-1k from nothing, by augmentation and regularisation. Table
9."""

from vitrail.data.augmentation import Augmentation
from vitrail.train.config import TrainConfig


def imagenet_deit(model: str) -> TrainConfig:
    """What Table 9 and the official code share for every size.

    There the rate changes once an epoch, the cosine counts the epochs of the warm-up too, and mixed precision
    is float16; here the rate changes with every update, the cosine begins behind the warm-up, and it is
    bfloat16. So it is in all recipes that start from this one.
    """
    return TrainConfig(
        model=model,
        image_size=224,
        model_fields={"drop_path_rate": 0.1},
        epochs=300,
        batch_size=1024,
        lr=1e-3,  # 5e-4 * batch / 512
        weight_decay=0.05,
        warmup_epochs=5,
        warmup_lr=1e-6,
        min_lr=1e-5,
        clip_grad=None,
        task={"label_smoothing": 0.1, "mixup": 0.8, "cutmix": 1.0},
        ema=0.99996,
        repeats=3,
        augmentation=Augmentation(
            randaugment_ops=2, randaugment_magnitude=9, randaugment_std=0.5, random_erasing=0.25
        ),
        precision="bf16",
    )


def deit_tiny() -> TrainConfig:
    """DeiT-Ti on ImageNet-1k.

    Command: torchrun --nproc-per-node 4 -m vitrail train --recipe deit_tiny --data IMAGENET --out
        runs/deit_tiny.
    Cost: less than three days on four V100 (paper, section 5.4, for Ti and S).
    Expected: top-1 72.2 (paper, Table 5).
    """
    return imagenet_deit("deit_tiny_patch16")


def deit_small() -> TrainConfig:
    """DeiT-S on ImageNet-1k.

    Command: torchrun --nproc-per-node 4 -m vitrail train --recipe deit_small --data IMAGENET --out
        runs/deit_small.
    Cost: less than three days on four V100 (paper, section 5.4).
    Expected: top-1 79.8 (paper, Table 5).
    """
    return imagenet_deit("deit_small_patch16")
