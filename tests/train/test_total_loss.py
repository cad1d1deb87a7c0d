"""What the sums of a model's losses are divided by."""

import pytest
import torch

from vitrail.train.ranks import total_loss

LOSSES = {"class": torch.tensor(6.0), "box": torch.tensor(5.0), "giou": torch.tensor(0.0)}


@pytest.mark.parametrize(
    ("weight", "want"),
    [
        (torch.tensor(4.0), 11 / 4),
        (torch.tensor([4.0], dtype=torch.float64), 11 / 4),
        (torch.tensor([3.0, 10.0, 2.0]), 6 / 3 + 5 / 10),
        (torch.tensor([3.0, 10.0, 0.0]), 6 / 3 + 5 / 10),
        (torch.tensor(0.0), 11.0),
        (torch.tensor(0.5), 22.0),
    ],
)
def test_every_loss_is_divided_by_the_weight_of_all_or_by_its_own(weight, want):
    total = total_loss(LOSSES, weight)
    assert total.item() == pytest.approx(want)
    assert total.dtype == torch.float32
    assert total.ndim == 0
