"""Swin under dense heads: normed maps, and the two foreign forms of its backbone."""

import pytest
import torch
import torch.nn.functional as F

from tests.parity import assert_close_to_peer
from tests.segmenters.swin_peer import upernet_on_swin
from vitrail.backbones.swin import (
    Swin,
    SwinConfig,
    maps_from_hugging_face,
    maps_from_mmsegmentation,
)
from vitrail.segmenters.segmenter import Segmenter
from vitrail.segmenters.upernet import FCNHead, UPerNetConfig, UPerNetHead, from_foreign

CONFIG = SwinConfig(
    embed_dim=12, depths=(1, 1, 2, 1), num_heads=(1, 2, 3, 4), window_size=4, norm_maps=True
)
K = 3


def own_backbone(state):
    """`state` of ours, keys "backbone.*"."""
    backbone = Swin(CONFIG)
    left = {k for k in state if not k.startswith("backbone.")}
    assert left <= {"head.norm.weight", "head.norm.bias"}, (
        "the classifier's norm, which nothing reads"
    )
    own = {k.removeprefix("backbone."): v for k, v in state.items() if k not in left}
    backbone.load_state_dict(own)
    return backbone


@pytest.mark.parametrize("size", [(128, 160), (256, 128)], ids=str)
def test_a_whole_upernet_on_swin_equals_transformers(size):
    peer = upernet_on_swin(K)
    peer = peer.double()
    state = peer.state_dict()
    prefix = "backbone."
    below = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    released = {k.removeprefix("swin."): v for k, v in below.items()}
    backbone = own_backbone(maps_from_hugging_face(released, CONFIG))
    again = own_backbone(maps_from_hugging_face(below, CONFIG)).state_dict()
    assert all(torch.equal(v, again[k]) for k, v in backbone.state_dict().items())
    own = UPerNetConfig(dim=12, auxiliary_dim=10)
    ours = Segmenter(
        backbone,
        UPerNetHead(own, backbone.feature_specs, K),
        auxiliary=FCNHead(own, backbone.feature_specs, K),
    )
    heads = from_foreign({k: v for k, v in state.items() if not k.startswith(prefix)})
    left = ours.load_state_dict(heads, strict=False)
    assert not left.unexpected_keys
    assert all(k.startswith("backbone.") for k in left.missing_keys)
    ours = ours.double().eval()
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        assert_close_to_peer(ours(x), peer(x).logits)


def foreign_keys(gathered: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Swin backbone of mmsegmentation (gathered) or of the official dense code."""
    stages, qkv = ("stages", "attn.w_msa") if gathered else ("layers", "attn")
    fc1, fc2 = ("ffn.layers.0.0", "ffn.layers.1") if gathered else ("mlp.fc1", "mlp.fc2")
    proj = "patch_embed.projection" if gathered else "patch_embed.proj"
    keys: dict[str, tuple[int, ...]] = {f"{proj}.weight": (12, 3, 4, 4), f"{proj}.bias": (12,)}

    def norm(name, dim):
        keys.update({f"{name}.weight": (dim,), f"{name}.bias": (dim,)})

    def linear(name, inward, outward):
        keys.update({f"{name}.weight": (outward, inward), f"{name}.bias": (outward,)})

    norm("patch_embed.norm", 12)
    for i, depth in enumerate(CONFIG.depths):
        dim = 12 * 2**i
        for j in range(depth):
            at = f"{stages}.{i}.blocks.{j}"
            norm(f"{at}.norm1", dim)
            norm(f"{at}.norm2", dim)
            keys[f"{at}.{qkv}.relative_position_bias_table"] = (49, CONFIG.num_heads[i])
            keys[f"{at}.{qkv}.relative_position_index"] = (16, 16)
            linear(f"{at}.{qkv}.qkv", dim, 3 * dim)
            linear(f"{at}.{qkv}.proj", dim, dim)
            linear(f"{at}.{fc1}", dim, 4 * dim)
            linear(f"{at}.{fc2}", 4 * dim, dim)
        if i < 3:
            norm(f"{stages}.{i}.downsample.norm", 4 * dim)
            keys[f"{stages}.{i}.downsample.reduction.weight"] = (2 * dim, 4 * dim)
        norm(f"norm{i}", dim)
    return keys


@pytest.mark.parametrize("gathered", [True, False], ids=["mmsegmentation", "official"])
def test_every_key_of_a_foreign_backbone_finds_its_place(gathered):
    generator = torch.Generator().manual_seed(0)
    state = {
        k: torch.randn(*shape, generator=generator) for k, shape in foreign_keys(gathered).items()
    }
    backbone = own_backbone(maps_from_mmsegmentation(state, CONFIG))
    stages = "stages" if gathered else "layers"
    assert torch.equal(backbone.norms["c4"].weight, state["norm2.weight"])
    x = torch.randn(2, 6 * 4, 24, generator=generator)
    merged = backbone.layers[2].downsample(x, 6, 4)
    at = f"{stages}.1.downsample"
    grid = x.transpose(1, 2).reshape(2, 24, 6, 4)
    if gathered:  # mmsegmentation gathers by unfold: channel by channel
        want = F.unfold(grid, 2, stride=2).transpose(1, 2)
    else:
        corners = [grid[:, :, r::2, c::2] for r, c in ((0, 0), (1, 0), (0, 1), (1, 1))]
        want = torch.cat(corners, 1).flatten(2).transpose(1, 2)
    want = F.layer_norm(want, (96,), state[f"{at}.norm.weight"], state[f"{at}.norm.bias"])
    torch.testing.assert_close(merged, want @ state[f"{at}.reduction.weight"].T)


def test_norms_on_the_maps_are_the_configs_choice():
    from dataclasses import replace

    assert not [k for k in Swin(replace(CONFIG, norm_maps=False)).state_dict() if "norms." in k]
