"""The feature pyramid against torchvision's."""

import pytest
import torch
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from tests.parity import assert_close_to_peer, randomise
from vitrail.features import FeatureSpec
from vitrail.necks.fpn import FPN

SPECS = {"c2": FeatureSpec(6, 4), "c3": FeatureSpec(9, 8), "c4": FeatureSpec(5, 14)}


@pytest.mark.parametrize("sizes", [[(8, 12), (4, 6), (2, 3)], [(9, 11), (5, 6), (3, 3)]], ids=str)
@pytest.mark.parametrize("pool", [False, True])
def test_the_pyramid_equals_torchvisions_at_sizes_that_halve_and_that_do_not(sizes, pool):
    peer = FeaturePyramidNetwork([6, 9, 5], 7, extra_blocks=LastLevelMaxPool() if pool else None)
    randomise(peer)
    ours = FPN(SPECS, 7, pool=pool).double()
    state = peer.double().state_dict()
    with torch.no_grad():
        for i in range(3):
            for mine, theirs in ((ours.lateral[i], "inner"), (ours.smooth[i], "layer")):
                for name in ("weight", "bias"):
                    getattr(mine, name).copy_(state[f"{theirs}_blocks.{i}.0.{name}"])
        generator = torch.Generator().manual_seed(0)
        maps = {
            name: torch.randn(2, spec.channels, *size, generator=generator, dtype=torch.float64)
            for (name, spec), size in zip(SPECS.items(), sizes, strict=True)
        }
        want = list(peer(maps).values())
        got = ours(maps)
    assert list(got) == ["p2", "p3", "p4", "p5"][: 3 + pool]
    for a, b in zip(got.values(), want, strict=True):
        assert_close_to_peer(a, b)


def test_the_pyramid_declares_its_width_and_the_true_strides():
    assert FPN(SPECS, 7, pool=True).feature_specs == {
        "p2": FeatureSpec(7, 4),
        "p3": FeatureSpec(7, 8),
        "p4": FeatureSpec(7, 14),
        "p5": FeatureSpec(7, 28),
    }


def test_fresh_weights_are_drawn_as_torchvisions():
    torch.manual_seed(0)
    ours, peer = FPN(SPECS, 64), FeaturePyramidNetwork([6, 9, 5], 64)
    for i in range(3):
        for mine, theirs in (
            (ours.lateral[i], peer.inner_blocks[i][0]),
            (ours.smooth[i], peer.layer_blocks[i][0]),
        ):
            std = theirs.weight.std().item()
            assert mine.weight.std().item() == pytest.approx(std, rel=0.15)
            assert not mine.bias.any()
