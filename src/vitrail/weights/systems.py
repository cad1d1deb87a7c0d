"""The systems that this library is for: what each is called here, how equal it is to its reference, and the
command that trains it. `models_table.py` writes them into docs/models.md; `tests/test_systems.py` builds
every name and resolves every command."""

from dataclasses import dataclass

EXACT = "1e-9"
STORED = "its code's stored run 3e-6"


@dataclass(frozen=True)
class System:
    """parity: what a test compares, and how near the two are. train: arguments of `vitrail train`; DIR is a
    folder of data. name: of a model that is built by it."""

    title: str
    paper: str  # of arXiv
    name: str
    parity: str
    train: str


SYSTEMS = (
    System(
        "ViT",
        "2010.11929",
        "vit_base_patch16",
        f"logits, map and tokens: timm, {EXACT}",
        "--model vit_tiny_patch16 --data DIR",
    ),
    System(
        "DeiT",
        "2012.12877",
        "deit_tiny_distilled_patch16",
        f"logits and both heads: timm and transformers, {EXACT}",
        "--recipe deit_tiny --data DIR",
    ),
    System(
        "DINOv2",
        "2304.07193",
        "vit_small_patch14_dinov2",
        f"pooled token and map: transformers and timm, {EXACT}",
        "--recipe finetune_small --model vit_small_patch14_dinov2 --weights pretrained --data DIR",
    ),
    System(
        "FlexiViT",
        "2212.08013",
        "flexivit_small",
        "logits at eight patch sizes: timm, 1e-6 (its positions are resized in fp32)",
        "--model flexivit_small --patch-sizes 8 16 32 --data DIR",
    ),
    System(
        "ViT with learnable memory",
        "2203.15243",
        "memory/vit_base_patch32",
        f"logits: vit-pytorch, {EXACT}, its stored run 3e-6; both forms: attention by its formula, 1e-12",
        "--recipe memory_small --data DIR",
    ),
    System(
        "ViT with a ResNet stem (hybrid)",
        "2010.11929",
        "vit_base_r50_s16",
        f"logits: timm, {EXACT}",
        "--model vit_tiny_r_s16_p8 --data DIR",
    ),
    System(
        "DeepViT",
        "2103.11886",
        "deepvit_s",
        f"logits and maps of attention: {STORED}",
        "--recipe deepvit_s --data DIR",
    ),
    System(
        "CMT",
        "2107.06263",
        "cmt_ti",
        f"logits and every stage: {STORED}",
        "--recipe cmt_ti --data DIR",
    ),
    System(
        "MobileViT",
        "2110.02178",
        "mobilevit_xxs",
        f"logits: timm and transformers, {EXACT}; stages: {STORED}",
        "--recipe mobilevit_xxs --data DIR",
    ),
    System(
        "MobileViTv2",
        "2206.02680",
        "mobilevitv2_100",
        f"logits: timm and transformers, {EXACT}; stages: {STORED}",
        "--recipe mobilevitv2_100 --data DIR",
    ),
    System(
        "EfficientViT",
        "2305.07027",
        "efficientvit_m0",
        f"logits and stages: timm, {EXACT}; {STORED}",
        "--recipe efficientvit_m0 --data DIR",
    ),
    System(
        "Swin",
        "2103.14030",
        "swin_tiny_patch4_window7",
        f"logits: torchvision, timm and transformers, {EXACT}; stages: {STORED}",
        "--recipe swin_tiny --data DIR",
    ),
    System(
        "NaViT",
        "2307.06304",
        "navit_small_patch16",
        f"logits: timm's NaFlexViT, {EXACT} at its own grid; stored runs of it and vit-pytorch's 3e-6",
        "--model navit_tiny_patch16 --native --data DIR",
    ),
    System(
        "ViT-CoMer",
        "2403.07392",
        "upernet/vit_comer_tiny",
        f"both forms, every map: {STORED}",
        "--recipe segment_small --model upernet/vit_comer_tiny --data DIR",
    ),
    System(
        "EfficientNet",
        "1905.11946",
        "efficientnet_b0",
        f"logits: timm and torchvision, {EXACT}",
        "--recipe efficientnet_b0 --data DIR",
    ),
    System(
        "MobileNet v1",
        "1704.04861",
        "mobilenetv1_100",
        f"logits: timm, {EXACT}",
        "--model mobilenetv1_100 --data DIR",
    ),
    System(
        "MobileNet v2",
        "1801.04381",
        "mobilenetv2_100",
        f"logits: timm and torchvision, {EXACT}",
        "--model mobilenetv2_100 --data DIR",
    ),
    System(
        "MobileNet v3",
        "1905.02244",
        "mobilenetv3_large",
        f"logits: timm and torchvision, {EXACT}",
        "--recipe mobilenetv3_large --data DIR",
    ),
    System(
        "Faster R-CNN",
        "1506.01497",
        "faster_rcnn/resnet50",
        f"all before suppression: torchvision, {EXACT}; answers 1e-4, losses and their gradients 1e-8",
        "--recipe detect_small --model faster_rcnn/mobilenetv3_large --data DIR",
    ),
    System(
        "Mask R-CNN",
        "1703.06870",
        "mask_rcnn/resnet50",
        f"as Faster R-CNN, and the masks: torchvision, {EXACT}",
        "--recipe detect_small --model mask_rcnn/mobilenetv3_large --data DIR",
    ),
    System(
        "Cascade R-CNN",
        "1712.00726",
        "cascade_rcnn/resnet50",
        "boxes, logits and losses of every stage: mmdetection's stored run 3e-6",
        "--recipe detect_small --model cascade_rcnn/mobilenetv3_large --data DIR",
    ),
    System(
        "Deformable convolution v1, v2",
        "1811.11168",
        "faster_rcnn/resnet50_dcnv2",
        f"the four maps: torchvision's operator in its ResNet, {EXACT}; the layer: a loop over taps",
        "--recipe detect_small --model faster_rcnn/resnet50_dcnv2 --data DIR",
    ),
    System(
        "DETR",
        "2005.12872",
        "detr/resnet50",
        f"logits, boxes and attention: transformers, {EXACT}; losses, gradients: {STORED}",
        "--recipe detect_small --model detr/resnet18 --data DIR",
    ),
    System(
        "DETR, panoptic",
        "2005.12872",
        "detr_panoptic/resnet50",
        f"logits, boxes, masks and losses: transformers, {EXACT}; segments: transformers' merging",
        "--recipe panoptic_small --data DIR",
    ),
    System(
        "Deformable DETR",
        "2010.04159",
        "deformable_detr/resnet50",
        f"logits, boxes and losses, one and two stages: transformers, {EXACT}",
        "--recipe detr_small --data DIR",
    ),
    System(
        "EfficientDet",
        "1911.09070",
        "efficientdet_d0",
        f"all that is said of anchors, D0 to D2: effdet, {EXACT}; losses 1e-6; parameters the same",
        "--recipe efficientdet_small --data DIR",
    ),
)


def systems() -> list[str]:
    """The table, as lines of Markdown."""
    lines = [
        "## Systems",
        "",
        "What each is called here, what it was compared with and how near the two are, and a command that",
        "trains it. The tests hold these numbers. 1e-9: of the largest value, in float64, with random",
        "weights carried over by the key map. 3e-6: of the largest value of a run of the official code, in",
        "float32, that was kept.",
        "",
        "| system | paper | a name here | equal to | trained by `vitrail train` |",
        "|---|---|---|---|---|",
    ]
    for s in SYSTEMS:
        paper = f"[{s.paper}](https://arxiv.org/abs/{s.paper})"
        lines.append(f"| {s.title} | {paper} | `{s.name}` | {s.parity} | `{s.train}` |")
    return lines
