"""Our models beside timm's: the names, and a pair with equal weights."""

import sys
from argparse import ArgumentParser
from collections.abc import Iterable
from typing import Any

import timm
import torch
from torch import nn

from vitrail.models import create_model

PAIRS = {  # ours -> timm's: of every family that timm has, the smallest and a larger one
    "efficientvit_m0": "efficientvit_m0",
    "efficientvit_m5": "efficientvit_m5",
    "vit_tiny_patch16": "vit_tiny_patch16_224",
    "vit_small_patch16": "vit_small_patch16_224",
    "deit_tiny_patch16": "deit_tiny_patch16_224",
    "deit_small_distilled_patch16": "deit_small_distilled_patch16_224",
    "vit_small_patch14_dinov2": "vit_small_patch14_dinov2",
    "vit_base_patch14_reg4_dinov2": "vit_base_patch14_reg4_dinov2",
    "vit_tiny_r_s16_p8": "vit_tiny_r_s16_p8_224",
    "vit_small_r26_s32": "vit_small_r26_s32_224",
    "swin_tiny_patch4_window7": "swin_tiny_patch4_window7_224",
    "swin_small_patch4_window7": "swin_small_patch4_window7_224",
    "mobilevit_xxs": "mobilevit_xxs",
    "mobilevit_s": "mobilevit_s",
    "mobilevitv2_050": "mobilevitv2_050",
    "mobilevitv2_100": "mobilevitv2_100",
    "mobilenetv1_100": "mobilenetv1_100",
    "mobilenetv1_125": "mobilenetv1_125",
    "mobilenetv2_035": "mobilenetv2_035",
    "mobilenetv2_100": "mobilenetv2_100",
    "mobilenetv3_small_050": "mobilenetv3_small_050",
    "mobilenetv3_large": "mobilenetv3_large_100",
    "efficientnet_b0": "efficientnet_b0",
    "efficientnet_b2": "efficientnet_b2",
    "tf_efficientnet_b0": "tf_efficientnet_b0",
    "resnet18": "resnet18",
    "resnet50": "resnet50",
}
# DINOv2 comes without a classifier and for 518 pixels: both get timm's, on the class token, at 224.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # name -> (ours, timm's)
    name: ({"image_size": 224, "pool": "token"}, {"img_size": 224, "num_classes": 1000})
    for name in PAIRS
    if "dinov2" in name
}
# MobileViTv2 equals timm's where every map is even, so both versions stand at their papers' size.
SIZES = {name: 256 if name.startswith("mobilevit") else 224 for name in PAIRS}
FEW = ("efficientvit_m0", "efficientvit_m5", "vit_tiny_patch16", "vit_small_patch16")


def add_models(parser: ArgumentParser, default: Iterable[str] = PAIRS) -> None:
    parser.add_argument(
        "--models",
        nargs="+",
        choices=sorted(PAIRS),
        default=list(default),
        metavar="NAME",
        help=f"of {', '.join(PAIRS)}",
    )
    parser.add_argument("--device", default="cpu")


def pair(name: str, device: str) -> tuple[nn.Module, nn.Module]:
    """(ours, timm's) with timm's weights, checked to be the same function."""
    mine, theirs = OPTIONS.get(name, ({}, {}))
    peer = timm.create_model(PAIRS[name], pretrained=False, **theirs).eval()
    # New weights may be zeros, which would make anything equal.
    for value in peer.state_dict().values():
        if value.is_floating_point() and not value.any():
            torch.nn.init.normal_(value, std=0.02)
    ours = create_model(name, weights=peer.state_dict(), **mine).eval()
    images = torch.randn(1, 3, SIZES[name], SIZES[name], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        a, b = ours(images), peer(images)
    if not torch.allclose(a, b, atol=1e-4 * float(b.abs().max()), rtol=0):
        sys.exit(f"{name} and timm's {PAIRS[name]} differ by {float((a - b).abs().max()):.3g}")
    return ours.to(device), peer.to(device)
