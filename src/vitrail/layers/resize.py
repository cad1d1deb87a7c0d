"""Resampling of maps to sizes that a block can take."""

import torch
import torch.nn.functional as F
from torch import Tensor


def resize_to_multiple(x: Tensor, multiple: int, *, align_corners: bool) -> Tensor:
    """Resize a map bilinearly up to the next multiple of `multiple`. (B, C, H, W).

    A map that fits is returned as it is. Exported graphs with dynamic sizes always resize: at equal
    sizes bilinear resampling is the identity.
    """
    height, width = x.shape[-2:]
    # The form of the ceiling that torch.export can solve.
    size = (
        (height + multiple - 1) // multiple * multiple,
        (width + multiple - 1) // multiple * multiple,
    )
    if not torch.compiler.is_exporting() and size == (height, width):
        return x
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)
