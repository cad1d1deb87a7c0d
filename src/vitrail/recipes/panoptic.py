"""Things and stuff by DETR, in its two steps."""

from dataclasses import replace

from vitrail.recipes.detection import detect_small
from vitrail.train.config import TrainConfig


def panoptic_small() -> TrainConfig:
    """DETR's panoptic form on images with segments: the boxes first, and then the masks.

    Command: vitrail train --recipe panoptic_small --data YOUR/FOLDER --model detr/resnet18 --out out/boxes,
        which learns a box around each segment; then vitrail train --recipe panoptic_small --data YOUR/FOLDER
        --weights out/boxes --train-only masks --epochs 25 --out out/masks. Both with the same --image-size,
        and with the same --head-fields where there are any. The first starts from the backbone's released
        weights where they can be had, else from random ones, and says so; on released ones add
        --backbone-lr 0.1, and frozen_norm=True to --head-fields.
    Cost: 300 passes over the data and 25 more; on a CPU take small images and a narrow head, such as
        --head-fields dim=128 mlp_dim=256 encoder_layers=2 decoder_layers=3 num_queries=20.
    Expected: of few images and few passes stuff at best: DETR takes hundreds of passes over a hundred
        thousand images, the paper's own remark. docs/panoptic.md has what minutes gave.

    Decay, clipping and passes are the paper's; images come at 0.8 to 1.25 times their size, and the averaged
    weights are saved, as in `detect_small`.
    """
    return replace(
        detect_small(),
        model="detr_panoptic/resnet18",
        epochs=300,
        batch_size=16,
        lr=1e-4,
        weight_decay=1e-4,
        clip_grad=0.1,
        eval_every=20,
    )
