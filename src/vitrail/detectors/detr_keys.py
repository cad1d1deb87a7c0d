"""Released DETRs and Deformable DETRs, official and transformers' (4 and 5): their keys to ours."""

import torch

from vitrail.detectors.detr_masks import from_transformers as from_masks
from vitrail.layers.keys import join_rows
from vitrail.registry import Tensors, rename_keys


def from_detr_panoptic(state: Tensors) -> Tensors:
    """Official files and transformers' have the detector below "detr."."""
    inner = {k.removeprefix("detr."): v for k, v in state.items()}
    return from_masks(from_detr(inner))


def from_detr(state: Tensors) -> Tensors:
    """Official files have our names but for the backbone's."""
    return rename_keys(
        _joined(state),
        [
            *BACKBONE,
            *LAYERS,
            (r"^(model\.decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
            (r"^(model\.decoder\.layers\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm2."),
            (r"^(model\.decoder\.layers\.\d+)\.encoder_attn\.", r"\1.multihead_attn."),
            (r"^model\.decoder\.layernorm\.", "transformer.decoder.norm."),
            (r"^model\.(en|de)coder\.", r"transformer.\1coder."),
            (r"^model\.query_position_embeddings\.", "query_embed."),
            (r"^model\.input_projection\.", "input_proj."),
            (r"^class_labels_classifier\.", "class_embed."),
            (r"^bbox_predictor\.", "bbox_embed."),
        ],
    )


def from_deformable_detr(state: Tensors) -> Tensors:
    """Official files have our names but for the backbone's, and their heads several times: once for each
    layer even where all layers share one, and once more in the decoder where they refine boxes."""
    ours = not any(key.startswith(("backbone.0.", "model.backbone.")) for key in state)
    state = rename_keys(
        _joined(state),
        [
            *BACKBONE,
            *LAYERS,
            (r"^(model\.decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm2."),
            (r"^(model\.decoder\.layers\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm1."),
            (r"^(model\.decoder\.layers\.\d+)\.encoder_attn\.", r"\1.cross_attn."),
            (r"^model\.query_position_embeddings\.", "query_embed."),
            (r"^model\.input_proj\.", "input_proj."),
            (r"^model\.", "transformer."),
        ],
    )
    copied = {k: v for k, v in state.items() if k.startswith(COPIES)}
    state = {k: v for k, v in state.items() if k not in copied}
    for key, value in copied.items():
        state.setdefault(key.removeprefix("transformer.decoder."), value)
    for key in [k for k in state if k.startswith("bbox_embed.") and k.endswith(".0.weight")]:
        for leaf in (
            "weight",
            "bias",
        ):  # transformers 5 writes one class head for layers that share it
            own = f"class_embed.{key.split('.')[1]}.{leaf}"
            if copied and (first := state.get(f"class_embed.0.{leaf}")) is not None:
                state.setdefault(own, first)
    if ours or copied or not _alike(state):
        return state
    return {k: v for k, v in state.items() if _first(k) in (k, None)}


HEADS = ("class_embed.", "bbox_embed.")
COPIES = tuple(f"transformer.decoder.{head}" for head in HEADS)


def _first(key: str) -> str | None:
    """The key of the first layer's head, of a key of any layer's."""
    if not key.startswith(HEADS):
        return None
    head, _, rest = key.split(".", 2)
    return f"{head}.0.{rest}"


def _alike(state: Tensors) -> bool:
    """Whether the heads of all layers are one."""
    pairs = [(v, state.get(_first(k) or k)) for k, v in state.items()]
    return all(first is not None and torch.equal(own, first) for own, first in pairs)


def _joined(state: Tensors) -> Tensors:
    """Queries, keys and values that transformers keeps apart, as one layer."""
    for name in ("self_attn", "encoder_attn"):
        rows = [f"{name}.{part}_proj" for part in "qkv"]
        state = join_rows(state, f"{name}.in_proj", rows)
    return state


_STAGE = r"^backbone\.encoder\.stages\.(\d)\.layers\.(\d+)\."
OURS = {"conv": "conv", "norm": "bn"}
BACKBONE = [  # official; timm's names within transformers' files, or its own
    (r"^backbone\.0\.body\.", "backbone."),
    (r"^model\.backbone\.(?:conv_encoder\.)?model\.", "backbone."),
    (r"^backbone\.embedder\.embedder\.convolution\.", "backbone.conv1."),
    (r"^backbone\.embedder\.embedder\.normalization\.", "backbone.bn1."),
    (
        rf"{_STAGE}layer\.(\d)\.(conv|norm)[a-z]+\.",
        lambda m: f"backbone.layer{int(m[1]) + 1}.{m[2]}.{OURS[m[4]]}{int(m[3]) + 1}.",
    ),
    (
        rf"{_STAGE}shortcut\.(conv|norm)[a-z]+\.",
        lambda m: f"backbone.layer{int(m[1]) + 1}.{m[2]}.downsample.{int(m[3] == 'norm')}.",
    ),
]
_LAYER = r"^(model\.(?:en|de)coder\.layers\.\d+)\."
LAYERS = [
    (rf"{_LAYER}(\w+)_attn\.in_proj\.", r"\1.\2_attn.in_proj_"),
    (rf"{_LAYER}(\w+)_attn\.o_proj\.", r"\1.\2_attn.out_proj."),
    (rf"{_LAYER}(?:mlp\.)?fc([12])\.", r"\1.linear\2."),
    (r"^(model\.encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"^(model\.encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"^(model\.decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
]
