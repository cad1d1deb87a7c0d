"""Class maps are as large as their images: an evaluation holds those of one batch, and no more."""

import weakref

import numpy as np
import pytest
import torch

from tests.train.conftest import SEGMENTER, SHAPES, make_masks
from vitrail.data import open_data
from vitrail.data.masks import ClassMaps
from vitrail.models import create_model
from vitrail.train.evaluate import evaluate
from vitrail_runtime.preprocess import Preprocessing

SQUASH = Preprocessing(size=(32, 32), mode="squash")


def segmenter():
    torch.manual_seed(0)
    how = {"image_size": 32, "head": SEGMENTER["head_fields"]}
    return create_model(
        SEGMENTER["model"], classes=SHAPES, **SEGMENTER["model_fields"], **how
    ).eval()


@pytest.mark.parametrize("batch_size", [1, 8])
def test_an_evaluation_never_holds_more_than_one_batch_of_class_maps(
    tmp_path, monkeypatch, batch_size
):
    data = open_data(make_masks(tmp_path / "set", train=4, val=40), "val")
    real, alive, peaks = ClassMaps.read, set(), []

    def read(self, i: int) -> np.ndarray:
        ids = real(self, i)
        alive.add(i)
        weakref.finalize(ids, alive.discard, i)
        peaks.append(len(alive))
        return ids

    monkeypatch.setattr(ClassMaps, "read", read)
    scores = evaluate(segmenter(), data, SQUASH, batch_size=batch_size, predictions=True)
    assert scores["num_images"] == len(peaks) == 40
    assert peaks == [1 + i % batch_size for i in range(40)]
    assert not alive
