"""`vitrail predict` from the command line: what is printed where, what is written, what is refused."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.cli import main
from vitrail.cli.predict import print_table
from vitrail.models import create_model, save
from vitrail_runtime.prediction import Prediction

CLASSES = ["ant", "[bold]bee", "cat ä"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("run")
    save(create_model("efficientvit_m0", classes=CLASSES), folder / "best")
    return str(folder)


@pytest.fixture
def pictures(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.png", "a.jpg", "sub/Bild ä.png"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return tmp_path / "in"


def test_a_table_names_every_picture_with_its_label_and_score(trained, pictures, capsys):
    assert main(["predict", trained, str(pictures)]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0].split() == ["picture", "label", "score", "or"]
    assert [line.split("  ")[0] for line in lines[1:]] == [
        str(pictures / name) for name in ("a.jpg", "a.png", "sub/Bild ä.png")
    ]
    assert any(name in lines[1] for name in CLASSES)
    assert "3 pictures in" in err
    assert "images/s" in err


def test_json_lines_are_all_that_stands_on_stdout(trained, pictures, capsys, monkeypatch):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # with a bar on stderr
    assert main(["predict", trained, f"{pictures}/**/*.png", "--json", "--top-k", "2"]) == 0
    out, _ = capsys.readouterr()
    first, second = map(json.loads, out.splitlines())
    assert first["path"] == str(pictures / "a.png")
    assert second["path"] == str(pictures / "sub/Bild ä.png")
    assert first["size"] == [30, 40]
    assert first["label"] in CLASSES
    assert [first["label"], first["score"]] == [first["top"][0]["label"], first["top"][0]["score"]]
    assert len(first["top"]) == 2
    assert 0 < first["top"][1]["score"] <= first["score"] < 1


def test_out_gets_annotated_pictures_and_the_predictions(trained, pictures, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    assert main(["predict", f"{trained}/best", str(pictures), "--out", str(out), "--json"]) == 0
    written = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert written == ["a.jpg", "a.png.jpg", "predictions.jsonl", "sub/Bild ä.jpg"]
    assert (out / "predictions.jsonl").read_text() == capsys.readouterr().out
    with Image.open(out / "a.jpg") as drawn:
        assert drawn.width == 320
        assert drawn.height > 240


def test_a_picture_given_twice_is_told_once(trained, pictures, capsys):
    assert main(["predict", trained, str(pictures), str(pictures / "a.png"), "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.fixture
def broken(pictures):
    (pictures / "b.png").write_bytes(b"text")
    return pictures


def test_broken_pictures_end_with_an_error_after_all_results(trained, broken, capsys):
    assert main(["predict", trained, str(broken)]) == 2
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4
    assert "vitrail: 1 of 4 pictures could not be read:" in err
    assert f"{broken / 'b.png'} is not a picture" in err


def test_broken_pictures_are_left_out_and_listed_when_asked(trained, broken, capsys):
    assert main(["predict", trained, str(broken), "--json", "--skip-broken"]) == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert "left out 1 of 4 pictures:" in err
    assert main(["predict", trained, str(broken / "b.png"), "--skip-broken"]) == 2
    assert "none of the pictures could be read" in capsys.readouterr().err


def test_no_copy_ever_overwrites_a_picture(trained, pictures, capsys):
    before = (pictures / "a.jpg").read_bytes()
    assert main(["predict", trained, str(pictures), "--out", str(pictures)]) == 2
    assert "would overwrite the picture" in capsys.readouterr().err
    assert (pictures / "a.jpg").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN"], "say which pictures"),
        (["RUN", "PICTURES/no.jpg"], "no.jpg: no such file or folder"),
        (["RUN", "PICTURES/*.gif"], r"no pictures match"),
        (["RUN", "EMPTY"], "no pictures in"),
        (["EMPTY", "PICTURES"], "is not a saved model (has no config.json)"),
        (["EMPTY/no", "PICTURES"], "is not a saved model (no such folder)"),
        (["RUN", "PICTURES", "--out", "PICTURES/a.png"], "is a file, but a folder is expected"),
        (["RUN", "PICTURES", "--out", "/proc/no"], "cannot write to /proc/no"),
        (["RUN", "PICTURES", "--top-k", "0"], "top_k must be at least 1"),
        (["RUN", "PICTURES", "--batch-size", "0"], "batch_size must be at least 1"),
        (["RUN", "PICTURES", "--device", "gpu"], "cannot use device 'gpu'"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    trained, pictures, tmp_path, capsys, arguments, message
):
    (tmp_path / "empty").mkdir()
    places = {"RUN": trained, "PICTURES": str(pictures), "EMPTY": str(tmp_path / "empty")}
    for name, place in places.items():
        arguments = [a.replace(name, place) if a.startswith(name) else a for a in arguments]
    assert main(["predict", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vitrail: ")
    assert message in err


def test_an_image_on_which_nothing_was_found_has_its_row_in_the_table(capsys):
    labels, scores = np.array([2, 0]), np.array([0.75, 0.2], np.float32)
    found = Prediction(labels, scores, ["cat ä", "ant"], source="cat.png")
    nothing = Prediction(labels[:0], scores[:0], [], boxes=np.zeros((0, 4)), source="empty.png")
    print_table([nothing, found], sys.stdout)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [
        ["empty.png", "nothing", "found"],
        ["cat.png", "cat", "ä", "75.0%", "ant", "20.0%"],
    ]
