"""The report page as a whole: every number on it against what was put in."""

import platform
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.analysis.test_report import answers, cells, rendered
from vitrail.analysis import page, report
from vitrail.analysis.report import configuration, explain, machine, write_report
from vitrail.data.examples import Labels
from vitrail.models import ModelInfo, create_model, describe
from vitrail.rows import read_rows
from vitrail.tasks.classify_report import Scored, calibration_section, interval, looks, sections
from vitrail.tasks.section import Found, data_rows
from vitrail_runtime.preprocess import Preprocessing

CLASSES = ("left", "right", "top")
MEAN, STD = (0.5, 0.25, 0.125), (0.25, 0.5, 0.125)


class Data:
    """Fourteen images of one grey level each, which tells them apart; heights and widths differ."""

    classes = CLASSES
    broken: tuple = (("a.png", "cut short"), ("b.png", "no image"))
    content_hash = "0123456789abcdefghij"

    def __init__(self) -> None:
        self.truth = Labels(CLASSES, np.array([0] * 9 + [2] * 4 + [1]))
        self.keys = [f"val/{i}.png" for i in range(14)]
        sizes = np.array([(30 + i, 1200 + 10 * i * i) for i in range(14)])
        self.images = SimpleNamespace(sizes=sizes, read=self.read)

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, i: int) -> np.ndarray:
        return np.full((24, 40, 3), 15 * i, np.uint8)


def classifier() -> torch.nn.Module:
    torch.manual_seed(0)
    fields = {"embed_dim": 16, "depth": 1, "num_heads": 1, "patch_size": 8, "image_size": 16}
    model = create_model("vit_tiny_patch16", num_classes=3, **fields)
    shown = Preprocessing(size=(16, 24), mode="squash", mean=MEAN, std=STD)
    describe(model, ModelInfo(model.info.name, model.info.config, CLASSES, shown))
    return model


def predictions(data: Data, wrong: tuple[int, ...]) -> dict[str, np.ndarray]:
    """All are 0.8 sure; those named are taken for the next class."""
    predicted = data.truth.labels.copy()
    predicted[list(wrong)] = (predicted[list(wrong)] + 1) % 3
    probabilities = np.full((14, 3), 0.1, np.float16)
    probabilities[np.arange(14), predicted] = 0.8
    return {"probabilities": probabilities, "labels": data.truth.labels, "predicted": predicted}


def cards(text: str) -> dict[str, str]:
    return dict(re.findall("<section><h2>(.*?)</h2>(.*?)</section>", text, re.DOTALL))


@pytest.mark.parametrize("wrong", [(2, 5, 9), ()])
def test_the_page_tells_what_the_predictions_are_worth(tmp_path, wrong):
    data, model = Data(), classifier()
    path = write_report(tmp_path / "a.html", model, data, predictions(data, wrong), split="test")
    assert path == tmp_path / "a.html"
    text = path.read_text(encoding="utf-8")
    assert "<h1>vit_tiny_patch16 on test</h1>" in text
    assert '<p class="lead">14 pictures, 3 classes</p>' in text
    right = 14 - len(wrong)
    low, high = interval(right, 14)
    size = sum(p.numel() for p in model.parameters())
    ece = abs(right / 14 - float(np.float16(0.8)))  # one bin holds all
    assert re.findall("<b>(.*?)</b><span>(.*?)</span>", text) == [
        (f"{right / 14:.3f}", f"accuracy (95 %: {low:.3f} to {high:.3f})"),
        (str(len(wrong)), "mistakes"),
        (f"{ece:.3f}", "calibration error (ECE)"),
        (f"{size / 1e6:.2f} M", "parameters"),
    ]
    found = cards(text)
    expected = [
        "What to look at first",
        "Confusion matrix",
        "Per class",
        "Calibration",
        *(["Worst mistakes"] if wrong else []),
        "Where the model looks",
        "Pictures of test",
        "Configuration and machine",
    ]
    assert list(found) == expected
    assert "Method: attention rollout." in found["Where the model looks"]
    assert found["Where the model looks"].count("<figure>") == 8
    assert found.get("Worst mistakes", "").count("<figure>") == len(wrong)
    assert f"Expected calibration error {ece:.3f} (ten bins)" in found["Calibration"]
    assert found["Configuration and machine"] == page.preformatted(machine())


def test_a_runs_curves_and_configuration_stand_on_the_page(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 7 < 8\n", encoding="utf-8")
    (run / "metrics.jsonl").write_text(
        '{"step": 1, "loss": 2.5, "lr": 0.1}\n'
        '{"step": 2, "epoch": 1, "top1": 0.5, "loss": 2.25}\n{"step": 3, "lo',  # cut by a kill
        encoding="utf-8",
    )
    assert read_rows(run / "metrics.jsonl") == [
        {"step": 1, "loss": 2.5, "lr": 0.1},
        {"step": 2, "epoch": 1, "top1": 0.5, "loss": 2.25},
    ]
    data = Data()
    path = write_report(tmp_path / "a.html", classifier(), data, predictions(data, ()), run=run)
    found = cards(path.read_text(encoding="utf-8"))
    assert list(found)[:2] == ["What to look at first", "Training"]
    assert found["Training"].count("<svg") == 3
    assert "Pictures of val" in found
    assert found["Configuration and machine"].startswith("<pre>seed: 7 &lt; 8\n</pre><br><pre>")


@pytest.mark.filterwarnings("error")
def test_curves_of_what_was_not_logged_are_left_out():
    """A run of few updates logs no loss, and a detector has none on validation images."""
    found = report.curves([{"step": 6, "epoch": 0.1, "AP": 0.25}], "AP")
    assert found.count("<svg") == 1
    assert "AP on the validation split" in found


def test_a_run_without_log_or_configuration_has_none(tmp_path):
    assert read_rows(tmp_path / "metrics.jsonl") == []
    assert configuration(tmp_path) == []
    assert configuration(None) == []


def test_the_machine_is_named_by_what_speed_and_rounding_depend_on():
    said = machine()
    assert said.startswith(f"python {platform.python_version()}, torch {torch.__version__}, ")
    assert f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads" in said
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    assert said.endswith(f", GPU {gpu}")


def test_the_table_of_the_data_tells_counts_sizes_and_the_hash():
    data = Data()
    assert cells(page.render(data_rows(data, [("classes", "so many")])))[1:] == [
        ["pictures", "14"],
        ["classes", "so many"],
        ["width", "1,200 to 2,890 px, median 1625"],
        ["height", "30 to 43 px, median 36"],
        ["left out as broken", "2"],
        ["content hash", "0123456789abcdef"],
    ]
    data.images.sizes[:, 0] = 30
    told = cells(page.render(data_rows(data, [("a", "b"), ("c", "d")])))
    assert told[2:4] == [["a", "b"], ["c", "d"]]
    assert told[5] == ["height", "30 px, median 30"]


@pytest.mark.parametrize(
    ("labels", "classes", "said"),
    [
        ([0] * 9 + [2] * 4 + [1], CLASSES, "3, 1 to 9 pictures each"),
        ([0, 1, 2] * 4, CLASSES, "3, 4 pictures each"),
        ([0, 1, 2] * 4, (*CLASSES, "absent"), "4, 0 to 4 pictures each"),
    ],
)
def test_the_pictures_of_each_class_are_counted(labels, classes, said):
    labels = np.array(labels)
    data, model = Data(), torch.nn.Linear(1, 1)
    model.classes = classes
    answers = {"labels": labels, "predicted": labels, "probabilities": np.eye(len(classes))[labels]}
    shown = Image.new("RGB", (2, 2))
    last = sections(Found(model, data, answers, "test", lambda pixels, label: ("a way", shown)))[-1]
    assert last.title == "Pictures of test"
    assert cells(rendered(last))[2] == ["classes", said]


def test_calibration_is_drawn_by_confidence_accuracy_and_count(monkeypatch):
    figures = []
    monkeypatch.setattr(page, "svg", lambda fig: figures.append(fig) or "")
    first = np.array([0.5, 0.625, 0.625, 0.625, 1.0])
    probabilities = np.stack([first, 1 - first, np.zeros(5)], 1)
    text = rendered(calibration_section(answers(probabilities, np.array([0, 0, 0, 1, 1]))))
    ece = (0.5 + 3 * (2 / 3 - 0.625) + 1.0) / 5
    assert f"Expected calibration error {ece:.3f} (ten bins)" in text
    (axes,) = figures[0].axes
    ideal, line = axes.lines
    assert ideal.get_xydata().tolist() == [[0, 0], [1, 1]]
    points = [[0.5, 1.0], [0.625, 2 / 3], [1.0, 0.0]]
    np.testing.assert_allclose(line.get_xydata(), points)
    (dots,) = axes.collections
    np.testing.assert_allclose(dots.get_offsets(), points)
    np.testing.assert_allclose(dots.get_sizes(), [80, 200, 80])  # 20 and 300 by share of the images
    assert (axes.get_xlim(), axes.get_ylim()) == ((0, 1.03), (0, 1.03))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("confidence", "accuracy")


def test_what_is_looked_at_is_the_image_as_the_model_gets_it_asked_for_what_was_said(monkeypatch):
    data, model = Data(), classifier().train()
    said = predictions(data, (2, 5, 9))
    scored = Scored(said["probabilities"], data.truth.labels, said["predicted"], CLASSES)
    asked, veiled = [], []

    def where(given, image, label):
        asked.append((given.training, image, label))
        return "a way", torch.full((2, 3), float(len(asked)))

    monkeypatch.setattr(report, "where_it_looks", where)
    monkeypatch.setattr(page, "heat", lambda *given: veiled.append(given) or given)
    found = Found(model, data, said, "val", lambda pixels, label: explain(model, pixels, label))
    name, shown = looks(found, scored)
    assert (name, len(shown), len(asked), len(veiled)) == ("a way", 8, 8, 8)
    levels = [int(image[0, 0, 0]) for image, _ in veiled]
    places = [round(level / 15) for level in levels]
    assert len(set(places)) == 8
    assert sorted(places[5:]) == [2, 5, 9], "mistakes come after the hits"
    for n, i in enumerate(places):
        image, values = veiled[n]
        assert (image.shape, image.dtype) == ((16, 24, 3), np.uint8)
        assert abs(image.astype(int) - 15 * i).max() <= 1, "as it was before it was normalised"
        assert (values == n + 1).all()
        training, given, label = asked[n]
        assert not training
        assert label == said["predicted"][i]
        normal = (15 * i / 255 - np.array(MEAN)) / STD
        np.testing.assert_allclose(given.mean((1, 2)), normal, atol=0.01)
        verdict = f"is {CLASSES[data.truth.labels[i]]}" if i in (2, 5, 9) else "right"
        assert shown[n] == (veiled[n], f"{CLASSES[label]} (0.80), {verdict}")
    assert [c for _, c in looks(found, scored)[1]] == [c for _, c in shown], "every time"
    assert len(looks(found, scored, count=4)[1]) == 4
