"""How EfficientDet grows (Tan et al., CVPR 2020, https://arxiv.org/abs/1911.09070, section 4.2 and Table 1):
one number phi sets backbone, image size, width and depth of the BiFPN, and depth of the heads. No torch."""

import math
from dataclasses import dataclass
from typing import Any, Literal

from vitrail_runtime.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Scale:
    """size: of the square that an image fits in, pixels. The rest are fields of `EfficientDetConfig`."""

    backbone: str
    size: int
    neck_dim: int
    neck_cells: int
    head_convs: int
    levels: int = 5
    fusion: Literal["fast", "softmax", "sum"] = "fast"
    anchor_scale: float = 4.0

    def fields(self) -> dict[str, Any]:
        """Of the head's config, for `create_model(..., head=...)`."""
        return {k: v for k, v in vars(self).items() if k not in ("backbone", "size")}


def compound_scale(phi: int) -> Scale:
    """The detector of a compound coefficient by the paper's equations 1 to 3: BiFPN of width 64 * 1.35^phi,
    to the nearest multiple of 8, and 3 + phi cells; heads of 3 + floor(phi / 3) convolutions; images of 512 +
    128 phi.

    The published detectors (`SCALES`) are these, rounded by hand: D2 is 112 wide, D4 224; D5 has 7 cells and
    takes 1280 pixels, D6 has 8 cells; D7 is D6 at 1536 pixels. Raises InputError unless phi is from 0 to 7.
    """
    if phi not in range(8):
        raise InputError(
            f"phi is a whole number from 0 to 7, those of EfficientNet B0 to B7, but is {phi}"
        )
    return Scale(
        backbone=f"tf_efficientnet_b{phi}",
        size=512 + 128 * phi,
        neck_dim=8 * math.floor(64 * 1.35**phi / 8 + 0.5),
        neck_cells=3 + phi,
        head_convs=3 + phi // 3,
    )


def _d(phi: int, size: int, dim: int, cells: int, convs: int, **more: Any) -> Scale:
    backbone = f"tf_efficientnet_b{phi}"
    return Scale(
        backbone=backbone, size=size, neck_dim=dim, neck_cells=cells, head_convs=convs, **more
    )


SCALES = {  # Table 1; sums without weights and D7's anchors are the official code's
    "efficientdet_d0": _d(0, 512, 64, 3, 3),
    "efficientdet_d1": _d(1, 640, 88, 4, 3),
    "efficientdet_d2": _d(2, 768, 112, 5, 3),
    "efficientdet_d3": _d(3, 896, 160, 6, 4),
    "efficientdet_d4": _d(4, 1024, 224, 7, 4),
    "efficientdet_d5": _d(5, 1280, 288, 7, 4),
    "efficientdet_d6": _d(6, 1280, 384, 8, 5, fusion="sum"),
    "efficientdet_d7": _d(6, 1536, 384, 8, 5, fusion="sum", anchor_scale=5.0),
    "efficientdet_d7x": _d(7, 1536, 384, 8, 5, fusion="sum", levels=6),
}
