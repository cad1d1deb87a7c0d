"""Backbone + head = classifier. Papers with a tail of their own register it; the rest use PooledHead."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.features import Features, FeatureSpec
from vitrail.packing import as_packed
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing


class PooledHead(nn.Module):
    """Global average pooling of the coarsest map, then one linear layer. Features -> (B, K)."""

    def __init__(self, config: Any, specs: Mapping[str, FeatureSpec], num_classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(list(specs.values())[-1].channels, num_classes)

    def forward(self, features: Features) -> Tensor:
        last = list(features.maps.values())[-1]
        return self.fc(last.mean((2, 3)))


def smoothed(shares: Tensor, smoothing: float) -> Tensor:
    """Shares of the classes (B, K), of which a part is spread over all."""
    return shares * (1 - smoothing) + smoothing / shares.shape[1]


class Classifier(nn.Module):
    """images (B, 3, H, W) -> logits (B, num_classes). `labels` are indices into `classes`."""

    task = "classify"
    takes_patch_sizes = True  # its head pools
    backbone: Any  # has feature_specs and, for token models, forward_packed
    # Attached by models.create_model and load:
    info: Any  # models.ModelInfo
    weights_report: Any  # weights.Report, where weights were given
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(
        self,
        images: Tensor,
        record: dict[str, Tensor] | None = None,
        *,
        patch_size: int | None = None,
    ) -> Tensor:
        asked = {} if patch_size is None else {"patch_size": patch_size}
        return self.head(self.backbone(images, record=record, **asked))

    def forward_tensors(
        self,
        images: Tensor,
        packing: Mapping[str, Any] | None = None,
        *,
        patch_size: int | None = None,
    ) -> dict[str, Tensor]:
        """{"logits": (B, num_classes)}: what is exported as it is.

        packing: where `images` are the patches of several (`vitrail.packing.as_packed`). patch_size: that
            other images are cut into, of a model that takes several (`models.use_patch_sizes`).
        """
        if packing is not None:
            return {"logits": self.forward_packed(as_packed(images, packing))}
        return {"logits": self(images, patch_size=patch_size)}

    def losses(
        self,
        images: Tensor,
        targets: Tensor,
        *,
        label_smoothing: float = 0.0,
        loss: Literal["softmax", "sigmoid"] = "softmax",
        packing: Mapping[str, Any] | None = None,
        patch_size: int | None = None,
    ) -> dict[str, Tensor]:
        """{"classify": cross-entropy in float32, summed over the images}; divide by `weight(targets)`.

        targets: (B,) labels, or (B, K) shares of the classes. loss: "sigmoid" asks of every class by itself
        whether it is the image's, and adds the answers' cross-entropies up.
        """
        asked = self.forward_tensors(images, packing, patch_size=patch_size)
        logits = asked["logits"].float()
        if loss == "sigmoid":
            if targets.ndim == 1:
                targets = F.one_hot(targets, logits.shape[1])
            shares = smoothed(targets.to(logits.dtype), label_smoothing)
            total = F.binary_cross_entropy_with_logits(logits, shares, reduction="sum")
        else:
            total = F.cross_entropy(
                logits, targets, label_smoothing=label_smoothing, reduction="sum"
            )
        return {"classify": total}

    def weight(self, targets: Tensor) -> Tensor:
        """What the sums of `losses` are divided by: the number of images."""
        return torch.tensor(float(len(targets)), device=targets.device)

    def forward_packed(self, packed: Any) -> Tensor:
        """PackedImages of N images -> logits (N, num_classes), in the order of `packed`.

        Raises InputError for a backbone whose tokens are not patches.
        """
        if not hasattr(self.backbone, "forward_packed"):
            raise InputError(
                f"{type(self.backbone).__name__} has no forward_packed: its tokens are not patches of one "
                "size; group images by size, as vitrail.Predictor does"
            )
        found = self.backbone.forward_packed(packed)
        return torch.cat([self.head(features) for features in found.batches()])
