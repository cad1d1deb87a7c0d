"""`vitrail convert`, from foreign files to what `vitrail.load` and `weights=` read."""

import argparse
import dataclasses
import json
import os

import pytest
import torch

import vitrail
from tests.parity import randomise
from vitrail import models
from vitrail.cli import main
from vitrail.cli.convert import recognise
from vitrail.models import Preprocessing
from vitrail.segmenters.upernet import UPerNetConfig
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
    err = capsys.readouterr().err
    assert "has no classifier" in err
    assert "(with --train-only head the backbone stays as it is, and the run is a base" in err
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


def test_a_named_layout_is_the_one_that_is_loaded_by(source, tmp_path, capsys):
    target = tmp_path / "m.safetensors"
    assert main(["convert", str(source), str(target), "--layout", "vitrail"]) == 2
    assert "fit efficientvit_m0" in capsys.readouterr().err
    assert not target.exists()


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


def test_a_model_folder_of_schema_1_is_written_anew_in_its_place_or_elsewhere(tmp_path, capsys):
    small = {"dims": (16, 24, 32), "depths": (1, 1, 1), "key_dim": 8}
    model = vitrail.create_model("efficientvit_m0", classes=["ant", "bee"], image_size=64, **small)
    folder = vitrail.save(model, tmp_path / "old", metrics={"top1": 0.75})
    path = folder / "config.json"
    now = json.loads(path.read_text())
    old = {k: v for k, v in now.items() if k not in ("config_sha256", "parts")}
    old |= {"schema_version": 1, "config": now["parts"]["backbone"]}
    path.write_text(json.dumps(old))
    with pytest.warns(UserWarning, match="schema 1"):
        assert main(["convert", str(folder), str(tmp_path / "new")]) == 0
    assert json.loads(path.read_text()) == old, "the source is as it was"
    with pytest.warns(UserWarning, match="schema 1"):
        assert main(["convert", str(folder)]) == 0
    assert f"wrote {folder}: efficientvit_m0" in capsys.readouterr().out
    for written in (folder, tmp_path / "new"):
        assert json.loads((written / "config.json").read_text()) == now
        assert json.loads((written / "metrics.json").read_text()) == {"top1": 0.75}
        assert "| top1 | 0.75 |" in (written / "README.md").read_text()
        assert vitrail.load(written).info == model.info


@pytest.mark.parametrize("flags", [[], ["--model", "efficientvit_m0"]])
def test_only_a_model_folder_without_flags_needs_no_target(source, tmp_path, capsys, flags):
    folder = tmp_path / "m"
    small = {"dims": (16, 24, 32), "depths": (1, 1, 1), "key_dim": 8}
    vitrail.save(vitrail.create_model("efficientvit_m0", num_classes=2, **small), folder)
    before = (folder / "config.json").stat().st_mtime_ns
    given = [str(folder), *flags] if flags else [str(source)]
    assert main(["convert", *given]) == 2
    assert "vitrail convert needs a TARGET too" in capsys.readouterr().err
    assert (folder / "config.json").stat().st_mtime_ns == before
    assert main(["convert", str(folder), str(folder)]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.fixture
def small_upernet(monkeypatch):
    head = dataclasses.replace(
        models.HEADS["upernet"], config=UPerNetConfig(dim=12, auxiliary_dim=10)
    )
    monkeypatch.setitem(models.HEADS, "upernet", head)
    model = vitrail.create_model("upernet/efficientvit_m0", num_classes=5)
    randomise(model)
    return model


def test_a_dense_model_in_foreign_names_becomes_a_model_folder(
    small_upernet, peer, tmp_path, capsys
):
    """The head in mmsegmentation's names, the backbone in timm's."""
    names = {
        "head.fc.": "decode_head.conv_seg.",
        "head.lateral.": "decode_head.lateral_convs.",
        "head.smooth.": "decode_head.fpn_convs.",
        "head.fuse.": "decode_head.fpn_bottleneck.",
        "head.bottleneck.": "decode_head.bottleneck.",
        "auxiliary.conv.": "auxiliary_head.convs.0.",
        "auxiliary.fc.": "auxiliary_head.conv_seg.",
    }
    state = {f"backbone.{k}": v for k, v in peer.state_dict().items() if not k.startswith("head.")}
    for key, value in small_upernet.state_dict().items():
        if not key.startswith("backbone."):
            new = next((key.replace(a, b) for a, b in names.items() if key.startswith(a)), key)
            if key.startswith("head.pools."):
                place, rest = key.removeprefix("head.pools.").split(".", 1)
                new = f"decode_head.psp_modules.{place}.1.{rest}"
            state[new] = value
    torch.save({"state_dict": state}, tmp_path / "seg.pth")
    (tmp_path / "names.txt").write_text("a\nb\nc\nd\ne\n")
    convert = ["convert", str(tmp_path / "seg.pth")]
    how = ["--model", "upernet/efficientvit_m0", "--classes", str(tmp_path / "names.txt")]
    assert main([*convert, str(tmp_path / "m"), *how]) == 0
    said = capsys.readouterr().out
    assert "layout 'timm, vitrail'" in said
    assert "upernet/efficientvit_m0" in said
    assert "5 classes" in said
    model = vitrail.load(tmp_path / "m")
    assert model.classes == tuple("abcde")
    assert (model.preprocessing.mode, model.preprocessing.size) == ("fit", (512, 512))
    want = vitrail.create_backbone("efficientvit_m0", weights=peer.state_dict()).state_dict()
    want = {f"backbone.{k}": v for k, v in want.items()}
    want |= {k: v for k, v in small_upernet.state_dict().items() if k not in want}
    for key, value in model.state_dict().items():
        assert torch.equal(value, want[key]) or key.endswith("num_batches_tracked"), key
    assert main([*convert, str(tmp_path / "no"), *how, "--layout", "vitrail"]) == 2
    assert not (tmp_path / "no").exists()
    torch.save(peer.state_dict(), tmp_path / "peer.pth")
    assert main(["convert", str(tmp_path / "peer.pth"), str(tmp_path / "no"), *how[:2]]) == 2
    assert "does not fit the head and auxiliary" in capsys.readouterr().err
