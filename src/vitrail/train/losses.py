"""What classification minimises."""

import torch.nn.functional as F
from torch import Tensor

from vitrail.train.config import TrainConfig


def loss_of(
    logits: Tensor, targets: Tensor, config: TrainConfig, *, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy with label smoothing, in float32.

    logits (B, K); targets (B, K) shares of the classes, or (B,) labels.
    """
    return F.cross_entropy(
        logits.float(), targets, label_smoothing=config.label_smoothing, reduction=reduction
    )
