import pytest

from vitrail.cli import flags, main
from vitrail.cli.train import effective_config, field_value
from vitrail.data.augmentation import Augmentation
from vitrail.recipes import RECIPES, recipe_config
from vitrail.train.config import TrainConfig, differences, read_config
from vitrail_runtime.errors import InputError


def test_defaults_yield_to_the_recipe_it_to_the_file_and_that_to_flags(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "three", lambda: TrainConfig(epochs=3, lr=3.0, batch_size=3))
    file = tmp_path / "run.yaml"
    file.write_text("lr: 4e-1\nbatch_size: 4\naugmentation: {flip: 0.25}\n")
    start = ["--recipe", "three", "--config", str(file)]
    config = effective_config(*start[1::2], [*start, "--batch-size", "5", "--data", "d"])
    assert (config.epochs, config.lr, config.batch_size) == (3, 0.4, 5)
    assert config.augmentation.flip == 0.25
    assert config.augmentation.scale == TrainConfig().augmentation.scale
    assert config.min_lr == TrainConfig().min_lr


def test_flags_reach_nested_settings_and_the_models_own(tmp_path):
    config = effective_config(
        None,
        None,
        [
            "--data",
            "d",
            "--augmentation.mixup",
            "0.2",
            "--sizes",
            "160",
            "192",
            "--model-fields",
            "drop_path_rate=0.1",
            "out_blocks=[1, 2]",
        ],
    )
    assert config.augmentation.mixup == 0.2
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
            ["train", "--sampling", "fair"],
            "--sampling must be one of uniform, balanced, but is 'fair'",
        ),
        (["train", "--augmentation.flip", "2"], "flip is a probability in [0, 1], but is 2.0"),
        (["train", "--max-steps", "few"], "--max-steps {None}|INT: invalid literal for int()"),
        (["train", "--epoch", "-1"], "unknown flag '--epoch'; did you mean '--epochs'"),
        (["train", "--resize", "sqush"], "one of None, crop, fit, native, squash, but is"),
        (["train", "--augmentation.mixup", "nan"], "mixup must not be negative, but is nan"),
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
        (["--val-fraction", "1"], "val_fraction must be above 0 and below 1, but is 1.0"),
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
