"""ViT, DeiT and DINOv2 against timm and transformers, and what is their own."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import vitrail.backbones  # noqa: F401  (registers them)
from tests.parity import assert_close_to_peer, randomise
from vitrail.classifiers import Classifier
from vitrail.registry import backbone_entry

timm = pytest.importorskip("timm")

# Small widths and depths of the same classes; (our name, our fields, timm's name, timm's arguments).
SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3}
PLAIN = ("vit_tiny_patch16", {}, "vit_tiny_patch16_224", {})
CASES = {
    "vit": PLAIN,
    "distilled": ("deit_tiny_distilled_patch16", {}, "deit_tiny_distilled_patch16_224", {}),
    "dinov2": ("vit_small_patch14_dinov2", {}, "vit_small_patch14_dinov2", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}, "vit_small_patch14_reg4_dinov2", {}),
    "swiglu": ("vit_giant_patch14_dinov2", {}, "vit_giant_patch14_dinov2", {"mlp_ratio": 16 / 3}),
}


def load(name: str, layout: str, state: dict[str, Tensor], **fields) -> Classifier:
    """Our classifier in float64 with a foreign state, every key of it used."""
    entry = backbone_entry(name)
    config = replace(entry.config, **fields)
    backbone = entry.cls(config)
    converted = entry.layouts[layout].convert(state, config)
    head = {k: v for k, v in converted.items() if k.startswith("head.")}
    num_classes = head["head.fc.weight"].shape[0] if head else 1
    model = Classifier(backbone, entry.tail(config, backbone.feature_specs, num_classes))
    own = model.state_dict() if head else backbone.state_dict()
    if not head:
        converted = {k.removeprefix("backbone."): v for k, v in converted.items()}
    spare = converted.keys() - own.keys()
    assert all(key.endswith("mask_token") for key in spare), spare
    kept = {k: v for k, v in converted.items() if k in own}
    (model if head else backbone).load_state_dict(kept)
    return model.double().eval()


@pytest.fixture
def wide_interpolation(monkeypatch):
    """Peers cast their position table to float32 before they resample it. Parameters are born in float32,
    so the cast loses nothing; this keeps the resampling itself from rounding."""
    narrow = torch.nn.functional.interpolate
    monkeypatch.setattr(
        torch.nn.functional, "interpolate", lambda x, *args, **kw: narrow(x.double(), *args, **kw)
    )


def picture(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("grid", [(8, 8), (6, 11)])
@pytest.mark.usefixtures("wide_interpolation")
def test_the_model_equals_timms_at_the_tables_size_and_at_another_shape(case, grid):
    name, fields, peer_name, peer_fields = CASES[case]
    patch_size = backbone_entry(name).config.patch_size
    size = 8 * patch_size
    torch.manual_seed(0)
    peer = timm.create_model(
        peer_name, img_size=size, dynamic_img_size=True, num_classes=7, **SMALL, **peer_fields
    )
    randomise(peer)
    ours = {"pos_antialias": True, "pos_offset": 0.0, "pool": "token", **SMALL, **fields}
    model = load(name, "timm", peer.state_dict(), image_size=size, **ours)
    peer = peer.double().eval()
    x = picture(2, 3, grid[0] * patch_size, grid[1] * patch_size)
    with torch.no_grad():
        features = model.backbone(x)
        theirs = peer.forward_features(x)
        assert_close_to_peer(model(x), peer(x))
    skip = peer.num_prefix_tokens
    assert_close_to_peer(features.prefix, theirs[:, :skip])
    (only,) = features.maps.values()
    assert_close_to_peer(only.flatten(2).transpose(1, 2), theirs[:, skip:])
