"""Where released weights of each model live: data for `vitrail models` and docs/models.md.

"hf:" names go to `weights=` and `vitrail convert` as they are (with "@revision" to pin them); addresses of
files are to be downloaded first. Weights keep their authors' licences, which their pages name.
"""

from vitrail.registry import backbone_entry

_EFFICIENTVIT = "https://github.com/xinyuliu-jeffrey/EfficientViT_Model_Zoo/releases/download/v1.0"
_CMT = "https://github.com/ggjy/CMT.pytorch/releases/download/release-v1"
_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"

RELEASED: dict[str, tuple[str, ...]] = {  # name -> sources, the default first
    "vit_tiny_patch16": (
        "hf:timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k",
        "hf:timm/vit_tiny_patch16_384.augreg_in21k_ft_in1k",
    ),
    "vit_small_patch8": ("hf:timm/vit_small_patch8_224.dino",),
    "vit_small_patch16": (
        "hf:timm/vit_small_patch16_224.augreg_in21k_ft_in1k",
        "hf:timm/vit_small_patch16_384.augreg_in21k_ft_in1k",
        "hf:timm/vit_small_patch16_224.dino",
    ),
    "vit_small_patch32": (
        "hf:timm/vit_small_patch32_224.augreg_in21k_ft_in1k",
        "hf:timm/vit_small_patch32_384.augreg_in21k_ft_in1k",
    ),
    "vit_base_patch8": ("hf:timm/vit_base_patch8_224.augreg2_in21k_ft_in1k",),
    "vit_base_patch16": (
        "hf:timm/vit_base_patch16_224.augreg2_in21k_ft_in1k",
        "hf:timm/vit_base_patch16_384.augreg_in21k_ft_in1k",
        "hf:google/vit-base-patch16-224",
        "hf:google/vit-base-patch16-384",
    ),
    "vit_base_patch32": (
        "hf:timm/vit_base_patch32_224.augreg_in21k_ft_in1k",
        "hf:timm/vit_base_patch32_384.augreg_in21k_ft_in1k",
        "hf:google/vit-base-patch32-384",
    ),
    "vit_large_patch16": (
        "hf:timm/vit_large_patch16_224.augreg_in21k_ft_in1k",
        "hf:timm/vit_large_patch16_384.augreg_in21k_ft_in1k",
        "hf:google/vit-large-patch16-224",
        "hf:google/vit-large-patch16-384",
    ),
    "vit_large_patch32": (
        "hf:timm/vit_large_patch32_384.orig_in21k_ft_in1k",
        "hf:google/vit-large-patch32-384",
    ),
    "vit_huge_patch14": (
        "hf:timm/vit_huge_patch14_224.orig_in21k",
        "hf:google/vit-huge-patch14-224-in21k",
    ),
    "vit_tiny_r_s16_p8": (
        "hf:timm/vit_tiny_r_s16_p8_224.augreg_in21k_ft_in1k",
        "hf:timm/vit_tiny_r_s16_p8_384.augreg_in21k_ft_in1k",
    ),
    "vit_small_r26_s32": (
        "hf:timm/vit_small_r26_s32_224.augreg_in21k_ft_in1k",
        "hf:timm/vit_small_r26_s32_384.augreg_in21k_ft_in1k",
    ),
    "vit_base_r50_s16": (
        "hf:timm/vit_base_r50_s16_384.orig_in21k_ft_in1k",
        "hf:timm/vit_base_r50_s16_224.orig_in21k",
    ),
    "vit_large_r50_s32": (
        "hf:timm/vit_large_r50_s32_224.augreg_in21k_ft_in1k",
        "hf:timm/vit_large_r50_s32_384.augreg_in21k_ft_in1k",
    ),
    **{
        f"deit_{size}{kind}_patch16": (
            f"hf:timm/deit_{size}{kind}_patch16_224.fb_in1k",
            f"hf:facebook/deit-{size}{kind.replace('_', '-')}-patch16-224",
        )
        for size in ("tiny", "small", "base")
        for kind in ("", "_distilled")
    },
    **{
        f"vit_{size}_patch14_{reg}dinov2": (
            f"hf:timm/vit_{size}_patch14_{reg}dinov2.lvd142m",
            f"hf:facebook/dinov2-{'with-registers-' if reg else ''}{size}",
            f"{_DINOV2}/dinov2_vit{size[0]}14/dinov2_vit{size[0]}14_{reg}pretrain.pth",
        )
        for size in ("small", "base", "large", "giant")
        for reg in ("", "reg4_")
    },
    **{
        f"efficientvit_m{i}": (
            f"hf:timm/efficientvit_m{i}.r224_in1k",
            f"{_EFFICIENTVIT}/efficientvit_m{i}.pth",
        )
        for i in range(6)
    },
    **{
        f"mobilevit_{short}": (
            f"hf:timm/mobilevit_{short}.cvnets_in1k",
            f"hf:apple/mobilevit-{long}",
        )
        for short, long in (("xxs", "xx-small"), ("xs", "x-small"), ("s", "small"))
    },
    **{
        f"mobilevitv2_{percent:03d}": (f"hf:timm/mobilevitv2_{percent:03d}.cvnets_in1k",)
        for percent in range(50, 201, 25)
    },
    **{
        f"swin_{size}_patch4_window7": (
            f"hf:timm/swin_{size}_patch4_window7_224.{tag}",
            f"hf:microsoft/swin-{size}-patch4-window7-224",
        )
        for size, tag in (
            ("tiny", "ms_in1k"),
            ("small", "ms_in1k"),
            ("base", "ms_in22k_ft_in1k"),
            ("large", "ms_in22k_ft_in1k"),
        )
    },
    **{
        f"swin_{size}_patch4_window12": (
            f"hf:timm/swin_{size}_patch4_window12_384.ms_in22k_ft_in1k",
            f"hf:microsoft/swin-{size}-patch4-window12-384",
        )
        for size in ("base", "large")
    },
    "cmt_ti": (f"{_CMT}/cmt_tiny.pth",),
    "cmt_xs": (f"{_CMT}/cmt_xs.pth",),
    "cmt_s": (f"{_CMT}/cmt_small.pth",),
    "cmt_b": (f"{_CMT}/cmt_base.pth",),
}


def weight_sources(name: str) -> list[str]:
    """Sources of weights that `weights=` reads for a registered name; where none is listed here, what its
    layouts say of theirs."""
    if name in RELEASED:
        return list(RELEASED[name])
    return [layout.source for layout in backbone_entry(name).layouts.values() if layout.source]
