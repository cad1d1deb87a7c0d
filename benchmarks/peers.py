"""Our models beside timm's: the names, and a pair with equal weights."""

import sys
from argparse import ArgumentParser

import timm
import torch
from torch import nn

from vitrail.models import create_model

PAIRS = {  # ours -> timm's
    "efficientvit_m0": "efficientvit_m0",
    "efficientvit_m5": "efficientvit_m5",
    "vit_tiny_patch16": "vit_tiny_patch16_224",
    "vit_small_patch16": "vit_small_patch16_224",
}


def add_models(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", choices=sorted(PAIRS), default=list(PAIRS), metavar="NAME"
    )
    parser.add_argument("--device", default="cpu")


def pair(name: str, device: str) -> tuple[nn.Module, nn.Module]:
    """(ours, timm's) with timm's weights, checked to be the same function."""
    peer = timm.create_model(PAIRS[name], pretrained=False).eval()
    ours = create_model(name, weights=peer.state_dict()).eval()
    images = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        a, b = ours(images), peer(images)
    if not torch.allclose(a, b, atol=1e-4 * float(b.abs().max()), rtol=0):
        sys.exit(f"{name} and timm's {PAIRS[name]} differ by {float((a - b).abs().max()):.3g}")
    return ours.to(device), peer.to(device)
