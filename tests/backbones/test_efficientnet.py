from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import vitrail
from tests.backbones.peers import assert_equals_peer
from vitrail.backbones.efficientnet import VARIANTS, EfficientNet, compound_scale
from vitrail.bench.macs import count_macs
from vitrail.registry import backbone_entry
from vitrail_runtime.errors import InputError

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


def peer_of(layout, name):
    make = timm.create_model if layout == "timm" else torchvision.models.get_model
    return make(name)


@pytest.mark.parametrize("size", [(75, 107), (64, 96)])
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("efficientnet_b0", "timm"),
        ("tf_efficientnet_b0", "timm"),
        ("efficientnet_b0", "torchvision"),
    ],
)
def test_logits_equal_the_peers(name, layout, size):
    assert_equals_peer(peer_of(layout, name), name, layout, [size])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout", "size"),
    [
        ("efficientnet_b0", "timm", 224),
        ("tf_efficientnet_b0", "timm", 224),
        ("tf_efficientnet_b3", "timm", 300),
        ("efficientnet_b2", "timm", 260),
        ("efficientnet_b3", "torchvision", 300),
    ],
)
def test_logits_equal_the_peers_at_the_papers_size(name, layout, size):
    assert_equals_peer(peer_of(layout, name), name, layout, [(size, size), (size, size // 2 + 13)])


@pytest.mark.slow
def test_torchvisions_other_epsilon_is_taken_up_by_the_running_variances():
    assert_equals_peer(
        peer_of("torchvision", "efficientnet_b5"), "efficientnet_b5", "torchvision", [(40, 56)]
    )


@pytest.mark.parametrize("number", range(8))
def test_the_key_map_takes_up_torchvisions_epsilon_where_it_is_another(number):
    name = f"efficientnet_b{number}"
    with torch.device("meta"):
        theirs = torchvision.models.get_model(name).features[0][1].eps
    entry = backbone_entry(name)
    state = {"features.0.1.running_var": torch.ones(3, dtype=torch.float64)}
    moved = entry.layouts["torchvision"].convert(state, entry.config)[
        "backbone.stem.bn.running_var"
    ]
    want = torch.full_like(moved, 1 + theirs - entry.config.norm["eps"])
    torch.testing.assert_close(moved, want, atol=1e-12, rtol=0)


def macs_of(config):
    with torch.device("meta"):
        return count_macs(EfficientNet(config), config.image_size, config.image_size)


@pytest.mark.slow
def test_compound_scaling_doubles_the_cost_with_each_step():
    # From phi 1 on: the first step also pays for rounding every stage's depth up.
    costs = [macs_of(compound_scale(phi)) for phi in range(1, 7)]
    for before, after in pairwise(costs):
        assert after / before == pytest.approx(1.92, rel=0.15)
    assert (costs[-1] / costs[0]) ** (1 / 5) == pytest.approx(1.92, rel=0.03)


def test_one_step_of_compound_scaling_is_b2_with_unrounded_coefficients():
    assert compound_scale(0) == VARIANTS["efficientnet_b0"]
    ours, b2 = compound_scale(1), VARIANTS["efficientnet_b2"]
    assert (ours.depth, ours.width) == pytest.approx((b2.depth, b2.width))
    assert ours.image_size == 256  # 257.6; the paper takes 260


def test_a_scaling_that_does_not_double_the_cost_is_refused():
    with pytest.raises(InputError, match=r"is 1\.452.*gamma=1\.174 would fit"):
        compound_scale(1, gamma=1.0)
    with pytest.raises(InputError, match="at least 1"):
        compound_scale(1, alpha=0.9, beta=1.3)


def test_an_unknown_padding_is_named():
    with pytest.raises(InputError, match="'same'"):
        replace(compound_scale(0), padding="same")


def test_drop_path_grows_over_the_blocks_as_in_the_official_code():
    rates = [
        m.rate for m in EfficientNet(VARIANTS["efficientnet_b0"]).modules() if hasattr(m, "rate")
    ]
    assert rates == pytest.approx([0.2 * i / 16 for i in range(16)])


@pytest.mark.parametrize(("padding", "share"), [("tf", 0.01), ("native", 0.1)])
def test_running_statistics_follow_a_batch_by_the_share_of_their_framework(padding, share):
    """The official TensorFlow code keeps 0.99 of what it has, PyTorch 0.9."""
    with torch.device("meta"):
        model = vitrail.create_model("efficientnet_b0", padding=padding)
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) > 40
    assert {m.momentum for m in norms} == {share}
