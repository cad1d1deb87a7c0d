"""Twenty updates of a run equal those of a loop written as a textbook has it, for every setting."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from tests.train import reference
from tests.train.children import run_many
from tests.train.reference import Classifying, Segmenting, Update
from vitrail.data.augment import augment
from vitrail.data.augmentation import Augmentation
from vitrail.data.plan import BatchPlan
from vitrail.models import create_model
from vitrail.train.config import TrainConfig
from vitrail.train.folder import RunFolder
from vitrail.train.trainer import train
from vitrail_runtime.preprocess import Preprocessing, prepare

CLASSES = ("a", "b", "c")
COUNTS = {
    "train": (10, 8, 6),
    "val": (2, 3, 2),
}  # unequal, so that balanced sampling is another order
VIT: dict[str, Any] = {
    "model": "vit_tiny_patch16",
    "model_fields": {"depth": 2, "embed_dim": 16, "num_heads": 2, "patch_size": 8},
    "image_size": 16,
}
VIT_LAYERS = {  # a stem, two blocks and what stands behind them
    "backbone.cls_token": 0,
    "backbone.pos_embed": 0,
    "backbone.patch_embed.": 0,
    "backbone.blocks.0.": 1,
    "backbone.blocks.1.": 2,
    "backbone.norm.": 3,
    "head.": 3,
    "auxiliary.": 3,
}
EFFICIENTVIT: dict[str, Any] = {  # with BatchNorm
    "model": "efficientvit_m0",
    "model_fields": {
        "dims": [8, 16],
        "depths": [1, 1],
        "num_heads": [1, 1],
        "kernels": [3],
        "key_dim": 4,
    },
    "image_size": 32,
    "eps": 1e-3,
}
EFFICIENTVIT_LAYERS = {  # what lies between two stages belongs to the later one
    "backbone.patch_embed.": 0,
    "backbone.stages.0.": 1,
    "backbone.stages.1.": 2,
    "head.": 3,
}


def file_of(root: Path, split: str, i: int) -> Path:
    """The i-th of all images of a split, class after class."""
    files = [
        root / split / name / f"{n}.png"
        for name, count in zip(CLASSES, COUNTS[split], strict=True)
        for n in range(count)
    ]
    return files[i]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, counts in COUNTS.items():
        for label, (name, count) in enumerate(zip(CLASSES, counts, strict=True)):
            (root / split / name).mkdir(parents=True)
            for n in range(count):
                pixels = rng.integers(0, 200, (18, 20, 3), dtype=np.uint8)
                pixels[..., label] += 50
                Image.fromarray(pixels).save(root / split / name / f"{n}.png")
    return root


def labels_of(split: str) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(3), torch.tensor(COUNTS[split]))


def config_for(data: Path, out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "data": str(data),
        "out": str(out),
        "crop_pct": 0.9,
        "epochs": 5,
        "batch_size": 6,
        "log_every": 1,
        "eval_every": 100,
        "eps": 1e-4,  # no step of full length where a gradient is nothing but rounding
        "augmentation": Augmentation(),
        "device": "cpu",
    }
    return TrainConfig(**(settings | VIT | changes))


def model_for(config: TrainConfig) -> Any:
    torch.manual_seed(config.seed)
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in config.model_fields.items()}
    return create_model(config.model, classes=CLASSES, image_size=config.image_size, **fields)


def updates_for(config: TrainConfig, p: Preprocessing) -> list[Update]:
    """The batches of the whole run, one image after the other, and what is drawn to mix them."""
    balanced = {}
    if config.task.get("sampling") == "balanced":
        labels = labels_of("train").numpy()
        balanced = {"weights": 1 / np.array(COUNTS["train"])[labels], "strata": labels}
    plan = BatchPlan(
        length=sum(COUNTS["train"]),
        batch_size=config.batch_size,
        size=(config.image_size, config.image_size),
        seed=config.seed,
        scales=tuple((s, s) for s in config.sizes),
        repeats=config.repeats,
        **balanced,
    )
    augmentation = replace(config.augmentation, mean=p.mean, std=p.std)
    mean, std = (255 * torch.tensor(v)[:, None, None] for v in (p.mean, p.std))
    found = []
    for epoch in range(config.epochs):
        for batch in plan.batches(epoch):
            pixels = [
                augment(
                    np.array(Image.open(file_of(Path(config.data), "train", i))),
                    batch.size,
                    augmentation,
                    (config.seed, epoch, position),
                )
                for i, position in zip(batch.indices, batch.positions, strict=True)
            ]
            images = (torch.stack(pixels).float() - mean) / std
            labels = labels_of("train")[list(batch.indices)]
            drawn = mixing(config.task, (config.seed, epoch, batch.step), batch.size)
            found.append(Update(images, labels, **drawn))
    return found[: config.max_steps]


def mixing(a: dict[str, Any], key: tuple[int, int, int], size: tuple[int, int]) -> dict[str, Any]:
    """What is drawn for the batch of an update, by its (seed, epoch, number in the epoch)."""
    seed, epoch, step = key
    rng = np.random.Generator(
        np.random.Philox(key=[seed, epoch * 2**40 + step], counter=[0, 0, 0, 1])
    )
    chance, which, row, column = rng.random(4)
    mixup, cutmix = a.get("mixup", 0.0), a.get("cutmix", 0.0)
    if not (mixup or cutmix) or chance >= a.get("mix_prob", 1.0):
        return {}
    cut = not mixup or (cutmix > 0 and which < 0.5)
    share = rng.beta(*[cutmix if cut else mixup] * 2)
    if not cut:
        return {"share": share}
    box = []
    for centre, length in zip((row, column), size, strict=True):
        half = length * (1 - share) ** 0.5 / 2
        box += [min(max(round(centre * length + sign * half), 0), length) for sign in (-1, 1)]
    return {"box": tuple(box)}


def decayed_of(model: nn.Module) -> set[str]:
    """Matrices and filters, and nothing else: no bias, norm, token, table or scale."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    }


def layers_of(model: nn.Module) -> dict[str, int]:
    names = [name for name, _ in model.named_parameters()]
    prefixes = VIT_LAYERS if "backbone.cls_token" in names else EFFICIENTVIT_LAYERS
    found = {n: [layer for p, layer in prefixes.items() if n.startswith(p)] for n in names}
    return {name: layer for name, (layer,) in found.items()}


def validation(config: TrainConfig, p: Preprocessing) -> tuple[torch.Tensor, torch.Tensor]:
    seen = replace(p, size=(config.image_size, config.image_size), crop_pct=config.crop_pct)
    files = [file_of(Path(config.data), "val", i) for i in range(sum(COUNTS["val"]))]
    images = [prepare(np.asarray(Image.open(file)), seen)[0] for file in files]
    return torch.from_numpy(np.stack(images)), labels_of("val")


def part_of(state: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(kind): value for k, value in state.items() if k.startswith(kind)}


def compare(
    config: TrainConfig, warmup_steps: int, world: int = 1, tolerance: float = 1e-6
) -> None:
    """The run in `config.out` against the loop of the textbook."""
    model = model_for(config)
    task = Classifying(len(CLASSES), config.task.get("label_smoothing", 0.1))
    updates = updates_for(config, model.preprocessing)
    agree(
        config,
        model,
        task,
        updates,
        validation(config, model.preprocessing),
        warmup_steps=warmup_steps,
        world=world,
        tolerance=tolerance,
    )


def agree(
    config: TrainConfig,
    model: Any,
    task: Classifying | Segmenting,
    updates: list[Update],
    measured: tuple[torch.Tensor, torch.Tensor],
    *,
    warmup_steps: int,
    world: int = 1,
    tolerance: float = 1e-6,
) -> None:
    """The run in `config.out` equals that of `model` on these updates; `measured` are the images and labels
    of its evaluation."""
    expected = reference.train(
        model,
        updates,
        config,
        decayed=decayed_of(model),
        layers=layers_of(model),
        warmup_steps=warmup_steps,
        task=task,
        world=world,
    )
    *rows, last = RunFolder(config.out).rows()
    assert [row["step"] for row in rows] == list(range(1, len(updates) + 1))
    assert [row["loss"] for row in rows] == pytest.approx(expected.losses, abs=tolerance)
    assert [row["lr"] for row in rows] == pytest.approx(expected.rates, rel=1e-12)
    assert [row["grad_norm"] for row in rows] == pytest.approx(expected.norms, rel=100 * tolerance)
    seen = np.cumsum([len(update.images) for update in updates])
    assert [row["images"] for row in rows] == seen.tolist()
    (file,) = (Path(config.out) / "state").iterdir()
    state = load_file(file)
    result = expected.average if config.ema else expected.weights
    for ours, theirs in (
        (part_of(state, "model."), expected.weights),
        (part_of(state, "ema."), expected.average if config.ema else {}),
        (load_file(Path(config.out) / "last" / "model.safetensors"), result),
    ):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            difference = (ours[name] - value).abs().max().item()
            allowed = tolerance * max(1.0, value.abs().max().item())
            assert difference <= allowed, f"{name} differs by {difference}"
    loss = reference.validation_loss(model, result, *measured)
    assert last["loss"] == pytest.approx(loss, abs=tolerance)


MIXED = {"mixup": 0.4, "cutmix": 1.0}
DROPPING = VIT | {"model_fields": VIT["model_fields"] | {"drop_path_rate": 0.4}}
CASES: dict[str, dict[str, Any]] = {  # every setting on and off, each beside others
    "plain": {"clip_grad": None, "task": {"label_smoothing": 0.0}},
    "clipped": {
        "clip_grad": 0.5,
        "task": {"label_smoothing": 0.2},
        "weight_decay": 0.3,
        "augmentation": Augmentation(random_erasing=1.0),
        "betas": (0.8, 0.95),
        "lr": 2e-3,
        "warmup_lr": 1e-4,
        "min_lr": 3e-4,
        "warmup_epochs": 1.65,  # of 4 updates: 6.6
        "warmup_steps": 7,
    },
    "averaged": {
        "ema": 0.9,
        "layer_decay": 0.6,
        "schedule": "constant",
        "warmup_epochs": 0.0,
        "warmup_steps": 0,
        "clip_mode": "agc",
        "clip_grad": 0.02,
        "eps": 1e-3,
        "seed": 3,
    },
    "sgd": {
        "optimizer": "sgd",
        "lr": 0.05,
        "momentum": 0.8,
        "ema": 0.5,
        "accumulate": 2,
        "task": {"mixup": 0.4},
        "warmup_epochs": 4.0,  # but half of the run at most
        "warmup_steps": 10,
    },
    "parts": {
        "optimizer": "sgd",
        "lr": 0.1,
        "momentum": 0.0,
        "weight_decay": 0.2,
        "task": {"label_smoothing": 0.0, "cutmix": 1.0},
        "layer_decay": 0.5,
        "accumulate": 3,
    },
    "dropping": DROPPING | {"task": MIXED | {"mix_prob": 0.6}, "clip_grad": None},
    "half": {"precision": "bf16", "task": MIXED, "ema": 0.99},
    "head": DROPPING | {"train_only": "head", "layer_decay": 0.5, "ema": 0.9},
    "sizes": {  # 6 images or 3, in two parts
        "sizes": (16, 24),
        "accumulate": 2,
        "epochs": 4,
        "max_steps": 14,
        "seed": 1,
        "warmup_epochs": 1.08,  # of 5, 6, 5 and 5 updates: 5.67
        "warmup_steps": 6,
    },
    "balanced": {"task": {"sampling": "balanced"}, "repeats": 2, "max_steps": 13, "seed": 1},
    "recomputed": DROPPING | {"grad_checkpointing": True, "clip_mode": "agc", "clip_grad": 0.05},
    "norm": EFFICIENTVIT | {"clip_grad": 0.3, "ema": 0.9, "task": MIXED},
    "norm-parts": EFFICIENTVIT
    | {"accumulate": 2, "layer_decay": 0.7, "clip_mode": "agc", "clip_grad": 0.02, "epochs": 3},
    "norm-head": EFFICIENTVIT | {"train_only": "head", "optimizer": "sgd", "lr": 0.1},
    "norm-recomputed": EFFICIENTVIT
    | {"grad_checkpointing": True, "precision": "bf16", "schedule": "constant", "epochs": 3},
}


@pytest.mark.parametrize("name", CASES)
def test_a_run_equals_the_textbook(images, tmp_path, name):
    changes = dict(CASES[name])
    warmup_steps = changes.pop("warmup_steps", 4)
    config = config_for(images, tmp_path / "run", **changes)
    train(config)
    # BatchNorm divides by the deviation of a few values, which makes more of a rounding.
    compare(config, warmup_steps, tolerance=1e-5 if "norm" in name else 1e-6)


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        (
            DROPPING
            | {"accumulate": 3, "batch_size": 12, "task": MIXED, "ema": 0.9}
            | {"clip_mode": "agc", "clip_grad": 0.02, "layer_decay": 0.6, "max_steps": 8},
            1e-6,
        ),
        (EFFICIENTVIT | {"batch_size": 12, "clip_grad": 0.3, "ema": 0.9, "max_steps": 6}, 1e-5),
    ],
    ids=["dropping", "norm"],
)
def test_two_processes_equal_the_textbook(images, tmp_path, changes, tolerance):
    config = config_for(images, tmp_path / "run", **changes)
    assert run_many(config, 2) == [0, 0]
    compare(config, warmup_steps=2, world=2, tolerance=tolerance)
