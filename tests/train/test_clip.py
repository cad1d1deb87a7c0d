"""Gradients limited by the norm of all, or unit by unit against timm's adaptive clipping."""

import copy

import pytest
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from vitrail.models import create_model
from vitrail.train.clip import classifier_parameters, clip_gradients
from vitrail.train.config import TrainConfig
from vitrail_runtime.errors import InputError

SMALL = {  # every shape of a weight: tokens, tables, vectors, matrices, filters, filters of one channel
    "vit_tiny_patch16": {"depth": 1, "embed_dim": 16, "num_heads": 2, "image_size": 32},
    "efficientvit_m0": {"dims": (16, 24, 32), "depths": (1, 1, 1), "key_dim": 8},
}


@pytest.fixture(params=SMALL, ids=lambda name: name.partition("_")[0])
def model(request) -> nn.Module:
    """Gradients from far below to far above what clipping at a hundredth of the weights allows."""
    torch.manual_seed(0)
    model = create_model(request.param, classes=("a", "b", "c"), **SMALL[request.param])
    for p in model.parameters():
        nn.init.normal_(p, std=0.5 * torch.rand(()).item())
        p.grad = torch.randn_like(p) * 10 ** torch.empty(len(p), *[1] * (p.ndim - 1)).uniform_(
            -4, 1
        )
    parameters = list(model.parameters())
    nn.init.zeros_(parameters[3])  # a unit without a norm
    parameters[4].grad = torch.zeros_like(parameters[4])
    parameters[5].grad = None  # frozen
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def whole_norm(model: nn.Module) -> torch.Tensor:
    return torch.sqrt(sum(g.square().sum() for g in gradients(model).values()))


@pytest.mark.parametrize("factor", [0.01, 0.3])
def test_adaptive_clipping_equals_timms_on_all_but_the_classifier(model, factor):
    theirs = copy.deepcopy(model)
    for ours, other in zip(model.parameters(), theirs.parameters(), strict=True):
        other.grad = None if ours.grad is None else ours.grad.clone()
    clipped = list(theirs.parameters())[
        :-2
    ]  # as timm's exclude_head does: the classifier stands last
    adaptive_clip_grad(clipped, clip_factor=factor)
    before, norm = gradients(model), whole_norm(model)
    said = clip_gradients(model, TrainConfig(clip_mode="agc", clip_grad=factor))
    torch.testing.assert_close(said, norm)
    after, expected = gradients(model), gradients(theirs)
    assert after.keys() == expected.keys()
    for name in after:
        torch.testing.assert_close(after[name], expected[name], rtol=1e-6, atol=0, msg=name)
    changed = [not torch.equal(after[n], before[n]) for n in after]
    assert 5 < sum(changed) < len(changed)


@pytest.mark.parametrize("mode", ["norm", "agc"])
def test_without_a_limit_no_gradient_changes_and_its_norm_is_told(model, mode):
    before, norm = gradients(model), whole_norm(model)
    said = clip_gradients(model, TrainConfig(clip_mode=mode, clip_grad=None))
    torch.testing.assert_close(said, norm)
    assert all(torch.equal(g, before[n]) for n, g in gradients(model).items())


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_the_whole_gradient_is_scaled_to_the_largest_norm_where_it_is_larger(model, share):
    before, norm = gradients(model), whole_norm(model)
    said = clip_gradients(model, TrainConfig(clip_grad=share * norm.item()))
    torch.testing.assert_close(said, norm)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, before[name] * min(share, 1.0))


@pytest.mark.parametrize(
    ("name", "left_alone"),
    [
        ("vit_tiny_patch16", ["head.fc.weight", "head.fc.bias"]),
        ("efficientvit_m0", ["head.linear.weight", "head.linear.bias"]),  # its norm is clipped
        ("mobilenetv3_large", ["head.fc.weight", "head.fc.bias"]),  # and so is the layer before
        ("cmt_ti", ["head.fc.weight", "head.fc.bias"]),
        (
            "deit_tiny_distilled_patch16",
            ["head.fc.weight", "head.fc.bias", "head.fc_dist.weight", "head.fc_dist.bias"],
        ),
        (
            "upernet/efficientvit_m0",
            ["head.fc.weight", "head.fc.bias", "auxiliary.fc.weight", "auxiliary.fc.bias"],
        ),
    ],
)
def test_the_classifier_is_what_gives_the_logits(name, left_alone):
    with torch.device("meta"):
        model = create_model(name, classes=tuple("abcdefg"))
    names = {id(p): n for n, p in model.named_parameters()}
    assert [names[id(p)] for p in classifier_parameters(model)] == left_alone


def test_adaptive_clipping_of_shards_is_refused():
    with pytest.raises(
        InputError, match=r"'agc' needs whole weights.*--parallel data, or --clip-mode norm"
    ):
        TrainConfig(clip_mode="agc", parallel="fsdp")
    TrainConfig(clip_mode="agc", parallel="data")
    TrainConfig(clip_mode="norm", parallel="fsdp")
