"""`vitrail convert`, from foreign files to what `vitrail.load` and `weights=` read."""

import argparse
import json
import os

import pytest
import torch

import vitrail
from vitrail.cli import main
from vitrail.cli.convert import recognise
from vitrail.models import Preprocessing
from vitrail.weights import layouts
from vitrail.weights.described import described
from vitrail.weights.files import Checkpoint
from vitrail_runtime.errors import InputError

timm = pytest.importorskip("timm")


@pytest.fixture(scope="module")
def peer():
    torch.manual_seed(0)
    model = timm.create_model("efficientvit_m0", num_classes=3).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.fixture
def source(peer, tmp_path):
    path = tmp_path / "downloaded.pth"
    torch.save({"model": peer.state_dict(), "args": argparse.Namespace(epochs=300)}, path)
    return path


def same_answers(model, peer):
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), peer(x), rtol=1e-4, atol=1e-5)


def test_a_foreign_file_becomes_a_model_folder_that_answers_the_same(
    peer, source, tmp_path, capsys
):
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n\n")
    assert main(["convert", str(source), str(tmp_path / "m"), "--classes", str(names)]) == 0
    said = capsys.readouterr().out
    assert "layout 'timm'" in said
    assert "took the entry 'model'" in said
    assert "efficientvit_m0, 2.16 M parameters, 3 classes" in said
    model = vitrail.load(tmp_path / "m")
    assert model.classes == ("ant", "bee", "cat")
    same_answers(model, peer)


def test_a_bare_file_serves_as_weights(peer, source, tmp_path):
    target = tmp_path / "new" / "w.safetensors"
    assert main(["convert", str(source), str(target)]) == 0
    model = vitrail.create_model("efficientvit_m0", num_classes=3, weights=target)
    assert model.weights_report.layout == "vitrail"
    same_answers(model, peer)


def test_weights_without_a_head_make_a_bare_file_and_no_folder(peer, tmp_path, capsys):
    state = {k: v for k, v in peer.state_dict().items() if not k.startswith("head.")}
    torch.save(state, tmp_path / "backbone.pth")
    assert main(["convert", str(tmp_path / "backbone.pth"), str(tmp_path / "m")]) == 2
    assert "has no classifier" in capsys.readouterr().err
    target = tmp_path / "b.safetensors"
    assert main(["convert", str(tmp_path / "backbone.pth"), str(target)]) == 0
    assert "no classifier" in capsys.readouterr().out
    model = vitrail.create_model("efficientvit_m0", num_classes=5, weights=target)
    assert "head.linear.weight" in model.weights_report.new


def test_a_timm_folder_tells_its_size_and_preprocessing(peer, tmp_path, capsys):
    folder = tmp_path / "hub"
    folder.mkdir()
    torch.save(peer.state_dict(), folder / "pytorch_model.bin")
    cfg = {
        "input_size": [3, 64, 64],
        "mean": [0.5] * 3,
        "crop_pct": 1.0,
        "interpolation": "lanczos",
    }
    config = {"architecture": "efficientvit_m0", "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["convert", str(folder), str(tmp_path / "m")]) == 0
    assert "resampled" in capsys.readouterr().out
    model = vitrail.load(tmp_path / "m")
    assert model.info.config.image_size == 64
    assert model.preprocessing.size == (64, 64)
    assert model.preprocessing.mean == (0.5, 0.5, 0.5)
    assert model.preprocessing.interpolation == "lanczos"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "efficientvit_m1"], "these weights look like efficientvit_m0"),
        (["--model", "efficientvit_x"], "did you mean"),
        (["--layout", "tim"], "did you mean 'timm'"),
        (["--classes", "two.txt"], "names 2 classes, but the weights have 3"),
        (["--classes", "none.txt"], "none.txt cannot be read"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_is_written(
    source, tmp_path, monkeypatch, capsys, flags, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.txt").write_text("a\nb\n")
    before = sorted(os.listdir())
    assert main(["convert", str(source), "m", *flags]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "Traceback" not in captured.err
    assert sorted(os.listdir()) == before


def test_weights_of_no_known_model_say_so(tmp_path, capsys):
    torch.save({"a.weight": torch.ones(2)}, tmp_path / "w.pth")
    assert main(["convert", str(tmp_path / "w.pth"), str(tmp_path / "m")]) == 2
    assert "looks like no registered model; its keys are a.weight" in capsys.readouterr().err


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_with_code_ends_with_one_message_and_nothing_executed(tmp_path, capsys):
    torch.save({"model": Bomb(str(tmp_path / "executed"))}, tmp_path / "w.pth")
    assert main(["convert", str(tmp_path / "w.pth"), str(tmp_path / "m")]) == 2
    assert "nothing was executed" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["w.pth"]


@pytest.mark.parametrize(
    ("source", "architecture", "expected"),
    [
        ("files/deit_tiny_patch16_224-a1311bcf.pth", "", "deit_tiny_patch16"),
        ("files/deit_tiny_patch16.pth", "", "deit_tiny_patch16"),
        ("hf:owner/name@0123", "vit_tiny_patch16_224", "vit_tiny_patch16"),
        ("hf:timm/vit_tiny_patch16_224.augreg@0123", "", "vit_tiny_patch16"),
    ],
)
def test_of_twins_in_shape_the_one_that_the_source_names_is_taken(
    monkeypatch, source, architecture, expected
):
    names = ["deit_tiny_patch16", "vit_tiny_patch16"]
    twins = [(name, "timm") for name in names]
    monkeypatch.setattr(layouts, "look_alikes", lambda state: twins)
    assert recognise(Checkpoint({}, source), architecture) == expected
    with pytest.raises(InputError, match="fits 2 models: deit_tiny_patch16, vit_tiny_patch16; say"):
        recognise(Checkpoint({}, "files/best.pth"), "")


def test_a_target_that_is_there_is_not_written_over_without_asking(source, tmp_path, capsys):
    target = tmp_path / "w.safetensors"
    target.write_bytes(b"precious")
    assert main(["convert", str(source), str(target)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert target.read_bytes() == b"precious"
    assert main(["convert", str(source), str(target), "--overwrite"]) == 0
    assert target.stat().st_size > 1_000_000


@pytest.mark.parametrize(
    ("config", "preprocessor", "expected"),
    [
        ({}, {}, {}),
        (
            {
                "pretrained_cfg": {
                    "input_size": [3, 384, 320],
                    "crop_mode": "squash",
                    "std": [1, 1, 1],
                }
            },
            {},
            {"size": (384, 320), "mode": "squash", "std": (1.0, 1.0, 1.0)},
        ),
        (
            {"model_type": "vit"},
            {"image_mean": [0.5] * 3, "size": {"height": 224, "width": 224}, "resample": 2},
            {
                "mean": (0.5,) * 3,
                "mode": "squash",
                "crop_pct": 1.0,
                "interpolation": "bilinear",
            },
        ),
        (
            {},
            {"do_center_crop": True, "size": {"shortest_edge": 256}, "crop_size": 224},
            {"size": (224, 224), "mode": "crop", "crop_pct": 0.875},
        ),
        ({"pretrained_cfg": {"mean": "?", "input_size": 3, "crop_mode": "border"}}, {}, {}),
    ],
)
def test_preprocessing_is_read_as_its_writers_meant_it(config, preprocessor, expected):
    default = Preprocessing(crop_pct=0.9)
    got = described(config, preprocessor, default).preprocessing
    wanted = {"crop_pct": 0.9} | expected
    assert got == Preprocessing(**wanted)


def test_class_names_of_hub_folders_are_made_distinct():
    config = {"id2label": {"0": "crane", "1": "owl", "2": "crane"}}
    assert described(config, {}, Preprocessing()).classes == ("crane (0)", "owl", "crane (2)")
    unnamed = {"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}
    assert described(unnamed, {}, Preprocessing()).classes is None
    assert described({"id2label": {"1": "x"}}, {}, Preprocessing()).classes is None
