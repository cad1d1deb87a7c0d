"""vitrail adapt: what it trains, tells and refuses, held against the models that capsules come from."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.adapt.capsules import Capsules, read_capsule, save_capsule
from vitrail.cli import main
from vitrail.data.packing import Packing
from vitrail.models import create_backbone, create_model, describe, load, save
from vitrail.train.folder import RunFolder
from vitrail.train.trainer import RunResult
from vitrail.weights import write_state
from vitrail_runtime.preprocess import decode, prepare

NAME = "vit_tiny_patch16"
FIELDS = {
    "embed_dim": 32,
    "depth": 2,
    "num_heads": 2,
    "patch_size": 8,
    "image_size": (24, 40),
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.1,
}
BASE = ("ash", "oak", "yew")
BIRDS = ("crow", "jay")


def squashed(model):
    pre = replace(model.preprocessing, mode="squash", crop_pct=0.8)
    describe(model, replace(model.info, preprocessing=pre))
    return model.eval()


def on_base(base, classes, seed, **head):
    weights = {"backbone": base.backbone.state_dict()}
    torch.manual_seed(seed)
    model = create_model(f"memory/{NAME}", classes=classes, weights=weights, head=head, **FIELDS)
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return squashed(model)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """run/best is a base; birds.capsule and signs.capsule stand on it, as do the models birds/ and signs/;
    data/ holds birds, of several sizes."""
    folder = tmp_path_factory.mktemp("adapt")
    torch.manual_seed(0)
    base = squashed(create_model(NAME, classes=BASE, **FIELDS))
    torch.nn.init.normal_(base.head.fc.weight)
    save(base, folder / "run" / "best")
    for seed, (name, classes) in enumerate({"birds": BIRDS, "signs": ("stop", "go", "?")}.items()):
        model = on_base(base, classes, seed, rows=seed + 1)
        save(model, folder / name)
        save_capsule(
            model, folder / f"{name}.capsule", metrics={"top1": 0.75 + seed / 8, "loss": 1.0}
        )
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        for i, name in enumerate(BIRDS):
            (folder / "data" / split / name).mkdir(parents=True)
            for j in range(count):
                pixels = rng.integers(0, 256, (30, 41 + 3 * j, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "data" / split / name / f"{i}{j}.png")
    return folder


def asks(place, *names):
    return [str(place / "run"), "--capsules", *(str(place / f"{name}.capsule") for name in names)]


# predict


def test_predict_tells_what_every_model_says_of_each_image_alone(place, capsys):
    images = sorted((place / "data" / "val").rglob("*.png"))
    command = ["adapt", "predict", *asks(place, "birds", "signs"), str(place / "data" / "val")]
    assert main([*command, "--json", "--top-k", "2", "--batch-size", "4"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["path"] for row in rows] == list(map(str, images))
    models = {"base": load(place / "run" / "best")}
    models |= {name: load(place / name) for name in ("birds", "signs")}
    for path, row in zip(images, rows, strict=True):
        assert list(row["tasks"]) == ["base", "birds", "signs"]
        for name, model in models.items():
            pixels, _ = prepare(decode(path), model.preprocessing)
            with torch.inference_mode():
                scores = model(torch.from_numpy(pixels)[None])[0].softmax(0)
            best = scores.argsort(descending=True)[:2].tolist()
            top = row["tasks"][name]["top"]
            assert [entry["label"] for entry in top] == [model.classes[i] for i in best]
            found = [entry["score"] for entry in top]
            assert found == pytest.approx(scores[best].tolist(), abs=2e-6)
    assert main([*command[:-1], "--batch-size", "1", "--", str(place / "data" / "val")]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["image", "base", "birds", "signs"]
    for line, row in zip(lines, rows, strict=True):
        best = [told["top"][0] for told in row["tasks"].values()]
        told = [row["path"], *(f"{b['label']} {b['score']:.1%}" for b in best)]
        assert line.split() == " ".join(told).split()


def test_a_capsule_can_be_given_another_name(place, capsys):
    files = [f"one={place / 'birds.capsule'}", f"two={place / 'birds.capsule'}"]
    images = str(place / "data" / "val" / "jay")
    assert (
        main(["adapt", "predict", str(place / "run"), "--capsules", *files, images, "--json"]) == 0
    )
    for line in capsys.readouterr().out.splitlines():
        tasks = json.loads(line)["tasks"]
        assert list(tasks) == ["base", "one", "two"]
        assert tasks["one"] == tasks["two"]
    odd = place / "a=b.capsule"  # a file's name, not another name for it
    shutil.copy(place / "birds.capsule", odd)
    assert main(["adapt", "predict", str(place / "run"), "--capsules", str(odd), images]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["image", "base", "birds"]


def test_images_are_asked_about_in_batches_of_one_size_and_so_many(place, monkeypatch, capsys):
    """Of a base whose images keep their shape."""
    folder = place / "fit"
    for name in ("run/best", "birds"):
        model = load(place / name)
        pre = replace(model.preprocessing, mode="fit")
        describe(model, replace(model.info, preprocessing=pre))
        save(model, folder / name)
    save_capsule(load(folder / "birds"), folder / "birds.capsule")
    seen = []
    predict = Capsules.predict
    monkeypatch.setattr(
        Capsules, "predict", lambda self, x: seen.append(x.shape) or predict(self, x)
    )
    names = ["train/crow/00", "train/jay/10", "val/crow/00", "train/crow/04", "train/crow/03"]
    images = [str(place / "data" / f"{name}.png") for name in (*names, names[0])]
    command = ["adapt", "predict", *asks(folder, "birds"), *images, "--json"]
    assert main([*command, "--batch-size", "2"]) == 0
    told = [json.loads(line)["path"] for line in capsys.readouterr().out.splitlines()]
    assert told == images[:-1]  # one given twice is told once
    sizes = [(2, 3, 24, 33), (1, 3, 24, 33), (1, 3, 23, 40), (1, 3, 24, 40)]
    assert [tuple(shape) for shape in seen] == sizes
    seen.clear()
    assert main(command) == 0
    assert seen[0] == (3, 3, 24, 33)


def test_broken_images_end_with_an_error_after_all_results_or_are_left_out(place, tmp_path, capsys):
    shutil.copytree(place / "data" / "val" / "jay", tmp_path / "in")
    (tmp_path / "in" / "aa.png").write_bytes(b"text")
    command = ["adapt", "predict", *asks(place, "birds"), str(tmp_path / "in"), "--json"]
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert "vitrail: 1 of 4 pictures could not be read:" in err
    assert main([*command, "--skip-broken"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert f"left out {tmp_path / 'in' / 'aa.png'} is not a picture" in err
    command[-2] = str(tmp_path / "in" / "aa.png")
    assert main([*command, "--skip-broken"]) == 2
    assert "none of the images could be read" in capsys.readouterr().err


# eval and list


def test_eval_tells_of_each_capsule_what_its_model_scores(place, tmp_path, capsys):
    data = ["--data", str(place / "data")]
    folders = {"birds": place / "birds", "other": tmp_path / "other"}
    other = on_base(load(place / "run" / "best"), BIRDS[::-1], 7)
    save(other, folders["other"])
    save_capsule(other, tmp_path / "o.capsule")
    files = [*asks(place, "birds"), f"other={tmp_path / 'o.capsule'}"]
    for split in ([], ["--split", "train"]):
        assert main(["adapt", "eval", *files, *data, *split, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["split"] == (split[1] if split else "val")
        assert list(found["tasks"]) == list(folders)
        for name, scores in found["tasks"].items():
            assert main(["eval", str(folders[name]), *data, *split, "--json"]) == 0
            model = json.loads(capsys.readouterr().out)
            assert scores.pop("loss") == pytest.approx(model["loss"], rel=1e-5)
            assert scores.items() <= model.items()
            assert scores["num_images"] == (10 if split else 6)
    assert main(["adapt", "eval", *asks(place, "birds"), *data]) == 0
    header, line = capsys.readouterr().out.splitlines()
    assert header.split() == ["task", "scores"]
    assert line.startswith("birds  top-1 ")
    assert line.endswith("  6 images")


def test_eval_gives_its_flags_to_the_data_and_to_the_batches(place, tmp_path, monkeypatch, capsys):
    from vitrail.data import loader

    shutil.copytree(place / "data" / "train", tmp_path / "data")
    broken = tmp_path / "data" / "jay" / "zz.png"
    broken.write_bytes(b"text")
    batches, eval_batches = [], loader.eval_batches

    def watched(data, preprocessing, batch_size, **how):
        batches.append((len(data), batch_size, how))
        return eval_batches(data, preprocessing, batch_size)

    monkeypatch.setattr(loader, "eval_batches", watched)
    command = ["adapt", "eval", *asks(place, "birds"), "--data", str(tmp_path / "data")]
    assert main(command) == 2
    assert "zz.png" in capsys.readouterr().err
    assert main([*command, "--skip-broken", "--split", "all"]) == 0
    assert f"vitrail: left out {broken}" in capsys.readouterr().err
    flags = ["--val-fraction", "0.4", "--batch-size", "3", "--workers", "2", "--skip-broken"]
    assert main([*command, *flags]) == 0
    assert batches == [(10, 16, {"workers": 0}), (4, 3, {"workers": 2})]
    assert "vitrail: " in capsys.readouterr().err  # which images are val


def test_list_tells_what_is_in_capsules(place, capsys):
    files = [place / "birds.capsule", place / "signs.capsule"]
    assert main(["adapt", "list", *map(str, files)]) == 0
    header, birds, signs = (line.split() for line in capsys.readouterr().out.splitlines())
    assert header == ["name", "classes", "rows", "size", "base", "score", "file"]
    capsule = read_capsule(files[0])
    size = f"{files[0].stat().st_size / 1000:.0f}"
    base = [NAME, capsule.base.sha256[:8]]
    told = ["birds", "2:", "crow,", "jay", "1", size, "kB", *base, "top-1", "0.7500", str(files[0])]
    assert birds == told
    assert signs[:6] == ["signs", "3:", "stop,", "go,", "?", "2"]
    assert signs[-2] == "0.8750"


def test_list_tells_four_of_many_classes_and_no_score_where_none_is_known(place, tmp_path, capsys):
    model = on_base(load(place / "run" / "best"), tuple("abcde"), 3)
    save_capsule(model, tmp_path / "letters.capsule")
    assert main(["adapt", "list", str(tmp_path / "letters.capsule")]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert " 5: a, b, c, d, ...  5 " in line
    assert "top-1" not in line


# train


@pytest.fixture
def trainer(monkeypatch):
    """Stands for the trainer: the best model of its runs is that of the configuration, with other answers.
    Keeps the configurations that it got; `signal` is how runs end."""
    from vitrail.train.build import build_model, resolve

    class Trainer:
        def __init__(self):
            self.signal, self.given, self.moves_the_base = 0, [], False

        def __call__(self, config):
            self.given.append(config)
            model = build_model(resolve(config), BIRDS)
            torch.nn.init.normal_(model.head.fc.weight)
            model.backbone.norm.bias.data += self.moves_the_base
            best = Path(config.out) / "best"
            if not self.signal:
                save(model, best, metrics={"top1": 0.625, "loss": 0.5, "classes": list(BIRDS)})
            return RunResult(Path(config.out), "all epochs", self.signal, 7, 0.625, "top-1", 1.0)

    stand_in = Trainer()
    monkeypatch.setattr("vitrail.train.trainer.train", stand_in)
    return stand_in


def test_train_makes_a_capsule_that_stands_on_its_base(place, tmp_path, trainer, capsys):
    out = tmp_path / "new" / "birds.v2.capsule"
    command = [
        "adapt",
        "train",
        str(place / "run"),
        "--data",
        str(place / "data"),
        "--out",
        str(out),
    ]
    assert main(command) == 0
    (config,) = trainer.given
    assert config.model == f"memory/{NAME}"
    assert config.train_only == "capsule"
    assert config.weights == str(place / "run" / "best")
    assert config.out == str(tmp_path / "new" / "birds.v2-run")
    assert config.head_fields == {"rows": 5}
    capsule = read_capsule(out)
    assert (capsule.name, capsule.classes) == ("birds.v2", BIRDS)
    assert capsule.metrics == {"top1": 0.625, "loss": 0.5}
    tasks = Capsules(place / "run")
    tasks.attach(capsule)  # the same backbone to the bit, and the same preprocessing
    best = load(tmp_path / "new" / "birds.v2-run" / "best")
    x = torch.randn(2, 3, 24, 40)
    assert torch.equal(tasks.predict(x)["birds.v2"], best(x))
    said = capsys.readouterr().out
    size = f"{out.stat().st_size / 1000:.0f}"
    assert said == (
        f"{out}: 'birds.v2', 2 classes, {size} kB, best top-1 0.6250 on the validation images; the run is in "
        f"{tmp_path / 'new' / 'birds.v2-run'}\n"
    )


def test_train_gives_its_flags_and_those_of_a_training_to_the_run(place, tmp_path, trainer):
    from vitrail.cli.adapt import RECIPE
    from vitrail.recipes import recipe_config

    command = [
        "adapt",
        "train",
        str(place / "run" / "best"),
        "--data",
        "D",
        "--out",
        f"{tmp_path}/b.capsule",
    ]
    own = ["--rows", "2", "--name", "jays", "--run", str(tmp_path / "elsewhere")]
    assert main([*command, *own, "--lr", "0.5", "--epochs", "3", "--head-fields", "norm=own"]) == 0
    config = trainer.given.pop()
    assert (config.data, config.lr, config.epochs) == ("D", 0.5, 3)
    assert config.head_fields == {"norm": "own", "rows": 2}
    assert config.out == str(tmp_path / "elsewhere")
    assert config.batch_size == recipe_config(RECIPE).batch_size
    assert read_capsule(tmp_path / "b.capsule").name == "jays"
    assert read_capsule(tmp_path / "b.capsule").head.rows == 2
    file = tmp_path / "c.yaml"
    other = "image_size: 16, crop_pct: 0.5, resize: fit, model_fields: {depth: 1, norm_eps: 0.5}"
    other += ", patch_sizes: [4, 8]"
    file.write_text(f"{{batch_size: 3, {other}}}")  # the base decides the others
    assert main([*command, "--config", str(file)]) == 0
    config = trainer.given.pop()
    assert (config.batch_size, config.lr) == (3, 1e-3)  # the defaults, without the recipe
    assert (config.image_size, config.crop_pct, config.resize) == ((24, 40), 0.8, "squash")
    assert config.model_fields["depth"] == FIELDS["depth"]
    assert "norm_eps" not in config.model_fields
    assert config.patch_sizes == ()
    file.write_text("{native: true, packing: {max_tokens: 99}, batch_size: 3}")
    assert main([*command, "--config", str(file)]) == 0
    config = trainer.given.pop()
    assert (config.native, config.packing, config.resize) == (False, Packing(), "squash")
    assert main([*command, "--recipe", "digits"]) == 0
    assert trainer.given.pop().epochs == recipe_config("digits").epochs


def test_rows_are_those_of_the_flag_else_of_the_head_fields_else_of_the_file(
    place, tmp_path, trainer
):
    file = tmp_path / "c.yaml"
    file.write_text("{model: memory/vit_tiny_patch16, head_fields: {rows: 3}}")
    command = [
        "adapt",
        "train",
        str(place / "run"),
        "--data",
        "D",
        "--out",
        f"{tmp_path}/b.capsule",
    ]
    fields, settings = ["--head-fields", "norm=own", "rows=7"], ["--config", str(file)]
    for given, rows in (
        ([], 5),
        (fields, 7),
        (["--head_fields=rows=7"], 7),
        (settings, 3),
        ([*settings, *fields], 7),
        ([*settings, "--rows", "2"], 2),
    ):
        assert main([*command, *given]) == 0
        assert read_capsule(tmp_path / "b.capsule").head.rows == rows
        assert trainer.given.pop().head_fields["rows"] == rows


def test_a_run_that_changed_the_base_gives_no_capsule(place, tmp_path, trainer, capsys):
    """Which would be a defect of the trainer."""
    out = tmp_path / "birds.capsule"
    trainer.moves_the_base = True
    assert main(["adapt", "train", str(place / "run"), "--data", "D", "--out", str(out)]) == 2
    assert "(sha256 differs)" in capsys.readouterr().err
    assert not out.exists()


def test_a_stopped_run_leaves_no_capsule_and_ends_as_its_signal(place, tmp_path, trainer, capsys):
    out = tmp_path / "birds.capsule"
    trainer.signal = 15
    assert main(["adapt", "train", str(place / "run"), "--data", "D", "--out", str(out)]) == 143
    assert not out.exists()
    said = capsys.readouterr().err
    assert (
        f"stopped at update 7, all saved; the same command goes on with {tmp_path}/birds-run"
        in said
    )


def test_of_many_processes_the_first_one_writes_and_tells(
    place, tmp_path, trainer, monkeypatch, capsys
):
    monkeypatch.setenv("RANK", "1")
    command = [
        "adapt",
        "train",
        str(place / "run"),
        "--data",
        "D",
        "--out",
        f"{tmp_path}/b.capsule",
    ]
    assert main(command) == 0
    assert not (tmp_path / "b.capsule").exists()
    assert capsys.readouterr() == ("", "")


def test_a_capsule_is_learnt_while_the_base_stays_as_it_is(place, tmp_path, capsys):
    base, data, out = place / "run", ["--data", str(place / "data")], tmp_path / "b.capsule"
    before = {p: p.read_bytes() for p in base.rglob("*") if p.is_file()}
    brief = ["--workers", "0", "--max-steps", "3", "--batch-size", "4"]
    assert main(["adapt", "train", str(base), *data, "--out", str(out), *brief]) == 0
    assert {p: p.read_bytes() for p in base.rglob("*") if p.is_file()} == before
    capsys.readouterr()
    assert main(["adapt", "eval", str(base), "--capsules", str(out), *data, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["tasks"]["b"]
    assert found["top1"] == read_capsule(out).metrics["top1"]
    assert all(value.any() for value in read_capsule(out).state.values())  # some start at zero


def test_a_run_whose_base_has_changed_is_refused_before_it_goes_on(place, tmp_path, capsys):
    base, out = tmp_path / "base", tmp_path / "b.capsule"
    shutil.copytree(place / "run" / "best", base)
    command = ["adapt", "train", str(base), "--data", str(place / "data"), "--out", str(out)]
    command += ["--workers", "0", "--max-steps", "1", "--batch-size", "4"]
    assert main(command) == 0
    assert main(command) == 0  # the same base: the run is over, and gives its capsule again
    other = load(base)
    other.head.fc.weight.data += 1  # not what the capsule stands on
    save(other, base)
    assert main(command) == 0
    other.backbone.norm.bias.data[3] += 1e-6
    save(other, base)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    capsys.readouterr()
    assert main(command) == 2
    told = f"the base has changed since the run in {tmp_path / 'b-run'} began"
    err = capsys.readouterr().err
    assert told in err
    assert err.endswith("could not be attached; give another --run\n")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert main([*command, "--run", str(tmp_path / "again")]) == 0


def test_another_run_in_the_folder_is_told_in_the_flags_that_there_are(place, tmp_path, capsys):
    run, data = tmp_path / "b-run", str(place / "data")
    command = ["adapt", "train", str(place / "run"), "--out", str(tmp_path / "b.capsule")]
    brief = ["--data", data, "--workers", "0", "--max-steps", "1", "--batch-size", "4"]
    assert main([*command, *brief, "--rows", "3"]) == 0
    assert main([*command, "--config", str(run / "config.yaml")]) == 0  # it goes on with that run
    assert read_capsule(tmp_path / "b.capsule").head.rows == 3
    settings = f"(--config {run / 'config.yaml'} has its settings)\n"
    shutil.copytree(place / "data", tmp_path / "data")
    next((tmp_path / "data" / "train" / "jay").iterdir()).unlink()
    cases = {
        "head_fields.rows: 3 there, 5 now": (brief, settings),
        "training images: not the same (10 there, 9 now)": (
            ["--data", str(tmp_path / "data"), *brief[2:], "--rows", "3"],
            settings,
        ),
    }
    for told, (given, end) in cases.items():
        capsys.readouterr()
        assert main([*command, *given]) == 2
        err = capsys.readouterr().err
        assert f"{run} holds another run, 1 steps on:\n  {told}\n" in err
        assert "give another --run to start anew; to go on with that one, give the base, the" in err
        assert err.endswith(end)
        assert not {"--weights", "--out"} & set(err.replace(",", " ").split())
    other = load(place / "run" / "best")
    other.backbone.norm.bias.data += 1
    save(other, tmp_path / "other")  # a base of its own, and not the run's as it has become
    assert (
        main(["adapt", "train", str(tmp_path / "other"), *command[3:], *brief, "--rows", "3"]) == 2
    )
    told = f"another run, 1 steps on:\n  weights: '{place / 'run' / 'best'}' there"
    assert told in capsys.readouterr().err
    shutil.rmtree(run / "state")
    assert main([*command, *brief]) == 2
    err = capsys.readouterr().err
    assert (
        "of a run with other settings:\n  head_fields.rows: 3 there, 5 now\ngive another --run\n"
        in err
    )
    with RunFolder(run).locked():
        assert main([*command, *brief]) == 2
    assert "stop it, or give another --run\n" in capsys.readouterr().err


def test_a_backbone_without_a_classifier_becomes_a_base_as_the_messages_and_the_docs_say(
    place, tmp_path, capsys
):
    name, fields = "vit_small_patch14_dinov2", {"embed_dim": 32, "depth": 2, "num_heads": 2}
    torch.manual_seed(0)
    backbone = create_backbone(name, image_size=(28, 42), **fields)
    file, base, out = tmp_path / "dino.safetensors", tmp_path / "base", tmp_path / "b.capsule"
    state = backbone.state_dict()
    write_state({f"backbone.{key}": value for key, value in state.items()}, file)
    brief = [
        "--data",
        str(place / "data"),
        "--workers",
        "0",
        "--max-steps",
        "1",
        "--batch-size",
        "4",
    ]
    capsys.readouterr()
    assert main(["adapt", "train", str(file), "--out", str(out), *brief]) == 2
    told = f"vitrail train --model NAME --weights {file} --train-only head --data DIR"
    assert told in capsys.readouterr().err
    command = told.replace("NAME", name).split()[1:-2]
    size = ["--image-size", "28", "42", "--out", str(base)]
    how = ["--model-fields", *(f"{key}={value}" for key, value in fields.items())]
    assert main([*command, *brief, *size, *how]) == 0
    tasks = Capsules(base)
    found = tasks.backbone.state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())
    assert main(["adapt", "train", str(base), "--out", str(out), *brief]) == 0
    assert tasks.attach(out) == "b"


# What is refused


@pytest.fixture(scope="module")
def wrong(place):
    """Beside `place`: other/ is another base, conv/ no plain ViT, odd/ a base of a colour mean that no
    training can be told, bad.capsule damaged, full.capsule of the full form; bugs/ holds other classes."""
    save(create_model("efficientvit_m0", num_classes=2), place / "conv")
    other = load(place / "run" / "best")
    other.backbone.norm.bias.data += 1
    save(other, place / "other")
    odd = load(place / "run" / "best")
    pre = replace(odd.preprocessing, mean=(0.1, 0.2, 0.3))
    describe(odd, replace(odd.info, preprocessing=pre))
    save(odd, place / "odd")
    content = bytearray((place / "birds.capsule").read_bytes())
    content[-3] ^= 1
    (place / "bad.capsule").write_bytes(content)
    fields = {"weights": {"backbone": other.backbone.state_dict()}, "head": {"form": "full"}}
    save_capsule(
        create_model(f"memory/{NAME}", classes=BIRDS, **fields, **FIELDS), place / "full.capsule"
    )
    shutil.copytree(place / "data" / "val" / "jay", place / "bugs" / "val" / "jay")
    shutil.copytree(place / "data" / "val" / "jay", place / "bugs" / "val" / "ant")
    return place


DATA = ["--data", "PLACE/data"]
TRAIN = [*DATA, "--out", "PLACE/new.capsule"]
ON = ["PLACE/run", "--capsules"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["tell"], "unknown action 'tell'; vitrail adapt takes train, list, eval, predict"),
        (
            ["train", *TRAIN],
            "say on which base first: vitrail adapt train BASE --data DIR, not --data",
        ),
        (["train", "PLACE/run", *DATA], "--out; vitrail adapt train --help tells what there is"),
        (["train", "PLACE/run", "--out", "a.capsule"], "say which images to train on"),
        (["train", "PLACE/run", *TRAIN, "--rows", "x"], "vitrail adapt train --help tells what"),
        (
            ["train", "PLACE/run", *TRAIN, "--rows", "-1"],
            "rows of memory must be 0 or more, but are -1",
        ),
        (["train", "PLACE/run", *TRAIN, "--lrr", "1"], "unknown flag '--lrr'; did you mean '--lr'"),
        (
            ["train", "PLACE/run", *DATA, "--out", "a.pth"],
            "a.pth must end in .capsule or .safetensors",
        ),
        (
            ["train", "PLACE/run", *DATA, "--out", "PLACE/d.capsule"],
            "is a folder; name a file, such as",
        ),
        (
            ["train", "PLACE/run", *DATA, "--out", "PLACE/run/best/model.safetensors"],
            "run/best/model.safetensors is there already and is no capsule",
        ),
        (["train", "PLACE/no", *TRAIN], "is not a saved model (no such folder)"),
        (
            ["train", "PLACE/run/best/model.safetensors", *TRAIN],
            "a backbone alone a run that leaves it as it is: vitrail train --model NAME --weights PLACE/run/",
        ),
        (
            ["train", "vit_tiny_patch16", *TRAIN],
            "is a model's name, but a base is a folder, that of a classifier or of the run that trained it; "
            "of its released weights a run makes one that leaves the backbone as it is: vitrail train "
            "--model vit_tiny_patch16 --weights pretrained --train-only head --data DIR",
        ),
        (
            ["predict", "PLACE/birds.capsule", *ON[1:], "PLACE/birds.capsule", "PLACE/data"],
            "is a file, but a base is a folder",
        ),
        (["train", "PLACE/run", *TRAIN, "--name", "base"], "a capsule cannot be called 'base'"),
        (
            ["train", "PLACE/run", *TRAIN, "--model=x"],
            "--model cannot be given: the base decides that",
        ),
        (
            ["train", "PLACE/run", *TRAIN, "--image-size", "32"],
            "--image-size cannot be given: the base",
        ),
        (
            ["train", "PLACE/run", *TRAIN, "--image_size=64", "--train_only", "full"],
            "--image-size, --train-only cannot be given: the base",
        ),
        (["train", "PLACE/run", *TRAIN, "--no_native"], "--no-native cannot be given: the base"),
        (
            ["train", "PLACE/run", *TRAIN, "--packing.max_tokens", "9"],
            "--packing.max-tokens cannot",
        ),
        (
            ["train", "PLACE/run", *TRAIN, "--replay", "PLACE/run"],
            "--replay trains nothing; look at a run with vitrail train --replay RUN",
        ),
        (
            ["train", "PLACE/run", *TRAIN, "--rows", "2", "--head-fields", "rows=7"],
            "--rows 2 and --head-fields rows=7 are one setting; give one",
        ),
        (["train", "PLACE/conv", *TRAIN], "read by the class token of a plain ViT, which this"),
        (
            ["train", "PLACE/birds", *TRAIN],
            "a plain ViT, or a classifier on one, not on MemoryClassifier",
        ),
        (
            ["train", "PLACE/odd", *TRAIN],
            "could not be attached: the capsule 'new' sees images in another way",
        ),
        (["train", "PLACE/run", *TRAIN, "--head-fields", "form=full"], "is of form='full'"),
        (["list"], "say which capsules: vitrail adapt list FILE..."),
        (["list", "PLACE/birds.capsule", "--json"], "unknown flag '--json'; there is none"),
        (["list", "PLACE/no.capsule"], "no.capsule is not there; a capsule is a file"),
        (["list", "PLACE/bad.capsule"], "bad.capsule is damaged"),
        (["list", "PLACE/run/best/model.safetensors"], "is no capsule"),
        (["eval", *ON, "PLACE/birds.capsule"], "needs --data"),
        (
            ["eval", *ON, "PLACE/birds.capsule", "--data", "PLACE/bugs", "--split", "val"],
            "classes that the",
        ),
        (
            ["eval", *ON, "PLACE/signs.capsule", *DATA],
            "the capsule 'signs': the data has classes that the",
        ),
        (
            ["eval", *ON, "PLACE/birds.capsule", *DATA, "--batch-size", "0"],
            "batch_size must be at least 1",
        ),
        (["predict", "PLACE/run", "PLACE/data"], "needs --capsules"),
        (["predict", *ON, "PLACE/data"], "say which capsules: --capsules FILE..."),
        (["predict", *ON, "PLACE/birds.capsule"], "say which images: vitrail adapt predict BASE"),
        (["predict", *ON, "PLACE/birds.capsule", "PLACE/no.png"], "no.png: no such file or folder"),
        (["predict", *ON, "PLACE/bad.capsule", "PLACE/data"], "bad.capsule is damaged"),
        (["predict", *ON, "PLACE/full.capsule", "PLACE/data"], "is of form='full'"),
        (
            ["predict", *ON, *["PLACE/birds.capsule"] * 2, "PLACE/data"],
            "called 'birds' is attached already",
        ),
        (
            ["predict", "PLACE/other", *ON[1:], "PLACE/birds.capsule", "PLACE/data"],
            "(sha256 differs)",
        ),
        (
            ["predict", "PLACE/conv", *ON[1:], "PLACE/birds.capsule", "PLACE/data"],
            "a plain ViT, which this backbone is not",
        ),
        (
            ["predict", *ON, "PLACE/birds.capsule", "PLACE/data", "--top-k", "0"],
            "must be at least 1",
        ),
        (
            ["predict", *ON, "PLACE/birds.capsule", "PLACE/data", "--batch-size", "0"],
            "must be at least 1",
        ),
        (
            ["predict", *ON, "PLACE/birds.capsule", "PLACE/data", "--device", "gpu"],
            "cannot use device",
        ),
    ],
)
def test_what_cannot_be_is_told_in_one_message(wrong, trainer, capsys, argv, message):
    (wrong / "d.capsule").mkdir(exist_ok=True)
    assert main(["adapt", *(text.replace("PLACE", str(wrong)) for text in argv)]) == 2
    _, err = capsys.readouterr()
    assert message.replace("PLACE", str(wrong)) in err
    assert "Traceback" not in err
    assert not trainer.given  # before any time was spent
    assert not (wrong / "new.capsule").exists()


def test_help_of_the_verb_and_of_training_tell_what_there_is(capsys):
    assert main(["adapt", "--help"]) == 0
    assert "vitrail adapt predict BASE --capsules" in capsys.readouterr().out
    assert main(["adapt", "train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "rows of memory in each block (default: 5)" in out
    assert "--model, --weights, --train-only" in out
