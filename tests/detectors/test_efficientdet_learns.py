"""EfficientDet learns a few scenes by heart, through the training command's own path."""

import json
import shutil

import pytest

from vitrail.data.augmentation import Augmentation
from vitrail.data.digits import make_digits
from vitrail.train.config import TrainConfig
from vitrail.train.trainer import train

SCENES = 24


@pytest.mark.slow
def test_some_scenes_are_learnt_by_heart(tmp_path):
    """0.67 after as many updates of a longer run; without one of the heads' parts it stays near nothing."""
    every, few = make_digits(tmp_path / "digits", task="detect"), tmp_path / "few"
    scenes = json.loads((every / "train.json").read_text())
    scenes["images"] = scenes["images"][:SCENES]
    shown = {one["id"] for one in scenes["images"]}
    scenes["annotations"] = [a for a in scenes["annotations"] if a["image_id"] in shown]
    shutil.copytree(every / "images" / "train", few / "images" / "train")
    for split in ("train", "val"):
        (few / f"{split}.json").write_text(json.dumps(scenes))
    result = train(
        TrainConfig(
            data=str(few),
            out=str(tmp_path / "run"),
            model="efficientdet/mobilenetv3_small_050",
            head_fields={"neck_cells": 2, "head_convs": 2, "norm_momentum": 0.1},
            resize="edges",
            image_size=(256, 256),
            epochs=40,
            batch_size=8,
            lr=2e-3,
            warmup_epochs=2,
            ema=0.9,
            eval_every=40,
            workers=0,
            augmentation=Augmentation(crop="whole", flip=0.0),
        )
    )
    assert result.best is not None
    assert result.best > 0.5
