"""From logits to Predictions."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vitrail_runtime.errors import InputError, NotFinite
from vitrail_runtime.finish import finish_classification
from vitrail_runtime.prediction import Prediction

CLASSES = ("ant", "bee", "cat")


def test_the_best_classes_come_first_with_their_probabilities():
    logits = np.log(np.array([[0.2, 0.5, 0.3], [0.7, 0.1, 0.2]]))
    first, second = finish_classification(logits, CLASSES, top_k=2)
    assert first.names == ["bee", "cat"]
    assert first.labels.tolist() == [1, 2]
    np.testing.assert_allclose(first.scores, [0.5, 0.3], rtol=1e-6)
    assert second.names == ["ant", "cat"]
    assert (first.labels.dtype, first.scores.dtype) == (np.int64, np.float32)


def test_equal_scores_keep_the_order_of_the_classes_and_huge_logits_do_not_overflow():
    (p,) = finish_classification(np.full((1, 3), 1e4), CLASSES, top_k=9)
    assert p.names == list(CLASSES)
    np.testing.assert_allclose(p.scores, 1 / 3, rtol=1e-6)
    many = [f"class {i}" for i in range(99)]  # short lists are sorted stably in any case
    (p,) = finish_classification(np.arange(99.0)[None] // 40, many, top_k=99)
    assert p.names == many[80:] + many[40:80] + many[:40]


def test_a_prediction_becomes_plain_data():
    (p,) = finish_classification(np.array([[0.0, 2.0, 1.0]]), CLASSES, top_k=2)
    data = p.to_dict()
    assert data["label"] == "bee"
    assert [t["index"] for t in data["top"]] == [1, 2]
    assert data["score"] == pytest.approx(0.665241)


def test_plain_data_has_every_box_in_the_order_of_the_answers_and_the_best_in_front():
    p = Prediction(
        labels=np.array([7, 2]),
        scores=np.array([0.98765432, 0.25], np.float32),
        names=["cat", "dog"],
        boxes=np.array([[1.126, 2, 30.5, 40.254], [5, 6, 7, 8]], np.float32),
        source="a.jpg",
        size=(50, 40),
    )
    assert p.to_dict() == {
        "path": "a.jpg",
        "size": [50, 40],
        "label": "cat",
        "score": 0.987654,
        "top": [
            {"label": "cat", "index": 7, "score": 0.987654, "box": [1.13, 2.0, 30.5, 40.25]},
            {"label": "dog", "index": 2, "score": 0.25, "box": [5.0, 6.0, 7.0, 8.0]},
        ],
    }
    assert json.loads(json.dumps(p.to_dict())) == p.to_dict()


def test_five_answers_are_given_without_a_word():
    (p,) = finish_classification(np.arange(8.0)[None], "abcdefgh")
    assert p.names == list("hgfed")
    want = np.exp(np.arange(8.0))[:2:-1] / np.exp(np.arange(8.0)).sum()
    np.testing.assert_allclose(p.scores, want, rtol=1e-6)


@pytest.mark.parametrize(
    ("logits", "top_k", "message"),
    [
        (np.zeros((2, 4)), 1, "do not fit 3 classes"),
        (np.zeros((1, 3)), 0, "top_k"),
    ],
)
def test_logits_that_cannot_be_read_are_refused(logits, top_k, message):
    with pytest.raises(InputError, match=message):
        finish_classification(logits, CLASSES, top_k=top_k)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_logits_that_are_no_numbers_are_refused(bad):
    with pytest.raises(NotFinite, match="not finite; its weights are damaged"):
        finish_classification(np.array([[0, 2, 1], [0, bad, 1]]), CLASSES)


def test_pictures_become_predictions_without_torch_or_vitrail(tmp_path):
    Image.fromarray(np.full((30, 40, 3), 99, np.uint8)).save(tmp_path / "a.png")
    code = (
        "import sys, numpy as np\n"
        "from vitrail_runtime import *\n"
        "path, = find_pictures(sys.argv[1])\n"
        "pixels, _ = prepare(decode(path), Preprocessing())\n"
        "p, = finish_classification(pixels.mean((1, 2))[None], ['a', 'b', 'c'])\n"
        "p.source = str(path)\n"
        "p.draw()\n"
        "print([m for m in ('torch', 'torchvision', 'vitrail', 'matplotlib') if m in sys.modules])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
