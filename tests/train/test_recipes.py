from dataclasses import replace

import pytest
import torch

from tests.train.conftest import VIT, tiny_config
from vitrail.data.plan import BatchPlan
from vitrail.models import load
from vitrail.recipes import RECIPES, recipe_config
from vitrail.train.build import build_model, resolve
from vitrail.train.config import TrainConfig
from vitrail.train.trainer import train
from vitrail_runtime.errors import InputError


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_its_model_and_tells_what_to_expect(name):
    text = RECIPES[name].__doc__ or ""
    assert "Expected" in text
    config = resolve(recipe_config(name))
    with torch.device("meta"):
        model = build_model(config, ("a", "b"))
    if config.image_size is not None:
        assert model.preprocessing.size == config.size


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    train(tiny_config(pictures, out, **VIT, epochs=1))
    return out / "best"


def test_finetune_small_needs_no_setting_but_data_and_weights(pictures, trained, tmp_path, capsys):
    config = replace(
        recipe_config("finetune_small"),
        data=str(pictures),
        weights=str(trained.parent),  # the run
        out=str(tmp_path / "run"),
        batch_size=12,
        epochs=2,
    )
    assert train(config).best is not None
    assert f"is a run; starting from its best model, {trained}" in capsys.readouterr().err
    start, end = load(trained), load(tmp_path / "run" / "best")
    assert end.info == start.info, "the model of the weights, seen as it was trained"


def test_a_setting_of_the_run_goes_before_that_of_the_weights(trained):
    config = resolve(
        TrainConfig(weights=str(trained), image_size=48, model_fields={"drop_path_rate": 0.2})
    )
    assert config.model == "vit_tiny_patch16"
    assert config.image_size == 48
    assert config.model_fields == VIT["model_fields"] | {"drop_path_rate": 0.2}
    model = build_model(config, ("a", "b"))
    assert model.preprocessing.size == (48, 48)
    assert model.preprocessing.crop_pct == 1.0


def test_without_model_and_weights_it_is_the_fast_default():
    assert resolve(TrainConfig()).model == "efficientvit_m0"
    assert resolve(TrainConfig(model="vit_tiny_patch16")).out == "runs/vit_tiny_patch16"


def test_a_field_that_the_model_does_not_have_names_the_closest(trained):
    config = TrainConfig(model="vit_tiny_patch16", model_fields={"drop_path": 0.1})
    with pytest.raises(InputError, match="'drop_path'; did you mean 'drop_path_rate'"):
        build_model(config, ("a", "b"))
    config = TrainConfig(model="vit_tiny_patch16", model_fields={"depth": "three"})
    with pytest.raises(InputError, match="depth is 'three'"):
        build_model(config, ("a", "b"))


@pytest.mark.parametrize("name", [n for n in RECIPES if recipe_config(n).sizes])
def test_multi_scale_recipes_have_batches_that_eight_processes_share(name):
    config = recipe_config(name)
    assert config.image_size in config.sizes
    scales = tuple((side, side) for side in config.sizes)
    size = (config.image_size, config.image_size)
    plan = BatchPlan(length=50_000, batch_size=config.batch_size, size=size, scales=scales)
    for batch in plan.batches(epoch=0):
        batch.part(rank=7, world=8)


def test_mobilevit_draws_the_papers_five_sizes_and_warms_up_for_3000_updates():
    config = recipe_config("mobilevit_s")
    assert config.sizes == (160, 192, 256, 288, 320)
    scales = tuple((side, side) for side in config.sizes)
    plan = BatchPlan(length=1_281_167, batch_size=config.batch_size, size=(256, 256), scales=scales)
    steps = sum(plan.steps(epoch) for epoch in range(4)) / 4  # of ImageNet
    assert config.warmup_epochs * steps == pytest.approx(3000, rel=0.03)
    assert (config.batch_size, config.warmup_lr, config.lr, config.min_lr) == (
        1024,
        2e-4,
        2e-3,
        2e-4,
    )


def test_narrower_mobilevitv2_take_higher_rates_and_less_decay():
    widths = [recipe_config(f"mobilevitv2_{p:03d}") for p in range(50, 201, 25)]
    assert [c.lr for c in widths] == [9e-3, 9e-3, 7.5e-3, 4.9e-3, 3.5e-3, 2.6e-3, 2e-3]
    decays = [c.weight_decay for c in widths]
    assert decays == [0.004, 0.008, 0.013, 0.02, 0.029, 0.039, 0.05]
    assert all(c.min_lr == pytest.approx(c.lr / 10) for c in widths)
