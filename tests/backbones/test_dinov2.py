"""DINOv2's position tables at any size, as `torch.hub` gives the official models: nothing has to be set."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.parity import randomise
from vitrail.models import create_backbone
from vitrail.registry import backbone_entry, list_backbones

SIZES = [(224, 224), (196, 252), (518, 518), (518, 504), (28, 700)]


def official_positions(
    table: Tensor, height: int, width: int, antialias: bool, offset: float
) -> Tensor:
    """The patches' rows of a table (1, N, C) for an image, as the official code resamples them."""
    rows, columns, side = height // 14, width // 14, math.isqrt(table.shape[1])
    if rows * columns == table.shape[1] and height == width:
        return table
    grid = table.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    if offset:
        scale = ((rows + offset) / side, (columns + offset) / side)
        grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", antialias=antialias)
    else:
        grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=antialias)
    assert grid.shape[2:] == (rows, columns)
    return grid.flatten(2).transpose(1, 2)


# The hub's entries: those without registers take the function's defaults, those with them set both.
HUB = {False: {"antialias": False, "offset": 0.1}, True: {"antialias": True, "offset": 0.0}}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", list_backbones("*dinov2"))
def test_by_default_the_table_is_resampled_as_by_the_official_code(name, size):
    backbone = create_backbone(name, depth=1, embed_dim=24, num_heads=2).double()
    randomise(backbone)
    table = backbone.pos_embed[:, backbone.prefix_rows :]
    assert table.shape[1] == 37 * 37
    want = official_positions(table, *size, **HUB["reg4" in name])
    got = backbone.positions((size[0] // 14, size[1] // 14))
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_what_enters_the_first_block_is_patches_plus_table_after_the_prefix(name):
    """Class token with its position, then registers without any, then the patches with theirs."""
    backbone = create_backbone(name, depth=1).double().eval()
    randomise(backbone)
    x = torch.randn(2, 3, 196, 252, generator=torch.Generator().manual_seed(0)).double()
    registers = "reg4" in name
    with torch.no_grad():
        tokens, grid = backbone.embed(x)
        patches = F.conv2d(
            x, backbone.patch_embed.proj.weight, backbone.patch_embed.proj.bias, stride=14
        )
        rows = backbone.pos_embed[:, 0 if registers else 1 :]
        patches = patches.flatten(2).mT + official_positions(rows, 196, 252, **HUB[registers])
        prefix = backbone.cls_token
        if registers:  # there the class token's position is part of the token
            prefix = torch.cat([prefix, backbone.reg_token], dim=1)
        else:
            prefix = prefix + backbone.pos_embed[:, :1]
        want = torch.cat([prefix.expand(2, -1, -1), patches], dim=1)
    assert grid == (14, 18)
    torch.testing.assert_close(tokens, want, atol=1e-12, rtol=0)


def test_the_sizes_are_those_of_the_official_code():
    """Width, depth, heads, and the hidden width of an MLP or of each half of SwiGLU, rounded up to 8."""
    sizes = {
        "small": (384, 12, 6, 4 * 384),
        "base": (768, 12, 12, 4 * 768),
        "large": (1024, 24, 16, 4 * 1024),
        "giant": (1536, 40, 24, (4 * 1536 * 2 // 3 + 7) // 8 * 8),
    }
    for name in list_backbones("*dinov2"):
        config = backbone_entry(name).config
        dim, depth, heads, hidden = sizes[name.split("_")[1]]
        assert (config.embed_dim, config.depth, config.num_heads) == (dim, depth, heads)
        assert round(dim * config.mlp_ratio) == hidden
        assert config.mlp == ("swiglu" if "giant" in name else "gelu")
        assert config.num_reg_tokens == (4 if "reg4" in name else 0)
        assert config.pool == "both"  # linear evaluation: class token and the mean of the map
