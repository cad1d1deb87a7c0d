"""The model of a run: what the configuration asks for, what the weights that it starts from bring."""

from dataclasses import replace

import pytest
import torch

from tests.train.conftest import VIT, tiny_config
from vitrail import models
from vitrail.data.packing import Packing
from vitrail.train import ranks
from vitrail.train.build import build_model, check_parts, resolve, starting_weights
from vitrail.train.config import TrainConfig
from vitrail_runtime.errors import InputError

CLASSES = ("a", "b")


def test_a_model_sees_images_as_the_configuration_says():
    own = build_model(TrainConfig(**VIT), CLASSES)
    assert own.preprocessing.size == (224, 224)
    assert not own.backbone.grad_checkpointing
    settings = {"image_size": 32, "crop_pct": 0.75, "resize": "fit", "grad_checkpointing": True}
    asked = build_model(TrainConfig(**VIT, **settings), CLASSES)
    p = asked.preprocessing
    assert (p.size, p.crop_pct, p.mode) == ((32, 32), 0.75, "fit")
    assert (p.mean, p.std) == (own.preprocessing.mean, own.preprocessing.std)
    assert asked.info.preprocessing == p
    assert asked.classes == CLASSES
    assert asked.backbone.grad_checkpointing
    assert asked.backbone.config.image_size == 32


def test_a_run_from_a_model_is_that_model_but_for_what_is_given(tmp_path):
    config = TrainConfig(**VIT, image_size=32, crop_pct=0.75, resize="squash")
    models.save(build_model(config, CLASSES), tmp_path / "model")
    weights = str(tmp_path / "model")
    ours = resolve(TrainConfig(weights=weights))
    assert (ours.model, ours.out) == ("vit_tiny_patch16", "runs/vit_tiny_patch16")
    assert (ours.image_size, ours.crop_pct, ours.resize) == (32, 0.75, "squash")
    assert ours.model_fields == VIT["model_fields"], "without those of the default"
    given = TrainConfig(
        weights=weights,
        image_size=16,
        crop_pct=0.5,
        resize="fit",
        out="o",
        model_fields={"drop_path_rate": 0.1, "depth": 1},
    )
    ours = resolve(given)
    assert (ours.image_size, ours.crop_pct, ours.resize, ours.out) == (16, 0.5, "fit", "o")
    assert ours.model_fields == VIT["model_fields"] | {"drop_path_rate": 0.1, "depth": 1}
    other = resolve(TrainConfig(weights=weights, model="deit_tiny_patch16"))
    assert (other.model, other.model_fields, other.image_size) == ("deit_tiny_patch16", {}, None)


@pytest.mark.parametrize("asked", [False, True])
def test_a_run_from_a_model_of_images_at_their_own_shape_packs_them_as_well(tmp_path, asked):
    config = TrainConfig(**VIT, native=True, packing=Packing(tokens_per_image=40))
    config = replace(config, model_fields=VIT["model_fields"] | {"image_size": 48})
    base = build_model(config, CLASSES)
    models.save(base, tmp_path / "model")
    weights = str(tmp_path / "model")
    ours = resolve(TrainConfig(weights=weights, native=asked))
    assert (ours.native, ours.resize, ours.crop_pct, ours.image_size) == (True, None, None, None)
    model = build_model(ours, CLASSES)
    assert model.preprocessing == base.preprocessing
    assert model.preprocessing.patches == (40, 8)
    torch.testing.assert_close(model.state_dict(), base.state_dict(), rtol=0, atol=0)
    fewer = resolve(TrainConfig(weights=weights, packing=Packing(tokens_per_image=9)))
    assert build_model(fewer, CLASSES).preprocessing.patches == (9, 8)
    squares = resolve(TrainConfig(weights=weights, resize="squash", image_size=32))
    assert (squares.native, squares.resize, squares.image_size) == (False, "squash", 32)


def test_a_model_of_squares_may_go_on_at_own_shapes(tmp_path):
    base = build_model(TrainConfig(**VIT, image_size=32, crop_pct=0.75), CLASSES)
    models.save(base, tmp_path / "model")
    ours = resolve(TrainConfig(weights=str(tmp_path / "model"), native=True))
    assert (ours.resize, ours.crop_pct, ours.packing) == (None, None, Packing())
    model = build_model(ours, CLASSES)
    assert model.preprocessing.mode == "native"
    torch.testing.assert_close(model.state_dict(), base.state_dict(), rtol=0, atol=0)


def test_a_capsule_stands_on_no_model_of_images_at_their_own_shape(tmp_path):
    models.save(build_model(TrainConfig(**VIT, native=True), CLASSES), tmp_path / "base")
    start = {"weights": str(tmp_path / "base"), "train_only": "capsule"}
    with pytest.raises(InputError, match=r"own shape, as it was trained \(--native\), but a task"):
        resolve(TrainConfig(model="memory/vit_tiny_patch16", **start))


def test_a_capsule_takes_its_base_over(tmp_path):
    config = TrainConfig(**VIT, image_size=(32, 48), crop_pct=0.75, resize="squash")
    models.save(build_model(config, CLASSES), tmp_path / "base")
    start = {"weights": str(tmp_path / "base"), "train_only": "capsule"}
    ours = resolve(TrainConfig(model="memory/vit_tiny_patch16", **start))
    assert (ours.model, ours.model_fields) == ("memory/vit_tiny_patch16", VIT["model_fields"])
    assert (ours.image_size, ours.crop_pct, ours.resize) == ((32, 48), 0.75, "squash")
    assert ours.head_fields == {}
    table = models.load(tmp_path / "base").backbone.pos_embed
    assert torch.equal(build_model(ours, ("x", "y", "z")).backbone.pos_embed, table)
    given = {"crop_pct": 0.5, "head_fields": {"rows": 2}, "model_fields": {"drop_path_rate": 0.1}}
    asked = resolve(TrainConfig(model="memory/vit_tiny_patch16", **start, **given))
    assert (asked.crop_pct, asked.head_fields) == (0.5, {"rows": 2})
    assert asked.model_fields == VIT["model_fields"] | {"drop_path_rate": 0.1}
    models.save(build_model(asked, CLASSES), tmp_path / "task")
    again = {"weights": str(tmp_path / "task"), "train_only": "capsule"}
    assert resolve(TrainConfig(**again)).head_fields == {"rows": 2}
    assert resolve(TrainConfig(model="memory/vit_tiny_patch16", **again)).head_fields == {"rows": 2}
    for other in (
        {"model": "memory/deit_tiny_patch16", **start},
        {"model": "memory/vit_tiny_patch16", "weights": start["weights"]},
    ):
        assert resolve(TrainConfig(**other)).model_fields == {}


def test_weights_for_other_classes_or_another_order_of_them_are_taken_without_the_head(tmp_path):
    folder = tmp_path / "model"
    models.save(build_model(TrainConfig(**VIT, image_size=32), CLASSES), folder)
    name = VIT["model"]
    assert starting_weights(str(folder), CLASSES, name) == str(folder)
    for classes in (("b", "a"), ("a", "c"), ("a", "b", "c")):
        assert starting_weights(str(folder), classes, name) == {"backbone": str(folder)}
    assert starting_weights("hf:owner/name@main", CLASSES, name) == "hf:owner/name@main"


def test_of_a_plain_classifier_a_model_with_a_head_takes_the_backbone_and_the_other_way_round(
    tmp_path,
):
    plain, memory = tmp_path / "plain", tmp_path / "memory"
    named = VIT | {"model": f"memory/{VIT['model']}"}
    models.save(build_model(TrainConfig(**VIT, image_size=32), CLASSES), plain)
    models.save(build_model(TrainConfig(**named, image_size=32), CLASSES), memory)
    for source, fields in ((plain, named), (memory, VIT)):
        model = build_model(TrainConfig(**fields, image_size=32, weights=str(source)), CLASSES)
        theirs = models.load(source).backbone.state_dict()
        assert all(torch.equal(v, theirs[k]) for k, v in model.backbone.state_dict().items())
    assert starting_weights(str(memory), CLASSES, named["model"]) == str(memory)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (1, 2), (1, 3), (2, 2)])
def test_a_part_of_one_image_is_refused_for_batchnorm_alone(count, world, accumulate, tmp_path):
    share = torch.arange(count // world)
    alone = any(len(part) == 1 for part in share.chunk(accumulate)) if len(share) else False
    if not len(share):
        return
    config = tiny_config(tmp_path, tmp_path / "out", accumulate=accumulate)
    if alone:
        with pytest.raises(InputError, match="BatchNorm, which cannot learn from one"):
            check_parts(config, CLASSES, {(32, 32): count}, world)
    else:
        check_parts(config, CLASSES, {(32, 32): count}, world)
    vit = tiny_config(tmp_path, tmp_path / "out", **VIT, accumulate=accumulate)
    check_parts(vit, CLASSES, {(32, 32): count}, world)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, r"\(1 an update\); give a larger --batch-size, such as 2$"),
        ({"accumulate": 3, "batch_size": 4}, r"\(3 an update in 3 parts\); .*such as 8$"),
    ],
)
def test_a_frozen_backbone_learns_from_one_image(settings, said):
    """Its BatchNorm stands still; that of a head would not."""
    config = TrainConfig(model="resnet18", **{"batch_size": 1} | settings)
    count = {(32, 16): config.accumulate}
    with pytest.raises(InputError, match=r"^resnet18 has BatchNorm, .* of 32 x 16 at .* " + said):
        check_parts(config, CLASSES, count, 1)
    check_parts(replace(config, train_only="head"), CLASSES, count, 1)


@pytest.mark.parametrize(
    ("met", "said"),
    [
        ([None, None, None], None),
        ([("no file", "x"), ("no file", "x"), ("no file", "y")], "no file"),
        (
            [None, ("no file", "x"), ("no room", "y")],
            "process 1 on x: no file\nprocess 2 on y: no room",
        ),
    ],
)
def test_one_error_tells_what_the_processes_met_and_which(monkeypatch, met, said):
    def all_gather_object(into, mine):
        into[:] = met

    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 3)
    monkeypatch.setattr(ranks.dist, "all_gather_object", all_gather_object)
    error = ranks.share(InputError("mine"))
    assert (None if error is None else str(error)) == said
    for rank in range(3):
        monkeypatch.setattr(ranks.dist, "get_rank", lambda rank=rank: rank)
        told = ranks.report_once(InputError("e"))
        assert (type(told) is InputError) == (rank == 0)
        if rank:
            assert told.code == 2


def test_alone_an_error_is_its_own(capsys):
    error = InputError("mine")
    assert str(ranks.share(error)) == "mine"
    assert ranks.share(None) is None
    assert ranks.report_once(error) is error
    assert ranks.report_alone(error) is error
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("Connection closed by peer [127.0.0.1]"), True),
        (RuntimeError("Read error: Connection reset by peer"), True),
        (RuntimeError("remote process exited or there was a network error"), True),
        (RuntimeError("shapes differ"), False),
        (ValueError("closed by peer"), False),
    ],
)
def test_a_broken_connection_is_another_process_that_ended(error, lost):
    assert ranks.peer_lost(error) == lost
