"""A backbone with a head: what the head reads, and in which order a pack answers."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitrail.backbones.vit import ViT, ViTConfig, ViTHead
from vitrail.classifiers import Classifier, PooledHead
from vitrail.features import Features, FeatureSpec
from vitrail.packing import pack


def test_the_pooled_head_averages_the_coarsest_map():
    specs = {"c2": FeatureSpec(3, 4), "c3": FeatureSpec(5, 8)}
    head = PooledHead(None, specs, 7)
    maps = {"c2": torch.randn(2, 3, 4, 6), "c3": torch.randn(2, 5, 2, 3)}
    want = nn.functional.linear(maps["c3"].flatten(2).mean(2), head.fc.weight, head.fc.bias)
    torch.testing.assert_close(head(Features(maps)), want)
    assert want.shape == (2, 7)


def test_a_pack_answers_in_its_own_order_and_records_pass_through():
    torch.manual_seed(0)
    shape = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 4, "image_size": 16}
    backbone = ViT(ViTConfig(**shape, head="mlp"))
    model = Classifier(backbone, ViTHead(backbone.config, backbone.feature_specs, 3)).eval()
    images = [torch.randn(3, 8, 4 * n) for n in (1, 4, 2)]
    (packed,) = pack(images, 4)
    assert packed.image_ids == (1, 2, 0)  # the longest first
    with torch.no_grad():
        got = model.forward_packed(packed)
        alone = torch.cat([model(images[i][None]) for i in packed.image_ids])
        record: dict[str, torch.Tensor] = {}
        recorded = model(images[0][None], record=record)
    torch.testing.assert_close(got, alone)
    torch.testing.assert_close(recorded[0], alone[2])
    assert "blocks.0.attn.weights" in record


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_sum_of_losses_over_their_weight_is_the_mean_cross_entropy(smoothing):
    torch.manual_seed(0)
    backbone = ViT(ViTConfig(embed_dim=32, depth=1, num_heads=2, patch_size=4, image_size=8))
    model = Classifier(backbone, ViTHead(backbone.config, backbone.feature_specs, 3))
    nn.init.normal_(model.head.fc.weight)
    images, labels = torch.randn(5, 3, 8, 12), torch.tensor([2, 0, 1, 1, 2])
    shares = torch.rand(5, 3).softmax(1)
    for targets in (labels, shares):
        losses, weight = (
            model.losses(images, targets, label_smoothing=smoothing),
            model.weight(targets),
        )
        want = F.cross_entropy(model(images), targets, label_smoothing=smoothing)
        assert losses.keys() == {"classify"}
        assert weight.dtype == torch.float32
        torch.testing.assert_close(losses["classify"] / weight, want)
    one_hot = F.one_hot(labels, 3).float()
    torch.testing.assert_close(model.losses(images, one_hot), model.losses(images, labels))
    # Two parts of a batch add up to it, in any split.
    parts = [model.losses(images[s], labels[s])["classify"] for s in (slice(2), slice(2, 5))]
    torch.testing.assert_close(parts[0] + parts[1], model.losses(images, labels)["classify"])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_sigmoid_loss_asks_of_each_class_by_itself(smoothing):
    class Given(nn.Module):
        def forward(self, images, record=None):
            return images

    model = Classifier(Given(), nn.Identity())
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
    labels = torch.tensor([2, 0])
    want = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        for k, x in enumerate(row):
            y = (k == label) * (1 - smoothing) + smoothing / 3
            p = 1 / (1 + math.exp(-x))
            want -= y * math.log(p) + (1 - y) * math.log(1 - p)
    options = {"label_smoothing": smoothing, "loss": "sigmoid"}
    got = model.losses(logits, labels, **options)["classify"]
    assert got.item() == pytest.approx(want, rel=1e-5)
    one_hot = F.one_hot(labels, 3).double()
    assert model.losses(logits, one_hot, **options)["classify"].item() == pytest.approx(
        want, rel=1e-5
    )


def test_the_loss_is_taken_in_float32_whatever_the_logits_are():
    class Half(nn.Module):
        def forward(self, images, record=None):
            return torch.tensor([[12.0, 1.5, -3.0], [0.1, 9.0, 2.0]], dtype=torch.bfloat16)

    model, labels = Classifier(Half(), nn.Identity()), torch.tensor([1, 2])
    logits = Half()(None).float()
    want = -(logits - logits.exp().sum(1, keepdim=True).log())[[0, 1], labels].sum()
    got = model.losses(torch.zeros(2, 3, 1, 1), labels)["classify"]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want)
