"""Detection on a few hundred images with boxes."""

from dataclasses import replace

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


def efficientdet_small() -> TrainConfig:
    """EfficientDet on some hundred to some thousand images with boxes, on a CPU.

    Command: vitrail train --recipe efficientdet_small --data YOUR/FOLDER --image-size 256 384. It starts from
        the backbone's released weights where they can be had, else from random ones, and says so. Sides that
        128 divides waste nothing: images are padded to such.
    Cost: 30 passes over the data. 500 updates at 256 x 384 took 34 minutes of a core that ten others shared.
    Expected: AP 0.33 on BCCD's validation images, from random weights and with --epochs 20 alone.
    """
    return replace(
        detect_small(),
        model="efficientdet/mobilenetv3_small",
        lr=2e-3,
        # The official 0.01 needs many hundreds of updates before the running statistics are right.
        head_fields={"norm_momentum": 0.1},
    )
