"""Stochastic depth and dropout: which rate stands where, and that it acts on what the papers say."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.parity import randomise
from vitrail.backbones.swin import SwinBlock
from vitrail.backbones.vit import Block
from vitrail.layers.residual import DropPath
from vitrail.models import build_classifier, create_backbone, create_model
from vitrail.registry import backbone_entry, list_backbones, tiny_entries
from vitrail.weights.layouts import Uninitialised

RATE = 0.2  # not a half, where dropping and keeping look alike


def on_meta(name: str, **fields: Any) -> nn.Module:
    with torch.device("meta"), Uninitialised():
        return create_model(name, **fields)


def rates(model: nn.Module) -> list[float]:
    return [m.rate for m in model.modules() if isinstance(m, DropPath)]


def linear(count: int, steps: int) -> list[float]:
    return pytest.approx([RATE * i / steps for i in range(count)])


@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16",
        "deit_tiny_distilled_patch16",
        "vit_small_patch14_reg4_dinov2",
        "vit_small_r26_s32",
        "deepvit_s",
        "navit_tiny_patch16",
        "swin_tiny_patch4_window7",
        "cmt_ti",
    ],
)
def test_the_rates_of_transformers_grow_from_zero_to_that_of_the_last_block(name):
    found = rates(on_meta(name, drop_path_rate=RATE))
    assert len(found) in (12, 16)
    assert found == linear(len(found), len(found) - 1)
    assert set(rates(on_meta(name))) == {0.0}


@pytest.mark.parametrize(("name", "blocks"), [("efficientnet_b1", 23), ("mobilenetv3_large", 15)])
def test_the_rates_of_convolutional_networks_grow_towards_a_block_after_the_last(name, blocks):
    assert rates(on_meta(name, drop_path_rate=RATE)) == linear(blocks, blocks)


def test_without_a_word_efficientnet_drops_a_fifth_and_mobilenetv3_nothing():
    assert rates(on_meta("efficientnet_b0")) == linear(16, 16)
    assert set(rates(on_meta("mobilenetv3_small"))) == {0.0}


def calls_of(family: str, **fields: Any) -> tuple[nn.Module, list[tuple[DropPath, Tensor, Tensor]]]:
    """The tiny model of a family after one step in training mode, and what each DropPath read and gave."""
    torch.manual_seed(0)
    entry = tiny_entries()[family]
    model = build_classifier(entry, replace(entry.config, **fields), 5)
    randomise(model)
    calls: list[tuple[DropPath, Tensor, Tensor]] = []
    for module in model.modules():
        if isinstance(module, DropPath):
            module.register_forward_hook(
                # A block may add to the result in place.
                lambda m, given, out: calls.append((m, given[0].detach().clone(), out.clone()))
            )
    model.train()(torch.randn(12, 3, 64, 96))
    return model, calls


# How often a block drops: a transformer's both branches; a convolutional block where it has a shortcut.
BRANCHES = {
    "vit": 2 * 2,
    "deit": 2 * 2,
    "studiedvit": 2 * 2 - 1,  # every other block attends
    "dinov2": 2 * 2,
    "vithybrid": 2 * 2,
    "deepvit": 2 * 2,
    "navit": 2 * 2,
    "swin": 2 * 6,
    "cmt": 2 * 5,
    "efficientnet": 0 + 1,
    "mobilenetv3": 0 + 2,
}


@pytest.mark.parametrize("family", BRANCHES)
def test_training_drops_whole_samples_of_every_branch_at_the_blocks_rate(family):
    fields = {"drop_path_rate": RATE}
    if family == "efficientnet":  # the second block of a stage has the shortcut
        stages = ((3, 1, 16, 1, 1), (3, 2, 24, 2, 2), (5, 2, 32, 2, 2))
        fields |= {"stages": stages}
    model, calls = calls_of(family, **fields)
    if family in ("efficientnet", "mobilenetv3"):
        blocks = [m for m in model.modules() if getattr(m, "shortcut", False)]
        assert len(calls) == len(blocks) >= 1
    else:
        assert len(calls) == BRANCHES[family]
    for module, given, out in calls:
        for before, after in zip(given, out, strict=True):
            if after.any():
                torch.testing.assert_close(after, before / (1 - module.rate))
    if family not in ("efficientnet", "mobilenetv3"):
        dropped = [not row.any() for m, _, out in calls if m.rate == RATE for row in out]
        assert True in dropped
        assert False in dropped
    model.eval()
    calls.clear()
    with torch.no_grad():
        model(torch.randn(2, 3, 64, 96))
    assert all(torch.equal(given, out) for _, given, out in calls)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_what_is_dropped_is_the_branch_and_never_the_stream(kind):
    """x + drop(attention(norm x)), then x + drop(mlp(norm x)), with masks drawn in this order."""
    torch.manual_seed(0)
    backbone = build_classifier(
        tiny_entries()[kind], replace(tiny_entries()[kind].config, drop_path_rate=RATE), 3
    ).backbone
    randomise(backbone)
    kinds = Block if kind == "vit" else SwinBlock
    block = [m for m in backbone.modules() if isinstance(m, kinds)][-1].train()
    x = torch.randn(40, 12, block.norm1.normalized_shape[0])
    size = () if kind == "vit" else (3, 4)
    with torch.no_grad():
        torch.manual_seed(1)
        got = block(x, *size)
        torch.manual_seed(1)
        masks = [torch.empty(40, 1, 1).bernoulli_(1 - RATE) / (1 - RATE) for _ in range(2)]
        want = x + masks[0] * block.attn(block.norm1(x), *size)
        want = want + masks[1] * block.mlp(block.norm2(want))
    assert masks[0].unique().tolist() == pytest.approx([0.0, 1.25])
    torch.testing.assert_close(got, want)


# Dropout


def dropouts(model: nn.Module) -> dict[str, float]:
    return {n: m.p for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0}


TORCHVISIONS = {
    **{f"efficientnet_b{i}": f"efficientnet_b{i}" for i in range(8)},
    "mobilenetv2_100": "mobilenet_v2",
    "mobilenetv3_large": "mobilenet_v3_large",
    "mobilenetv3_small": "mobilenet_v3_small",
}


@pytest.mark.parametrize("name", TORCHVISIONS)
def test_the_dropout_before_the_classifier_is_torchvisions(name):
    models = pytest.importorskip("torchvision").models
    with torch.device("meta"), Uninitialised():
        theirs = dropouts(models.get_model(TORCHVISIONS[name]))
    assert len(theirs) == 1
    own = [name, f"tf_{name}"] if name.startswith("efficientnet") else [name]
    for ours in own:
        assert dropouts(on_meta(ours)) == {"head.drop": next(iter(theirs.values()))}


def test_other_models_drop_as_their_official_code():
    """CMT's `dp`; MobileViT's `dropout` on both branches of a layer and before the classifier."""
    for name, rate in (("cmt_ti", 0.1), ("cmt_xs", 0.1), ("cmt_s", 0.1), ("cmt_b", 0.3)):
        assert dropouts(on_meta(name)) == {"head.drop": rate}
    for name in ("mobilevit_xxs", "mobilevit_xs", "mobilevit_s"):
        found = dropouts(on_meta(name))
        assert set(found.values()) == {0.1}
        assert len(found) == 2 + 4 + 3 + 1
    quiet = [n for n in list_backbones() if backbone_entry(n).family in ("swin", "vit", "resnet")]
    assert not any(dropouts(on_meta(name)) for name in quiet[:3] + quiet[-3:])


@pytest.mark.parametrize(
    "family", ["cmt", "mobilenetv2", "mobilenetv3", "efficientnet", "mobilevit"]
)
def test_the_classifier_reads_what_dropout_left(family):
    torch.manual_seed(0)
    entry = tiny_entries()[family]
    field = "head_drop" if family == "cmt" else "head_drop_rate"
    model = build_classifier(entry, replace(entry.config, **{field: RATE}), 5)
    randomise(model)
    seen = {}
    model.head.drop.register_forward_hook(
        lambda m, given, out: seen.update(given=given[0], out=out)
    )
    model.head.fc.register_forward_hook(lambda m, given, out: seen.update(read=given[0]))
    model.train()(torch.randn(64, 3, 40, 24))
    assert seen["read"] is seen["out"]
    assert seen["given"].shape == (64, model.head.fc.in_features)
    zero = (seen["out"] == 0) & (seen["given"] != 0)
    share = zero.sum() / (seen["given"] != 0).sum()
    assert float(share) == pytest.approx(RATE, abs=0.03)
    kept = ~zero
    torch.testing.assert_close(seen["out"][kept], seen["given"][kept] / (1 - RATE))


def test_both_branches_of_a_mobilevit_layer_are_dropped():
    torch.manual_seed(0)
    config = replace(tiny_entries()["mobilevit"].config, drop_rate=RATE)
    layer = tiny_entries()["mobilevit"].cls(config).stages[2][1].transformer[0]
    randomise(layer)
    x = torch.randn(3, 50, 16)
    with torch.no_grad():
        torch.manual_seed(1)
        got = layer.train()(x)
        torch.manual_seed(1)
        want = x + nn.functional.dropout(layer.attn(layer.norm1(x)), RATE)
        want = want + nn.functional.dropout(layer.mlp(layer.norm2(want)), RATE)
    torch.testing.assert_close(got, want)


NORMED = ["efficientnet_b0", "tf_efficientnet_b0", "mobilevit_xxs", "mobilenetv3_small"]


def test_batchnorms_move_their_averages_as_the_references():
    """0.1 a step; 0.01 in TensorFlow's EfficientNets."""
    for name in [*NORMED, "cmt_s", "deepvit_s", "resnet18", "efficientvit_m1"]:
        model = on_meta(name)
        found = {
            m.momentum for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        }
        assert found <= {0.01 if name.startswith("tf_") else 0.1}, name


def test_a_rate_that_would_drop_everything_is_refused():
    from vitrail_runtime.errors import InputError

    for rate in (-0.1, 1.0):
        with torch.device("meta"), pytest.raises(InputError, match="from 0 to below 1"):
            create_backbone("vit_tiny_patch16", drop_path_rate=rate)
