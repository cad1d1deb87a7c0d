"""What the commands make of a run, whatever its task: model, scores, report, predictions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from faster_coco_eval import COCO, COCOeval_faster
from PIL import Image
from safetensors.torch import load_file

import vitrail
from tests.train.conftest import TINY, tiny_config
from vitrail.cli import main
from vitrail.configuration import to_dict
from vitrail.train.folder import RunFolder


@pytest.fixture(scope="module")
def run(tiny, examples, tmp_path_factory) -> Path:
    """Trained by the command."""
    out = tmp_path_factory.mktemp("run") / "run"
    config = tiny_config(examples, out, **tiny.settings, epochs=3, keep_every=1, ema=0.5)
    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(to_dict(config)))
    assert main(["train", "--config", str(file)]) == 0
    return out


def test_best_is_the_model_of_the_highest_headline(tiny, run):
    rows = [row for row in RunFolder(run).rows() if row["kind"] == "eval"]
    scores = {row["epoch"]: row[tiny.headline] for row in rows}
    first = max(scores, key=lambda epoch: (scores[epoch], -epoch))
    for name, epoch in (("best", first), ("last", 3), *((f"epoch-000{e}", e) for e in scores)):
        kept = json.loads((run / name / "metrics.json").read_text())
        assert kept[tiny.headline] == scores[epoch]
    best, same = (load_file(run / n / "model.safetensors") for n in ("best", f"epoch-000{first}"))
    assert all(torch.equal(best[key], value) for key, value in same.items())
    kept = vitrail.load(run / "best")
    assert kept.classes == tiny.classes
    ids = {"detect": tuple(range(2, 3 * len(tiny.classes), 3)), "panoptic": (1, 2, 3)}
    assert kept.category_ids == next((ids[name] for name in ids if TINY[name] is tiny), None)


def test_eval_measures_the_best_model_as_the_training_did(tiny, run, examples, capsys):
    assert main(["eval", str(run), "--data", str(examples), "--json", "--batch-size", "5"]) == 0
    printed = json.loads(capsys.readouterr().out)
    kept = json.loads((run / "best" / "metrics.json").read_text())
    assert printed == json.loads((run / "eval.json").read_text())
    assert kept[tiny.headline] == printed[tiny.headline]
    assert (
        ("loss" in kept) == ("loss" in printed) == (tiny not in (TINY["detect"], TINY["panoptic"]))
    )
    assert kept.get("loss", 0) == pytest.approx(printed.get("loss", 0), rel=1e-5)
    assert kept["num_images"] == printed["num_images"] == 12
    assert main(["eval", str(run), "--data", str(examples)]) == 0
    said = capsys.readouterr().out
    assert "12 images" in said
    assert all(name in said for name in tiny.classes)


def test_a_report_is_written_with_the_scores_of_best(tiny, run):
    page = (run / "report.html").read_text(encoding="utf-8")
    kept = json.loads((run / "best" / "metrics.json").read_text())
    assert f"{kept[tiny.headline]:.3f}" in page or f"{kept[tiny.headline]:.1%}" in page
    assert all(name in page for name in tiny.classes)
    assert "data:image/" in page


@pytest.mark.parametrize("tiny", ["classify", "segment"], indirect=True, scope="session")
def test_predict_says_what_eval_measured(tiny, run, examples, tmp_path):
    """The confusion that metrics.json tells, counted here: by image, or pixel by pixel."""
    segments = tiny is TINY["segment"]
    files = sorted((examples / ("images/val" if segments else "val")).rglob("*.png"))
    assert main(["predict", str(run), *map(str, files), "--out", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    counts = np.zeros((3, 3), int)
    for file, found in zip(files, map(json.loads, lines), strict=True):
        if segments:
            said = np.array(Image.open(tmp_path / "out" / found["mask"])).ravel()
            truth = np.array(Image.open(examples / "masks" / "val" / file.name)).ravel()
            np.add.at(counts, (truth[truth != 255], said[truth != 255]), 1)
        else:
            counts[tiny.classes.index(file.parent.name), tiny.classes.index(found["label"])] += 1
    kept = json.loads((run / "best" / "metrics.json").read_text())
    assert kept["confusion"] == counts.tolist()
    assert len(list((tmp_path / "out").rglob("*.jpg"))) == 12


@pytest.mark.parametrize("tiny", ["detect"], indirect=True, scope="session")
def test_predict_finds_the_boxes_that_eval_measured(tiny, run, examples, tmp_path):
    """By COCO's own reckoning with the file that it reads."""
    assert tiny.headline == "AP"
    truth, out = examples / "val.json", tmp_path / "out"
    images = str(examples / "images" / "val")
    how = ["--out", str(out), "--coco", str(truth), "--threshold", "0"]
    assert main(["predict", str(run), images, *how]) == 0
    known, silent = COCO(str(truth)), {"print_function": lambda *_: None}
    official = COCOeval_faster(
        known, known.loadRes(str(out / "coco_results.json")), "bbox", **silent
    )
    official.run()
    kept = json.loads((run / "best" / "metrics.json").read_text())
    assert kept["AP50"] > 0.001
    found = dict(zip(("AP", "AP50", "AP75"), official.stats.tolist(), strict=False))
    assert {name: kept[name] for name in found} == pytest.approx(found, abs=1e-6)
    lines = (out / "predictions.jsonl").read_text().splitlines()
    answers = sum(len(json.loads(line)["top"]) for line in lines)
    assert answers == len(json.loads((out / "coco_results.json").read_text()))
    assert len(list(out.rglob("*.jpg"))) == len(lines) == 12
