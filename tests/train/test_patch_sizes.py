"""Training with patches of several sizes, and asking a model with any of them."""

import json
import math
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import vitrail
from tests.train.children import run
from tests.train.conftest import DETECTOR, VIT, tiny_config
from vitrail.cli import main
from vitrail.data import open_data
from vitrail.data.augmentation import Augmentation
from vitrail.data.loader import train_batches
from vitrail.data.packing import Packing
from vitrail.models import at_patch_size
from vitrail.train.evaluate import evaluate
from vitrail.train.folder import RunFolder
from vitrail.train.replay import replay
from vitrail.train.setup import build, open_splits
from vitrail.train.trainer import train
from vitrail_runtime.errors import InputError

FLEXIBLE = VIT | {"patch_sizes": (4, 8, 16)}
PACKS = {
    "native": True,
    "packing": Packing(max_tokens=40),
    "image_size": None,
    "crop_pct": None,
    "augmentation": Augmentation(crop="whole", flip=0.0),
}


@pytest.fixture(params=["batches", "packs"])
def how(request) -> dict[str, Any]:
    return FLEXIBLE | (PACKS if request.param == "packs" else {})


def test_an_update_is_made_with_the_patches_that_the_plan_drew(how, pictures, tmp_path):
    """The loss of a batch is that of the model at its size; the base projection learns from every size."""
    config = tiny_config(pictures, tmp_path, **how)
    data, _ = open_splits(config, 1)
    torch.manual_seed(0)
    model, plan = build(config, data, 1)
    torch.nn.init.normal_(model.head.fc.weight, std=0.1)
    assert model.backbone.patch_sizes == (8, 4, 8, 16)
    seen = set()
    for epoch in (0, 1):
        for batch in train_batches(data, plan, config.augmentation, epoch=epoch):
            batch = batch.to(torch.device("cpu"), model.preprocessing)
            model.zero_grad()
            loss = model.losses(batch.images, batch.targets, **batch.padding)["classify"]
            loss.backward()
            assert model.backbone.patch_embed.proj.weight.grad.abs().sum() > 0
            if not config.native and batch.patch_size not in seen:
                other = vitrail.create_model(
                    "vit_tiny_patch16",
                    classes=data.classes,
                    weights={k: v.detach() for k, v in model.state_dict().items()},
                    **VIT["model_fields"],
                    image_size=32,
                )
                at_patch_size(other, batch.patch_size)
                want = other.losses(batch.images, batch.targets)["classify"]
                torch.testing.assert_close(loss, want)
            seen.add(batch.patch_size)
    assert seen <= {4, 8, 16}
    assert len(seen) >= (2 if config.native else 3)


def test_a_run_is_measured_at_its_own_size_and_asked_at_any(how, pictures, tmp_path, capsys):
    out = tmp_path / "run"
    train(tiny_config(pictures, out, **how, epochs=1))
    stored = json.loads((out / "best" / "metrics.json").read_text())
    model = vitrail.load(out / "best")
    assert (model.backbone.patch_sizes, model.backbone.config.patch_size) == ((8,), 8)
    data = open_data(pictures, "val", classes=model.classes)
    assert evaluate(model, data)["loss"] == pytest.approx(stored["loss"], rel=1e-5)
    capsys.readouterr()
    assert main(["eval", str(out), "--data", str(pictures), "--patch-size", "4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    at_patch_size(model, 4)
    assert said["loss"] == pytest.approx(evaluate(model, data)["loss"], rel=1e-5)
    assert said["loss"] != pytest.approx(stored["loss"], rel=1e-5)
    picture = str(next((pictures / "val").rglob("*.png")))
    found = {}
    for more in ([], ["--patch-size", "4"], ["--patch-size", "4", "--max-tokens", "200"]):
        assert main(["predict", str(out), picture, "--json", *more]) == 0
        found[len(more)] = json.loads(capsys.readouterr().out)["top"]
    assert found[0] != found[2]
    (direct,) = vitrail.Predictor(model, top_k=5)([picture])
    assert [one["score"] for one in found[2]] == pytest.approx(direct.scores.tolist(), abs=1e-5)


def test_a_batch_of_drawn_patches_whose_loss_is_not_finite_runs_again(how, pictures, tmp_path):
    changes = {"lr": 1e30, "clip_grad": None, "warmup_epochs": 0.0, "epochs": 3}
    with pytest.raises(InputError, match="not finite"):
        train(tiny_config(pictures, tmp_path / "run", **how, **changes))
    found = replay(tmp_path / "run")
    assert not math.isfinite(found["loss"]) or not math.isfinite(found["gradient_norm"])


def test_models_that_have_one_size_alone_are_refused(pictures, scenes, tmp_path):
    config = tiny_config(pictures, tmp_path / "run", patch_sizes=(8, 16))
    with pytest.raises(InputError, match="efficientvit_m0 cannot change its patch size"):
        train(config)
    boxes = tiny_config(scenes, tmp_path / "run", **DETECTOR, patch_sizes=(8, 16))
    with pytest.raises(
        InputError, match=r"cannot change its patch size, for which its head was made"
    ):
        train(boxes)
    with pytest.raises(InputError, match=r"patch_sizes must be at least 1 pixel, but are \(0,\)"):
        replace(config, patch_sizes=(0,))


def test_a_report_is_not_drawn_by_patches_that_are_not_the_models_own(pictures, tmp_path, capsys):
    flags = ["--patch-size", "4", "--report", str(tmp_path / "r.html")]
    assert main(["eval", str(tmp_path), "--data", str(pictures), *flags]) == 2
    assert "leave --patch-size or --report away" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_with_drawn_patches_that_is_killed_ends_the_same(how, pictures, tmp_path):
    changes = how | {"save_every": 0.0, "epochs": 2}
    whole, out = tmp_path / "whole", tmp_path / "run"
    assert run(tiny_config(pictures, whole, **changes)) == 0
    died = 0
    for renames in (1, 3, 5):
        died += (
            run(tiny_config(pictures, out, **changes), dies_at=f"rename:{renames}")
            == -signal.SIGKILL
        )
    assert died == 3
    assert run(tiny_config(pictures, out, **changes)) == 0
    mine, theirs = (load_file(f / "last" / "model.safetensors") for f in (out, whole))
    assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    rows = [[(r["step"], r.get("loss")) for r in RunFolder(f).rows()] for f in (out, whole)]
    assert rows[0] == rows[1]
