"""DETR in its two steps: boxes, and then masks on top of what stays as it is; and what comes of it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.train.conftest import KINDS, PANOPTIC, tiny_config
from vitrail.cli import main
from vitrail.data import open_data
from vitrail.train.trainer import train
from vitrail_runtime.panoptic import ids_of

HEAD = PANOPTIC["head_fields"] | {"sure": 0.6}
BOXES = {k: v for k, v in HEAD.items() if k != "sure"}


def quality(said: list[tuple], truth: list[tuple]) -> float:
    """PQ of Kirillov et al. (2019), segment by segment, of (ids, {id: category}) of each image; a pixel of id
    0 in the truth is not counted."""
    sums: dict[int, list[float]] = {}
    for (mine, kinds), (own, true_kinds) in zip(said, truth, strict=True):
        known, found = own > 0, set()
        for j, true_kind in true_kinds.items():
            row = sums.setdefault(true_kind, [0.0, 0.0, 0.0])
            for i, kind in kinds.items():
                both = ((mine == i) & (own == j)).sum()
                iou = both / (((mine == i) & known) | (own == j)).sum()
                if kind == true_kind and iou > 0.5:
                    found.add(i)
                    row[0], row[1], row[2] = row[0] + iou, row[1] + 1, row[2] + 1
                    break
            else:
                row[2] += 0.5
        for i, kind in kinds.items():
            if i not in found and ((mine == i) & ~known).sum() <= (mine == i).sum() / 2:
                sums.setdefault(kind, [0.0, 0.0, 0.0])[2] += 0.5
    return float(np.mean([total / count for total, _, count in sums.values()]))


def read_panoptic(file: Path, folder: Path) -> list[tuple]:
    told = json.loads(file.read_text())
    out = []
    for annotation in sorted(told["annotations"], key=lambda a: a["image_id"]):
        ids = ids_of(np.asarray(Image.open(folder / annotation["file_name"])))
        out.append((ids, {s["id"]: s["category_id"] for s in annotation["segments_info"]}))
    return out


def weights_of(run: Path, name: str = "last") -> dict:
    return load_file(run / name / "model.safetensors")


@pytest.mark.slow
def test_masks_are_learnt_on_top_of_boxes_and_told_as_they_are_measured(segments, tmp_path):
    """Blocks on ground, learnt by heart: by the paper's formula, from the files that predict writes in COCO's
    panoptic form, which are read as data too."""
    model = {k: v for k, v in PANOPTIC.items() if k != "head_fields"}
    how = {"image_size": 64, "resize": "squash", "batch_size": 12, "lr": 2e-3}
    how |= {"eval_every": 1000, "log_every": 100, "warmup_epochs": 0.0, "clip_grad": 0.5}
    first = how | model | {"model": "detr/vit_tiny_patch16", "head_fields": BOXES, "epochs": 250}
    train(tiny_config(segments, tmp_path / "boxes", **first))
    second = how | model | {"head_fields": HEAD, "epochs": 80, "train_only": "masks"}
    start = {"weights": str(tmp_path / "boxes" / "last")}
    train(tiny_config(segments, tmp_path / "masks", **second, **start))
    before, after = weights_of(tmp_path / "boxes"), weights_of(tmp_path / "masks")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    out, truth = tmp_path / "out", segments / "panoptic_train.json"
    run, data = str(tmp_path / "masks"), str(segments)
    assert (
        main(
            ["eval", run, "--data", data, "--split", "train", "--report", str(tmp_path / "p.html")]
        )
        == 0
    )
    kept = json.loads((tmp_path / "masks" / "eval.json").read_text())
    images = str(segments / "images" / "train")
    assert main(["predict", run, images, "--out", str(out), "--coco", str(truth)]) == 0
    said = read_panoptic(out / "coco_panoptic.json", out / "coco_panoptic")
    want = quality(said, read_panoptic(truth, segments / "panoptic_train"))
    assert kept["PQ"] == pytest.approx(want, abs=1e-6)
    assert kept["PQ_stuff"] > 0.8
    assert kept["PQ_things"] > 0.1
    lines = (out / "predictions.jsonl").read_text().splitlines()
    answers = sum(len(json.loads(line)["top"]) for line in lines)
    assert answers == sum(len(kinds) for _, kinds in said) > 24
    assert len(list(out.rglob("*.jpg"))) == len(lines) == 24
    again = open_data(out / "coco_panoptic.json", "all")
    assert (again.classes, again.truth.stuff) == (KINDS, {2})
    assert "PQ of things" in (tmp_path / "p.html").read_text()


def test_the_second_step_leaves_what_the_first_learnt(segments, tmp_path):
    model = {k: v for k, v in PANOPTIC.items() if k != "head_fields"}
    how = {"epochs": 1, "max_steps": 1, "image_size": 32, "resize": "squash", "batch_size": 12}
    first = how | model | {"model": "detr/vit_tiny_patch16", "head_fields": BOXES}
    train(tiny_config(segments, tmp_path / "boxes", **first))
    start = {"weights": str(tmp_path / "boxes" / "last"), "train_only": "masks"}
    train(tiny_config(segments, tmp_path / "masks", **how, **model, head_fields=HEAD, **start))
    before, after = weights_of(tmp_path / "boxes"), weights_of(tmp_path / "masks")
    assert all(torch.equal(after[key], value) for key, value in before.items())
    config = json.loads((tmp_path / "masks" / "last" / "config.json").read_text())
    assert config["parts"]["head"]["stuff"] == [2]
    assert (config["task"], config["category_ids"]) == ("panoptic", [1, 2, 3])
