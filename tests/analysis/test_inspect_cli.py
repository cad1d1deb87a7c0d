"""`vitrail inspect` at a terminal."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.cli import main
from vitrail.models import create_model, load, save
from vitrail.train.config import TrainConfig


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(3):
        pixels = rng.integers(0, 255, (40, 60 + 8 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of a tiny ViT whose class is not all zeros."""
    torch.manual_seed(0)
    fields = {"embed_dim": 32, "depth": 4, "num_heads": 4, "patch_size": 8, "image_size": 32}
    model = create_model("vit_tiny_patch16", num_classes=3, **fields)
    torch.nn.init.normal_(model.head.fc.weight)
    return save(model, tmp_path_factory.mktemp("model") / "small")


def test_collapse_writes_a_page_that_says_what_was_found(pictures, trained, tmp_path, capsys):
    out = tmp_path / "new folder" / "page.html"
    assert (
        main(["inspect", "collapse", str(trained), "--images", str(pictures), "--out", str(out)])
        == 0
    )
    said = capsys.readouterr().out
    assert "of 4 attention blocks have maps at least 0.90 similar to the block before" in said
    assert "random" not in said
    text = out.read_text(encoding="utf-8")
    assert said.splitlines()[0] in text
    assert text.count("<svg") == 3
    assert text.count("<figure>") == 13  # the picture, and three heads of four blocks
    assert "http" not in text.replace("http://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")


def test_several_models_stand_side_by_side_and_random_weights_are_said(
    pictures, trained, tmp_path, capsys
):
    out = tmp_path / "page.html"
    argv = ["inspect", "collapse", str(trained), "efficientvit_m0", "--images", str(pictures)]
    assert main([*argv, "--count", "1", "--out", str(out), "--json", "--threshold", "0.5"]) == 0
    captured = capsys.readouterr()
    studies = json.loads(captured.out)
    assert [s["model"] for s in studies] == [str(trained), "efficientvit_m0"]
    assert [len(s["layers"]) for s in studies[1]["stages"]] == [1, 2, 3]
    assert "random weights: efficientvit_m0" in captured.err
    text = out.read_text(encoding="utf-8")
    assert "The weights of efficientvit_m0 are random" in text
    assert "similar blocks of all attention blocks" in text


def test_heads_writes_a_page_with_distances(pictures, trained, tmp_path, capsys):
    out = tmp_path / "page.html"
    assert (
        main(["inspect", "heads", str(trained), "--images", str(pictures), "--out", str(out)]) == 0
    )
    said = capsys.readouterr().out
    assert "the most alike heads are in blocks." in said
    assert "pixels away on average in the first layer" in said
    assert "mean attention distance of each head" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["collapse", "mobilenetv1_100"], "has no attention maps to study"),
        (["collapse", "vit_tinny"], "unknown model 'vit_tinny'; did you mean"),
        (["collapse", "runs/none"], "neither a run folder nor a model's name"),
        (["heads"], "say which model"),
        (["collapse", "vit_tiny_patch16", "--count", "0"], "at least 1 picture"),
        (["collapse", "vit_tiny_patch16", "--threshold", "2"], "from -1 to 1"),
        (["nonsense"], "unknown action 'nonsense'"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(argv, message, pictures, capsys):
    asked = [*argv, "--images", str(pictures)] if argv != ["nonsense"] else argv
    assert main(["inspect", *asked]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1


def test_a_folder_without_pictures_is_named(tmp_path, capsys):
    assert main(["inspect", "heads", "efficientvit_m0", "--images", str(tmp_path)]) == 2
    assert f"no pictures in {tmp_path}" in capsys.readouterr().err


def test_a_broken_picture_is_named(tmp_path, trained, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    assert main(["inspect", "heads", str(trained), "--images", str(tmp_path)]) == 2
    assert "broken.jpg" in capsys.readouterr().err


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """Class folders with the names of the trained model's classes."""
    folder = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(1)
    for split in ("train", "val"):
        for name in "012":
            (folder / split / name).mkdir(parents=True)
            for i in range(3):
                pixels = rng.integers(0, 255, (36, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


def test_importance_writes_a_page_and_a_slim_model_that_training_takes(
    trained, labelled, tmp_path, capsys
):
    out = tmp_path / "slim"
    argv = ["inspect", "importance", str(trained), "--data", str(labelled), "--out", str(out)]
    assert main([*argv, "--slim", "0.5", "--count", "6"]) == 0
    said = capsys.readouterr().out
    assert "qk_dim: None -> 4" in said
    assert "mlp_ratio: 4.0 -> 2.0" in said
    assert "parameters: 0.0" in said
    assert "Q and K, a head" in (out / "importance.html").read_text(encoding="utf-8")
    slim = load(out)
    assert (slim.info.config.qk_dim, slim.info.config.mlp_ratio) == (4, 2.0)
    # What `vitrail train --weights OUT` starts from is the slim model, width for width.
    from vitrail.train.build import build_model, settled

    config = settled(TrainConfig(data=str(labelled), weights=str(out)))
    again = build_model(config, slim.classes)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in slim.state_dict().items())


def test_importance_alone_writes_no_model(trained, labelled, tmp_path, capsys):
    argv = ["inspect", "importance", str(trained), "--data", str(labelled), "--count", "3"]
    assert main([*argv, "--out", str(tmp_path / "page")]) == 0
    assert "importance is gathered in the fewest channels in" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "page").iterdir()] == ["importance.html"]


def test_a_slim_model_does_not_overwrite_the_one_it_came_from(trained, labelled, capsys):
    argv = ["inspect", "importance", str(trained), "--data", str(labelled), "--slim", "0.5"]
    assert main([*argv, "--out", str(trained)]) == 2
    assert "holds the model itself" in capsys.readouterr().err
    assert main([*argv[:-1], "1.5", "--out", str(trained)]) == 2
    assert "above 0 and up to 1" in capsys.readouterr().err
