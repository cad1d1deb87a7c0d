"""A backbone with a head: what the head reads, and in which order a pack answers."""

import torch
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
