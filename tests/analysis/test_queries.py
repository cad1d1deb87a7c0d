"""Where queries look, drawn from what a model records."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

import vitrail
from vitrail.analysis.queries import answers, cell_of
from vitrail.cli import main
from vitrail_runtime.errors import InputError

TINY = {"dim": 64, "num_heads": 2, "mlp_dim": 16, "encoder_layers": 2, "decoder_layers": 2}
FIELDS = {"dims": (16, 24, 32), "depths": (1, 1, 1), "key_dim": 8}


class Told(torch.nn.Module):
    """A model that records what it is told."""

    def __init__(self, record):
        super().__init__()
        self.told = record

    def forward_tensors(self, images, record):
        record |= self.told
        boxes = torch.tensor([[[8.0, 4, 24, 12], [40, 16, 60, 30], [0, 0, 64, 32]]])
        scores = torch.tensor([[0.9, 0.6, 0.2]])
        labels = torch.tensor([[1, 0, 2]])
        return {"boxes": boxes, "scores": scores, "labels": labels, "count": torch.tensor([3])}


def dense():
    """An image of 32 x 64 pixels in 2 x 4 cells; in the last layers query q looks at cell q, and cell c at
    cell 7 - c; elsewhere in the first."""
    decoder, encoder = torch.zeros(2, 1, 2, 3, 8), torch.zeros(2, 1, 2, 8, 8)
    for query in range(3):
        decoder[0, ..., query, 7], decoder[1, ..., query, query] = 1, 1
    for cell in range(8):
        encoder[0, ..., cell, 0], encoder[1, ..., cell, 7 - cell] = 1, 1
    decoder[1, 0, 0, 1] = torch.tensor(
        [0, 0, 0, 1.0, 0, 0, 0, 0]
    )  # one of two heads looks elsewhere
    record = {"queries": torch.tensor([[1, 2, 0]]), "cells": torch.tensor([2, 4])}
    for i in range(2):
        record[f"decoder.layers.{i}.multihead_attn.weights"] = decoder[i]
        record[f"decoder.layers.{i}.self_attn.weights"] = torch.ones(1, 2, 3, 3)
        record[f"encoder.layers.{i}.self_attn.weights"] = encoder[i]
    return record


def test_a_query_of_the_last_layer_and_the_cell_in_the_middle_of_its_box_are_shown():
    first, second = answers(Told(dense()), torch.zeros(3, 32, 64), count=5, score=0.5)
    assert (first.label, first.query, round(first.score, 3), first.middle) == (1, 1, 0.9, (16, 8))
    want = np.zeros((2, 4), np.float32)
    want[0, 1] = want[0, 3] = 0.5  # the mean of two heads
    np.testing.assert_array_equal(first.looked, want)
    want = np.zeros((2, 4), np.float32)
    want[1, 2] = 1  # what cell 1 looks at
    np.testing.assert_array_equal(first.around, want)
    assert (second.query, second.label, second.middle) == (2, 0, (50, 23))
    assert np.argwhere(second.looked).tolist() == [[0, 2]]
    assert np.argwhere(second.around).tolist() == [[0, 0]]  # of cell 7


def test_points_are_shown_where_they_lie_with_their_weights():
    """Two levels, two points: one inside each, one of them outside the image."""
    places, weights = torch.zeros(1, 3, 1, 2, 2, 2), torch.zeros(1, 3, 1, 2, 2)
    places[0, 1, 0] = torch.tensor([[[0.25, 0.5], [0.75, 0.25]], [[1.2, 0.5], [0.5, -0.1]]])
    weights[0, 1, 0] = torch.tensor([[0.6, 0.2], [0.1, 0.1]])
    around = torch.full((1, 10, 1, 2, 2, 2), 0.99)
    around[0, 1] = 0.01  # the first cell of the second column of 2 x 4, then 1 x 2 cells
    record = {
        "queries": torch.tensor([[1, 2, 0]]),
        "cells": torch.tensor([[2, 4], [1, 2]]),
        "decoder.layers.0.cross_attn.weights": weights,
        "decoder.layers.0.cross_attn.locations": places,
        "encoder.layers.0.self_attn.weights": torch.full((1, 10, 1, 2, 2), 0.25),
        "encoder.layers.0.self_attn.locations": around,
    }
    (first,) = answers(Told(record), torch.zeros(3, 64, 128), count=1, score=0.5)
    # In places of 4 pixels: (8, 8) and (24, 4) of 32 x 16.
    assert first.looked.shape == (16, 32)
    assert np.unravel_index(first.looked.argmax(), (16, 32)) == (8, 8)
    assert first.looked[4, 24] == pytest.approx(first.looked[8, 8] / 3, rel=1e-3)
    assert first.looked.sum() == pytest.approx(0.8, rel=1e-3)
    record["cells"] = torch.tensor([[2, 4], [1, 2]])
    (first,) = answers(Told(record), torch.zeros(3, 32, 64), count=1, score=0.5)
    assert np.unravel_index(first.around.argmax(), (8, 16)) == (0, 0)


def test_the_best_answer_is_shown_where_none_is_sure():
    found = answers(Told(dense()), torch.zeros(3, 32, 64), count=5, score=0.95)
    assert [answer.label for answer in found] == [1]
    found = answers(Told(dense()), torch.zeros(3, 32, 64), count=2, score=0.1)
    assert [answer.label for answer in found] == [1, 0]


def test_a_query_that_answers_with_two_classes_is_shown_once_with_the_better():
    record = dense() | {"queries": torch.tensor([[1, 1, 0]])}
    found = answers(Told(record), torch.zeros(3, 32, 64), count=2, score=0.1)
    assert [(answer.query, answer.label) for answer in found] == [(1, 1), (0, 2)]


@pytest.mark.parametrize(
    ("x", "y", "cell"), [(0, 0, 0), (0.3, 0, 1), (0.99, 0.4, 3), (0, 0.5, 4), (1.0, 1.0, 7)]
)
def test_cells_are_counted_by_rows(x, y, cell):
    assert cell_of(torch.tensor([2, 4]), x, y) == cell
    assert cell_of(torch.tensor([[2, 4], [1, 2]]), x, y) == cell


@pytest.mark.parametrize("head", ["detr", "deformable_detr"])
def test_a_page_shows_each_answer_thrice(head, tmp_path, capsys):
    torch.manual_seed(0)
    names = ("cat", "dog")
    model = vitrail.create_model(
        f"{head}/efficientvit_m0", classes=names, head=TINY, image_size=64, **FIELDS
    )
    vitrail.save(model, tmp_path / "model")
    Image.new("RGB", (50, 40), (90, 20, 30)).save(tmp_path / "one.png")
    given = ["--images", str(tmp_path / "one.png"), "--out", str(tmp_path / "page.html")]
    command = ["inspect", "queries", str(tmp_path / "model"), *given, "--device", "cpu"]
    assert main([*command, "--answers", "2", "--score", "0"]) == 0
    assert str(tmp_path / "page.html") in capsys.readouterr().out
    text = (tmp_path / "page.html").read_text()
    assert text.count("<figure>") == 6
    assert len(re.findall(r"(cat|dog), 0\.\d\d", text)) >= 2
    assert "one.png" in text
    assert main([*command, "--answers", "0"]) == 2
    assert "--answers must be at least 1, but is 0" in capsys.readouterr().err


def test_a_model_without_queries_is_told_so():
    model = Told({"proposals": torch.zeros(1)})
    model.info = type("Info", (), {"name": "faster_rcnn/resnet18"})
    with pytest.raises(InputError, match=r"faster_rcnn/resnet18 has no queries .* detr/resnet50"):
        answers(model, torch.zeros(3, 32, 64), count=1, score=0.5)
