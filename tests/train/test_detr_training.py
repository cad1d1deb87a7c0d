"""DETRs learn the same whoever shares a batch: their losses are divided by what all of it holds."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train.children import run_many
from tests.train.conftest import VIT, make_scenes, tiny_config
from vitrail.train.folder import RunFolder
from vitrail.train.trainer import train

# Without BatchNorm and dropout.
HEADS = {
    "detr": {"dim": 16, "encoder_layers": 1, "num_heads": 2},
    "detr_panoptic": {"dim": 32, "encoder_layers": 1, "num_heads": 8},
    "deformable_detr": {
        "dim": 64,
        "encoder_layers": 1,
        "num_heads": 2,
        "num_levels": 2,
        "refine": True,
    },
}
SMALL = {"mlp_dim": 16, "decoder_layers": 2, "num_queries": 8, "dropout": 0.0}
OFTEN = {"epochs": 10, "batch_size": 12, "log_every": 1, "eval_every": 10}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """Of 24 images every fourth has no object, the others one to three."""
    return make_scenes(tmp_path_factory.mktemp("scenes"))


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in RunFolder(out).rows() if row["kind"] == "train"]


@pytest.mark.parametrize(
    ("head", "way"),
    [
        ("detr", "parts"),
        pytest.param("detr", "processes", marks=pytest.mark.slow),
        pytest.param("detr_panoptic", "parts", marks=pytest.mark.slow),
        pytest.param("detr_panoptic", "processes", marks=pytest.mark.slow),
        pytest.param("deformable_detr", "parts", marks=pytest.mark.slow),
        pytest.param("deformable_detr", "processes", marks=pytest.mark.slow),
    ],
)
def test_parts_and_processes_change_no_loss_over_twenty_updates(
    head, way, scenes, segments, tmp_path
):
    scenes = segments if head == "detr_panoptic" else scenes
    model = VIT | {"model": f"{head}/vit_tiny_patch16", "head_fields": HEADS[head] | SMALL}
    # The queries of the first layer are all alike at first, so some gradients are nothing but rounding, which
    # AdamW would enlarge to steps of full length.
    # One size: a backbone sees the padding of a batch, which parts of it have less of.
    how = model | OFTEN | {"image_size": 64, "resize": "squash", "eps": 1e-5}
    train(tiny_config(scenes, tmp_path / "alone", **how))
    alone = losses(tmp_path / "alone")
    assert len(alone) == 20
    assert min(alone[10:]) < 0.9 * alone[0]
    if way == "parts":
        train(tiny_config(scenes, tmp_path / "shared", **how, accumulate=4))
    else:
        assert run_many(tiny_config(scenes, tmp_path / "shared", **how), 2) == [0, 0]
    assert losses(tmp_path / "shared") == pytest.approx(alone, abs=1e-5)
    want, got = (
        load_file(tmp_path / n / "last" / "model.safetensors") for n in ("alone", "shared")
    )
    for key, value in want.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=1e-4)
