"""The command as a whole: its help, its table of models, its demo, and how it refuses."""

import io
import json
import os
import re
import sys

import pytest
from PIL import Image

from vitrail.cli import VERBS, main
from vitrail.models import create_model, save


def test_help_names_every_verb(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"  {verb} " in out for verb in VERBS)


@pytest.mark.parametrize("verb", [v for v in VERBS if v not in ("adapt", "data", "inspect")])
def test_every_verb_has_help(verb, capsys):
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    assert f"vitrail {verb}" in capsys.readouterr().out


def test_an_unknown_verb_is_refused_with_the_closest(capsys):
    assert main(["trian"]) == 2
    err = capsys.readouterr().err
    assert "did you mean 'train'" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_names_that_are_no_text_are_printed_as_escapes(tmp_path, monkeypatch, encoding):
    names = [os.fsdecode(b"caf\xe9"), "th\u00e9"]
    root, run = tmp_path / "data", tmp_path / "run"
    for i, name in enumerate(names):
        for split in ("train", "val"):
            (root / split / name).mkdir(parents=True)
            file = root / split / name / os.fsdecode(b"\xff.png")
            Image.new("RGB", (40, 33), (90 * i, 9, 200)).save(file)
    (root / "val" / names[0] / os.fsdecode(b"\xfe.jpg")).write_bytes(b"gone")
    model = create_model(
        "efficientvit_m0", classes=names, dims=(16, 24, 32), depths=(1, 1, 1), key_dim=8
    )
    save(model, run)
    picture = str(root / "val" / names[1] / os.fsdecode(b"\xff.png"))
    commands = [
        (["data", "check", str(root)], 1),
        (["data", "show", str(root), "--out", str(tmp_path / "sheet.png")], 0),
        (["eval", str(run), "--data", str(root), "--skip-broken"], 0),
        (["eval", str(run), "--data", str(root), "--skip-broken", "--json"], 0),
        (["predict", str(run), picture], 0),
        (["predict", str(run), picture, "--json"], 0),
    ]
    said = []
    for argv, code in commands:
        stdout = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(argv) == code, argv
        stdout.flush()
        said.append(stdout.buffer.getvalue().decode(encoding))
    assert "\\udcfe.jpg" in said[0]
    assert "caf\\udce9" in said[2]
    assert json.loads(said[3])["classes"] == names
    assert json.loads((run / "eval.json").read_text("utf-8"))["classes"] == names
    assert json.loads(said[5])["path"] == picture


def test_models_prints_a_table(capsys):
    assert main(["models", "efficientvit_*"]) == 0
    out = capsys.readouterr().out
    assert "efficientvit_m5" in out
    assert "12.47" in out
    assert "77.1" in out
    assert "6 models" in out
    lines = out.splitlines()
    assert "efficientvit_m0: --weights hf:timm/efficientvit_m0.r224_in1k" in lines
    assert any(line.endswith("v1.0/efficientvit_m5.pth") for line in lines), "a broken address"


def test_many_models_are_listed_without_their_weights(capsys):
    assert main(["models", "vit_*"]) == 0
    out = capsys.readouterr().out
    assert "hf:" not in out
    assert "released weights: vitrail models NAME" in out
    assert max(map(len, out.splitlines())) <= 88


def test_models_prints_json_lines(capsys):
    assert main(["models", "vit_small_patch14*", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [r["strides"] for r in rows] == [[14]] * len(rows)
    assert all(r["weights"] for r in rows)


def test_the_stored_counts_are_what_counting_gives():
    from vitrail.cli.models import count, stored_counts

    for name in ("efficientvit_m0", "mobilevit_xxs"):
        assert stored_counts()[name] == count(name)


def test_every_model_has_stored_counts():
    from vitrail.cli.models import stored_counts
    from vitrail.models import list_models

    assert set(stored_counts()) == set(list_models())


def test_models_refuses_an_unknown_name_with_one_message(capsys):
    assert main(["models", "nonsense_9"]) == 2
    assert "unknown model 'nonsense_9'" in capsys.readouterr().err


def test_a_demo_into_a_file_is_refused_and_leaves_it(tmp_path, capsys):
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    assert main(["demo", "--out", str(file)]) == 2
    assert "digits cannot be made" in capsys.readouterr().err
    assert file.read_text() == "mine"


@pytest.mark.slow
def test_the_demo_goes_the_whole_path(tmp_path, capsys):
    """Two epochs only: the score of a whole demo is in docs/results.md."""
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--epochs", "2"]) == 0
    said = capsys.readouterr().out
    assert "test accuracy 0." in said.splitlines()[-1]
    assert (out / "predictions.png").is_file()
    assert "Confusion matrix" in (out / "report.html").read_text()
    assert (out / "run" / "best" / "model.safetensors").is_file()
    assert main(["predict", str(out / "run"), str(out / "digits" / "test" / "3"), "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {json.loads(line)["label"] for line in lines} <= set("0123456789")


@pytest.mark.slow
def test_the_demo_of_segmentation_goes_the_whole_path(tmp_path, capsys):
    out = tmp_path / "demo"
    assert main(["demo", "--task", "segment", "--out", str(out), "--epochs", "1"]) == 0
    assert re.fullmatch(r"test mIoU 0\.\d\d", capsys.readouterr().out.splitlines()[-1])
    assert (out / "predictions.png").is_file()
    assert "Worst images" in (out / "report.html").read_text()


@pytest.mark.slow
def test_the_demo_of_captions_learns_digits_by_their_names(tmp_path, capsys):
    """All of it: by chance one of ten names is right, and one of 80 captions."""
    out = tmp_path / "demo"
    assert main(["demo", "--task", "contrast", "--out", str(out)]) == 0
    assert "test recall@1 0." in capsys.readouterr().out
    kept = json.loads((out / "run" / "best" / "metrics.json").read_text())
    assert kept["zero_shot"] > 0.8
    assert kept["recall"] > 0.8
    assert (out / "predictions.png").is_file()
