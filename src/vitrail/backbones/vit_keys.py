"""Key maps of ViT's checkpoints, which DeiT, DINOv2, DeepViT and the hybrids share, and position tables and
patch kernels brought to another size."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vitrail.layers.keys import join_rows
from vitrail.layers.position import resample_positions, resize_patch_embedding
from vitrail.registry import Tensors, rename_keys

if TYPE_CHECKING:
    from vitrail.backbones.vit import ViTConfig

TIMM_MARKS = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
HUGGINGFACE_EMBEDDING = "embeddings.patch_embeddings.projection.weight"


def from_timm(state: Tensors, config: "ViTConfig") -> Tensors:
    """timm's and DeiT's keys, which are ours except for the heads."""
    heads = {"head": "head.fc", "head_dist": "head.fc_dist", "pre_logits.fc": "head.hidden"}
    out = {}
    for key, value in state.items():
        part, _, leaf = key.rpartition(".")
        out[f"{heads[part]}.{leaf}" if part in heads else f"backbone.{key}"] = value
    return unambiguous_table(out, config)


HUGGINGFACE_NAMES = [  # (pattern, ours), tried in order; the older released names and those of 5.x
    (r"^(vit|deit|dinov2|dinov2_with_registers)\.", ""),
    (r"^(encoder\.)?layers?\.(\d+)\.", r"blocks.\2."),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.(?:attention\.)?(?:(q)uery|(k)ey|(v)alue|([qkv])_proj)\.", r".attn.\1\2\3\4."),
    (r"\.attention\.(output\.dense|o_proj)\.", ".attn.proj."),
    (r"\.(intermediate\.dense|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"\.(output\.dense|mlp\.weights_out|mlp\.down_proj)\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"^(cls_)?classifier\.", "head.fc."),
    (r"^distillation_classifier\.", "head.fc_dist."),
    (r"^pooler\.dense\.", "head.hidden."),
]
# Separate projections there, one of ours.
HUGGINGFACE_PARTS = {
    "attn.qkv": ("attn.q", "attn.k", "attn.v"),
    "mlp.fc1": ("mlp.gate_proj", "mlp.up_proj"),
}


def from_huggingface(state: Tensors, config: "ViTConfig") -> Tensors:
    """ViT, DeiT and DINOv2 (with and without registers) of transformers, as released and as of 5.x."""
    ours = rename_keys(state, HUGGINGFACE_NAMES)
    for whole, parts in HUGGINGFACE_PARTS.items():
        ours = join_rows(ours, whole, parts)
    out = {k if k.startswith("head.") else f"backbone.{k}": v for k, v in ours.items()}
    return unambiguous_table(fold_class_position(out, config), config)


def fold_class_position(state: Tensors, config: "ViTConfig") -> Tensors:
    """For a model whose table has no row for the class token: add that row to the token itself."""
    table, token = state.get("backbone.pos_embed"), state.get("backbone.cls_token")
    if config.prefix_positions or table is None or token is None:
        return state
    folded = {"backbone.cls_token": token + table[:, :1], "backbone.pos_embed": table[:, 1:]}
    return {**state, **folded}


def resample_to(state: Tensors, config: "ViTConfig") -> Tensors:
    """Our keys, with a square position table and the patch kernel of another size brought to the config's.

    This is how fine-tuning at a higher resolution starts (section 3.2), and how one checkpoint runs at other
    patch sizes (FlexiViT).
    """
    out = dict(state)
    kernel, table = out.get("backbone.patch_embed.proj.weight"), out.get("backbone.pos_embed")
    # Of an RGB image, that is; the patches of a stem's map are not pixels.
    if kernel is not None and kernel.shape[1] == 3 and kernel.shape[-1] == kernel.shape[-2] != 1:
        out["backbone.patch_embed.proj.weight"] = resize_patch_embedding(kernel, config.patch_size)
    if table is not None and _num_positions(table, config) != math.prod(config.grid):
        return from_square_table(out, config)
    return out


def unambiguous_table(state: Tensors, config: "ViTConfig") -> Tensors:
    """For key maps: released tables are square, also one with as many rows as a grid of another shape
    (14 x 14 and 7 x 28), where `resample_to` could not know."""
    table = state.get("backbone.pos_embed")
    if table is None or _num_positions(table, config) != math.prod(config.grid):
        return state
    return from_square_table(state, config)


def from_square_table(state: Tensors, config: "ViTConfig") -> Tensors:
    """Our keys, with the position table of a square image brought to the config's grid."""
    table = state.get("backbone.pos_embed")
    if table is None:
        return state
    count = _num_positions(table, config)
    side, skip = math.isqrt(count), table.shape[1] - count
    if side * side != count or (side, side) == tuple(config.grid):
        return state
    patches = resample_positions(
        table[:, skip:],
        (side, side),
        config.grid,
        antialias=config.pos_antialias,
        offset=config.pos_offset,
    )
    return {**state, "backbone.pos_embed": torch.cat([table[:, :skip], patches], dim=1)}


def _num_positions(table: Tensor, config: "ViTConfig") -> int:
    """Rows of a position table that stand for patches."""
    return table.shape[1] - (config.num_prefix_tokens if config.prefix_positions else 0)
