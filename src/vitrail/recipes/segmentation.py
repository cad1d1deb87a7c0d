"""Semantic segmentation on a few hundred images with masks."""

from vitrail.data.augmentation import Augmentation
from vitrail.train.config import TrainConfig


def segment_small() -> TrainConfig:
    """Any segmenter ("HEAD/BACKBONE") on some hundred to some thousand images with masks.

    Command: vitrail train --recipe segment_small --data YOUR/FOLDER --model semantic_fpn/mobilenetv3_large
        --image-size 180 240 --resize squash. It starts from the backbone's released weights where they can be
        had, else from random ones, and says so.
    Cost: 30 passes over the data; on a CPU take small images (--image-size) and a narrow head, such as
        --head-fields fpn_dim=64 dim=64.
    Expected: docs/results.md has what it gave on CamVid from random weights.

    Crops stay large and about as wide as tall as the image, because a class is told by what is around it; the
    averaged weights are the ones that are saved.
    """
    return TrainConfig(
        weights="auto",
        epochs=30,
        batch_size=16,
        lr=1e-3,
        weight_decay=0.05,
        warmup_epochs=1,
        min_lr=1e-6,
        clip_grad=1.0,
        ema=0.99,
        augmentation=Augmentation(
            scale=(0.3, 1.0), ratio=(0.9, 1.8), interpolation="bilinear", color_jitter=0.2
        ),
        eval_every=5,
        log_every=10,
    )
