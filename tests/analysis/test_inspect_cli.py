"""`vitrail inspect` at a terminal."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.analysis import page
from vitrail.analysis.attention import study_attention
from vitrail.analysis.importance import importance
from vitrail.analysis.importance_page import importance_words
from vitrail.bench.macs import count_macs, count_params
from vitrail.cli import main
from vitrail.cli.inspect import open_model, prepared
from vitrail.models import create_model, load, save
from vitrail.train.config import TrainConfig
from vitrail_runtime.errors import InputError


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
    assert page.flowing("The weights of efficientvit_m0 are random") in text
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
        (["collapse", "vit_tiny_patch16", "--threshold", "-1.1"], "from -1 to 1"),
        (["collapse", "vit_tiny_patch16", "--within", "0"], "--within must be at least 1 block"),
        (["heads", "vit_tiny_patch16", "--device", "cuda:77"], "cannot use device 'cuda:77'"),
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
    from vitrail.train.build import build_model, resolve

    config = resolve(TrainConfig(data=str(labelled), weights=str(out)))
    again = build_model(config, slim.classes)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in slim.state_dict().items())


def test_importance_alone_writes_no_model(trained, labelled, tmp_path, capsys):
    argv = ["inspect", "importance", str(trained), "--data", str(labelled), "--count", "3"]
    assert main([*argv, "--out", str(tmp_path / "page")]) == 0
    assert "importance is gathered in the fewest channels in" in capsys.readouterr().out
    assert [p.name for p in (tmp_path / "page").iterdir()] == ["importance.html"]


@pytest.fixture
def weighed(monkeypatch):
    """The batches that importance is measured on."""
    from vitrail.analysis import importance

    measure, seen = importance.importance, []

    def keep(model, batches):
        seen.extend(batches)
        return measure(model, seen)

    monkeypatch.setattr(importance, "importance", keep)
    return seen


def test_importance_is_measured_on_images_evenly_from_all_with_the_models_labels(
    labelled, tmp_path, capsys, weighed
):
    torch.manual_seed(0)
    fields = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8, "image_size": 32}
    model = create_model("vit_tiny_patch16", classes=("2", "0", "1"), **fields)
    torch.nn.init.normal_(model.head.fc.weight)
    folder = save(model, tmp_path / "model")
    argv = ["inspect", "importance", str(folder), "--data", str(labelled)]
    assert main([*argv, "--count", "5", "--batch-size", "3", "--out", str(tmp_path / "a")]) == 0
    # Of nine training images of the classes 0, 0, 0, 1, 1, 1, 2, 2, 2: numbers 0, 2, 4, 6 and 8.
    assert [len(labels) for _, labels in weighed] == [3, 2]
    assert torch.cat([labels for _, labels in weighed]).tolist() == [1, 1, 2, 0, 0]
    files = [f"train/{c}/{i}.png" for c, i in ("00", "02", "11", "20", "22")]
    expected = torch.cat(list(prepared([labelled / f for f in files], model.preprocessing)))
    given = torch.cat([images for images, _ in weighed]).flatten(0, 1)
    torch.testing.assert_close(given, expected)
    found = importance(model.eval(), weighed)
    assert importance_words(str(folder), found) in capsys.readouterr().out
    weighed.clear()
    assert main([*argv, "--split", "val", "--out", str(tmp_path / "a")]) == 0
    assert [len(labels) for _, labels in weighed] == [9]  # no more than there are


def test_broken_images_stop_importance_unless_they_may_be_left_out(
    trained, labelled, tmp_path, capsys
):
    shutil.copytree(labelled, tmp_path / "data")
    (tmp_path / "data" / "train" / "0" / "1.png").write_bytes(b"not an image")
    argv = ["inspect", "importance", str(trained), "--data", str(tmp_path / "data")]
    argv += ["--out", str(tmp_path / "page")]
    assert main(argv) == 2
    assert "1.png" in capsys.readouterr().err
    assert main([*argv, "--skip-broken"]) == 0
    captured = capsys.readouterr()
    assert "vitrail: " in captured.err
    assert "8 pictures" in (tmp_path / "page" / "importance.html").read_text(encoding="utf-8")


def test_the_price_of_both_models_is_told_and_how_to_go_on(trained, labelled, tmp_path, capsys):
    out = tmp_path / "slim"
    argv = ["inspect", "importance", str(trained), "--data", str(labelled), "--out", str(out)]
    assert main([*argv, "--slim", "0.5"]) == 0
    said = capsys.readouterr().out.splitlines()
    before, after = load(trained), load(out)
    for what, count in (("parameters", count_params), ("MACs", lambda m: count_macs(m, 32, 32))):
        (line,) = [text for text in said if text.startswith(what)]
        unit, place = (1e6, " M") if what == "parameters" else (1e9, " G at 32 x 32")
        counts = [f"{count(m) / unit:.3f}{place}" for m in (before, after)]
        assert line == f"{what}: {counts[0]} -> {counts[1]}"
    assert (
        f"fine-tune it: vitrail train --weights {out} --data {labelled} --out {out}-tuned" in said
    )
    assert f"page: {out / 'importance.html'}" in said


@pytest.fixture
def studied(monkeypatch):
    """The images of each study, in order."""
    from vitrail.analysis import attention

    study, seen = attention.study_attention, []

    def keep(backbone, images, *, name):
        seen.append(list(images))
        return study(backbone, seen[-1], name=name)

    monkeypatch.setattr(attention, "study_attention", keep)
    return seen


def test_images_are_taken_evenly_from_all_and_in_order(trained, tmp_path, studied, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(7):
        Image.new("RGB", (40, 30), (30 * i, 0, 0)).save(folder / f"{i}.png")
    argv = [
        "inspect",
        "heads",
        str(trained),
        "--images",
        str(folder),
        "--out",
        str(tmp_path / "a.html"),
    ]
    model = load(trained)
    for count, taken in (("3", (0, 2, 4)), ("20", range(7))):
        assert main([*argv, "--count", count]) == 0
        expected = list(prepared([folder / f"{i}.png" for i in taken], model.preprocessing))
        assert len(studied[-1]) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(studied[-1], expected, strict=True))
    capsys.readouterr()
    argv[1:2] = ["collapse"]
    assert main([*argv, "--json"]) == 0
    (study,) = json.loads(capsys.readouterr().out)
    expected = study_attention(
        model.backbone, prepared([folder / f"{i}.png" for i in range(7)], model.preprocessing)
    )
    assert study == {**expected.to_dict(), "model": str(trained)}


def test_threshold_and_within_reach_the_words_and_the_page(pictures, trained, tmp_path, capsys):
    out = tmp_path / "page.html"
    argv = ["inspect", "collapse", str(trained), "--images", str(pictures), "--out", str(out)]
    assert main([*argv, "--threshold", "-1", "--within", "2"]) == 0
    said = capsys.readouterr().out
    assert "3 of 4 attention blocks have maps at least -1.00 similar to one of the 2 blocks" in said
    text = out.read_text(encoding="utf-8")
    assert said.splitlines()[0] in text
    assert "<b>3 of 4</b>" in text
    assert f"page: {out}" in said
    assert main([*argv, "--threshold", "1", "--within", "1"]) == 0
    assert "0 of 4 attention blocks" in capsys.readouterr().out


def test_random_weights_are_the_same_at_every_call_and_a_folder_has_its_own(trained):
    name, model, random = open_model("efficientvit_m0", None)
    _, again, _ = open_model("efficientvit_m0", None)
    assert (name, random, model.training) == ("efficientvit_m0", True, False)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    name, model, random = open_model(str(trained), None)
    assert (name, random, model.training) == (str(trained), False, False)
    assert model.info.config.embed_dim == 32
    with pytest.raises(InputError, match="folder with weights of its own; drop --weights"):
        open_model(str(trained), "a.safetensors")


def test_a_named_model_takes_weights(trained, tmp_path):
    torch.manual_seed(3)
    made = create_model("efficientvit_m0")
    folder = save(made, tmp_path / "weights")
    _, model, random = open_model("efficientvit_m0", str(folder))
    assert not random
    assert torch.equal(next(model.parameters()), next(made.parameters()))


def test_a_slim_model_does_not_overwrite_the_one_it_came_from(trained, labelled, capsys):
    argv = ["inspect", "importance", str(trained), "--data", str(labelled), "--slim", "0.5"]
    assert main([*argv, "--out", str(trained)]) == 2
    assert "holds the model itself" in capsys.readouterr().err
    for share in ("1.5", "0"):
        assert main([*argv[:-1], share, "--out", str(trained)]) == 2
        assert "above 0 and up to 1" in capsys.readouterr().err
    assert main([*argv[:-2], "--count", "0"]) == 2
    assert "--count must be at least 1 picture" in capsys.readouterr().err


def test_a_model_is_studied_once(pictures, trained, tmp_path, capsys):
    argv = ["inspect", "heads", str(trained), str(trained), "--images", str(pictures)]
    assert main([*argv, "--count", "1", "--out", str(tmp_path / "a.html")]) == 2
    assert "stands twice among the models" in capsys.readouterr().err


def test_a_page_that_cannot_be_written_is_named(pictures, trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    argv = ["inspect", "heads", str(trained), "--images", str(pictures), "--count", "1"]
    assert main([*argv, "--out", str(tmp_path / "file" / "a.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_help_is_told_without_an_action(capsys):
    for argv in ([], ["--help"], ["-h"]):
        assert main(["inspect", *argv]) == 0
        assert "vitrail inspect collapse MODEL" in capsys.readouterr().out
