"""The report page: its statistics, its advice, and that it is written whole."""

import json
import os
import re
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

from tests.train.conftest import CLASSES, VIT, make_pictures, tiny_config
from vitrail.analysis import page
from vitrail.analysis.report import (
    Scored,
    advice,
    calibration_bins,
    curves,
    expected_calibration_error,
    interval,
)
from vitrail.analysis.saliency import attention_rollout, smooth_gradient
from vitrail.cli import main
from vitrail.cli.train import report_run
from vitrail.data import open_data
from vitrail.train.loop import train
from vitrail_runtime.errors import InputError


def answers(probabilities: np.ndarray, labels: np.ndarray) -> Scored:
    return Scored(probabilities, labels, probabilities.argmax(1), CLASSES)


def scored(seed: int = 0, n: int = 200) -> Scored:
    rng = np.random.default_rng(seed)
    probabilities = rng.dirichlet((0.5, 0.5, 0.5), n)
    return answers(probabilities, rng.integers(0, 3, n))


def test_the_interval_is_wilsons():
    # Wilson (1927) for 8 of 10: 0.4902 to 0.9433.
    assert interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert interval(0, 0) == (0.0, 1.0)


def test_the_confusion_matrix_has_the_truth_in_rows():
    s = scored()
    assert np.array_equal(s.confusion(), confusion_matrix(s.labels, s.predicted))


def test_calibration_error_is_zero_when_confidence_equals_accuracy():
    probabilities = np.array([[0.75, 0.25, 0.0]] * 4)
    perfect = answers(probabilities, np.array([0, 0, 0, 1]))
    assert expected_calibration_error(perfect) == pytest.approx(0)
    sure = answers(np.array([[1.0, 0, 0]] * 4), np.array([0, 0, 1, 1]))
    assert expected_calibration_error(sure) == pytest.approx(0.5)
    assert sum(n for *_, n in calibration_bins(scored())) == 200


@pytest.mark.parametrize(
    ("confidence", "count", "word"),
    [(0.6, 20, ""), (0.6, 1000, "surer"), (0.4, 20, ""), (0.4, 1000, "less sure")],
)
def test_confidence_is_judged_by_what_so_many_pictures_can_tell(confidence, count, word):
    rest = (1 - confidence) / 2
    probabilities = np.array([[confidence, rest, rest]] * count)
    said = " ".join(advice(answers(probabilities, np.arange(count) % 2), []))  # half are right
    assert word in said
    assert bool(word) == ("mean confidence" in said)


def test_the_advice_names_the_confusion_and_what_was_not_measured():
    probabilities = np.array([[0.02, 0.98, 0.0]] * 5 + [[0.9, 0.1, 0.0]] * 5)
    said = " ".join(advice(answers(probabilities, np.zeros(10, int)), []))
    assert "'left' taken for 'right', 5 of 10" in said
    assert "no picture of 'right', 'top'" in said
    assert "over 90 % confidence" in said


def test_rollout_rows_are_shares_that_sum_to_one():
    layers = [torch.rand(2, 3, 5, 5).softmax(-1) for _ in range(4)]
    rolled = attention_rollout(layers)
    torch.testing.assert_close(rolled.sum(-1), torch.ones(2, 5))
    identity = torch.eye(5).expand(1, 2, 5, 5)
    torch.testing.assert_close(attention_rollout([identity])[0], torch.eye(5))


def test_the_gradient_map_is_bright_where_the_score_comes_from():
    class Corner(torch.nn.Module):
        def forward(self, images):
            return images[:, :, 2:6, 20:24].square().sum((1, 2, 3))[:, None]

    values = smooth_gradient(Corner(), torch.randn(3, 24, 32), 0)
    assert values.shape == (24, 32)
    row, column = divmod(int(values.argmax()), 32)
    assert 1 <= row <= 6
    assert 19 <= column <= 24


def test_the_pattern_of_strides_is_smoothed_away():
    class EveryFourth(torch.nn.Module):  # as stride 4 sees it: equally much everywhere
        def forward(self, x):
            return x[..., ::4, ::4].sum((1, 2, 3))[:, None]

    values = smooth_gradient(EveryFourth(), torch.randn(3, 64, 80), 0)[8:-8, 8:-8]
    assert values.std() < 0.01 * values.mean()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    data = make_pictures(root / "data", train=8, val=4)
    config = tiny_config(data, root / "run", **VIT, epochs=1)
    train(config)
    return root / "run", data


def test_eval_writes_the_page_with_every_section(run, tmp_path, capsys):
    folder, data = run
    page = tmp_path / "page.html"
    assert main(["eval", str(folder), "--data", str(data), "--report", str(page)]) == 0
    text = page.read_text()
    for title in (
        "What to look at first",
        "Training",
        "Confusion matrix",
        "Per class",
        "Calibration",
    ):
        assert f"<h2>{title}</h2>" in text
    for title in ("Where the model looks", "Pictures of val", "Configuration and machine"):
        assert f"<h2>{title}</h2>" in text
    assert "attention rollout" in text
    assert all(name in text for name in CLASSES)
    assert not re.search(r"(src|href)=\"?https?:", text)  # nothing is fetched


def test_the_curves_show_both_losses_and_the_advice_that_the_model_learns_by_heart():
    history = [{"step": 10 * i, "loss": 2.0 - 0.3 * i, "lr": 0.1} for i in range(1, 6)]
    losses = (1.6, 1.2, 1.0, 1.3, 1.9)
    history += [
        {"step": 10 * i, "epoch": i, "loss": loss, "top1": 0.5} for i, loss in enumerate(losses, 1)
    ]
    drawn = curves(history)
    assert ">training, with augmentation and smoothing<" in drawn
    assert ">validation<" in drawn
    said = " ".join(advice(scored(), history))
    assert (
        "lowest at step 30 (1.00) and ended at 1.90: the model learns its training pictures by"
        in said
    )
    assert "by heart" not in " ".join(advice(scored(), history[:-2]))


def test_names_in_other_alphabets_are_drawn_without_a_word_of_missing_letters():
    fig, ax = page.figure()
    ax.set_title("猫")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "猫" in page.svg(fig)


def test_a_page_or_scores_that_cannot_be_written_are_one_message(
    run, tmp_path, capsys, monkeypatch
):
    folder, data = run
    how = ["eval", str(folder), "--data", str(data)]
    assert main([*how, "--report", str(tmp_path)]) == 2
    assert "is a folder; name a file, such as" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main([*how, "--report", str(tmp_path / "file" / "page.html")]) == 2
    assert "page.html cannot be written" in capsys.readouterr().err

    def refuse(path, text):
        raise InputError(f"{path} cannot be written: read-only")

    monkeypatch.setattr("vitrail.weights.write_text", refuse)
    assert main(how) == 2
    told = capsys.readouterr()
    assert "top-1" in told.out
    assert "eval.json cannot be written" in told.err


def test_a_report_does_not_go_with_a_probe(run, tmp_path, capsys):
    folder, data = run
    flags = ["--probe", "knn", "--report", str(tmp_path / "r.html")]
    assert main(["eval", str(folder), "--data", str(data), *flags]) == 2
    assert "--report" in capsys.readouterr().err


def test_eval_holds_out_what_the_run_held_out(tmp_path, capsys):
    """Data without a val split: a run that kept 25 % is measured on those, not on 20 % of its own making."""
    data = make_pictures(tmp_path / "data", train=12, val=4)
    for split in ("val", "train"):
        for picture in (data / split).rglob("*.png"):
            target = data / picture.parent.name / f"{split}-{picture.name}"
            target.parent.mkdir(exist_ok=True)
            picture.rename(target)
    for split in ("val", "train"):
        for folder in [*(data / split).iterdir(), data / split]:
            folder.rmdir()
    config = tiny_config(data, tmp_path / "run", **VIT, epochs=1, val_fraction=0.5)
    train(config)
    assert main(["eval", str(tmp_path / "run"), "--data", str(data), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 24
    assert len(open_data(data, "val")) < 24


def test_class_names_that_are_no_text_or_look_like_formulas_are_shown(tmp_path):
    data = make_pictures(tmp_path / "data", train=2, val=1)
    for split in ("train", "val"):
        (data / split / "left").rename(data / split / os.fsdecode(b"caf\xe9"))
        (data / split / "right").rename(data / split / r"a$\frac$")
    config = tiny_config(data, tmp_path / "run", **VIT, epochs=1)
    train(config)
    text = report_run(config, tmp_path / "run").read_text(encoding="utf-8")
    assert r"caf\udce9" in text
    assert r"a$\frac$" in text
