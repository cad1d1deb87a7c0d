"""Backbone + dense head = segmenter: a class for every pixel."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.features import AdaptLevels, adapt_levels
from vitrail.necks.simple_pyramid import SimplePyramid
from vitrail.packing import PackedImages, as_packed, packed_maps
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

Neck = Literal["none", "simple_pyramid"]
IGNORE = 255  # a pixel without a class, in targets: it teaches nothing and counts in no score


class Segmenter(nn.Module):
    """images (B, 3, H, W) -> logits (B, num_classes, H, W). Labels are indices into `classes`.

    head: from maps at `strides` (None: all that the backbone has) to logits (B, num_classes, h, w) at
        `head.stride`.
    neck: from Features to the maps that the heads read, in place of resampling to `strides`.
    auxiliary: such a head beside it, which helps in training only (weight `auxiliary_weight` in the loss).
    class_weights: how much a pixel of each class counts in the loss; None: all alike.
    """

    task = "segment"
    reads_maps = True
    backbone: Any
    head: Any  # has a `stride`
    # Attached by models.create_model and load:
    info: Any
    weights_report: Any
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def __init__(
        self,
        backbone: Any,
        head: nn.Module,
        *,
        strides: Sequence[int] | None = (4, 8, 16, 32),
        neck: nn.Module | None = None,
        auxiliary: nn.Module | None = None,
        auxiliary_weight: float = 0.4,
        class_weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.levels = neck
        if neck is None and strides is not None:
            self.levels = adapt_levels(backbone.feature_specs, strides)
        self.head = head
        self.auxiliary = auxiliary
        self.auxiliary_weight = auxiliary_weight
        self.class_weights = None if class_weights is None else tuple(class_weights)

    def forward(self, images: Tensor, record: dict[str, Tensor] | None = None) -> Tensor:
        maps = self.maps(images, record)
        return to_image(self.head(maps), self.head.stride, images.shape[-2:])

    @property
    def takes_packs(self) -> bool:
        """Whether its head reads the tokens of images of any sizes at once."""
        return hasattr(self.head, "forward_packed") and self.levels is None

    def forward_packed(self, packed: PackedImages) -> list[Tensor]:
        """PackedImages -> of each image, in the order of `packed`, logits (num_classes, height, width)."""
        found = packed_maps(self.backbone, packed)
        logits = self.head.forward_packed(found.maps, packed.spans())  # (T, K)
        groups = replace(found, maps={"logits": logits}, prefix=None).batches()
        every = [one for group in groups for one in group.maps["logits"].split(1)]
        return [
            to_image(one, self.head.stride, size)[0]
            for one, size in zip(every, packed.sizes, strict=True)
        ]

    def maps(self, images: Tensor, record: dict[str, Tensor] | None = None) -> Mapping[str, Tensor]:
        """What the heads read, finest first."""
        features = self.backbone(images, record=record)
        return features.maps if self.levels is None else self.levels(features)

    def forward_tensors(
        self, images: Tensor, packing: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """{"logits": (B, num_classes, H, W)}: what is exported as it is.

        packing: where `images` are the patches of several (`vitrail.packing.as_packed`); then "logits" are a
            tuple of (num_classes, height, width) of each.
        """
        if packing is not None:
            return {"logits": tuple(self.forward_packed(as_packed(images, packing)))}
        return {"logits": self(images)}

    def losses(
        self,
        images: Tensor,
        targets: Tensor | Sequence[Tensor],
        *,
        packing: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Cross-entropy, summed over the labelled pixels; divide by `weight(targets)` for the mean.

        targets: (B, H, W) integers, 0..K-1 or IGNORE; of packed images one (H, W) each. packing: as for
            `forward_tensors`.
        Returns: "segment" and, where there is an auxiliary head, "auxiliary", which is weighted already: the
            loss is their sum.
        """
        if packing is not None:
            logits = self.forward_packed(as_packed(images, packing))
            each = zip(logits, targets, strict=True)
            total = [self._loss(one[None], target[None]) for one, target in each]
            return {"segment": torch.stack(total).sum()}
        assert isinstance(targets, Tensor)
        maps, size = self.maps(images), images.shape[-2:]
        out = {"segment": self._loss(to_image(self.head(maps), self.head.stride, size), targets)}
        if self.auxiliary is not None:
            asked: Any = self.auxiliary
            loss = self._loss(to_image(asked(maps), asked.stride, size), targets)
            out["auxiliary"] = self.auxiliary_weight * loss
        return out

    def weight(self, targets: Tensor | Sequence[Tensor]) -> Tensor:
        """What the sums of `losses` are divided by: the labelled pixels, by the weights of their classes."""
        if not isinstance(targets, Tensor):
            targets = torch.cat([target.flatten() for target in targets])
        labelled = targets != IGNORE
        if self.class_weights is None:
            return labelled.sum().float()
        return self._class_weights(targets)[targets[labelled].long()].sum()

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        weight = None
        if self.class_weights is not None:
            weight = self._class_weights(logits).to(logits.dtype)
        return F.cross_entropy(logits, targets.long(), weight, ignore_index=IGNORE, reduction="sum")

    def _class_weights(self, like: Tensor) -> Tensor:
        return torch.tensor(self.class_weights, dtype=torch.float32, device=like.device)


def neck_of(backbone: Any, neck: Neck, dim: int) -> AdaptLevels | SimplePyramid:
    """What brings a backbone's maps to strides 4, 8, 16 and 32, by its name in a head's config."""
    specs = backbone.feature_specs
    return SimplePyramid(specs, dim) if neck == "simple_pyramid" else adapt_levels(specs)


def to_image(logits: Tensor, stride: float, size: Sequence[int]) -> Tensor:
    """Logits (B, K, h, w) of a map of this stride -> (B, K, H, W), the size of the image, bilinearly.

    A map of ceil(H / stride) rows describes as many whole cells, the last of which reaches beyond an image
    that does not fit: it is enlarged by the stride and then cut, so that every value stays where it was
    computed. Where the image fits this is the resize to its size that the official codes do.
    """
    height, width = size
    ratio = Fraction(stride)
    whole = [side * ratio.numerator // ratio.denominator for side in logits.shape[-2:]]
    logits = F.interpolate(logits, whole, mode="bilinear", align_corners=False)
    return logits[..., :height, :width]


def check_classes(num_classes: int) -> None:
    """Raise InputError unless so many classes fit into an 8-bit mask beside IGNORE."""
    if not 1 <= num_classes <= IGNORE:
        raise InputError(
            f"a segmenter has 1 to {IGNORE} classes ({IGNORE} marks pixels without one), but got "
            f"{num_classes}"
        )
