"""The report page: its statistics, its advice, and that it is written whole."""

import json
import os
import re
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
from torchmetrics.functional.classification import multiclass_calibration_error

import vitrail
from tests.train.conftest import CLASSES, VIT, make_pictures, tiny_config
from vitrail.analysis import page, report
from vitrail.analysis.report import curves, explain, training_advice
from vitrail.analysis.saliency import attention_rollout, smooth_gradient
from vitrail.cli import main
from vitrail.cli.train import report_run
from vitrail.data import open_data
from vitrail.tasks import section as blocks
from vitrail.tasks.classify_report import (
    Scored,
    advice,
    calibration_bins,
    class_table,
    expected_calibration_error,
    interval,
    looks,
    worst_mistakes,
)
from vitrail.tasks.section import Found, Section, confusions, isolated, shortened
from vitrail.train.trainer import train
from vitrail_runtime.errors import InputError


def answers(probabilities: np.ndarray, labels: np.ndarray) -> Scored:
    return Scored(probabilities, labels, probabilities.argmax(1), CLASSES)


def rendered(section: Section) -> str:
    return "".join(map(page.render, section.blocks))


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
    said = " ".join(advice(answers(probabilities, np.arange(count) % 2)))  # half are right
    assert word in said
    assert bool(word) == ("mean confidence" in said)


def test_the_advice_names_the_confusion_and_what_was_not_measured():
    probabilities = np.array([[0.02, 0.98, 0.0]] * 5 + [[0.9, 0.1, 0.0]] * 5)
    said = " ".join(advice(answers(probabilities, np.zeros(10, int))))
    assert "'left' taken for 'right', 5 of 10" in said
    assert "no picture of 'right', 'top'" in said
    assert "over 90 % confidence" in said


@pytest.mark.parametrize("case", ["random", "edges", "half precision"])
def test_calibration_error_is_torchmetrics(case):
    rng = np.random.default_rng(1)
    if case == "edges":  # exactly between two bins, and the last bin's end
        first = np.array([0.5, 0.5, 0.75, 1.0, 1.0, 0.625, 0.4375])
        probabilities = np.stack([first, (1 - first) * 0.75, (1 - first) * 0.25], 1)
        labels = np.array([0, 1, 0, 2, 0, 0, 1])
    else:
        probabilities, labels = rng.dirichlet((0.4, 0.4, 0.9), 300), rng.choice([0, 2], 300)
    if case == "half precision":
        probabilities = probabilities.astype(np.float16).astype(np.float64)
    ours = expected_calibration_error(answers(probabilities, labels))
    theirs = multiclass_calibration_error(
        torch.tensor(probabilities), torch.tensor(labels), 3, n_bins=10, norm="l1"
    )
    assert ours == pytest.approx(float(theirs), abs=1e-6)


def test_a_bin_tells_its_mean_confidence_its_accuracy_and_how_many_it_holds():
    first = np.array([0.5, 0.59, 0.6, 0.95, 1.0])
    rest = 1 - first
    probabilities = np.stack([first, rest, np.zeros(5)], 1)
    bins = calibration_bins(answers(probabilities, np.array([0, 1, 0, 0, 2])))
    expected = [(0.545, 0.5, 2), (0.6, 1.0, 1), (0.975, 0.5, 2)]
    assert bins == [pytest.approx(row) for row in expected]


def test_the_most_frequent_confusions_come_first_and_equal_ones_in_the_matrixs_order():
    confusion = np.array([[9, 1, 3, 0], [1, 50, 0, 3], [0, 0, 0, 0], [4, 0, 1, 2]])
    assert confusions(confusion, 4) == [(3, 0, 4), (0, 2, 3), (1, 3, 3), (0, 1, 1)]
    assert len(confusions(confusion, 99)) == 6, "what never happened is no confusion"
    assert confusion[1, 1] == 50


def many(count: int) -> Scored:
    """Class i is taken for the next i - 27 times, for i of 28 and more; class 1 has no images."""
    rows = [(i, i) for i in range(count) if i != 1]
    rows += [(i, (i + 1) % count) for i in range(28, count) for _ in range(i - 27)]
    labels, predicted = np.array(rows).T
    names = tuple(f"class {i}" for i in range(count))
    return Scored(np.eye(count)[predicted] * 0.9, labels, predicted, names)


def cells(table: str) -> list[list[str]]:
    rows = re.findall("<tr>(.*?)</tr>", table)
    return [re.findall("<t[dh][^>]*>(.*?)</t[dh]>", row) for row in rows]


def confusion_section(scored):
    matrix = scored.confusion()
    return blocks.confusion_section("Confusion matrix", matrix, scored.classes, "images")


def test_with_many_classes_the_worst_cells_stand_for_the_matrix():
    section = confusion_section(many(30))
    assert section.title == "Confusion matrix"
    assert "<svg" in rendered(section)
    section = confusion_section(many(31))
    assert section.title == "Most frequent confusions"
    assert cells(rendered(section)) == [
        ["true", "predicted", "images"],
        ["class 30", "class 0", "3"],
        ["class 29", "class 30", "2"],
        ["class 28", "class 29", "1"],
    ]


def test_the_fifteen_worst_cells_and_the_twelve_worst_mistakes_are_enough():
    s = many(60)
    rows = cells(rendered(confusion_section(s)))[1:]
    assert [row[2] for row in rows] == [str(32 - i) for i in range(15)]
    images = SimpleNamespace(read=lambda i: np.zeros((2, 3, 3), np.uint8))
    data = SimpleNamespace(keys=["a.png"] * len(s.labels), images=images)
    assert len(worst_mistakes(s, data)) == 12


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        (0, ""),
        (1, "'c5' in this"),
        (5, "'c1', 'c2', 'c3', 'c4', 'c5' in this"),
        (6, "'c0', 'c1', 'c2', 'c3', 'c4', ... (6 in all) in this"),
    ],
)
def test_five_classes_without_images_are_named_and_the_others_counted(absent, said):
    labels = np.arange(7)
    predicted = np.where(labels < 6 - absent, labels, 6)
    names = tuple(f"c{i}" for i in range(7))
    truth = np.where(labels < 6 - absent, labels, 6)
    told = advice(Scored(np.eye(7)[predicted], truth, predicted, names))
    assert told[1:] == ([f"Not measured: no picture of {said} split."] if said else [])


def test_the_matrix_has_the_truth_in_rows_and_shades_shares_of_them(monkeypatch):
    figures = []
    monkeypatch.setattr(page, "svg", lambda fig: figures.append(fig) or "<svg>")
    predicted = np.array([0, 1, 1, 1, 2])
    s = Scored(np.eye(3)[predicted], np.array([0, 0, 0, 0, 2]), predicted, CLASSES)
    rendered(confusion_section(s))
    (axes,) = figures[0].axes
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.25, 0.75, 0], [0, 0, 0], [0, 0, 1]])
    assert axes.images[0].get_clim() == (0, 1)
    # (column, row): count
    assert {t.get_position(): t.get_text() for t in axes.texts} == {
        (0, 0): "1",
        (1, 0): "3",
        (2, 2): "1",
    }
    assert [t.get_color() for t in axes.texts] == [page.INK, "white", "white"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("predicted", "true")
    assert [t.get_text() for t in axes.get_yticklabels()] == list(CLASSES)
    assert [t.get_text() for t in axes.get_xticklabels()] == list(CLASSES)


def test_the_table_of_classes_has_scikit_learns_figures_weakest_first_and_unmeasured_last():
    rng = np.random.default_rng(3)
    labels = rng.choice([0, 1, 2, 4], 60, p=(0.7, 0.1, 0.1, 0.1))
    predicted = np.where(rng.random(60) < 0.6, labels, rng.choice([0, 1, 3], 60))
    predicted[labels == 2] = 0
    names = ("a", "b", "c", "never seen", "e")
    s = Scored(np.eye(5)[predicted], labels, predicted, names)
    header, *rows = cells(page.render(class_table(s)))
    assert header == ["class", "pictures", "precision", "95 %", "recall", "95 %"]
    precision, recall, _, support = precision_recall_fscore_support(
        labels, predicted, labels=range(5), zero_division=0
    )
    assert rows[0][0] == "c"
    assert rows[-1][0] == "never seen"
    assert [float(row[4]) for row in rows[:-1]] == sorted(float(row[4]) for row in rows[:-1])
    for name, pictures, p, p_range, r, r_range in rows:
        i = names.index(name)
        figures = (str(support[i]), f"{precision[i]:.3f}", f"{recall[i]:.3f}")
        assert (pictures, p, r) == figures
        hits, said = int(((labels == i) & (predicted == i)).sum()), int((predicted == i).sum())
        assert p_range == ("{:.2f} to {:.2f}".format(*interval(hits, said)) if said else "none")
        n = support[i]
        assert r_range == ("{:.2f} to {:.2f}".format(*interval(hits, n)) if n else "none")


class Data:
    """Images of one grey level each, which tells them apart."""

    def __init__(self, count: int) -> None:
        self.keys = [f"val/IMG_{i:04d}.png" for i in range(count)]
        self.images = self

    def read(self, i: int) -> np.ndarray:
        return np.full((8, 12, 3), 10 * i, np.uint8)


def test_the_worst_mistakes_are_the_surest_wrong_answers():
    first = np.array([0.9, 0.6, 0.99, 0.6, 0.7, 0.95])
    probabilities = np.stack([first, 1 - first, np.zeros(6)], 1)
    s = answers(probabilities, np.array([1, 1, 0, 2, 0, 1]))  # 2 and 4 are right
    shown = worst_mistakes(s, Data(6))
    assert [caption for _, caption in shown] == [
        "said left (0.95), is right\nval/IMG_0005.png",
        "said left (0.90), is right\nval/IMG_0000.png",
        "said left (0.60), is right\nval/IMG_0001.png",
        "said left (0.60), is top\nval/IMG_0003.png",
    ]
    assert [image.getpixel((0, 0))[0] for image, _ in shown] == [50, 0, 10, 30]
    assert len(worst_mistakes(s, Data(6), count=2)) == 2


@pytest.mark.parametrize(("wrong", "hits", "misses"), [(20, 4, 4), (2, 6, 2), (0, 8, 0)])
def test_half_of_what_is_looked_at_are_mistakes_where_there_are(run, wrong, hits, misses):
    folder, data = run
    model, images = vitrail.load(folder / "best"), open_data(data, "train")
    labels = images.truth.labels
    predicted = labels.copy()
    predicted[:wrong] = (labels[:wrong] + 1) % 3
    probabilities = np.full((24, 3), 0.1)
    probabilities[np.arange(24), predicted] = 0.8
    found = Found(model, images, {}, "train", lambda pixels, label: explain(model, pixels, label))
    name, shown = looks(found, Scored(probabilities, labels, predicted, CLASSES))
    assert name == "attention rollout"
    captions = [caption for _, caption in shown]
    assert sum(caption.endswith("(0.80), right") for caption in captions) == hits
    assert sum(bool(re.search(r"^\w+ \(0.80\), is \w+$", c)) for c in captions) == misses


def test_advice_for_a_model_without_mistakes_says_so_and_nothing_of_weak_classes():
    said = advice(answers(np.eye(3)[[0, 1, 2] * 9], np.array([0, 1, 2] * 9)))
    assert said == ["Every picture was classified correctly."]


def test_the_weakest_class_is_the_one_with_the_lowest_recall_among_the_measured():
    labels = np.array([0] * 10 + [2] * 4)
    predicted = np.array([0] * 9 + [1] + [2, 2, 2, 0])
    said = " ".join(advice(Scored(np.eye(3)[predicted] * 0.8, labels, predicted, CLASSES)))
    assert "Weakest class: 'top' with recall 0.75 (95 %: 0.30 to 0.95, 4 pictures)." in said
    assert "Not measured: no picture of 'right' in this split." in said
    assert "over 90 %" not in said


@pytest.mark.parametrize(("confidence", "count"), [(0.9, 0), (0.91, 2)])
def test_mistakes_with_over_90_percent_confidence_are_counted(confidence, count):
    probabilities = np.array([[confidence, 1 - confidence, 0.0]] * 3)
    said = " ".join(advice(answers(probabilities, np.array([0, 1, 1]))))
    assert (f"over 90 % confidence: {count};" in said) == bool(count)


def evaluations(*scores: float, losses: tuple[float, ...] = ()) -> list[dict]:
    losses = losses or (1.0,) * len(scores)
    rows = zip(range(1, 99), scores, losses, strict=False)
    return [{"step": 10 * i, "epoch": i, "top1": s, "loss": x} for i, s, x in rows]


@pytest.mark.parametrize(
    ("scores", "rises"),
    [
        ((0.1, 0.2, 0.3), True),
        ((0.1, 0.3, 0.2), False),
        ((0.1, 0.3, 0.3), False),
        ((0.1, 0.2), False),
    ],
)
def test_training_longer_is_advised_only_where_the_last_evaluation_is_the_best(scores, rises):
    said = " ".join(training_advice(evaluations(*scores), "top1"))
    assert ("train longer" in said) == rises


@pytest.mark.parametrize(
    ("losses", "overfits"),
    [
        ((1.0, 1.05, 1.11), True),
        ((1.0, 1.05, 1.09), False),
        ((1.0, 1.2), False),
        ((1.0, 2.0, 1.0), False),
    ],
)
def test_overfitting_is_told_from_a_tenth_above_the_lowest_loss_on(losses, overfits):
    history = evaluations(*(0.5,) * len(losses), losses=losses)
    assert ("by heart" in " ".join(training_advice(history, "top1"))) == overfits


def test_the_curves_draw_what_was_logged_and_ring_the_best_evaluation(monkeypatch):
    figures = []
    monkeypatch.setattr(page, "svg", lambda fig: figures.append(fig) or "")
    history = [{"step": s, "loss": 3 - s / 10, "lr": s / 100} for s in (1, 2, 3)]
    history += evaluations(0.2, 0.7, 0.7, losses=(2.0, 1.5, 1.8))
    curves(history, "top1")
    losses, score, rate = (fig.axes[0].lines for fig in figures)
    drawn = {line.get_label(): line.get_xydata().tolist() for line in losses}
    assert drawn == {
        "training, with augmentation": [[1, 2.9], [2, 2.8], [3, 2.7]],
        "validation": [[10, 2.0], [20, 1.5], [30, 1.8]],
    }
    assert score[0].get_xydata().tolist() == [[10, 0.2], [20, 0.7], [30, 0.7]]
    assert score[1].get_xydata().tolist() == [[20, 0.7]], "the first of equals, which best/ holds"
    assert score[1].get_markerfacecolor() == "none"
    assert rate[0].get_xydata().tolist() == [[1, 0.01], [2, 0.02], [3, 0.03]]
    titles = [fig.axes[0].get_title(loc="left") for fig in figures]
    assert titles == ["loss", "top1 on the validation split", "learning rate"]
    for part, kept in (
        (history[:3], [0, 2]),
        (history[3:], [0, 1]),
    ):  # a run without evaluations, without a log
        figures.clear()
        curves(part, "top1")
        assert [fig.axes[0].get_title(loc="left") for fig in figures] == [titles[i] for i in kept]
        assert len(figures[0].axes[0].lines) == 1


def test_names_of_files_break_behind_separators_and_captions_have_lines():
    image = Image.new("RGB", (4, 4))
    drawn = page.gallery([(image, "said a<b (0.53), is c\nval/my_dog-2.png")])
    caption = re.search("<figcaption>(.*)</figcaption>", drawn)
    assert caption
    assert caption[1] == "said a&lt;b (0.53), is c<br>val/<wbr>my_<wbr>dog-<wbr>2.png"


def test_names_written_from_right_to_left_do_not_turn_round_what_stands_beside_them():
    assert isolated("כלב") == "\u2068כלב\u2069"
    assert isolated("كلب_2") == "\u2068كلب_2\u2069"
    assert [isolated(name) for name in ("dog", "猫", "Größe")] == ["dog", "猫", "Größe"]
    labels = np.zeros(4, int)
    s = Scored(np.eye(2)[[1, 1, 0, 0]], labels, np.array([1, 1, 0, 0]), ("כלב", "كلب"))
    assert "\u2068'כלב'\u2069 taken for \u2068'كلب'\u2069, 2 of 4" in advice(s)[0]


def test_long_names_keep_their_beginning_and_their_end_in_a_drawing():
    assert shortened("a" * 24) == "a" * 24
    short = shortened("breed of a very long hunting dog 217")
    assert short == "breed of a very… dog 217"
    assert len(short) == 24


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
    drawn = curves(history, "top1")
    assert ">training, with augmentation<" in drawn
    assert ">validation<" in drawn
    said = " ".join(training_advice(history, "top1"))
    assert (
        "lowest at step 30 (1.00) and ended at 1.90: the model learns its training pictures by"
        in said
    )
    assert "by heart" not in " ".join(training_advice(history[:-2], "top1"))


def test_a_task_without_a_loss_of_validation_has_its_curves_and_advice_of_scores():
    history = [{"step": 10 * i, "loss": 2.0 - 0.3 * i, "lr": 0.1} for i in range(1, 5)]
    history += [{"step": 10 * i, "epoch": i, "AP": 0.1 * i} for i in range(1, 5)]
    drawn = curves(history, "AP")
    assert ">training, with augmentation<" in drawn
    assert ">validation<" not in drawn
    assert ">AP on the validation split<" in drawn
    assert training_advice(history, "AP") == [
        "The score still rose at the last evaluation: train longer."
    ]


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
    assert "\ntop-1 0." in told.out
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


def test_the_curve_of_a_score_by_any_name_has_a_ring_at_its_best(monkeypatch):
    drawn = []
    real = report.page.figure

    def figure(*args, **given):
        fig, ax = real(*args, **given)
        drawn.append(ax)
        return fig, ax

    monkeypatch.setattr(report.page, "figure", figure)
    rows = [(10, 0.2), (20, 0.6), (30, 0.6), (40, 0.5)]
    history = [{"epoch": s // 10, "step": s, "loss": 1 / s, "score": v} for s, v in rows]
    assert "score on the validation split" in curves(history, "score")
    line, ring = drawn[1].lines
    assert line.get_xydata().tolist() == [list(row) for row in rows]
    assert ring.get_xydata().tolist() == [[20, 0.6]], "the first of equals"
