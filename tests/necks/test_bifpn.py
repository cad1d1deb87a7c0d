"""The weighted bidirectional pyramid against the paper's formulas written out (effdet's own cells:
tests/detectors)."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.parity import assert_close_to_peer, randomise
from vitrail.features import FeatureSpec
from vitrail.necks.bifpn import BiFPN, Lateral, Node, SeparableConv2d, Shrink

SPECS = {"c3": FeatureSpec(6, 7), "c4": FeatureSpec(8, 14), "c5": FeatureSpec(5, 28)}
DIM = 8


def neck_of(**fields):
    torch.manual_seed(0)
    neck = BiFPN(SPECS, DIM, **{"cells": 2, "levels": 4, **fields})
    randomise(neck)
    return neck.double().eval()


def maps_of(sizes=((9, 12), (5, 6), (3, 3))):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(2, spec.channels, *size, generator=generator, dtype=torch.float64)
        for (name, spec), size in zip(SPECS.items(), sizes, strict=True)
    }


def half(x):
    """3x3 max pooling as TensorFlow pads: the end first, and the start where a side is odd."""
    rows, columns = -(-x.shape[-2] // 2), -(-x.shape[-1] // 2)
    out = x.new_zeros(*x.shape[:-2], rows, columns)
    for i in range(rows):
        for j in range(columns):
            top, left = 2 * i - x.shape[-2] % 2, 2 * j - x.shape[-1] % 2
            window = x[..., max(0, top) : top + 3, max(0, left) : left + 3]
            out[..., i, j] = window.amax((-2, -1))
    return out


def fused(node, *maps, fusion="fast"):
    """Equation of section 3.3, then activation, separable convolution and norm."""
    w = node.weights
    if fusion == "fast":
        total = sum(x * w[i].clamp(min=0) for i, x in enumerate(maps))
        total = total / (1e-4 + sum(w[i].clamp(min=0) for i in range(len(maps))))
    elif fusion == "softmax":
        total = sum(x * w[i].exp() for i, x in enumerate(maps)) / w.exp().sum()
    else:
        total = sum(maps)
    return node.norm(node.conv(total * total.sigmoid()))


def up(x, like):
    return F.interpolate(x, like.shape[-2:], mode="nearest")


@pytest.mark.parametrize("fusion", ["fast", "softmax", "sum"])
def test_a_pyramid_equals_figure_2d_written_out(fusion):
    neck, given = neck_of(fusion=fusion, cells=2), maps_of()
    if fusion != "sum":
        with torch.no_grad():  # a weight below zero counts nothing in fast fusion
            neck.cells[0].up[1].weights.copy_(torch.tensor([0.7, -0.4, 1.6]))
    p3, p4, p5 = given.values()
    p6 = half(neck.extra(p5))
    for cell in neck.cells:
        d3, d4, d5 = (lat(x) for lat, x in zip(cell.down_laterals, (p3, p4, p5), strict=True))
        u4, u5, u6 = (lat(x) for lat, x in zip(cell.up_laterals, (p4, p5, p6), strict=True))
        t5 = fused(cell.down[2], d5, up(p6, d5), fusion=fusion)
        t4 = fused(cell.down[1], d4, up(t5, d4), fusion=fusion)
        p3 = fused(cell.down[0], d3, up(t4, d3), fusion=fusion)
        p4 = fused(cell.up[0], u4, t4, half(p3), fusion=fusion)
        p5 = fused(cell.up[1], u5, t5, half(p4), fusion=fusion)
        p6 = fused(cell.up[2], u6, half(p5), fusion=fusion)
    with torch.no_grad():
        got = neck(given)
    assert list(got) == ["p3", "p4", "p5", "p6"]
    assert [tuple(x.shape[-2:]) for x in got.values()] == [(9, 12), (5, 6), (3, 3), (2, 2)]
    for a, b in zip(got.values(), (p3, p4, p5, p6), strict=True):
        assert_close_to_peer(a, b.detach())


def test_shares_are_positive_and_make_one_and_start_alike():
    node = Node(4, 3, "fast", bias=True, norm_momentum=0.01)
    torch.testing.assert_close(node.shares(), torch.full((3,), 1 / 3.0001))
    soft = Node(4, 2, "softmax", bias=True, norm_momentum=0.01)
    torch.testing.assert_close(soft.shares(), torch.full((2,), 0.5))
    plain = Node(4, 2, "sum", bias=True, norm_momentum=0.01)
    assert plain.shares() is None
    assert "weights" not in dict(plain.named_parameters())


@pytest.mark.parametrize("size", [(6, 9), (7, 4), (1, 2)])
@pytest.mark.parametrize("same_pad", [True, False])
def test_maps_are_halved_with_the_padding_of_either_library(size, same_pad):
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0)) - 5
    want = half(x) if same_pad else nn.MaxPool2d(3, 2, padding=1)(x)
    assert torch.equal(Shrink(same_pad)(x), want)
    assert torch.equal(neck_of(same_pad=same_pad).shrink(x), want)
    assert torch.equal(neck_of(same_pad=same_pad).cells[1].shrink(x), want)


def test_widths_and_true_strides_are_declared_and_maps_of_the_width_pass_as_they_are():
    neck = neck_of(levels=5)
    assert neck.feature_specs == {
        "p3": FeatureSpec(DIM, 7),
        "p4": FeatureSpec(DIM, 14),
        "p5": FeatureSpec(DIM, 28),
        "p6": FeatureSpec(DIM, 56),
        "p7": FeatureSpec(DIM, 112),
    }
    first, second = neck.cells
    assert [lat.changes for lat in first.down_laterals] == [True, False, True, False]
    assert [lat.changes for lat in first.up_laterals] == [False, True, False, False]
    assert not any(lat.changes for lat in (*second.down_laterals, *second.up_laterals))
    assert [len(node.weights) for node in (*first.down, *first.up)] == [2] * 4 + [3] * 3 + [2]
    with torch.no_grad():
        assert [tuple(x.shape[1:]) for x in neck(maps_of()).values()] == [
            (DIM, 9, 12),
            (DIM, 5, 6),
            (DIM, 3, 3),
            (DIM, 2, 2),
            (DIM, 1, 1),
        ]


def test_biases_and_the_pace_of_the_norms_are_fields():
    for bias in (True, False):
        neck = BiFPN(SPECS, DIM, 1, bias=bias, norm_momentum=0.2)
        convs = [m for m in neck.modules() if isinstance(m, (SeparableConv2d, Lateral))]
        ones = [m.pointwise if isinstance(m, SeparableConv2d) else m.conv for m in convs
                if isinstance(m, SeparableConv2d) or m.changes]  # fmt: skip
        assert {conv.bias is not None for conv in ones} == {bias}
        norms = [m for m in neck.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.2)}
    assert BiFPN(SPECS, DIM, 1).extra.norm.momentum == 0.01


def test_fresh_weights_are_glorots():
    torch.manual_seed(0)
    neck = BiFPN(SPECS, 96, 1)
    node = neck.cells[0].down[0].conv
    for conv, fans in (
        (node.depthwise, 9 + 9),
        (node.pointwise, 96 + 96),
        (neck.extra.conv, 5 + 96),
    ):
        bound = (6 / fans) ** 0.5
        largest = conv.weight.abs().max().item()
        assert 0.97 * bound < largest <= bound
        assert conv.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert conv.bias is None or not conv.bias.any()
