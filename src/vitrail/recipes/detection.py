"""Detection on a few hundred images with boxes."""

from vitrail.data.augmentation import Augmentation
from vitrail.train.config import TrainConfig


def detect_small() -> TrainConfig:
    """Any detector ("HEAD/BACKBONE") on some hundred to some thousand images with boxes, or boxes and masks.

    Command: vitrail train --recipe detect_small --data YOUR/FOLDER --model faster_rcnn/mobilenetv3_large
        --image-size 240 320. It starts from the backbone's released weights where they can be had, else from
        random ones, and says so.
    Cost: 30 passes over the data; on a CPU take small images (--image-size) and a narrow head, such as
        --head-fields neck_dim=128 box_dim=256.
    Expected: docs/results.md has what it gave on BCCD from random weights.

    Images come at 0.8 to 1.25 times their size; the averaged weights are the ones that are saved. From random
    weights the first epochs find nothing: the rate is high and the average short.
    """
    return TrainConfig(
        weights="auto",
        resize="edges",
        epochs=30,
        batch_size=8,
        lr=1e-3,
        weight_decay=0.05,
        warmup_epochs=1,
        min_lr=1e-6,
        clip_grad=10.0,
        ema=0.99,
        augmentation=Augmentation(
            crop="whole", scale_jitter=(0.8, 1.25), interpolation="bilinear", color_jitter=0.2
        ),
        eval_every=5,
        log_every=10,
    )
