"""What the commands make of a model of images and captions."""

import json

import pytest
import torch

import vitrail
from tests.train.conftest import CLASSES, TINY, TOWERS, tiny_config
from tests.train.test_native import NATIVE
from vitrail.cli import main
from vitrail.data import open_data
from vitrail.towers import zero_shot
from vitrail.train.evaluate import evaluate
from vitrail.train.folder import RunFolder
from vitrail.train.trainer import train
from vitrail_runtime.errors import InputError


@pytest.fixture(scope="module")
def learned(pairs, tmp_path_factory):
    out = tmp_path_factory.mktemp("learned") / "run"
    train(tiny_config(pairs, out, **TINY["contrast"].settings, epochs=20, eval_every=20, lr=5e-3))
    return out


def test_a_tiny_model_learns_which_caption_an_image_has(learned):
    row = RunFolder(learned).rows()[-1]
    assert row["recall"] > 0.6  # by chance one of three
    assert row["zero_shot"] > 0.8


def test_class_folders_are_measured_by_the_names_of_their_classes(learned, pictures, capsys):
    assert main(["eval", str(learned), "--data", str(pictures), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    data = open_data(pictures, "val")
    want = evaluate(zero_shot(vitrail.load(learned / "best"), CLASSES), data)
    assert said["top1"] == want["top1"] > 0.8
    assert said["num_images"] == 12
    assert said["classes"] == list(CLASSES)


def test_predict_looks_for_the_names_that_it_is_given(learned, pictures, capsys):
    images = sorted(map(str, (pictures / "val" / "top").glob("*.png")))
    names = ["--classes", "top", "right"]
    assert main(["predict", str(learned), *images, "--json", *names]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["label"] for line in lines] == ["top"] * 4
    assert all({entry["label"] for entry in line["top"]} == {"top", "right"} for line in lines)
    assert main(["predict", str(learned), *images, "--json"]) == 0
    assert "left" in capsys.readouterr().out  # one of the training data's own


def test_what_goes_with_no_such_model_is_told(learned, pairs, pictures, tmp_path, capsys):
    config = tiny_config(pairs, tmp_path / "run", **TOWERS, accumulate=2)
    with pytest.raises(InputError, match="--accumulate 2 would hold each part's images"):
        train(config)
    with pytest.raises(
        InputError, match=r"'contrast', which learns from captions, but .* holds labels"
    ):
        train(tiny_config(pictures, tmp_path / "run", **TOWERS))
    long = TOWERS | {"head_fields": TOWERS["head_fields"] | {"context": 4}}
    train(tiny_config(pairs, tmp_path / "cut", **long, max_steps=1, epochs=1))
    said = capsys.readouterr()
    assert "24 of 24 captions are longer than the 4 tokens" in said.out + said.err


def test_a_run_from_its_weights_keeps_their_words(learned, pairs, tmp_path):
    (tmp_path / "set").mkdir()
    for split in ("train", "val"):
        (tmp_path / "set" / split).symlink_to(pairs / split)
    text = (pairs / "pairs.csv").read_text().replace("a square ", "some other words ")
    (tmp_path / "set" / "pairs.csv").write_text(text)
    how = {"weights": str(learned), "max_steps": 1, "epochs": 1}
    train(tiny_config(tmp_path / "set", tmp_path / "run", **TOWERS, **how))
    first, second = (vitrail.load(p) for p in (learned / "best", tmp_path / "run" / "last"))
    assert first.merges == second.merges
    assert len(first.merges) > 5
    train(tiny_config(tmp_path / "set", tmp_path / "new", **TOWERS, max_steps=1, epochs=1))
    assert vitrail.load(tmp_path / "new" / "last").merges != first.merges


def test_the_image_tower_can_stay_as_it_is(learned, pairs, tmp_path):
    how = {"weights": str(learned), "max_steps": 2, "epochs": 1, "train_only": "head"}
    train(tiny_config(pairs, tmp_path / "run", **TOWERS, **how))
    first, second = (vitrail.load(p) for p in (learned / "best", tmp_path / "run" / "last"))
    same = {k: torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items()}
    assert all(value for k, value in same.items() if k.startswith("backbone."))
    assert not same["text.proj.weight"]
    assert not same["pairs.log_scale"]


def test_images_with_captions_are_trained_on_packed(pairs, tmp_path):
    config = tiny_config(pairs, tmp_path / "run", **(NATIVE | TOWERS | {"epochs": 2}))
    train(config)
    assert RunFolder(tmp_path / "run").rows()[-1]["num_images"] == 12
    assert vitrail.load(tmp_path / "run" / "last").preprocessing.mode == "native"
