"""Frozen BatchNorm against torchvision's and against BatchNorm in eval mode."""

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from tests.parity import randomise
from vitrail.layers.frozen import FrozenNorm, freeze_norms


def test_it_equals_torchvisions_in_output_and_gradient():
    peer, ours = FrozenBatchNorm2d(5, eps=1e-3).double(), FrozenNorm(5, 1e-3).double()
    randomise(peer)
    ours.load_state_dict(peer.state_dict())
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ours(x), peer(x))
    (mine,), (other,) = (torch.autograd.grad(m(x).square().sum(), x) for m in (ours, peer))
    torch.testing.assert_close(mine, other)
    assert not list(ours.parameters())


def test_every_norm_of_a_model_is_replaced_by_one_of_its_values_and_epsilon():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, eps=0.1), nn.ModuleList())
    model[2].append(nn.BatchNorm2d(2))
    randomise(model)
    x = torch.randn(2, 3, 5, 6)
    want = model[:2].eval()(x)
    frozen = freeze_norms(model).train()
    torch.testing.assert_close(frozen[:2](x), want)
    assert frozen is model
    assert not [m for m in frozen.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len([m for m in frozen.modules() if isinstance(m, FrozenNorm)]) == 2
    assert [name for name, _ in frozen.named_parameters()] == ["0.weight", "0.bias"]
