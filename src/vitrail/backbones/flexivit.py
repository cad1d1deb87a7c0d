"""FlexiViT (Beyer et al., "FlexiViT: One Model for All Patch Sizes", CVPR 2023,
https://arxiv.org/abs/2212.08013).

The size of a ViT's patches decides what it costs and how well it sees, and is settled before training. If it
is drawn anew for every batch, one set of weights serves all sizes: the patches' projection and the positions
are kept at one size and resized to that of the batch, the projection by the pseudo-inverse of the resize, so
that a patch that grows keeps its token (section 3.4).

The network is a ViT, and every ViT with plain patches can be trained and asked so (`vitrail train
--patch-sizes`, `models.use_patch_sizes`); these are the sizes and files of the paper.

Unlike the official code, which keeps 32 x 32 projections and a 7 x 7 table and resamples that bilinearly: the
base is timm's, 16 x 16 and 15 x 15, resampled bicubically with antialias; files of any base size load.
"""

from dataclasses import replace

from vitrail.backbones.vit import (
    BASE,
    HALF,
    LARGE,
    LAYOUTS,
    SMALL,
    ViT,
    ViTConfig,
    ViTHead,
    smallest,
)
from vitrail.backbones.vit_keys import resample_to
from vitrail.registry import register_backbone
from vitrail_runtime.preprocess import Preprocessing

VARIANTS = {  # section 3.2; 240 pixels are whole patches of 8, 10, 12, 15, 16, 20, 24, 30, 40 and 48
    f"flexivit_{name}": replace(size, image_size=240, prefix_positions=False)
    for name, size in (("small", SMALL), ("base", BASE), ("large", LARGE))
}
SIZES = (8, 10, 12, 15, 16, 20, 24, 30, 40, 48)  # that the paper trains with


class FlexiViT(ViT):
    """A ViT whose released weights were trained with patches of all `SIZES`."""


register_backbone(
    FlexiViT,
    VARIANTS,
    tiny=smallest(ViTConfig, prefix_positions=False, image_size=(24, 40)),
    layouts={"timm": replace(LAYOUTS["timm"], source="timm's flexivit")},
    tail=ViTHead,
    resample=resample_to,
    preprocessing=Preprocessing(size=(240, 240), crop_pct=0.95, mean=HALF, std=HALF),
)
