"""Each flag of a verb reaches what it sets, and each figure that a verb tells is what an oracle counts."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.cli import flags as cli_flags
from vitrail.cli import main
from vitrail.models import create_model, load, save
from vitrail.train.config import TrainConfig
from vitrail_runtime.preprocess import decode, prepare

SMALL = {"dims": (16, 24, 32), "depths": (1, 1, 1), "key_dim": 8}
CLASSES = tuple("abcdefg")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """run/best is a model of seven classes; images/ holds three images."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("flags")
    model = create_model("efficientvit_m0", classes=CLASSES, **SMALL)
    torch.nn.init.normal_(list(model.parameters())[-1])  # the classifier's bias
    save(model, folder / "run" / "best")
    rng = np.random.default_rng(0)
    (folder / "images").mkdir()
    for i in range(3):
        pixels = rng.integers(0, 256, (40 + i, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
    return folder


class Reached(Exception):
    """What a verb gave to whom it calls."""


def reach(*given, **named):
    raise Reached(given, named)


def reached(argv):
    with pytest.raises(Reached) as stop:
        main(argv)
    return stop.value.args


def test_predict_tells_what_a_forward_of_each_image_alone_gives(place, capsys):
    model = load(place / "run" / "best")
    expected = {}
    for i in range(3):
        path = place / "images" / f"{i}.png"
        pixels, _ = prepare(decode(path), model.preprocessing)
        with torch.inference_mode():
            expected[str(path)] = model.eval()(torch.from_numpy(pixels)[None])[0].softmax(0)
    assert main(["predict", str(place / "run"), str(place / "images"), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["path"] for row in rows] == list(expected)
    for row, scores in zip(rows, expected.values(), strict=True):
        best = scores.argsort(descending=True)[:5].tolist()  # five, unless told otherwise
        assert [top["label"] for top in row["top"]] == [CLASSES[i] for i in best]
        assert [top["score"] for top in row["top"]] == pytest.approx(
            scores[best].tolist(), abs=2e-6
        )
    assert main(["predict", str(place / "run"), str(place / "images"), "--top-k", "3"]) == 0
    for line, row in zip(capsys.readouterr().out.splitlines()[1:], rows, strict=True):
        told = [f"{top['label']} {top['score']:.1%}" for top in row["top"][:3]]
        first, *others = told
        assert line.split()[1:3] == first.split()
        assert line.endswith("  " + ", ".join(others))


def test_predict_gives_its_flags_to_the_predictor(place, monkeypatch):
    monkeypatch.setattr("vitrail.predictor.Predictor", reach)
    command = ["predict", str(place / "run"), str(place / "images")]
    defaults = {"device": "auto", "batch_size": 16, "top_k": 5, "skip_broken": False}
    defaults |= {"max_tokens": None, "tokens_per_image": None}
    assert reached(command)[1] == defaults
    flags = ["--batch-size", "3", "--top-k", "2", "--skip-broken", "--device", "cuda:1"]
    others = {"device": "cuda:1", "batch_size": 3, "top_k": 2, "skip_broken": True}
    others |= {"max_tokens": None, "tokens_per_image": None}
    assert reached([*command, *flags])[1] == others


def test_the_demo_trains_the_recipe_on_its_own_folder(tmp_path, monkeypatch):
    from vitrail.recipes import recipe_config

    monkeypatch.setattr("vitrail.data.digits.make_digits", lambda folder, task: folder)
    monkeypatch.setattr("vitrail.train.trainer.train", reach)
    (config,), _ = reached(["demo", "--out", str(tmp_path), "--epochs", "5"])
    assert (config.data, config.out) == (str(tmp_path / "digits"), str(tmp_path / "run"))
    recipe = recipe_config("digits")
    kept = [f for f in vars(config) if f not in ("data", "out", "epochs")]
    assert config.epochs == 5
    assert config.threads is None
    assert [getattr(config, f) for f in kept] == [getattr(recipe, f) for f in kept]
    (config,), _ = reached(["demo"])
    assert (config.out, config.epochs) == ("vitrail-demo/run", 24)


def test_a_demo_of_another_task_has_its_own_digits_recipe_folder_and_command(
    tmp_path, monkeypatch, capsys
):
    from vitrail.recipes import recipe_config

    made, given = [], []
    stopped = SimpleNamespace(signal=2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "vitrail.data.digits.make_digits", lambda folder, task: made.append((str(folder), task))
    )
    monkeypatch.setattr(
        "vitrail.train.trainer.train", lambda config: given.append(config) or stopped
    )
    assert main(["demo", "--task", "segment"]) == 130
    assert made == [("vitrail-demo-segment/digits", "semantic")]
    (config,) = given
    recipe = recipe_config("digits_segment")
    assert (config.model, config.epochs) == (recipe.model, recipe.epochs)
    assert config.out == "vitrail-demo-segment/run"
    out = capsys.readouterr().out
    assert out.startswith(
        "1/4  900 sheets of handwritten digits with masks -> vitrail-demo-segment"
    )
    assert out.endswith(
        "vitrail demo --task segment --out vitrail-demo-segment goes on from here\n"
    )
    assert main(["demo", "--task", "describe"]) == 2
    assert "unknown task 'describe'" in capsys.readouterr().err


def test_a_demo_that_is_stopped_says_how_to_go_on_and_ends_as_its_signal(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("vitrail.data.digits.make_digits", lambda folder, task: folder)
    monkeypatch.setattr("vitrail.train.trainer.train", lambda config: SimpleNamespace(signal=2))
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().out.endswith(f"vitrail demo --out {tmp_path} goes on from here\n")


@pytest.mark.parametrize(("rank", "told"), [("0", True), ("1", False)])
@pytest.mark.parametrize(("signal", "code"), [(0, 0), (15, 143)])
def test_train_ends_as_its_run_did(tmp_path, monkeypatch, capsys, rank, told, signal, code):
    from vitrail.configuration import to_dict
    from vitrail.tasks.classify import Settings
    from vitrail.train.trainer import RunResult

    result = RunResult(
        tmp_path, "SIGTERM" if signal else "all steps", signal, 7, 0.123, "top-1", 90.0
    )
    given = []
    monkeypatch.setattr(
        "vitrail.train.trainer.train", lambda config: given.append(config) or result
    )
    monkeypatch.setattr("vitrail.cli.train.model_to_show", lambda folder: "best")
    monkeypatch.setattr(
        "vitrail.cli.train.report_run", lambda config, folder, name: folder / "r.html"
    )
    monkeypatch.setenv("RANK", rank)
    assert main(["train", "--data", "D", "--lr", "0.5"]) == code
    assert given == [TrainConfig(data="D", lr=0.5, task=to_dict(Settings()))]
    out, err = capsys.readouterr()
    if not told:
        assert (out, err) == ("", "")
    elif signal:
        assert out == ""
        assert err == (
            "SIGTERM: stopped at update 7, all saved; go on with: "
            f"vitrail train --config {tmp_path / 'config.yaml'}\n"
        )
    else:
        assert out == f"best top-1 0.1230 on the validation images: {tmp_path / 'best'}\n"
        assert err == f"all steps: 7 updates in 1.5 minutes\nreport: {tmp_path / 'r.html'}\n"


def test_flags_stand_over_a_file_over_a_recipe_over_the_defaults(tmp_path):
    from vitrail.cli.train import effective_config
    from vitrail.configuration import to_dict
    from vitrail.recipes import recipe_config
    from vitrail.tasks.classify import Settings

    file = tmp_path / "c.yaml"
    file.write_text("lr: 0.25\nbatch_size: 48\nmodel_fields: {key_dim: 8, depths: [1, 1, 1]}\n")
    flags = ["--data", "D", "--batch-size", "32", "--model-fields", "key_dim=4", "mlp=[a]"]
    config = effective_config(["--recipe", "digits", "--config", str(file), *flags])
    recipe = recipe_config("digits")
    assert (config.batch_size, config.lr, config.ema) == (32, 0.25, recipe.ema)
    assert config.model_fields == {"key_dim": 4, "depths": [1, 1, 1], "mlp": ["a"]}
    plain = effective_config(["--data", "D"])
    assert plain == TrainConfig(data="D", task=to_dict(Settings()))


def test_models_tells_counted_figures_in_the_units_it_names(capsys):
    from vitrail.cli.models import row

    told = row("efficientvit_m0", [2_345_678, 79_012_345])
    assert (told["params_m"], told["macs_g"]) == (2.35, 0.079)
    model = create_model("efficientvit_m0")
    assert main(["models", "efficientvit_m[01]", "--json", "--task", "classify"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["name"] for r in rows] == ["efficientvit_m0", "efficientvit_m1"]
    count = sum(math.prod(p.shape) for p in model.parameters())
    assert rows[0]["params_m"] == round(count / 1e6, 2)
    assert rows[0]["strides"] == [s.stride for s in model.backbone.feature_specs.values()]
    assert main(["models", "--task", "nothing"]) == 2


@pytest.fixture
def labelled(place, tmp_path):
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        for name in ("cat", "dog"):
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for i in range(count):
                shutil.copy(place / "images" / f"{i}.png", tmp_path / "set" / split / name)
    return tmp_path / "set"


def test_data_make_gives_its_folder_task_and_seed(monkeypatch):
    monkeypatch.setattr("vitrail.data.digits.make_digits", reach)
    make = ["data", "make", "digits", "D"]
    assert reached([*make, "--seed", "7"]) == (("D",), {"task": "classify", "seed": 7})
    assert reached([*make, "--task", "semantic"]) == (("D",), {"task": "semantic", "seed": 0})


def test_data_show_draws_the_split_that_is_asked_for_first(labelled, monkeypatch):
    monkeypatch.setattr("vitrail.data.sheet.contact_sheet", reach)
    for flags, first, seed in (([], "train", 0), (["--split", "test", "--seed", "3"], "test", 3)):
        (splits, title), how = reached(["data", "show", str(labelled), *flags])
        assert [d.split for d in splits] == [
            first,
            *(s for s in ("train", "val", "test") if s != first),
        ]
        assert [len(d) for d in splits] == [
            {"train": 6, "val": 4, "test": 2}[d.split] for d in splits
        ]
        assert (title, how) == ("set", {"seed": seed})


def test_data_check_tells_the_same_in_json_and_in_words(labelled, capsys):
    """Images of one content under two labels spoil a training: exit code 1."""
    assert main(["data", "check", str(labelled), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["classes"] == ["cat", "dog"]
    assert [(s["name"], s["pictures"], s["per_class"]) for s in found["splits"]] == [
        ("train", 6, {"cat": 3, "dog": 3}),
        ("val", 4, {"cat": 2, "dog": 2}),
        ("test", 2, {"cat": 1, "dog": 1}),
    ]
    train = found["splits"][0]
    assert (train["smallest"], train["median"], train["largest"]) == ([40, 50], [41, 50], [42, 50])
    assert train["most_elongated"] == 50 / 40
    assert main(["data", "check", str(labelled)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        f"{labelled}: 2 classes",
        "  train: 6 pictures, 3 a class",
        "    height x width, smallest / median / largest: 40 x 50 / 41 x 50 / 42 x 50; longest shape 1.2 : 1",
    ]
    for mark, kind in (("ERROR", "errors"), ("warning", "warnings")):
        for what, places in found[kind].items():
            assert f"{mark}: {what}: {len(places)}" in lines
            assert all(f"    {place}" in lines for place in places[:10])


def event(kind: str, **given) -> object:
    argument = SimpleNamespace(display_name=lambda: "--flag", **given)
    return type(kind, (SimpleNamespace,), {})(prog="vitrail", argument=argument, **given)


def test_choices_are_told_in_an_order_that_does_not_change():
    choices = {"None", *"gfedcba"}
    said = cli_flags._told(event("InvalidChoice", choices=choices, value="x"), TrainConfig)
    assert said == "--flag must be one of None, a, b, c, d, e, f, g, but is 'x'"


def test_of_a_value_that_may_be_none_the_other_kinds_reason_is_told(monkeypatch):
    monkeypatch.setattr(cli_flags, "_name", lambda argument: argument.display_name())
    message = "- <class 'NoneType'>: not None\n- <class 'int'>: 'x' is no number"
    said = cli_flags._told(event("InstantiationFailure", message=message), TrainConfig)
    assert said == "--flag: 'x' is no number"
