import pytest
import torch
from torch import nn

from vitrail.bench.macs import count_macs, count_params
from vitrail.layers.deform_conv import DeformConv2d
from vitrail.models import create_model


def test_a_grouped_convolution_and_a_linear_layer_are_counted_by_hand():
    conv = nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3)
    model = nn.Sequential(conv, nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 5 * 4, 7))
    assert count_macs(model, 10, 8) == 6 * 9 * 5 * 4 + 120 * 7
    assert count_params(model) == 6 * 9 + 6 + 12 + 120 * 7 + 7


def test_a_deformable_convolution_counts_as_two_plain_ones():
    """Its own, and the one that says where it reads."""
    conv = DeformConv2d(8, 12, 3, stride=2, padding=1, groups=2)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), conv)
    places = 10 * 15
    want = 3 * 8 * 20 * 30 + places * (12 * 4 * 9 + 27 * 8 * 9)
    assert count_macs(model, 20, 30) == want


def test_counting_leaves_a_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    count_macs(model, 9, 11)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(("height", "width"), [(64, 96), (224, 224)])
def test_a_vision_transformer_is_counted_by_hand(height, width):
    """ViT-Ti/16: patches, four projections and two products of attention, the MLP, the classifier."""
    model = create_model("vit_tiny_patch16")
    dim, patches = 192, (height // 16) * (width // 16)
    tokens = patches + 1
    block = tokens * dim * (3 * dim + dim + 8 * dim) + 2 * tokens * tokens * dim
    expected = patches * 3 * 16 * 16 * dim + 12 * block + dim * 1000
    if (height, width) == (64, 96):  # 14 x 14 positions become 4 x 6: one axis, then the other
        expected += dim * (14 * 14 * 6 + 4 * 14 * 6)
    assert count_macs(model, height, width) == expected
    norms = 2 * 2 * dim * 12 + 2 * dim
    biases = 12 * (3 + 1 + 4 + 1) * dim + dim + 1000
    positions = (14 * 14 + 1) * dim + dim  # with the class token
    weights = 3 * 16 * 16 * dim + 12 * 12 * dim * dim + dim * 1000
    assert count_params(model) == weights + biases + norms + positions == 5_717_416


def test_shared_and_frozen_parameters_count_once_and_statistics_do_not():
    layer = nn.Linear(4, 4, bias=False).requires_grad_(False)
    model = nn.Sequential(layer, layer, nn.BatchNorm1d(4))
    assert count_params(model) == 16 + 8


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        self.part = nn.Dropout(0.5)
        self.seen = []

    def forward(self, images):
        self.seen.append((self.training, self.part.training, images.shape, torch.is_grad_enabled()))
        raise OSError("gone")


def test_counting_runs_in_eval_mode_and_puts_modes_back_after_an_error():
    model = Broken().train()
    model.part.eval()
    with pytest.raises(OSError, match="gone"):
        count_macs(model, 5, 7)
    assert model.seen == [(False, False, (1, 3, 5, 7), False)]
    assert (model.training, model.part.training) == (True, False)
