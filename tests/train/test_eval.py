import json
import math

import pytest
import torch

import vitrail
from tests.train.conftest import CLASSES, VIT, make_pictures, tiny_config
from vitrail.classifiers import Classifier
from vitrail.cli import main
from vitrail.cli.eval import show
from vitrail.data import open_data
from vitrail.models import save
from vitrail.segmenters.inference import Inference, InferredSegmenter
from vitrail.tasks.classify import scores_of
from vitrail.train.evaluate import evaluate
from vitrail.train.trainer import train


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    train(tiny_config(pictures, out, **VIT, epochs=1))
    return out


def test_eval_prints_a_table_and_writes_the_scores(run, pictures, capsys):
    assert main(["eval", str(run), "--data", str(pictures)]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in CLASSES)
    assert "12 images" in out
    scores = json.loads((run / "eval.json").read_text())
    assert scores["split"] == "val"
    assert sum(map(sum, scores["confusion"])) == scores["num_images"] == 12


def test_eval_prints_json_alone_on_stdout(run, pictures, capsys):
    assert (
        main(["eval", str(run / "last"), "--data", str(pictures), "--json", "--split", "train"])
        == 0
    )
    assert json.loads(capsys.readouterr().out)["num_images"] == 24


def test_as_many_classes_with_other_names_are_refused_with_both_lists(run, tmp_path, capsys):
    data = make_pictures(tmp_path / "data")
    for split in ("train", "val"):
        (data / split / "top").rename(data / split / "up")
    assert main(["eval", str(run), "--data", str(data)]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert "left, right, top" in message
    assert "left, right, up" in message


def test_a_model_whose_scores_are_no_numbers_has_none(run, pictures, tmp_path, capsys):
    model = vitrail.load(run / "best")
    next(model.head.parameters()).data.fill_(math.nan)
    save(model, tmp_path / "broken")
    assert main(["eval", str(tmp_path / "broken"), "--data", str(pictures)]) == 2
    out, message = capsys.readouterr()
    assert out == ""
    assert "not finite (NaN or infinite) on 12 of 12 images" in message
    assert not (tmp_path / "broken" / "eval.json").exists()


def test_memory_that_runs_out_is_one_message(run, pictures, capsys, monkeypatch):
    def forward(*args, **asked) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")

    monkeypatch.setattr(Classifier, "forward", forward)
    for how in (["eval", str(run), "--data", str(pictures)], ["predict", str(run), str(pictures)]):
        assert main(how) == 2
        message = capsys.readouterr().err
        assert "not enough memory for " in message
        assert "9 GiB" in message
        assert "--batch-size" in message
        assert "Traceback" not in message


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--data", "x"], ["nowhere", "not a saved model"]),
        (["RUN", "--data", "nowhere"], ["nowhere"]),
        (["RUN", "--data", "DATA", "--split", "test"], ["test"]),
        (["RUN", "--data", "DATA", "--device", "cuda"], ["GPU"]),
    ],
)
def test_what_is_not_there_is_said(run, pictures, capsys, arguments, words):
    places = {"RUN": str(run), "DATA": str(pictures)}
    assert main(["eval", *(places.get(a, a) for a in arguments)]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words)


def test_the_table_shows_the_scores_as_they_are_and_names_as_they_are_written(capsys):
    figures = {"precision": 0.12345, "recall": 0.5, "f1": 0.25, "support": 1234}
    names = ["[bold]ant", ":cat:", "a name that is longer than a terminal is wide " * 3]
    scores = {
        "per_class": [figures | {"support": i} for i in range(3)],
        "confusion": [[9, 0, 2], [7, 30, 0], [0, 1, 4]],
        "top1": 0.123456,
        "top5": 0.98765,
        "loss": 1.00006,
        "num_images": 53,
    }
    show(scores_of(scores, tuple(names)))
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["class", "images", "precision", "recall", "F1"]
    for i, name in enumerate(names):
        assert rows[i].startswith(name)
        assert rows[i].split()[-4:] == [str(i), "0.123", "0.500", "0.250"]
    assert rows[3:] == [
        f"7 x {names[1]} taken for {names[0]}",
        f"2 x {names[0]} taken for {names[2]}",
        f"1 x {names[2]} taken for {names[1]}",
        "top-1 0.1235  top-5 0.9877  loss 1.0001  53 images",
    ]


def test_what_is_written_is_what_evaluation_gives(run, pictures, capsys):
    assert main(["eval", str(run), "--data", str(pictures), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((run / "eval.json").read_text())
    model = vitrail.load(run / "best")
    scores = evaluate(model, open_data(pictures, "val"), batch_size=64)
    about = {"model": str(run), "data": str(pictures), "split": "val", "probe": None}
    assert printed == about | scores.to_dict()


def test_eval_asks_a_segmenter_in_windows_scales_and_mirrored(masks, tmp_path, capsys):
    settings = {"model": "linear/vit_tiny_patch16", "model_fields": VIT["model_fields"]}
    config = tiny_config(masks, tmp_path / "run", **settings, epochs=1)
    train(config)
    how = ["eval", config.out, "--data", str(masks), "--json"]
    asked = ["--window", "20", "--stride", "10", "--scales", "1", "1.5", "--flip"]
    assert main([*how, *asked]) == 0
    found = json.loads(capsys.readouterr().out)
    model = vitrail.load(f"{config.out}/best")
    data = open_data(masks, "val", classes=model.classes)
    inference = Inference(window=20, stride=10, scales=(1.0, 1.5), flip=True)
    want = evaluate(InferredSegmenter(model, inference), data)
    assert found["loss"] == pytest.approx(want["loss"], rel=1e-5)
    assert found["loss"] != pytest.approx(evaluate(model, data)["loss"], rel=1e-5)
    assert found["confusion"] == want["confusion"]


def test_ways_to_ask_are_for_trained_segmenters(run, pictures, capsys):
    how = ["eval", str(run), "--data", str(pictures)]
    assert main([*how, "--flip"]) == 2
    assert "windows, scales and flips are for segmenters" in capsys.readouterr().err
    assert main([*how, "--probe", "knn", "--scales", "2"]) == 2
    assert "do not go with --probe" in capsys.readouterr().err
    assert main([*how, "--stride", "4"]) == 2
    assert "needs a window" in capsys.readouterr().err
