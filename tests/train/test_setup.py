"""What a start decides, and what it tells the person who waits."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.train.conftest import VIT, tiny_config
from vitrail import models
from vitrail.adapt.freeze import freeze
from vitrail.data import open_data
from vitrail.data.plan import shape_groups
from vitrail.train import introduction, setup
from vitrail.train.build import build_model
from vitrail.train.config import TrainConfig
from vitrail.train.folder import RunFolder
from vitrail.train.introduction import introduce
from vitrail.train.run import Run
from vitrail.train.setup import _other_images, build_plan, set_up
from vitrail.train.state import Position
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing


@pytest.fixture
def start(pictures, tmp_path):
    """Sets a run up, as `train` does before the first update."""

    def begin(**changes: Any) -> Run:
        config = tiny_config(pictures, tmp_path / "run", **(VIT | changes))
        Path(config.out).mkdir(exist_ok=True)
        return set_up(config, Accelerator(cpu=True), RunFolder(config.out))

    return begin


def told(run: Run, monkeypatch) -> list[str]:
    said = []
    monkeypatch.setattr(run.progress, "say", said.append)
    introduce(run)
    return said


def test_a_start_tells_the_model_the_images_and_the_machine(start, monkeypatch):
    run = start(threads=1)
    count = sum(p.numel() for p in run.model.parameters())
    assert 10_000 < count < 100_000
    random, line = told(run, monkeypatch)
    assert random.startswith("starting from random weights; on 24 images, weights trained on ")
    threads = torch.get_num_threads()
    of_threads = f"{threads} thread{'s' * (threads > 1)}"
    form = (
        "vit_tiny_patch16: {} parameters to train on 24 images at 32 x 32, 3 classes; 8 updates; "
        f"cpu, {of_threads}, 0 workers"
    )
    assert line == form.format(f"{count:,}")
    run.model.extra = torch.nn.Parameter(torch.zeros(100_000 - count))
    assert told(run, monkeypatch)[1] == form.format("0.10 M")
    run.model.extra = torch.nn.Parameter(torch.zeros(99_999 - count))
    assert told(run, monkeypatch)[1] == form.format("99,999")
    run.model.extra = torch.nn.Parameter(torch.zeros(2_345_678 - count))
    assert told(run, monkeypatch)[1] == form.format("2.35 M")
    run.model.backbone.requires_grad_(False)
    run.model.extra = None
    assert told(run, monkeypatch)[1] == form.format(str(32 * 3 + 3))
    monkeypatch.setattr(Run, "world", 2)
    monkeypatch.setattr(Run, "workers", 1)
    assert "; 2 processes, cpu, " in told(run, monkeypatch)[1]
    assert told(run, monkeypatch)[1].endswith(", 1 worker")


def test_random_weights_deserve_a_word_only_at_the_start_of_a_small_set(start, monkeypatch):
    run = start()
    word = "starting from random weights; on 24 images, weights trained on many do far better"
    monkeypatch.setattr(introduction, "weight_sources", lambda name: [f"hf:{name}@1", "hf:other@1"])
    assert told(run, monkeypatch)[0] == f"{word}: --weights pretrained takes hf:vit_tiny_patch16@1"
    for model, backbone in (
        ("linear/resnet18", "resnet18"),
        ("efficientdet_d1", "tf_efficientnet_b1"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(run, "config", replace(run.config, model=model))
            assert (
                told(run, monkeypatch)[0] == f"{word}: --weights pretrained takes hf:{backbone}@1"
            )
    monkeypatch.setattr(introduction, "SMALL", 25)
    assert told(run, monkeypatch)[0].startswith(word)
    for name, value in (("SMALL", 24), ("at", Position(step=1))):
        with monkeypatch.context() as patch:
            patch.setattr(introduction if name == "SMALL" else run, name, value)
            assert not any("random" in line for line in told(run, monkeypatch))
    assert introduction.SMALL == 25
    run.config = replace(run.config, weights="some")
    monkeypatch.setattr(models, "model_folder", lambda source: Path("some"))
    assert not any("random" in line for line in told(run, monkeypatch))


def test_a_start_from_a_run_names_the_model_that_it_takes(start, monkeypatch):
    run = start()
    word = "runs/a is a run; starting from its best model, runs/a/best"
    for given, taken, step, said in (
        ("runs/a", "runs/a/best", 0, True),
        ("runs/a", "runs/a/best", 1, False),
        ("runs/a/best", "runs/a/best", 0, False),
        ("runs/a", "runs/a/last", 0, False),
    ):
        run.config, run.at = replace(run.config, weights=given), Position(step=step)
        monkeypatch.setattr(models, "model_folder", lambda source, taken=taken: Path(taken))
        assert (word in told(run, monkeypatch)) == said
    run.model.weights_report = "all of it fits"
    assert "all of it fits" in told(run, monkeypatch)


def test_notes_come_once_and_in_front(start, monkeypatch):
    run = start()
    torn = (("a.png", "torn"),)
    run.train_data = replace(run.train_data, notes=("x", "y"), broken=torn)
    run.val_data = replace(run.val_data, notes=("y", "z"), broken=torn)
    run.notes = ["of the folder"]
    run.at = Position(step=3, epoch=1)
    said = told(run, monkeypatch)
    assert said[:4] == ["x", "y", "z", "left out a.png: torn"]
    assert said[-2:] == ["of the folder", "going on at update 3, epoch 2"]
    run.at.finished = "all epochs"
    assert told(run, monkeypatch)[-1] == "of the folder"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"batch_size": 23}, "1 of 24 images"),  # 4.2 %
        ({"batch_size": 11}, "2 of 24 images"),
        ({"batch_size": 11, "repeats": 2}, ""),
        ({"batch_size": 11, "task": {"sampling": "balanced"}}, ""),
        ({"batch_size": 12}, ""),
    ],
)
def test_images_left_out_of_an_epoch_are_told_where_they_are_many(
    start, monkeypatch, changes, said
):
    run = start(**changes)
    line = f"{said} fill no batch in an epoch, others each time"
    assert (line in told(run, monkeypatch)) == (said.startswith("2"))
    monkeypatch.setattr(introduction, "NOTICEABLE", 1 / 24)
    assert any("fill no batch" in line for line in told(run, monkeypatch)) == bool(said)
    assert not any("instead of" in line for line in told(run, monkeypatch))


def test_where_a_run_stands_is_the_further_of_updates_and_time(start):
    run = start(batch_size=6, epochs=5, max_minutes=2.0)
    run.at = Position(step=5, epoch=1, batch=1, seconds=12.0)
    assert run.share_done == 5 / 20
    assert run.epochs_done == 1 + 1 / 4
    run.at.seconds = 60.0
    assert run.share_done == 0.5
    run.config = replace(run.config, max_minutes=None)
    assert run.share_done == 5 / 20


@pytest.mark.parametrize(
    ("settings", "world", "expected"),
    [
        ({}, 1, 24),  # all there are
        ({"batch_size": 7}, 1, 7),
        ({"accumulate": 2}, 1, None),
        ({"sizes": (16, 32)}, 1, None),
        ({}, 2, None),
    ],
)
def test_a_set_smaller_than_a_batch_is_one_where_one_process_computes_it_at_once(
    pictures, settings, world, expected
):
    config = TrainConfig(**({"batch_size": 48, "seed": 5, "repeats": 1} | settings))
    data = open_data(pictures, "train")
    if expected is None:
        with pytest.raises(InputError, match="24"):
            build_plan(config, data, (32, 32), world)
        return
    plan = build_plan(config, data, (24, 32), world)
    assert (plan.batch_size, plan.length, plan.size, plan.seed) == (expected, 24, (24, 32), 5)
    assert (plan.weights, plan.strata, plan.repeats, plan.scales) == (None, None, 1, ())


def test_a_plan_has_the_settings_of_the_run(pictures):
    data = open_data(pictures, "train")
    config = TrainConfig(
        batch_size=6, sizes=(16, 24), repeats=2, task={"sampling": "balanced"}, seed=9
    )
    plan = build_plan(config, data, (16, 16), 1)
    assert (plan.batch_size, plan.scales) == (6, ((16, 16), (24, 24)))
    assert (plan.repeats, plan.seed) == (2, 9)
    assert list(plan.strata) == list(data.truth.labels)


def test_other_images_are_told_by_split_and_count():
    ours = {"data": "a", "val": "b", "counts": [10, 4]}
    assert _other_images(ours, ours) == []
    assert _other_images({"data": "a"}, ours) == [], "the first states had neither"
    assert _other_images(ours | {"data": "x", "counts": [9, 4]}, ours) == [
        "training images: not the same (9 there, 10 now)"
    ]
    same = "as before, but a name, a label or a content differs)"
    assert _other_images(ours | {"data": "x", "val": "y"}, ours) == [
        f"training images: not the same (10 {same}",
        f"validation images: not the same (4 {same}",
    ]
    assert _other_images({"data": "x"}, ours) == [f"training images: not the same (10 {same}"]


def test_a_warm_up_is_at_most_half_of_the_run_and_max_steps_end_it(start):
    run = start(batch_size=6, epochs=5, warmup_epochs=1.4)
    assert (run.total_steps, run.warmup_steps) == (20, 6)
    run.folder.path.joinpath("config.yaml").unlink()
    assert start(batch_size=6, epochs=5, warmup_epochs=4.0).warmup_steps == 10
    run = start(batch_size=6, epochs=5, warmup_epochs=4.0, max_steps=7)
    assert (run.total_steps, run.warmup_steps) == (7, 3)
    assert start(batch_size=6, epochs=5, max_steps=70).total_steps == 20


def test_the_loader_reads_what_the_run_says(start, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        setup,
        "TrainLoader",
        lambda data, plan, augmentation, **how: seen.update(how, a=augmentation),
    )
    run = start(workers=3)
    p = run.model.preprocessing
    assert seen.pop("a") == replace(run.config.augmentation, mean=p.mean, std=p.std)
    own = {"own_sizes": None}  # of a model whose images all have one size
    assert seen == {"rank": 0, "world": 1, "workers": 3, "pin_memory": False} | own
    edges = replace(p, mode="edges", size=(32, 48))
    setup.build_loader(run.config, run.train_data, run.plan, edges, run.accelerator)
    assert seen["own_sizes"] == edges


def test_a_frozen_backbone_stays_still_in_every_epoch(start):
    run = start(train_only="head")
    run.batches()
    assert not any(m.training for m in run.model.backbone.modules())
    assert run.model.head.training
    assert not any(p.requires_grad for p in run.model.backbone.parameters())
    freeze(run.model, "full")
    run.batches()
    assert all(m.training for m in run.model.modules())


def test_a_model_without_blocks_to_recompute_is_told(monkeypatch):
    real = models.create_model

    def create_model(*args, **kwargs):
        model = real(*args, **kwargs)
        model.backbone.__dict__.pop("grad_checkpointing", None)
        return model

    monkeypatch.setattr(models, "create_model", create_model)
    config = TrainConfig(**VIT, image_size=32, grad_checkpointing=True)
    with pytest.raises(InputError, match=r"has no blocks to recompute; drop --grad-checkpointing"):
        build_model(config, ("a", "b"))
    build_model(replace(config, grad_checkpointing=False), ("a", "b"))


@pytest.mark.parametrize("mode", ["edges", "crop"])
def test_images_at_their_own_sizes_are_batched_by_shape(pictures, monkeypatch, mode):
    data = open_data(pictures, "train")
    model = SimpleNamespace(preprocessing=Preprocessing(mode=mode, size=(24, 40)))
    monkeypatch.setattr(setup, "build_model", lambda config, classes: model)
    _, plan = setup.build(TrainConfig(model="vit_tiny_patch16", batch_size=4), data, 1)
    if mode == "edges":
        assert plan.groups.tolist() == shape_groups(data.images.sizes).tolist()
    else:
        assert plan.groups is None
    assert (plan.size, plan.batch_size) == ((24, 40), 4)
