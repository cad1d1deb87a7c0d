"""Deformable DETR on a few hundred images with boxes."""

from dataclasses import replace

from vitrail.recipes.detection import detect_small
from vitrail.train.config import TrainConfig


def detr_small() -> TrainConfig:
    """Deformable DETR, refined and of two stages, on some hundred to some thousand images with boxes.

    Command: vitrail train --recipe detr_small --data YOUR/FOLDER --image-size 240 320. It starts from the
        backbone's released weights where they can be had, else from random ones, and says so. On released
        ones add --backbone-lr 0.1 --head-fields frozen_norm=True, as the paper: batches are too small to
        estimate BatchNorms anew. Never freeze the norms of random weights: they would do nothing.
    Cost: 50 passes over the data; on a CPU take small images and a narrow head, such as --head-fields dim=128
        mlp_dim=256 encoder_layers=2 decoder_layers=3, and a higher rate for it (--lr 1e-3).
    Expected: docs/results.md has what detectors gave on BCCD. Plain DETR (--model detr/...) takes hundreds of
        passes over a hundred thousand images, and finds next to nothing on so few: the paper's own remark.

    Rate, decay, clipping and passes are the paper's; images come at 0.8 to 1.25 times their size, and the
    averaged weights are saved, as in `detect_small`. More than 100 objects in an image need as many queries:
    --head-fields num_queries=300.
    """
    return replace(
        detect_small(),
        model="deformable_detr/resnet18",
        head_fields={"refine": True, "two_stage": True, "num_queries": 100},
        epochs=50,
        lr=2e-4,
        weight_decay=1e-4,
        clip_grad=0.1,
    )
