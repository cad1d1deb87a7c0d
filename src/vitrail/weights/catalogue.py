"""Where released weights of each model live: data for `vitrail models` and docs/models.md.

"hf:" names go to `weights=` and `vitrail convert` as they are (with "@revision" to pin them); addresses are
to be downloaded first, and the file goes there. Weights keep their authors' licences, which their pages name.
"""

_EFFICIENTVIT = "https://github.com/xinyuliu-jeffrey/EfficientViT_Model_Zoo/releases/download/v1.0"
_CMT = "https://github.com/ggjy/CMT.pytorch/releases/download/release-v1"
_DINOV2 = "https://dl.fbaipublicfiles.com/dinov2"
_DEEPVIT = "https://github.com/zhoudaquan/dvit_repo"  # its README links files of Google Drive
_TORCHVISION = "https://download.pytorch.org/models"

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
    **{
        f"naflexvit_base_patch16_{kind}": (f"hf:timm/naflexvit_base_patch16_{kind}.e300_s576_in1k",)
        for kind in ("gap", "par_gap", "parfac_gap")
    },
    **{
        f"flexivit_{size}": tuple(
            f"hf:timm/flexivit_{size}.{epochs}ep_in1k" for epochs in (1200, 600, 300)
        )
        for size in ("small", "base", "large")
    },
    "deepvit_24b": (_DEEPVIT,),
    "deepvit_32b": (_DEEPVIT,),
    "deepvit_s": (_DEEPVIT,),
    "deepvit_l": (_DEEPVIT,),
    **{
        f"efficientnet_b{i}": (
            *((f"hf:timm/efficientnet_b{i}.{tag}",) if tag else ()),
            f"{_TORCHVISION}/efficientnet_b{i}_{file}.pth",
        )
        for i, (tag, file) in enumerate(
            (
                ("ra_in1k", "rwightman-7f5810bc"),
                ("ft_in1k", "rwightman-bac287d4"),
                ("ra_in1k", "rwightman-c35c1473"),
                ("ra2_in1k", "rwightman-b3899882"),
                ("ra2_in1k", "rwightman-23ab8bcd"),
                ("sw_in12k_ft_in1k", "lukemelas-1a07897c"),
                ("", "lukemelas-24a108a5"),
                ("", "lukemelas-c5b4e57e"),
            )
        )
    },
    **{
        f"tf_efficientnet_b{i}": (
            f"hf:timm/tf_efficientnet_b{i}.aa_in1k",
            f"hf:timm/tf_efficientnet_b{i}.ap_in1k",
        )
        for i in range(8)
    },
    "mobilenetv1_100": ("hf:timm/mobilenetv1_100.ra4_e3600_r224_in1k",),
    "mobilenetv1_125": ("hf:timm/mobilenetv1_125.ra4_e3600_r224_in1k",),
    "mobilenetv2_050": ("hf:timm/mobilenetv2_050.lamb_in1k",),
    "mobilenetv2_100": (
        "hf:timm/mobilenetv2_100.ra_in1k",
        f"{_TORCHVISION}/mobilenet_v2-b0353104.pth",
        f"{_TORCHVISION}/mobilenet_v2-7ebf99e0.pth",
    ),
    "mobilenetv2_140": ("hf:timm/mobilenetv2_140.ra_in1k",),
    "mobilenetv3_large": (
        "hf:timm/mobilenetv3_large_100.ra_in1k",
        "hf:timm/mobilenetv3_large_100.miil_in21k_ft_in1k",
        f"{_TORCHVISION}/mobilenet_v3_large-8738ca79.pth",
        f"{_TORCHVISION}/mobilenet_v3_large-5c1a4163.pth",
    ),
    "mobilenetv3_small": (
        "hf:timm/mobilenetv3_small_100.lamb_in1k",
        f"{_TORCHVISION}/mobilenet_v3_small-047dcff4.pth",
    ),
    "mobilenetv3_small_075": ("hf:timm/mobilenetv3_small_075.lamb_in1k",),
    "mobilenetv3_small_050": ("hf:timm/mobilenetv3_small_050.lamb_in1k",),
    **{
        f"resnet{depth}": (
            f"hf:timm/resnet{depth}.a1_in1k",
            f"hf:timm/resnet{depth}.tv_in1k",
            f"{_TORCHVISION}/resnet{depth}-{digest}.pth",
        )
        for depth, digest in (
            (18, "f37072fd"),
            (34, "b627a593"),
            (50, "0676ba61"),
            (101, "63fe2227"),
            (152, "394f9c45"),
        )
    },
}


def weight_sources(name: str) -> list[str]:
    """What `weights=` and --weights take for a registered name, the default first."""
    return [source for source in RELEASED.get(name, ()) if source.startswith("hf:")]


def downloads(name: str) -> list[str]:
    """Addresses of files (or of a page that links them) whose downloaded copy `weights=` takes."""
    return [source for source in RELEASED.get(name, ()) if not source.startswith("hf:")]
