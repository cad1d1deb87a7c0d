"""A task with memory is trained by the verbs of every classifier, and its backbone stays as it is."""

import json

import pytest
import torch
from safetensors.torch import load_file

import vitrail
from tests.parity import randomise
from tests.train.conftest import CLASSES, tiny_config
from vitrail import models
from vitrail.cli import main
from vitrail.train.folder import RunFolder
from vitrail.train.trainer import train

# With BatchNorm in its stem and over its heads, and stochastic depth.
FIELDS = {"depth": 2, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "stem": "conv"}
FIELDS |= {"drop_path_rate": 0.3}
# All that could move what is frozen.
HARD = {"ema": 0.9, "weight_decay": 0.5, "backbone_lr": 0.5, "layer_decay": 0.5, "accumulate": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A classifier of other classes, whose every number says something."""
    torch.manual_seed(0)
    model = models.create_model("deepvit_16b", classes=["x", "y"], image_size=32, **FIELDS)
    randomise(model)
    return models.save(model, tmp_path_factory.mktemp("base") / "model")


def settings(base, **changes):
    how = {"model": "memory/deepvit_16b", "model_fields": FIELDS, "weights": str(base)}
    return how | {"train_only": "capsule", "lr": 3e-3} | changes


@pytest.mark.parametrize(
    ("form", "changes"),
    [("masked", HARD), ("full", {"optimizer": "sgd", "lr": 0.1, "precision": "bf16"})],
    ids=["masked", "full"],
)
def test_a_trained_tasks_backbone_is_the_base_to_the_last_bit(
    base, pictures, tmp_path, form, changes
):
    how = settings(base, head_fields={"form": form}, epochs=2, **changes)
    train(tiny_config(pictures, tmp_path / "run", **how))
    before = load_file(base / "model.safetensors")
    for name in ("best", "last"):
        after = load_file(tmp_path / "run" / name / "model.safetensors")
        same = {k: torch.equal(v, before[k]) for k, v in after.items() if k.startswith("backbone.")}
        assert same.keys() == {k for k in before if k.startswith("backbone.")}
        assert all(same.values()), [k for k, equal in same.items() if not equal]
        new = {k: v for k, v in after.items() if k.startswith("head.")}
        assert new.keys() == {"head.token", "head.memory", "head.fc.weight", "head.fc.bias"}
        assert all(v.any() for v in new.values())


def test_a_task_is_learnt_measured_and_asked_by_the_verbs_of_every_classifier(
    base, pictures, tmp_path, capsys
):
    run = tmp_path / "run"
    train(tiny_config(pictures, run, **settings(base, epochs=24, eval_every=24, lr=2e-2)))
    assert RunFolder(run).rows()[-1]["top1"] > 0.9  # by chance one of three
    capsys.readouterr()
    assert main(["eval", str(run), "--data", str(pictures), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["top1"] > 0.9
    assert said["classes"] == list(CLASSES)
    images = sorted(map(str, (pictures / "val" / "top").glob("*.png")))
    assert main(["predict", str(run), *images, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["label"] for line in lines].count("top") >= 3
    model = vitrail.load(run / "best")
    assert type(model).__name__ == "MemoryClassifier"
    assert model.info.name == "memory/deepvit_16b"


def test_models_lists_a_task_with_the_size_of_its_backbones_classifier(capsys):
    rows = []
    for name in ("vit_tiny_patch16", "memory/vit_tiny_patch16"):
        assert main(["models", name, "--json"]) == 0
        rows += map(json.loads, capsys.readouterr().out.splitlines())
    plain, task = rows
    assert task["task"] == plain["task"] == "classify"
    assert task["image_size"] == plain["image_size"] == 384
    # A class token and five rows for each of twelve blocks, of 192 numbers each.
    assert task["params_m"] - plain["params_m"] == pytest.approx((1 + 12 * 5) * 192e-6, abs=0.01)
