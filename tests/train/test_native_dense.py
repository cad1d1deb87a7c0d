"""Segmenters and detectors trained on packs of images of any shape, by the same commands as all others."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import vitrail
from tests.train.conftest import DETECTOR, VIT, tiny_config
from vitrail.cli import main
from vitrail.configuration import to_dict
from vitrail.data import open_data
from vitrail.data.augmentation import Augmentation
from vitrail.data.loader import train_batches
from vitrail.data.packing import Packing
from vitrail.train.config import TrainConfig
from vitrail.train.evaluate import evaluate
from vitrail.train.folder import RunFolder
from vitrail.train.replay import replay
from vitrail.train.setup import build
from vitrail.train.trainer import train
from vitrail_runtime.errors import InputError

LINEAR = VIT | {"model": "linear/vit_tiny_patch16", "head_fields": {}}
OWN = {"native": True, "image_size": None, "crop_pct": None, "batch_size": 4}
KINDS = {"masks": LINEAR, "scenes": DETECTOR}


def native_config(data: Path, out: Path, kind: str, **changes: Any) -> TrainConfig:
    packing = changes.pop("packing", Packing(max_tokens=60, packs=2))
    how = OWN | {"augmentation": Augmentation(flip=0.0, crop="whole"), "packing": packing}
    return tiny_config(data, out, **(KINDS[kind] | how | changes))


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture
def data(kind, request) -> Path:
    return request.getfixturevalue(kind)


def test_what_a_packed_image_teaches_is_of_the_size_that_it_is_shown_at(kind, data, tmp_path):
    """Boxes scaled with it, and of a class map the pixel that lies nearest."""
    packing = Packing(max_tokens=60, resolution="uniform", sides=(12, 40))
    config = native_config(data, tmp_path, kind, packing=packing)
    examples = open_data(data, "train")
    _, plan = build(config, examples, 1)
    seen = changed = 0
    for batch in train_batches(examples, plan, config.augmentation, epoch=0):
        for i, size, target in zip(batch.indices.tolist(), batch.sizes, batch.targets, strict=True):
            whole, own = examples.truth.target(i, None), examples.images.sizes[i].tolist()
            scale = np.array(size) / own
            if kind == "scenes":
                want = whole.boxes * [*scale[::-1], *scale[::-1]]
                np.testing.assert_allclose(target["boxes"].numpy(), want, atol=1e-4)
            else:
                rows, columns = (
                    ((np.arange(n) + 0.5) / s + 1e-9).astype(int)
                    for n, s in zip(size, scale, strict=True)
                )
                assert np.array_equal(target.numpy(), np.array(whole)[rows[:, None], columns])
            changed += tuple(own) != size
            seen += 1
    assert seen == len(examples)
    assert changed > 0.8 * seen


def test_a_pack_counts_its_pixels_whatever_it_is_computed_with(masks, tmp_path):
    """In parts of an update, the norms at rest, losses and weights add up."""
    config = native_config(masks, tmp_path, "masks")
    examples = open_data(masks, "train")
    model, plan = build(config, examples, 1)
    batch = next(train_batches(examples, plan, config.augmentation, epoch=0))
    batch = batch.to(torch.device("cpu"), model.preprocessing)
    model.eval()
    whole, parts = model.losses(batch.images, batch.targets, **batch.padding), batch.split(2)
    assert len(parts) == 2
    found = [model.losses(part.images, part.targets, **part.padding) for part in parts]
    weights = [float(model.weight(part.targets)) for part in parts]
    assert sum(weights) == float(model.weight(batch.targets))
    torch.testing.assert_close(sum(f["segment"] for f in found), whole["segment"])


def test_holes_that_dropping_leaves_are_refused_before_any_update(kind, data, tmp_path):
    config = native_config(data, tmp_path / "run", kind, packing=Packing(max_tokens=60, drop=0.2))
    with pytest.raises(InputError, match="reads maps, in which token dropping leaves holes"):
        train(config)
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_mosaics_of_packs_are_refused(scenes, tmp_path):
    config = native_config(scenes, tmp_path / "run", "scenes", task={"mosaic": 0.5})
    with pytest.raises(InputError, match=r"cannot be mixed with each other.*--task.mosaic 0"):
        train(config)


def test_a_head_of_maps_of_one_size_is_refused_by_name(masks, tmp_path):
    changes = {"model": "semantic_fpn/vit_tiny_patch16"}
    config = native_config(masks, tmp_path / "run", "masks", **changes)
    with pytest.raises(
        InputError, match="semantic_fpn/vit_tiny_patch16 cannot take packed images: its head"
    ):
        train(config)


def test_a_pack_whose_loss_is_not_finite_is_kept_and_runs_again(kind, data, tmp_path):
    changes = {"lr": 1e30, "clip_grad": None, "warmup_epochs": 0.0}
    with pytest.raises(InputError, match="not finite"):
        train(native_config(data, tmp_path / "run", kind, **changes))
    found = replay(tmp_path / "run")
    assert not math.isfinite(found["loss"]) or not math.isfinite(found["gradient_norm"])
    assert found["num_images"] > 1
    assert len(found["images"]) <= found["num_images"]


@pytest.mark.slow
def test_a_model_learns_on_packs_is_measured_and_asked(kind, data, tmp_path, capsys):
    """From the command to the predictions, at the images' own shape."""
    out = tmp_path / "run"
    changes = {"epochs": 40, "lr": 3e-3, "eval_every": 40, "log_every": 1, "min_lr": 1e-4}
    config = native_config(data, out, kind, **changes)
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(to_dict(config)))
    assert main(["train", "--config", str(file)]) == 0
    rows = RunFolder(out).rows()
    losses = [row["loss"] for row in rows if row["kind"] == "train"]
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:10])
    model = vitrail.load(out / "best")
    assert (model.preprocessing.mode, model.preprocessing.patches) == ("native", (59, 8))
    stored = json.loads((out / "best" / "metrics.json").read_text())
    scores = evaluate(model, open_data(data, "val", classes=model.classes))
    assert scores.best == pytest.approx(stored[scores.headline], abs=1e-6)
    assert scores.best > {"masks": 0.3, "scenes": 0.05}[kind]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "data:image/" in page
    capsys.readouterr()
    how = ["--data", str(data), "--tokens-per-image", "12", "--json"]
    assert main(["eval", str(out), *how]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 12
    pictures = sorted((data / "images" / "val").glob("*.png"))
    said = ["--tokens-per-image", "12", "--max-tokens", "50", "--out", str(tmp_path / "out")]
    assert main(["predict", str(out), *map(str, pictures), *said]) == 0
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["path"] for line in lines] == list(map(str, pictures))
