"""Settings of classification: their defaults and ranges, and that each reaches what it sets."""

import numpy as np
import pytest
import torch

from vitrail.data.augment import mix
from vitrail.data.batch import Dense
from vitrail.data.examples import Labels
from vitrail.tasks.classify import TASK, Settings
from vitrail_runtime.errors import InputError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mixup": -0.1}, "^mixup must be at least 0, but is -0.1"),
        ({"mixup": float("inf")}, "^mixup must be at least 0, but is inf"),
        ({"cutmix": -0.1}, "^cutmix must be at least 0, but is -0.1"),
        ({"cutmix": float("nan")}, "^cutmix must be at least 0, but is nan"),
        ({"mix_prob": -0.1}, "^mix_prob must be at least 0 and at most 1, but is -0.1"),
        ({"mix_prob": 1.1}, "^mix_prob must be at least 0 and at most 1, but is 1.1"),
        (
            {"label_smoothing": 1.0},
            r"^label_smoothing must be at least 0 and below 1, but is 1.0 \(0 is off\)",
        ),
        ({"label_smoothing": -0.1}, "^label_smoothing must be"),
        ({"sampling": "fair"}, r"task\.sampling is 'fair', but must be one of .*balanced"),
    ],
)
def test_a_setting_out_of_range_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        Settings(**given)


@pytest.mark.parametrize(
    "given",
    [
        {"mixup": 0.0, "cutmix": 0.0, "mix_prob": 0.0, "label_smoothing": 0.0},
        {"mixup": 9.0, "cutmix": 9.0, "mix_prob": 1.0, "label_smoothing": 0.99},
    ],
)
def test_a_setting_at_the_end_of_its_range_is_taken(given):
    assert Settings(**given) == Settings(**given)


def test_by_default_labels_are_smoothed_and_nothing_is_mixed():
    s = Settings()
    assert (s.mixup, s.cutmix, s.mix_prob) == (0.0, 0.0, 1.0)
    assert (s.label_smoothing, s.sampling) == (0.1, "uniform")
    assert TASK.options(Settings(label_smoothing=0.3)) == {
        "label_smoothing": 0.3,
        "loss": "softmax",
    }
    assert TASK.options(Settings(loss="sigmoid"))["loss"] == "sigmoid"


@pytest.mark.parametrize(
    "given", [{}, {"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 0.5, "mix_prob": 0.5}]
)
def test_a_batch_is_mixed_as_the_settings_say_and_keeps_what_else_it_has(given):
    images = torch.randn(4, 3, 12, 10, generator=torch.Generator().manual_seed(0))
    batch = Dense(images, torch.tensor([2, 0, 1, 1]), torch.tensor([7, 5, 3, 1]), step=9)
    for step in range(8):
        key = (3, 1, step)
        made = TASK.prepare(batch, key, Settings(**given), 5)
        expected = mix(batch.images, batch.targets, key, num_classes=5, **given)
        assert torch.equal(made.images, expected[0])
        assert torch.equal(made.targets, expected[1])
        assert (made.step, made.indices) == (9, batch.indices)
    assert batch.images is images, "the batch given is left as it is"


def test_neighbours_that_are_mixed_stay_in_one_share():
    assert TASK.multiple(Settings()) == 1
    assert TASK.multiple(Settings(mixup=0.1)) == TASK.multiple(Settings(cutmix=0.1)) == 2


def test_balanced_sampling_weighs_images_by_the_size_of_their_class():
    truth = Labels(("a", "b"), np.array([0, 1, 1, 1, 1]))
    assert TASK.weights(Settings(), truth) is None
    weights = TASK.weights(Settings(sampling="balanced"), truth)
    assert (weights / weights[1]).tolist() == [4, 1, 1, 1, 1]
