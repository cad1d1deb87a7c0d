"""Gradients that are too large, made smaller: all by one factor, or each unit by its own."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vitrail.train.config import TrainConfig

SMALLEST_WEIGHT = 1e-3  # a norm of a unit's weights, so that those that start at zero can learn


def clip_gradients(model: Any, config: TrainConfig) -> Tensor:
    """Limit the gradient as the configuration says; returns the norm over all parameters, before."""
    adaptive = config.clip_mode == "agc"
    largest = float("inf") if adaptive or config.clip_grad is None else config.clip_grad
    norm = nn.utils.clip_grad_norm_(model.parameters(), largest)
    if adaptive and config.clip_grad is not None:
        clip_units(model, config.clip_grad)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


@torch.no_grad()
def clip_units(model: Any, factor: float) -> None:
    """Adaptive gradient clipping (Brock et al. 2021, arXiv 2102.06171, eq. 3), in place.

    A unit is a row of a matrix or a filter of a convolution (axis 0), and a whole vector. Its gradient's
    norm becomes at most `factor` times its weights' norm. The classifier is left alone, as in the paper.
    """
    classifier = {id(p) for p in classifier_parameters(model)}
    for weight in model.parameters():
        if weight.grad is None or id(weight) in classifier:
            continue
        largest = factor * _unit_norms(weight).clamp(min=SMALLEST_WEIGHT)
        # A gradient of zero gives infinity, of which 1 is left.
        weight.grad.mul_((largest / _unit_norms(weight.grad)).clamp(max=1.0))


def classifier_parameters(model: Any) -> list[nn.Parameter]:
    """Those of the linear layers, or 1x1 convolutions, that give logits, an auxiliary head's too."""
    heads = (part for name, part in model.named_children() if name not in ("backbone", "neck"))
    layers = (m for head in heads for m in head.modules() if isinstance(m, (nn.Linear, nn.Conv2d)))
    return [p for m in layers if _gives(m, len(model.classes)) for p in m.parameters()]


def _gives(layer: nn.Linear | nn.Conv2d, num_classes: int) -> bool:
    if isinstance(layer, nn.Linear):
        return layer.out_features == num_classes
    return layer.out_channels == num_classes and layer.kernel_size == (1, 1)


def _unit_norms(x: Tensor) -> Tensor:
    """Euclidean norms that multiply with `x`: (C, ...) -> (C, 1, ...), of a vector one."""
    axes = tuple(range(1, x.ndim)) if x.ndim > 1 else None
    return torch.linalg.vector_norm(x, dim=axes, keepdim=True)
