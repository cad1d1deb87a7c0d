"""Cascade R-CNN (Cai and Vasconcelos, "Cascade R-CNN: Delving into High Quality Object Detection", CVPR 2018,
https://arxiv.org/abs/1712.00726; with masks: TPAMI 2019, https://arxiv.org/abs/1906.09756).

A head that learns from boxes of IoU 0.5 answers boxes of little more; asked for more at once, it finds too
few examples. So heads stand one behind the other: each learns at a higher overlap, from the boxes that the
one before has moved, which are better and so as many. Their scores are averaged.

Where paper and codes differ this follows mmdetection: a stage's loss weighs half of that before; every stage
scores its own input, not the last one's, and the logits are averaged (`average="probabilities"`: detectron2's
way); the spread of a stage's regression targets is 0.1 and 0.2 over its number, not measured; sizes are
bounded on both sides; RoIAlign is shifted by half a cell and reads as many samples as there are pixels. Masks
are learnt at every stage and averaged. Mask targets stay shares of a cell, as in torchvision.
"""

from dataclasses import dataclass

from vitrail.detectors.rcnn import MaskRCNNConfig, RCNNConfig


@dataclass(frozen=True, kw_only=True)
class CascadeRCNNConfig(RCNNConfig):
    ious: tuple[float, ...] = (0.5, 0.6, 0.7)
    class_agnostic: bool = True
    anchor_rounding: bool = False
    pool_samples: int = 0
    pool_aligned: bool = True
    box_beta: float = 1.0
    clamp_small: bool = True


@dataclass(frozen=True, kw_only=True)
class CascadeMaskRCNNConfig(CascadeRCNNConfig, MaskRCNNConfig):
    pass
