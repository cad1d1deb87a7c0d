import dataclasses
from dataclasses import FrozenInstanceError

import pytest
import yaml

from vitrail.cli import flags, main
from vitrail.cli.train import effective_config, field_value
from vitrail.configuration import to_dict
from vitrail.data.augmentation import Augmentation
from vitrail.data.packing import Packing
from vitrail.recipes import RECIPES, recipe_config
from vitrail.train.config import RANGES, TrainConfig, differences, read_config
from vitrail_runtime.errors import InputError


def test_defaults_yield_to_the_recipe_it_to_the_file_and_that_to_flags(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "three", lambda: TrainConfig(epochs=3, lr=3.0, batch_size=3))
    file = tmp_path / "run.yaml"
    file.write_text("lr: 4e-1\nbatch_size: 4\naugmentation: {flip: 0.25}\n")
    start = ["--recipe", "three", "--config", str(file)]
    config = effective_config([*start, "--batch-size", "5", "--data", "d"])
    assert (config.epochs, config.lr, config.batch_size) == (3, 0.4, 5)
    assert config.augmentation.flip == 0.25
    assert config.augmentation.scale == TrainConfig().augmentation.scale
    assert config.min_lr == TrainConfig().min_lr


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        ("deformable_detr/resnet50", {"refine": True, "two_stage": True, "num_queries": 100}),
        ("detr/resnet18", {}),
        ("resnet18", {}),
    ],
)
def test_a_recipes_head_fields_hold_for_its_head_alone(model, kept):
    given = ["--recipe", "detr_small", "--data", "d", "--model", model, "--head-fields", "dim=64"]
    assert effective_config(given).head_fields == kept | {"dim": 64}
    system = ["--recipe", "efficientdet_small", "--data", "d", "--model", "efficientdet_d1"]
    assert effective_config(system).head_fields == {"norm_momentum": 0.1}


def test_flags_reach_nested_settings_and_the_models_own(tmp_path):
    config = effective_config(
        [
            "--data",
            "d",
            "--task.mixup",
            "0.2",
            "--sizes",
            "160",
            "192",
            "--model-fields",
            "drop_path_rate=0.1",
            "out_blocks=[1, 2]",
        ],
    )
    assert config.task["mixup"] == 0.2
    assert config.sizes == (160, 192)
    assert config.model_fields == {"drop_path_rate": 0.1, "out_blocks": [1, 2]}
    with pytest.raises(InputError, match="FIELD=VALUE"):
        field_value("drop_path_rate")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "unknown key.*'epoch'; did you mean 'epochs'"),
        ("augmentation: {flop: 1}", "unknown key.*'flop'; did you mean 'flip'"),
        ("epochs: many", "epochs is 'many', but must be int"),
        ("optimizer: adam", "must be one of"),
        ("- a list", "must hold keys and values"),
        ("a: b: c", "cannot be read as YAML"),
    ],
)
def test_a_file_that_does_not_fit_says_why(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_config(tmp_path / "run.yaml")


def test_an_unknown_recipe_names_the_closest(monkeypatch):
    monkeypatch.setitem(RECIPES, "finetune_small", TrainConfig)
    with pytest.raises(InputError, match="did you mean 'finetune_small'"):
        recipe_config("fine_tune_small")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["train", "--data", "d", "--epoch", "3"],
            "unknown flag '--epoch'; did you mean '--epochs'",
        ),
        (["train", "--augmentation.flop=1"], "did you mean '--augmentation.flip'"),
        (["train", "--epochs", "many"], "--epochs INT: invalid literal for int()"),
        (["train", "--data"], "--data STR: a value is missing; vitrail train --help"),
        (["train", "--recipe"], "argument --recipe: expected one argument; vitrail train --help"),
        (
            ["train", "--task.sampling", "fair"],
            "--task.sampling must be one of uniform, balanced, but is 'fair'",
        ),
        (["train", "--augmentation.flip", "2"], "flip is a probability in [0, 1], but is 2.0"),
        (["train", "--max-steps", "few"], "--max-steps {None}|INT: invalid literal for int()"),
        (["train", "--epoch", "-1"], "unknown flag '--epoch'; did you mean '--epochs'"),
        (
            ["train", "--resize", "sqush"],
            "one of None, crop, edges, fit, letterbox, native, squash, but is",
        ),
        (["train", "--task.mixup", "nan"], "mixup must be at least 0, but is nan"),
        (["train", "stray"], "unexpected 'stray'; vitrail train --help"),
        (["eval"], "vitrail eval needs RUN and --data STR; vitrail eval --help"),
    ],
)
def test_a_wrong_flag_is_told_as_any_other_mistake(argv, message, capsys):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("vitrail: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_tyro_that_tells_nothing_of_its_errors_draws_its_own(capsys, monkeypatch):
    monkeypatch.setattr(flags, "_errors", None)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--data", "d", "--epoch", "3"])
    assert stop.value.code == 2
    assert "--epochs" in capsys.readouterr().err


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help", "--replay", "runs/a"])
    said = capsys.readouterr().out
    for flag in ("--recipe NAME", "--config FILE", "--model-fields FIELD", "--replay RUN"):
        assert flag in said
    assert "--augmentation.flip FLOAT" in said


def test_training_without_data_asks_for_it(capsys):
    assert main(["train"]) == 2
    assert "--data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--epochs", "0"], "epochs must be at least 1, but is 0"),
        (["--lr", "-1"], "lr must be at least 0, but is -1.0"),
        (["--lr", "nan"], "lr must be at least 0, but is nan"),
        (["--lr", "inf"], "lr must be at least 0, but is inf (give a finite number)"),
        (["--image-size", "0"], "image_size must be at least 1, but is 0"),
        (["--crop-pct", "2"], "crop_pct must be above 0 and at most 1, but is 2.0"),
        (["--val-fraction", "1"], "val_fraction must be at least 0 and below 1, but is 1.0"),
        (["--sizes", "32", "-5"], "sizes must be at least 1 pixel, but are (32, -5)"),
        (["--seed", str(2**63)], "seed must be at least 0 and at most 9223372036854775807"),
        (["--keep", "0"], "keep must be at least 1, but is 0"),
        (["--max-minutes", "0"], "max_minutes must be at least 0.001, but is 0"),
        (["--ema", "1"], "ema must be at least 0 and below 1, but is 1.0 (0 is off"),
        (["--clip-grad", "0"], "clip_grad must be above 0, but is 0.0 (None is off)"),
        (
            ["--layer-decay", "0"],
            "layer_decay must be above 0 and at most 1, but is 0.0 (1 is off)",
        ),
        (["--betas", "0.9", "1"], "betas must be from 0 to below 1"),
    ],
)
def test_a_number_out_of_range_is_refused_before_a_folder_is_made(
    given, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", "d", "--out", "run", *given]) == 2
    assert f"vitrail: {message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


SMALL, INF, NAN = 1e-9, float("inf"), float("nan")


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("val_fraction", (0, 1 - SMALL), (-SMALL, 1)),
        ("image_size", (1, (1, 2)), (0, (0, 8), (8, 0))),
        ("crop_pct", (SMALL, 1), (0, 1 + SMALL)),
        ("epochs", (1,), (0,)),
        ("max_steps", (1,), (0,)),
        ("max_minutes", (0.001,), (0.001 - SMALL,)),
        ("batch_size", (1,), (0,)),
        ("accumulate", (1,), (0,)),
        ("repeats", (1,), (0,)),
        ("lr", (0,), (-SMALL,)),
        ("momentum", (0, 1 - SMALL), (-SMALL, 1)),
        ("eps", (0,), (-SMALL,)),
        ("weight_decay", (0,), (-SMALL,)),
        ("backbone_lr", (SMALL, 1), (0, 1 + SMALL)),
        ("layer_decay", (SMALL, 1), (0, 1 + SMALL)),
        ("warmup_epochs", (0,), (-SMALL,)),
        ("warmup_lr", (0,), (-SMALL,)),
        ("min_lr", (0,), (-SMALL,)),
        ("clip_grad", (SMALL,), (0,)),
        ("ema", (0, 1 - SMALL), (-SMALL, 1)),
        ("seed", (0, 2**63 - 1), (-1, 2**63)),
        ("eval_every", (1,), (0,)),
        ("early_stopping", (1,), (0,)),
        ("keep_every", (1,), (0,)),
        ("save_every", (0,), (-SMALL,)),
        ("keep", (1,), (0,)),
        ("log_every", (1,), (0,)),
        ("workers", (0,), (-1,)),
        ("threads", (1,), (0,)),
        ("sizes", ((), (1, 1)), ((0,), (32, 0))),
        ("betas", ((0, 0), (1 - SMALL, 1 - SMALL)), ((1, 0.9), (0.9, 1), (-SMALL, 0.9))),
    ],
)
def test_a_number_may_be_what_its_range_includes_and_nothing_else(name, allowed, refused):
    for value in allowed:
        assert getattr(TrainConfig(**{name: value}), name) == value
    for value in (*refused, *(() if name in ("sizes", "betas") else (INF, -INF, NAN))):
        with pytest.raises(InputError, match=f"^{name} must be "):
            TrainConfig(**{name: value})
    assert name in ("image_size", "sizes", "betas") or name in RANGES


def test_every_range_is_tried():
    (mark,) = test_a_number_may_be_what_its_range_includes_and_nothing_else.pytestmark
    assert {name for name, *_ in mark.args[1]} == {*RANGES, "image_size", "sizes", "betas"}


def test_every_setting_but_those_of_carrying_it_out_makes_another_run(tmp_path):
    # Written out: what is missing here may not change when a run goes on.
    outward = ["data", "out", "device", "workers", "threads", "log_every", "save_every", "keep"]
    outward += ["keep_every", "tensorboard"]
    others = {
        "data": "d",
        "val_fraction": 0.5,
        "model": "m",
        "out": "o",
        "weights": "w",
        "train_only": "head",
        "model_fields": {"depth": 1},
        "head_fields": {"dim": 1},
        "image_size": 8,
        "crop_pct": 0.5,
        "resize": "fit",
        "skip_broken": True,
        "drop_bad": True,
        "epochs": 2,
        "max_steps": 3,
        "max_minutes": 4.0,
        "batch_size": 5,
        "accumulate": 6,
        "repeats": 7,
        "sizes": (8, 9),
        "patch_sizes": (8, 16),
        "optimizer": "sgd",
        "lr": 0.5,
        "betas": (0.1, 0.2),
        "eps": 0.3,
        "momentum": 0.4,
        "weight_decay": 0.6,
        "backbone_lr": 0.35,
        "layer_decay": 0.7,
        "schedule": "constant",
        "warmup_epochs": 0.5,
        "warmup_lr": 0.8,
        "min_lr": 0.25,
        "clip_grad": None,
        "clip_mode": "agc",
        "task": {"label_smoothing": 0.5},
        "ema": 0.5,
        "augmentation": Augmentation(flip=0.25, scale=(0.5, 0.75)),
        "native": True,
        "packing": Packing(packs=2),
        "seed": 11,
        "eval_every": 12,
        "early_stopping": 13,
        "keep_every": 14,
        "save_every": 0.5,
        "keep": 15,
        "log_every": 16,
        "tensorboard": True,
        "precision": "bf16",
        "grad_checkpointing": True,
        "parallel": "fsdp",
        "device": "cuda",
        "workers": 17,
        "threads": 18,
    }
    known = {f.name for f in dataclasses.fields(TrainConfig)}
    assert others.keys() == known, "a new setting: is it another run?"
    for name, value in others.items():
        ours = TrainConfig(**{name: value})
        lines = differences(ours, TrainConfig())
        assert bool(lines) == (name not in outward), name
        assert lines == [] or lines[0].startswith(name)
        assert bool(differences(TrainConfig(), ours)) == (name not in outward), name
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump(to_dict(ours), sort_keys=False))
        assert read_config(file) == ours, name


def test_the_defaults_are_what_the_documentation_says():
    c = TrainConfig()
    assert (c.epochs, c.batch_size, c.accumulate, c.repeats, c.sizes) == (30, 128, 1, 1, ())
    assert (c.optimizer, c.lr, c.betas, c.eps) == ("adamw", 1e-3, (0.9, 0.999), 1e-8)
    assert (c.momentum, c.weight_decay, c.layer_decay, c.schedule) == (0.9, 0.05, 1.0, "cosine")
    assert (c.warmup_epochs, c.warmup_lr, c.min_lr) == (1.0, 1e-6, 1e-5)
    assert (c.clip_grad, c.clip_mode, c.ema, c.backbone_lr) == (1.0, "norm", 0.0, 1.0)
    assert (c.seed, c.val_fraction, c.eval_every, c.early_stopping) == (0, 0.2, 1, None)
    assert (c.keep, c.keep_every, c.save_every, c.log_every) == (2, None, 5.0, 20)
    assert (c.precision, c.parallel, c.device, c.train_only) == ("fp32", "data", "auto", "full")
    assert (c.skip_broken, c.drop_bad, c.grad_checkpointing, c.tensorboard) == (False,) * 4
    p = c.packing
    assert (c.native, p.max_tokens, p.packs, p.tokens_per_image) == (False, 4096, 1, None)
    assert (p.too_long, p.window, p.resolution, p.sides) == ("resize", 256, "own", (64, 256))
    assert (p.side_of, p.drop, p.drop_std, p.drop_largest) == ("area", 0.0, 0.1, None)
    given = (c.max_steps, c.max_minutes, c.weights, c.image_size, c.crop_pct, c.resize, c.workers)
    assert (*given, c.threads) == (None,) * 8
    assert (c.model, c.model_fields, c.head_fields, c.task) == ("", {}, {}, {})
    assert c.augmentation == Augmentation()


def test_settings_that_do_not_change_the_result_are_no_difference():
    ours = TrainConfig(workers=4, out="a", keep=7, lr=1.0)
    assert differences(ours, TrainConfig(out="b")) == ["lr: 0.001 there, 1.0 now"]


def test_of_nested_settings_only_those_that_differ_are_told():
    ours = TrainConfig(augmentation=Augmentation(flip=0.0), model_fields={"depth": 2})
    assert differences(ours, TrainConfig()) == [
        "model_fields.depth: None there, 2 now",
        "augmentation.flip: 0.5 there, 0.0 now",
    ]


def test_a_model_field_that_is_no_yaml_is_an_input_error():
    with pytest.raises(InputError, match=r"dims=.*YAML"):
        field_value("dims=[1")


def test_a_configuration_cannot_be_changed_under_a_run():
    with pytest.raises(FrozenInstanceError):
        TrainConfig().lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]
