"""DINOv2 (Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", TMLR 2024,
https://arxiv.org/abs/2304.07193), and registers (Darcet et al., "Vision Transformers Need Registers",
ICLR 2024, https://arxiv.org/abs/2309.16588).

A ViT with patches of 14, LayerScale on every branch, SwiGLU in the giant, trained on images alone at up to
518 pixels: features to be used frozen. Large models keep notes about the whole image in patch tokens of dull
background; four register tokens give those a place, and the maps become smooth.

Unlike the official code: masked-image training and its mask token are left out. The weights without
registers resample their position table as they were released, with 0.1 added to the grid before the scale is
taken and without antialias; those with registers with antialias and without the offset. `pos_offset` and
`pos_antialias` choose: timm resamples both with antialias alone, transformers those without registers
plainly. In the models with registers the class token's position is folded into the token, which changes
nothing. The head reads the class token and the mean of the map, as the paper's linear evaluation does.
"""

from dataclasses import replace

from vitrail.backbones.vit import BASE, LARGE, SMALL, ViT, ViTConfig, ViTHead, smallest
from vitrail.backbones.vit_keys import (
    HUGGINGFACE_EMBEDDING,
    TIMM_MARKS,
    fold_class_position,
    from_huggingface,
    from_timm,
    resample_to,
)
from vitrail.registry import Layout, Tensors, register_backbone
from vitrail_runtime.preprocess import Preprocessing

GIANT = replace(
    BASE,
    embed_dim=1536,
    depth=40,
    num_heads=24,
    mlp="swiglu",
    mlp_ratio=8 / 3,  # 4096 in each half: the parameters of a plain MLP of ratio 4
)
SIZES = {  # Table 17
    size: replace(shape, patch_size=14, image_size=518, layer_scale_init=1e-5, pool="both")
    for size, shape in {"small": SMALL, "base": BASE, "large": LARGE, "giant": GIANT}.items()
}
VARIANTS = {
    f"vit_{size}_patch14_dinov2": replace(shape, pos_antialias=False, pos_offset=0.1)
    for size, shape in SIZES.items()
} | {
    f"vit_{size}_patch14_reg4_dinov2": replace(shape, num_reg_tokens=4, prefix_positions=False)
    for size, shape in SIZES.items()
}


class DINOv2(ViT):
    """A ViT; its config says what differs."""


OFFICIAL_NAMES = {"mlp.w12.": "mlp.fc1.", "mlp.w3.": "mlp.fc2.", "register_tokens": "reg_token"}


def from_official(state: Tensors, config: ViTConfig) -> Tensors:
    """The files of facebookresearch/dinov2. They have a position for the class token, also with registers."""
    ours = {}
    for key, value in state.items():
        for theirs, name in OFFICIAL_NAMES.items():
            key = key.replace(theirs, name)
        ours[f"backbone.{key}"] = value
    return fold_class_position(ours, config)


LAYOUTS = {
    "official": Layout(
        from_official,
        ("mask_token", "pos_embed", "blocks.0.ls1.gamma"),
        may_leave=("mask_token",),
        source="facebookresearch/dinov2",
    ),
    "timm": Layout(from_timm, ("blocks.0.ls1.gamma", *TIMM_MARKS), source="timm"),
} | {
    name: Layout(
        from_huggingface,
        (prefix + HUGGINGFACE_EMBEDDING, f"{prefix}encoder.layer.0.layer_scale1.lambda1"),
        may_leave=(f"{prefix}embeddings.mask_token",),
        source=f"Hugging Face {cls}",
    )
    for name, prefix, cls in (
        ("huggingface", "dinov2.", "Dinov2ForImageClassification"),
        (
            "huggingface_registers",
            "dinov2_with_registers.",
            "Dinov2WithRegistersForImageClassification",
        ),
        ("huggingface_base", "", "Dinov2Model, Dinov2WithRegistersModel"),
    )
}


register_backbone(
    DINOv2,
    VARIANTS,
    tiny=smallest(
        ViTConfig,
        patch_size=7,
        image_size=42,
        mlp_ratio=1.5,
        mlp="swiglu",
        layer_scale_init=1e-1,
        num_reg_tokens=2,
        prefix_positions=False,
        pos_antialias=False,
        pos_offset=0.1,
        pool="both",
    ),
    layouts=LAYOUTS,
    tail=ViTHead,
    resample=resample_to,
    preprocessing=Preprocessing(size=(518, 518), crop_pct=1.0),
)
