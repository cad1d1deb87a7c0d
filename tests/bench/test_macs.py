import torch
from torch import nn

from vitrail.bench.macs import count_macs, count_params


def test_a_grouped_convolution_and_a_linear_layer_are_counted_by_hand():
    conv = nn.Conv2d(3, 6, 3, stride=2, padding=1, groups=3)
    model = nn.Sequential(conv, nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 5 * 4, 7))
    assert count_macs(model, 10, 8) == 6 * 9 * 5 * 4 + 120 * 7
    assert count_params(model) == 6 * 9 + 6 + 12 + 120 * 7 + 7


def test_counting_leaves_a_model_as_it_was():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    count_macs(model, 9, 11)
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
