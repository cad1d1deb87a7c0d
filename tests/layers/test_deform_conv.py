"""Deformable convolution against the plain one and a loop over taps."""

import math

import pytest
import torch
from torch import nn

from tests.parity import randomise
from vitrail.layers.deform_conv import DeformConv2d


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def read(plane, y, x):
    """Bilinear, zero outside."""
    total = torch.zeros((), dtype=plane.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < plane.shape[0] and 0 <= column < plane.shape[1]:
                total += (1 - abs(y - row)) * (1 - abs(x - column)) * plane[row, column]
    return total


def by_hand(conv, x, offset_groups):
    """Equation 1 of the second paper, place by place, for a kernel of 3."""
    moves = conv.conv_offset(x)
    out = torch.zeros(
        x.shape[0], conv.out_channels, *moves.shape[2:], dtype=x.dtype
    ) + conv.bias.view(-1, 1, 1)
    group_in = x.shape[1] // conv.groups
    group_out = conv.out_channels // conv.groups
    for b, i, j in torch.cartesian_prod(
        *map(torch.arange, (x.shape[0], *moves.shape[2:]))
    ).tolist():
        for c in range(x.shape[1]):
            group = c // (x.shape[1] // offset_groups)
            for tap in range(9):
                k = group * 9 + tap
                down, right = moves[b, 2 * k : 2 * k + 2, i, j].tolist()
                y = i * conv.stride[0] - conv.padding[0] + tap // 3 * conv.dilation[0] + down
                z = j * conv.stride[1] - conv.padding[1] + tap % 3 * conv.dilation[1] + right
                seen = read(x[b, c], y, z)
                if conv.modulated:
                    seen = seen * moves[b, 18 * offset_groups + k, i, j].sigmoid()
                first = c // group_in * group_out
                kernel = conv.weight[first : first + group_out, c % group_in, tap // 3, tap % 3]
                out[b, first : first + group_out, i, j] += kernel * seen
    return out


@pytest.mark.parametrize("modulated", [False, True])
@torch.no_grad()
def test_each_tap_reads_where_its_offset_points_weighed_by_its_factor(modulated):
    conv = DeformConv2d(
        4, 2, modulated=modulated, offset_groups=2, groups=2, stride=2, padding=1, dilation=2
    ).double()
    randomise(conv)
    x = draw(2, 4, 6, 5)
    assert conv.conv_offset(x).abs().max() > 1, "points that leave their pixel"
    torch.testing.assert_close(conv(x), by_hand(conv, x, 2))


@pytest.mark.parametrize(("modulated", "factor"), [(False, 1.0), (True, 0.5)])
@torch.no_grad()
def test_it_starts_as_the_plain_convolution_times_the_first_factor(modulated, factor):
    conv = DeformConv2d(3, 4, modulated=modulated, padding=1).double()
    x = draw(2, 3, 5, 7)
    plain = nn.functional.conv2d(x, conv.weight, padding=1)
    torch.testing.assert_close(conv(x), factor * plain + conv.bias.view(-1, 1, 1))


@pytest.mark.parametrize("modulated", [False, True])
def test_every_parameter_receives_a_gradient_from_the_first_step(modulated):
    conv = DeformConv2d(3, 4, modulated=modulated, padding=1, bias=False).double()
    x = draw(1, 3, 5, 4).requires_grad_()
    conv(x).square().sum().backward()
    for tensor in (x, *conv.parameters()):
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()


@pytest.mark.parametrize(("modulated", "numbers"), [(False, 18), (True, 27)])
def test_its_keys_and_shapes_are_those_of_mmdetection(modulated, numbers):
    conv = DeformConv2d(8, 6, modulated=modulated, padding=1, bias=False)
    assert {key: tuple(t.shape) for key, t in conv.state_dict().items()} == {
        "weight": (6, 8, 3, 3),
        "conv_offset.weight": (numbers, 8, 3, 3),
        "conv_offset.bias": (numbers,),
    }


@torch.no_grad()
def test_bfloat16_rounds_inputs_offsets_and_output_alone():
    conv = DeformConv2d(3, 4, padding=1)
    randomise(conv)
    conv.bfloat16()
    x = draw(1, 3, 5, 4).bfloat16()
    out = conv(x)
    assert out.dtype == torch.bfloat16
    exact = conv.double()(x.double())
    # The offsets themselves are of bfloat16: a hundredth of a pixel at most here.
    assert (out - exact).abs().max() <= 0.02 * exact.abs().max()


def test_groups_divide_the_channels_that_a_filter_reads():
    assert DeformConv2d(4, 2, groups=2).weight.shape == (2, 2, 3, 3)
    assert DeformConv2d(4, 2).weight.shape == (2, 4, 3, 3)


def test_factors_are_learnt_unless_the_first_form_is_asked_for():
    assert DeformConv2d(4, 6, 3).conv_offset.out_channels == 27
    assert DeformConv2d(4, 6, 3, modulated=False).conv_offset.out_channels == 18
