"""The embedded digits, from nothing, in minutes on a CPU."""

from vitrail.data.augmentation import Augmentation
from vitrail.train.config import TrainConfig


def digits() -> TrainConfig:
    """EfficientViT-M0 on the embedded digits, from random weights: what `vitrail demo` runs.

    Command: vitrail data make digits out/digits; vitrail train --recipe digits --data out/digits.
    Cost: 34,500 pictures of 64 x 64; about a minute on one core.
    Expected: test accuracy 0.95 or more (`vitrail demo` prints it).
    """
    return TrainConfig(
        model="efficientvit_m0",
        image_size=64,
        resize="squash",  # digits stand anywhere, so nothing may be cut off
        epochs=24,
        batch_size=64,
        lr=5e-3,
        weight_decay=0.05,
        warmup_epochs=2,
        ema=0.98,
        # A mirrored digit is no digit: no flip.
        augmentation=Augmentation(scale=(0.6, 1.0), flip=0.0),
        eval_every=6,
    )


def digits_segment() -> TrainConfig:
    """Semantic FPN on MobileNetV3-S on sheets of the embedded digits, from random weights: what `vitrail demo
    --task segment` runs.

    Command: vitrail data make digits out/sheets --task semantic; vitrail train --recipe digits_segment
        --data out/sheets.
    Cost: 14,400 images of 128 x 128; two and a half minutes of one CPU core.
    Expected: a test mIoU of about 0.77, of one run (`vitrail demo --task segment` prints it).
    """
    return TrainConfig(
        model="semantic_fpn/mobilenetv3_small",
        head_fields={"fpn_dim": 32, "dim": 32},
        image_size=128,
        resize="squash",
        epochs=20,
        batch_size=16,
        lr=3e-3,
        weight_decay=0.05,
        warmup_epochs=2,
        clip_grad=1.0,
        ema=0.98,
        # A mirrored digit is no digit: no flip.
        augmentation=Augmentation(scale=(0.5, 1.0), flip=0.0, interpolation="bilinear"),
        eval_every=5,
    )


def digits_detect() -> TrainConfig:
    """Faster R-CNN on MobileNetV3-S on scenes of the embedded digits, from random weights: what `vitrail demo
    --task detect` runs. A narrow neck and head, and few proposals: images are small and hold few objects.

    Command: vitrail data make digits out/scenes --task detect; vitrail train --recipe digits_detect
        --data out/scenes.
    Cost: 5,040 images of 160 x 160; two and a half minutes of one CPU core.
    Expected: a test AP of about 0.63, of one run (`vitrail demo --task detect` prints it).
    """
    return TrainConfig(
        model="faster_rcnn/mobilenetv3_small",
        head_fields={
            "neck_dim": 64,
            "strides": (8, 16, 32),
            "anchor_sizes": (3.0,),  # digits are 10 to 70 pixels high
            "anchor_ratios": (1.0, 2.0),
            "box_dim": 256,
            "class_agnostic": True,
            "proposals_before_nms": (400, 200),
            "proposals": (200, 60),
            "proposal_samples": 64,
            "samples": 64,
        },
        image_size=160,
        resize="squash",
        epochs=7,
        batch_size=8,
        lr=2e-3,
        weight_decay=0.05,
        warmup_epochs=1,
        clip_grad=1.0,
        ema=0.98,
        # A mirrored digit is no digit: no flip.
        augmentation=Augmentation(scale=(0.5, 1.0), flip=0.0, interpolation="bilinear"),
        eval_every=7,
    )


def digits_pairs() -> TrainConfig:
    """CLIP of EfficientViT-M0 and a text transformer of two blocks on the embedded digits with captions, from
    random weights: what `vitrail demo --task contrast` runs.

    Command: vitrail data make digits out/pairs --task pairs; vitrail train --recipe digits_pairs
        --data out/pairs.
    Cost: 28,760 images of 56 x 80 and as many captions; two and a half minutes of one CPU core.
    Expected: a test recall@1 of about 0.95 and, by the digits' names alone, an accuracy of about 0.94, of one
        run (`vitrail demo --task contrast` prints the recall).
    """
    return TrainConfig(
        model="clip/efficientvit_m0",
        head_fields={
            "dim": 64,
            "text_dim": 64,
            "text_depth": 2,
            "text_heads": 2,
            "context": 12,
            "vocab_size": 600,
            "templates": ("a {}",),
        },
        image_size=(56, 80),
        resize="squash",  # a digit stands where its caption says, so nothing may be cut off
        epochs=10,
        batch_size=64,
        lr=4e-3,
        weight_decay=0.05,
        warmup_epochs=2,
        ema=0.98,
        # A mirrored digit is no digit and stands on the other side, and a crop moves it.
        augmentation=Augmentation(scale=(0.8, 1.0), ratio=(1.1, 1.9), flip=0.0),
        eval_every=5,
    )
