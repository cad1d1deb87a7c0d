"""DETR's segmentation head (Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020,
section 4.4 and figure 8, https://arxiv.org/abs/2005.12872).

Each query that stands for an object looks at the encoder's cells once more; where it looks, head by head, is
a coarse map of its object. With the image's features beside it, convolutions and the backbone's finer maps
make a mask of stride 4 of it.

Unlike the official code, which makes masks of all queries: of those that are asked for alone, since no
query's mask depends on another's; and what is the same for all queries of an image (its share of the first
convolution, the finer maps) is reckoned once. The numbers are the same.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.registry import Tensors, rename_keys
from vitrail_runtime.errors import InputError

FOCUS, BALANCE = 2.0, 0.25  # gamma and alpha of the focal loss


class AttentionMaps(nn.Module):
    """Where queries look: queries (P, dim) of the images `image` (P,), memory (B, dim, h, w) ->
    (P, heads, h, w), which adds up to one over heads and cells. pad_mask: (B, h, w), True where nobody looks.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_linear, self.k_linear = nn.Linear(dim, dim), nn.Linear(dim, dim)
        for layer in (self.q_linear, self.k_linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, queries: Tensor, image: Tensor, memory: Tensor, pad_mask: Tensor | None = None
    ) -> Tensor:
        q = self.q_linear(queries).unflatten(1, (self.num_heads, -1))
        k = self.k_linear(memory.permute(0, 2, 3, 1)).unflatten(3, (self.num_heads, -1))
        scores = torch.einsum("pnc,phwnc->pnhw", q * q.shape[-1] ** -0.5, k[image])
        if pad_mask is not None:
            scores = scores.masked_fill(pad_mask[image, None], -torch.inf)
        return scores.flatten(1).softmax(1).view_as(scores)


class MaskHead(nn.Module):
    """Logits of the masks of queries, at the finest map's size.

    dim: of the transformer. fpn_dims: channels of the backbone's maps, coarsest (stride 16) first.
    """

    def __init__(self, dim: int, num_heads: int, fpn_dims: Sequence[int]) -> None:
        super().__init__()
        if len(fpn_dims) != 3 or dim % 16 or (dim + num_heads) % 8:
            raise InputError(
                f"DETR's mask head takes three finer maps, a dim that is a multiple of 16 and with the heads "
                f"of 8, but got {len(fpn_dims)} maps, dim {dim} and {num_heads} heads"
            )
        first = dim + num_heads
        dims = (first, first, dim // 2, dim // 4, dim // 8, dim // 16)
        for i, (before, after) in enumerate(pairwise(dims), 1):
            setattr(self, f"lay{i}", nn.Conv2d(before, after, 3, padding=1))
            setattr(self, f"gn{i}", nn.GroupNorm(min(8, after), after))
        self.out_lay = nn.Conv2d(dims[-1], 1, 3, padding=1)
        for i, channels in enumerate(fpn_dims, 1):
            setattr(self, f"adapter{i}", nn.Conv2d(channels, dims[i + 1], 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor, attention: Tensor, image: Tensor, fpn: Sequence[Tensor]) -> Tensor:
        """Features (B, dim, h, w), attention (P, heads, h, w) of queries of the images `image` (P,), the
        backbone's maps of stride 16, 8 and 4 -> (P, h', w') of the last of them."""
        own: Any = self  # its layers go by number
        weight, bias = own.lay1.weight, own.lay1.bias
        of_image = F.conv2d(x, weight[:, : x.shape[1]], bias, padding=1)
        y = of_image[image] + F.conv2d(attention, weight[:, x.shape[1] :], padding=1)
        y = F.relu(own.gn2(own.lay2(F.relu(own.gn1(y)))))
        for i, finer in enumerate(fpn, 1):
            beside = getattr(own, f"adapter{i}")(finer)[image]
            y = beside + F.interpolate(y, beside.shape[-2:], mode="nearest")
            y = F.relu(getattr(own, f"gn{i + 2}")(getattr(own, f"lay{i + 2}")(y)))
        return self.out_lay(y)[:, 0]


def mask_losses(logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """The focal loss (Lin et al., ICCV 2017), a mean over the pixels of each mask, and the DICE loss
    (Milletari et al., 3DV 2016), each summed over the masks.

    logits: (P, h, w), brought bilinearly to the masks' (P, H, W). What both are divided by is the number of
    objects.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    if not len(logits):
        none = logits.to(wide).sum()
        return none, none
    logits = F.interpolate(logits[:, None].to(wide), masks.shape[-2:], mode="bilinear")
    x, wanted = logits.flatten(1), masks.flatten(1).to(wide)
    said = x.sigmoid()
    missed = F.binary_cross_entropy_with_logits(x, wanted, reduction="none")
    right = said * wanted + (1 - said) * (1 - wanted)
    balance = BALANCE * wanted + (1 - BALANCE) * (1 - wanted)
    focal = (balance * missed * (1 - right) ** FOCUS).mean(1).sum()
    both, all_of_both = (said * wanted).sum(1), said.sum(1) + wanted.sum(1)
    return focal, (1 - (2 * both + 1) / (all_of_both + 1)).sum()


def from_transformers(state: Tensors) -> Tensors:
    """What stands beside the detector in transformers' DetrForSegmentation, by the official names, which are
    ours: "bbox_attention.*" and "mask_head.*"."""
    return rename_keys(
        state,
        [
            (r"^bbox_attention\.([qk])_proj\.", r"bbox_attention.\1_linear."),
            (r"^mask_head\.conv([12])\.conv\.", r"mask_head.lay\1."),
            (r"^mask_head\.conv([12])\.norm\.", r"mask_head.gn\1."),
            (
                r"^mask_head\.fpn_stages\.(\d)\.fpn_adapter\.",
                lambda m: f"mask_head.adapter{int(m[1]) + 1}.",
            ),
            (
                r"^mask_head\.fpn_stages\.(\d)\.refine\.conv\.",
                lambda m: f"mask_head.lay{int(m[1]) + 3}.",
            ),
            (
                r"^mask_head\.fpn_stages\.(\d)\.refine\.norm\.",
                lambda m: f"mask_head.gn{int(m[1]) + 3}.",
            ),
            (r"^mask_head\.output_conv\.", "mask_head.out_lay."),
        ],
    )
