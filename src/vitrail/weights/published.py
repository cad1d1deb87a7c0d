"""What the authors say of each model: data for `vitrail models` and docs/models.md, which set our counts
beside it, and for tests/test_published.py, where every figure stands a second time."""

from dataclasses import KW_ONLY, dataclass


@dataclass(frozen=True)
class Published:
    """What the authors say of a variant, at its `image_size` (height = width, pixels).

    None stands for a figure that they do not give; `remark` then says why, or what there is instead.
    """

    params: float | None  # millions
    macs: float | None  # billions of multiply-adds
    top1: float | None  # ImageNet-1k validation, per cent
    source: str  # the table or page where these figures stand
    _: KW_ONLY
    image_size: int = 224
    params_note: str = ""  # why our count differs, where it does by more than rounding
    macs_note: str = ""
    remark: str = ""  # why a figure is missing; what a score belongs to


# What several models share, sources first.
STEINER = (
    'parameters: Steiner et al., "How to train your ViT?", TMLR 2022, table 2; top-1: the official README '
    "(AugReg weights, ImageNet-21k first)"
)
AUGREG = "top-1: the official README (AugReg weights, ImageNet-21k first)"
VIT_TABLE = (
    "parameters: the paper's table 1; multiply-adds: the Swin paper's table 1; top-1: the official README "
    "(AugReg weights, ImageNet-21k first)"
)
CMT_TABLE = (
    "top-1: the official README; parameters and multiply-adds: the paper's table 2, which we could not "
    "read (other people's tables have these of S and B, and the parameters of Ti and XS; the multiply-adds "
    "of Ti and XS have no second source)"
)
DEEPVIT_TABLE = (
    "top-1: the official README; the counts: the paper's table, as later papers quote it"
)
README = "the official README"
README_AND_SWIN = "the official README; multiply-adds: the Swin paper's table 1"
TABLE_2 = "the paper's table 2, as later papers quote it"
ZOO = "the model zoo of the official README"
MOBILENETV1_TABLE = "the paper's table 6, as TensorFlow's and Keras's documentation quote it"
SLIM = "TensorFlow Slim's README"
TABLE_3 = "the paper's table 3"
TABLE_6 = "the paper's table 6"
RESNET_TABLES = "the paper's tables 1 to 3, read in a text version and as later texts quote them"
TABLE_1 = "the paper's table 1, as later papers quote it"
HYBRID = "parameters: Steiner et al., table 2; top-1: the official README (ImageNet-21k first)"
NO_MACS = "no multiply-adds are given"
NO_COUNTS = "neither parameters nor multiply-adds are given"
ZHAI = "Zhai et al., table 2, as later papers quote it; its {} GFLOPs take a multiply-add as two"
JFT = "weights are not published; trained on JFT-3B"
README_NO_MACS = "the README gives no multiply-adds"
DENSE = "for dense prediction: the paper counts and scores whole detectors and segmenters"
LINEAR = "no multiply-adds are given; top-1 of a linear layer on frozen features"
LESS = (
    "timm's and torchvision's models have as many; why the paper has less is not known. Tried: without "
    "stem and last convolution B4 has 4.23 G and B7 37.0 G as there, but B5 9.96 G and B0 0.355 G; odd maps "
    "halved downwards B4 has 3.99 G, B5 9.50 G and B7 35.5 G"
)
BATCHNORM = (
    "the README leaves out the scales and shifts of BatchNorm, without which the count is the same"
)
FIGURE_5 = "the paper draws this width in its figure 5, without numbers"
TEN_CROPS = "the paper gives no parameters; its errors are by ten crops"
STRIDE = "a bottleneck has its stride in the 3x3 convolution, as torchvision's v1.5"
IN22K = "top-1 after ImageNet-22k"
BARE = "a round count there, without a classifier: {} M without it"

# fmt: off
PUBLISHED: dict[str, Published] = {
    # backbones/vit.py
    "vit_tiny_patch16": Published(5.8, None, 78.22, STEINER, image_size=384, remark=NO_MACS),
    "vit_small_patch8": Published(None, None, None, "none",
        remark="in no table of these papers; its weights are DINO's, without a classifier"),
    "vit_small_patch16": Published(22.2, None, 83.73, STEINER, image_size=384, remark=NO_MACS),
    "vit_small_patch32": Published(None, None, 79.58, AUGREG, image_size=384, remark=NO_COUNTS),
    "vit_base_patch8": Published(None, None, None, "none",
        remark="neither the papers' tables nor the README's have it"),
    "vit_base_patch16": Published(86, 55.4, 85.49, VIT_TABLE, image_size=384,
        params_note="the paper leaves out the classifier: 86.09 M without it"),
    "vit_base_patch32": Published(None, None, 83.59, AUGREG, image_size=384, remark=NO_COUNTS),
    "vit_large_patch14": Published(None, None, None, "none",
        remark="not in the paper: the shape of DINOv2's and others' image towers"),
    "vit_large_patch16": Published(307, 190.7, 85.59, VIT_TABLE, image_size=384,
        params_note="the layers of table 1 count 303.7 M, and 304.7 M with a classifier"),
    "vit_large_patch32": Published(None, None, 82.01,
        "top-1: the official README, fine-tuned by its code", image_size=384,
        remark="neither parameters nor multiply-adds are given; the better of two runs, the other: 81.78 %"),
    "vit_huge_patch14": Published(632, None, None, "the paper's table 1",
        remark="no multiply-adds are given; its 88.55 % is of weights from JFT-300M, which are not released"),
    "vit_giant_patch14": Published(1011, 266.5, None, ZHAI.format(533), remark=JFT),
    "vit_gigantic_patch14": Published(1843, 482.5, None, ZHAI.format(965), remark=JFT),
    # backbones/cmt.py
    "cmt_ti": Published(9.5, 0.6, 79.0, CMT_TABLE, image_size=160),
    "cmt_xs": Published(15.2, 1.5, 81.8, CMT_TABLE, image_size=192),
    "cmt_s": Published(25.1, 4.0, 83.5, CMT_TABLE,
        params_note="the official code has 26.26 M too; why the paper has 1.1 M less is not known. Tried: "
            "the classifier has 1.28 M, the convolution before it 0.66, the position tables 0.29; an "
            "expansion of 3.7 would have 25.1 M but 3.83 G"),
    "cmt_b": Published(45.7, 9.3, 84.5, CMT_TABLE, image_size=256),
    # backbones/navit.py
    **{
        f"navit_{size}_patch16": Published(None, None, None, "none",
            remark="the paper trains on data of its own; a table for these shapes we could not verify")
        for size in ("tiny", "small", "base", "large")
    },
    **{
        f"naflexvit_base_patch16_{kind}": Published(None, None, None, "none",
            remark="timm's; its figures, for images of 576 tokens, we could not verify")
        for kind in ("gap", "par_gap", "parfac_gap")
    },
    # backbones/flexivit.py
    **{
        f"flexivit_{size}": Published(None, None, None, "none",
            remark="the paper's figures are curves over patch sizes; we could not verify single ones")
        for size in ("small", "base", "large")
    },
    # backbones/deepvit.py
    "deepvit_s": Published(27, 6.2, 82.3, DEEPVIT_TABLE,
        macs_note="the official code is the same layer for layer; why the paper has less is not known. "
            "Tried: without the stem's first convolution it is 6.24 G, but L at 408 then 12.36; the stem's "
            "others (0.46 and 0.32 G), attention's products (0.49 G) and re-attention (0.03 G) do not fit"),
    "deepvit_l": Published(55, 12.5, 83.1, DEEPVIT_TABLE,
        params_note="the code's is 420 wide; a width of 408, inferred from the count alone, fits the "
            "paper's: 55.6 M; the README says 48.1 M, the count of deepvit_32b",
        macs_note="the code's is 420 wide; a width of 408, inferred from the count alone, fits the paper's: "
            "12.48 G"),
    "deepvit_16b": Published(24.5, None, 79.1, README, remark=README_NO_MACS),
    "deepvit_24b": Published(36.3, None, 79.99, README, remark=README_NO_MACS),
    "deepvit_32b": Published(48.1, None, 80.9, README, remark=README_NO_MACS),
    # backbones/vit_comer.py
    "vit_comer_tiny": Published(None, None, None, "none", remark=DENSE),
    "vit_comer_small": Published(None, None, None, "none", remark=DENSE),
    "vit_comer_base": Published(None, None, None, "none", remark=DENSE),
    "vit_comer_large": Published(None, None, None, "none", remark=DENSE),
    # backbones/deit.py
    "deit_tiny_patch16": Published(5, 1.3, 72.2,
        "the official README; multiply-adds: table 3 of the MobileViT paper",
        params_note="digits are cut there and the classifier is left out: 5.52 M without it"),
    "deit_small_patch16": Published(22, 4.6, 79.9, README_AND_SWIN,
        remark="the paper's table 5 has 79.8 %"),
    "deit_base_patch16": Published(86, 17.5, 81.8, README_AND_SWIN,
        params_note="the classifier is left out there: 85.80 M without it"),
    "deit_tiny_distilled_patch16": Published(6, None, 74.5, README,
        params_note="rounded to whole millions there", remark=NO_MACS),
    "deit_small_distilled_patch16": Published(22, None, 81.2, README, remark=NO_MACS),
    "deit_base_distilled_patch16": Published(87, None, 83.4, README, remark=NO_MACS),
    # backbones/dinov2.py
    "vit_small_patch14_dinov2": Published(21, None, 81.1, README, params_note=BARE.format(21.6),
        remark=LINEAR),
    "vit_base_patch14_dinov2": Published(86, None, 84.5, README, params_note=BARE.format(85.7),
        remark=LINEAR),
    "vit_large_patch14_dinov2": Published(300, None, 86.3, README, params_note=BARE.format(303.2),
        remark=LINEAR),
    "vit_giant_patch14_dinov2": Published(1100, None, 86.5, README,
        params_note=BARE.format(1134.8), remark=LINEAR),
    "vit_small_patch14_reg4_dinov2": Published(21, None, 80.9, README,
        params_note=BARE.format(21.6), remark=LINEAR),
    "vit_base_patch14_reg4_dinov2": Published(86, None, 84.6, README,
        params_note=BARE.format(85.7), remark=LINEAR),
    "vit_large_patch14_reg4_dinov2": Published(300, None, 86.7, README,
        params_note=BARE.format(303.2), remark=LINEAR),
    "vit_giant_patch14_reg4_dinov2": Published(1100, None, 87.1, README,
        params_note=BARE.format(1134.8), remark=LINEAR),
    # backbones/efficientnet.py
    "efficientnet_b0": Published(5.3, 0.39, 77.1, TABLE_2),
    "efficientnet_b1": Published(7.8, 0.7, 79.1, TABLE_2, image_size=240,
        macs_note="timm's and torchvision's models have as many; why the paper has more is not known. "
            "Tried: 242 pixels, the next larger maps: 0.724 G"),
    "efficientnet_b2": Published(9.2, 1.0, 80.1, TABLE_2, image_size=260,
        params_note="timm's and torchvision's models have as many; how the paper counts is not known"),
    "efficientnet_b3": Published(12, 1.8, 81.6, TABLE_2, image_size=300),
    "efficientnet_b4": Published(19, 4.2, 82.9, TABLE_2, image_size=380, macs_note=LESS),
    "efficientnet_b5": Published(30, 9.9, 83.6, TABLE_2, image_size=456, macs_note=LESS),
    "efficientnet_b6": Published(43, 19, 84.0, TABLE_2, image_size=528),
    "efficientnet_b7": Published(66, 37, 84.3, TABLE_2, image_size=600, macs_note=LESS),
    # backbones/efficientvit.py
    "efficientvit_m0": Published(2.3, 0.079, 63.2, ZOO),
    "efficientvit_m1": Published(3.0, 0.167, 68.4, ZOO),
    "efficientvit_m2": Published(4.2, 0.201, 70.8, ZOO),
    "efficientvit_m3": Published(6.9, 0.263, 73.4, ZOO),
    "efficientvit_m4": Published(8.8, 0.299, 74.3, ZOO),
    "efficientvit_m5": Published(12.4, 0.522, 77.1, ZOO,
        params_note="the official code has 12.47 M too: digits are cut there, not rounded"),
    # backbones/mobilenetv1.py
    "mobilenetv1_025": Published(0.5, 0.041, 50.6, MOBILENETV1_TABLE),
    "mobilenetv1_050": Published(1.3, 0.149, 63.7, MOBILENETV1_TABLE),
    "mobilenetv1_075": Published(2.6, 0.325, 68.4, MOBILENETV1_TABLE),
    "mobilenetv1_100": Published(4.2, 0.569, 70.6, MOBILENETV1_TABLE),
    "mobilenetv1_125": Published(None, None, None, "none",
        remark="a width of timm's; the paper's end at 1.0, and so do TensorFlow's"),
    # backbones/mobilenetv2.py
    "mobilenetv2_035": Published(1.66, 0.059, 60.3, SLIM, params_note=BATCHNORM, remark=FIGURE_5),
    "mobilenetv2_050": Published(1.95, 0.097, 65.4, SLIM, params_note=BATCHNORM, remark=FIGURE_5),
    "mobilenetv2_075": Published(2.61, 0.209, 69.8, SLIM, params_note=BATCHNORM, remark=FIGURE_5),
    "mobilenetv2_100": Published(3.47, 0.3, 71.8, SLIM, params_note=BATCHNORM,
        remark="the paper's table 4 has 3.4 M and 72.0 %"),
    "mobilenetv2_140": Published(6.06, 0.582, 75.0, SLIM, params_note=BATCHNORM,
        remark="the paper's table 4 has 6.9 M, 0.585 G and 74.7 %; no model of that size was released"),
    # backbones/mobilenetv3.py
    "mobilenetv3_large": Published(5.4, 0.217, 75.2, "the paper's table 9 (table 3 has 0.219 G)",
        params_note="timm's and torchvision's models have 5.48 M too; digits seem cut there"),
    "mobilenetv3_large_075": Published(4.0, 0.155, 73.3, TABLE_3),
    "mobilenetv3_small": Published(2.5, 0.056, 67.4, TABLE_3),
    "mobilenetv3_small_075": Published(2.0, 0.044, 65.4, TABLE_3,
        macs_note="timm's model has 0.0434 G too; what else the paper counts is not known"),
    "mobilenetv3_small_050": Published(1.6, 0.021, 58.0, "the paper's table 9",
        macs_note="timm keeps the stem 16 wide at this multiplier; 8 wide, all is 0.021 G"),
    # backbones/mobilevit.py
    "mobilevit_xxs": Published(1.3, None, 69.0, "the official model zoo", image_size=256,
        remark="the paper gives no multiply-adds for this size"),
    "mobilevit_xs": Published(2.3, 0.7, 74.8, TABLE_3, image_size=256,
        macs_note="the paper does not say at which size; 0.77 G at 224 pixels here"),
    "mobilevit_s": Published(5.6, 2.0, 78.4,
        "table 2 of the MobileViTv2 paper, by the same authors", image_size=256),
    # backbones/mobilevitv2.py
    "mobilevitv2_050": Published(1.4, 0.5, 70.2, TABLE_6, image_size=256),
    "mobilevitv2_075": Published(2.9, 1.0, 75.6, TABLE_6, image_size=256),
    "mobilevitv2_100": Published(4.9, 1.8, 78.1, TABLE_6, image_size=256),
    "mobilevitv2_125": Published(7.5, 2.8, 79.6, TABLE_6, image_size=256),
    "mobilevitv2_150": Published(10.6, 4.0, 80.4, TABLE_6, image_size=256),
    "mobilevitv2_175": Published(14.3, 5.5, 80.8, TABLE_6, image_size=256),
    "mobilevitv2_200": Published(18.5, 7.2, 81.2, TABLE_6, image_size=256),
    # backbones/resnet.py
    "resnet18": Published(None, 1.8, 72.1, RESNET_TABLES, remark=TEN_CROPS),
    "resnet34": Published(None, 3.6, 75.5, RESNET_TABLES,
        macs_note="torchvision counts as many; how the paper counts is not known",
        remark=TEN_CROPS),
    "resnet50": Published(None, 3.8, 77.2, RESNET_TABLES, macs_note=STRIDE, remark=TEN_CROPS),
    "resnet101": Published(None, 7.6, 78.3, RESNET_TABLES, macs_note=STRIDE, remark=TEN_CROPS),
    "resnet152": Published(None, 11.3, 78.6, RESNET_TABLES, macs_note=STRIDE, remark=TEN_CROPS),
    # backbones/resnet_dcn.py
    **{f"resnet{depth}_{form}": Published(None, None, None, "none", remark=DENSE)
        for depth in (50, 101) for form in ("dcn", "dcnv2")},
    # backbones/swin.py
    "swin_tiny_patch4_window7": Published(29, 4.5, 81.3, TABLE_1,
        params_note="the official README has 28 M"),
    "swin_small_patch4_window7": Published(50, 8.7, 83.0, TABLE_1),
    "swin_base_patch4_window7": Published(88, 15.4, 85.2, README,
        remark="top-1 after ImageNet-22k, as timm's weights; 83.5 % from ImageNet-1k alone"),
    "swin_base_patch4_window12": Published(88, 47.1, 86.4, README, image_size=384,
        remark="top-1 after ImageNet-22k, as timm's weights; 84.5 % from ImageNet-1k alone"),
    "swin_large_patch4_window7": Published(197, 34.5, 86.3, README, remark=IN22K),
    "swin_large_patch4_window12": Published(197, 103.9, 87.3, README, image_size=384, remark=IN22K),
    # backbones/vit_hybrid.py
    "vit_tiny_r_s16_p8": Published(6.4, None, 75.4, HYBRID, image_size=384, remark=NO_MACS),
    "vit_small_r26_s32": Published(36.6, None, 83.85, HYBRID, image_size=384, remark=NO_MACS),
    "vit_base_r50_s16": Published(None, None, 85.08,
        "the official README (ImageNet-21k first)", image_size=384,
        remark="the README gives neither parameters nor multiply-adds; the paper's hybrids saw JFT-300M"),
    "vit_large_r50_s32": Published(330, None, 85.99, HYBRID, image_size=384, remark=NO_MACS),
}
# fmt: on
PUBLISHED |= {f"tf_{n}": p for n, p in PUBLISHED.items() if n.startswith("efficientnet_")}
