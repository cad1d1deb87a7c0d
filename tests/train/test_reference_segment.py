"""Updates of a segmenter equal those of the textbook's loop, on class maps picked as torch picks them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.train.children import run_many
from tests.train.conftest import SEGMENTER, SHAPES
from tests.train.reference import Segmenting, Update
from tests.train.test_loop import balanced
from tests.train.test_reference import agree
from vitrail.data.augment import augment, draw
from vitrail.data.augmentation import Augmentation
from vitrail.data.plan import BatchPlan
from vitrail.models import create_model
from vitrail.train.config import TrainConfig
from vitrail.train.run import Run
from vitrail.train.trainer import train
from vitrail_runtime.preprocess import Preprocessing, prepare


def config_for(data: Path, out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "data": str(data),
        "out": str(out),
        "image_size": (32, 64),
        "resize": "squash",
        "epochs": 2,
        "batch_size": 6,
        "log_every": 1,
        "eval_every": 100,
        "eps": 1e-4,  # no step of full length where a gradient is nothing but rounding
        "augmentation": Augmentation(),
        "device": "cpu",
    }
    return TrainConfig(**(settings | SEGMENTER | changes))


def model_for(config: TrainConfig) -> Any:
    torch.manual_seed(config.seed)
    fields = {"image_size": config.image_size, "head": config.head_fields}
    return create_model(config.model, classes=SHAPES, **config.model_fields, **fields)


def picked(ids: np.ndarray, size: tuple[int, int]) -> torch.Tensor:
    """The nearest pixels of a class map."""
    return F.interpolate(torch.tensor(ids)[None, None], size, mode="nearest-exact")[0, 0]


def files_of(data: Path, split: str) -> list[Path]:
    return sorted((data / "images" / split).iterdir())


def mask_of(image: Path) -> np.ndarray:
    return np.array(Image.open(Path(str(image).replace("images", "masks"))))


def updates_for(config: TrainConfig, p: Preprocessing) -> list[Update]:
    """The batches of the whole run; the part of each image that is drawn, and its mirroring, are told."""
    size = config.size
    assert size is not None
    files = files_of(Path(config.data), "train")
    plan = BatchPlan(length=len(files), batch_size=config.batch_size, size=size, seed=config.seed)
    augmentation = replace(config.augmentation, mean=p.mean, std=p.std)
    mean, std = (255 * torch.tensor(v)[:, None, None] for v in (p.mean, p.std))
    found = []
    for epoch in range(config.epochs):
        for batch in plan.batches(epoch):
            images, maps = [], []
            for i, position in zip(batch.indices, batch.positions, strict=True):
                key = (config.seed, epoch, position)
                pixels, ids = np.array(Image.open(files[i])), mask_of(files[i])
                images.append(augment(pixels, size, augmentation, key))
                view = draw(*ids.shape, size, augmentation, key).view
                top, left, height, width = view.crop
                seen = picked(ids[top : top + height, left : left + width], size)
                maps.append(seen.flip(1) if view.flip else seen)
            found.append(Update((torch.stack(images).float() - mean) / std, torch.stack(maps)))
    return found[: config.max_steps]


def validation(config: TrainConfig, p: Preprocessing) -> tuple[torch.Tensor, torch.Tensor]:
    size = config.size
    assert size is not None
    files = files_of(Path(config.data), "val")
    seen = replace(p, size=size, mode="squash")
    images = [prepare(np.array(Image.open(file)), seen)[0] for file in files]
    maps = [picked(mask_of(file), size) for file in files]
    return torch.from_numpy(np.stack(images)), torch.stack(maps).long()


DROPPING = SEGMENTER["model_fields"] | {"drop_path_rate": 0.4}
BALANCED = {"task": {"class_weights": "balanced"}}
CASES: dict[str, dict[str, Any]] = {
    "plain": {"clip_grad": None},
    "parts": BALANCED  # of one image each, some without a class
    | {"accumulate": 6, "model_fields": DROPPING, "ema": 0.9, "layer_decay": 0.6},
    "sgd": {"optimizer": "sgd", "lr": 0.05, "accumulate": 3, "precision": "bf16"},
    "units": {
        "clip_mode": "agc",
        "clip_grad": 0.02,
    },  # the classifier stands last, and is left alone
    "auxiliary": BALANCED
    | {
        "model": "upernet/vit_tiny_patch16",
        "head_fields": {"dim": 8, "auxiliary_dim": 6, "auxiliary_weight": 0.3},
        "eps": 1e-3,
    },
    "upernet": {
        "model": "upernet/vit_tiny_patch16",
        "head_fields": {"dim": 8, "auxiliary_weight": 0.0},
        "accumulate": 2,
        "eps": 1e-3,
    },
    "head": BALANCED
    | {
        "model": "linear/vit_tiny_patch16",
        "head_fields": {"dropout": 0.3},
        "model_fields": DROPPING,
        "train_only": "head",
    },
}


def compare(config: TrainConfig, **how: Any) -> None:
    model = model_for(config)
    classes = balanced(Path(config.data)) if config.task else torch.ones(3)
    task = Segmenting(classes, config.head_fields.get("auxiliary_weight", 0.0))
    p = model.preprocessing
    agree(config, model, task, updates_for(config, p), validation(config, p), warmup_steps=4, **how)


@pytest.mark.parametrize("name", CASES)
def test_a_run_of_a_segmenter_equals_the_textbook(masks, tmp_path, name):
    config = config_for(masks, tmp_path / "run", **CASES[name])
    train(config)
    # BatchNorm divides by the deviation of a few values, which makes more of a rounding.
    compare(config, tolerance=1e-6 if "semantic" in config.model else 1e-5)


def test_two_processes_of_a_segmenter_equal_the_textbook(masks, tmp_path):
    config = config_for(masks, tmp_path / "run", **CASES["parts"] | {"accumulate": 3})
    assert run_many(config, 2) == [0, 0]
    compare(config, world=2)


def test_what_is_learnt_is_the_nearest_pixel_of_the_mask(masks, tmp_path, monkeypatch):
    real, met = Run.prepared, []

    def prepared(run, batch):
        batch = real(run, batch)
        met.append((batch.images, batch.targets))
        return batch

    monkeypatch.setattr(Run, "prepared", prepared)
    config = config_for(masks, tmp_path / "run")
    train(config)
    updates = updates_for(config, model_for(config).preprocessing)
    assert len(met) == len(updates) == 8
    for (images, targets), update in zip(met, updates, strict=True):
        torch.testing.assert_close(images, update.images)
        assert torch.equal(targets, update.labels)
    assert {int(c) for _, targets in met for c in targets.unique()} == {0, 1, 2, 255}
