"""From a COCO folder to scores and results: what `vitrail predict` writes is what evaluation measured."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from PIL import Image

from vitrail.cli import main
from vitrail.data import open_data
from vitrail.train.evaluate import evaluate
from vitrail_runtime.preprocess import Preprocessing

CATEGORIES = {"cell": 9, "plate": 4}  # the model has them in another order than their ids
SIZES = [(40, 60), (44, 60), (60, 44), (48, 48), (40, 60)]


def objects_of(image):
    """(label, box) of the truth, in whole pixels; the last image is empty."""
    rng = np.random.default_rng(image)
    if image == len(SIZES) - 1:
        return []
    out = []
    for _ in range(3):
        x, y = rng.integers(0, 20, 2).tolist()
        w, h = rng.integers(6, 18, 2).tolist()
        out.append((int(rng.integers(2)), (x, y, x + w, y + h)))
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("coco")
    names = list(CATEGORIES)
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        images, annotations = [], []
        for i, (height, width) in enumerate(SIZES):
            grey = np.full((height, width, 3), 40 * (i + 1), np.uint8)
            Image.fromarray(grey).save(root / "images" / split / f"{i}.png")
            known = {"id": 100 - 7 * i, "file_name": f"{i}.png", "height": height, "width": width}
            images.append(known)
            for label, (x0, y0, x1, y1) in objects_of(i):
                bbox = [x0, y0, x1 - x0, y1 - y0]
                entry = {"id": len(annotations) + 1, "image_id": known["id"], "bbox": bbox}
                entry |= {"category_id": CATEGORIES[names[label]], "area": bbox[2] * bbox[3]}
                annotations.append(entry | {"iscrowd": int(i == 1 and label == 0)})
        categories = [{"id": number, "name": name} for name, number in CATEGORIES.items()]
        about = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{split}.json").write_text(json.dumps(about))
    return root


class Seer(torch.nn.Module):
    """Knows an image by its brightness, and its objects to a pixel or two; one answer has the other class."""

    task = "detect"
    classes = tuple(CATEGORIES)
    has_masks = False
    preprocessing = Preprocessing(size=(80, 120), mode="fit", mean=(0.0,) * 3, std=(1.0,) * 3)
    info = SimpleNamespace(name="seer", category_ids=None)

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward_tensors(self, images):
        out = {
            "boxes": torch.zeros(len(images), 6, 4),
            "scores": torch.zeros(len(images), 6),
            "labels": torch.zeros(len(images), 6, dtype=torch.int64),
            "count": torch.zeros(len(images), dtype=torch.int64),
        }
        for row, image in enumerate(images):
            number = round(float(image.mean()) * 255 / 40) - 1
            scale = image.shape[1] / SIZES[number][0], image.shape[2] / SIZES[number][1]
            rng = np.random.default_rng(50 + number)
            said = [(k, np.add(b, rng.normal(0, 1, 4))) for k, b in objects_of(number)]
            said += [(1 - k, b) for k, b in said[:1]]
            for j, (label, box) in enumerate(said):
                out["boxes"][row, j] = torch.tensor(box * np.array(scale[::-1] * 2))
                out["labels"][row, j], out["scores"][row, j] = label, 0.9 - 0.1 * j
            out["count"][row] = len(said)
        return out


def test_what_predict_writes_is_what_evaluation_measures(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("vitrail.models.load", lambda _: Seer())
    scores = evaluate(Seer(), open_data(folder, "val", classes=Seer.classes), batch_size=2)
    out, truth = tmp_path / "out", folder / "val.json"
    (tmp_path / "config.json").write_text("{}")
    how = ["predict", str(tmp_path), str(folder / "images" / "val"), "--out", str(out)]
    assert main([*how, "--coco", str(truth), "--threshold", "0.85"]) == 0
    capsys.readouterr()
    known = COCO(str(truth))
    official = COCOeval_faster(
        known,
        known.loadRes(str(out / "coco_results.json")),
        "bbox",
        print_function=lambda *_: None,
    )
    official.run()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR")
    want = dict(zip(names, official.stats.tolist(), strict=False))
    assert 0.2 < want["AP"] < 0.9
    for name in ("AP", "AP50", "AP75", "APs", "AR"):
        assert scores[name] == pytest.approx(want[name], abs=1e-6), name
    assert scores["num_images"] == len(SIZES)
    assert scores["errors"]["classification"]["count"] >= 2
