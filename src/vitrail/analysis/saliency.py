"""Where a classifier looks: attention rollout for token models, smoothed gradients for the rest."""

from typing import Any

import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from vitrail.modes import eval_mode


def where_it_looks(model: Any, image: Tensor, label: int) -> tuple[str, Tensor]:
    """(the method's name, a map (h, w) >= 0) for one preprocessed image (3, H, W), in eval mode.

    Attention rollout where the backbone records square attention over class token and patches;
    otherwise the smoothed gradient of the score of `label`.
    """
    with eval_mode(model):
        return _rollout(model.backbone, image) or (
            "smoothed gradient",
            smooth_gradient(model, image, label),
        )


def _rollout(backbone: Any, image: Tensor) -> tuple[str, Tensor] | None:
    record: dict[str, Tensor] = {}
    with torch.no_grad():
        features = backbone(image[None], record=record)
    layers = [v for k, v in record.items() if k.endswith("attn.weights")]
    if features.prefix is not None and layers:
        tokens = {v.shape[-2:] for v in layers}
        if len(tokens) == 1 and (shape := tokens.pop())[0] == shape[1]:
            last = list(features.maps.values())[-1]
            rolled = attention_rollout(layers)[0]
            prefix = features.prefix.shape[1]
            return "attention rollout", rolled[0, prefix:].reshape(last.shape[-2:])
    return None


def attention_rollout(layers: list[Tensor]) -> Tensor:
    """How much each output token draws on each input token (Abnar & Zuidema, ACL 2020, arXiv
    2005.00928): the product of head-averaged attention, each with the residual's identity added and its rows
    scaled to one. Where weights may be negative (re-attention) their size counts.

    layers: attention weights (B, heads, N, N) of each block, first block first. Returns (B, N, N).
    """
    eye = torch.eye(layers[0].shape[-1], dtype=layers[0].dtype, device=layers[0].device)
    rolled = eye.expand(layers[0].shape[0], -1, -1)
    for weights in layers:
        mixed = weights.abs().mean(1) + eye
        rolled = mixed / mixed.sum(-1, keepdim=True) @ rolled
    return rolled


def smooth_gradient(
    model: torch.nn.Module, image: Tensor, label: int, *, draws: int = 8, noise: float = 0.1
) -> Tensor:
    """Mean |d score / d pixel| over noisy copies (Smilkov et al., 2017, arXiv 1706.03825), smoothed.

    image: (3, H, W), preprocessed; noise: standard deviation as a share of the image's range.
    Returns (H, W) >= 0.
    """
    generator = torch.Generator().manual_seed(0)
    spread = noise * float(image.max() - image.min())
    copies = image + spread * torch.randn(draws, *image.shape, generator=generator).to(image)
    copies.requires_grad_(True)
    with torch.enable_grad():
        score = model(copies)[:, label].sum()
        (gradient,) = torch.autograd.grad(score, copies)
    values = gradient.abs().mean(0).sum(0).cpu().numpy()
    # Wide enough that the pattern of the strides (periods of 2, 4, 8 pixels) goes; what it looks at stays.
    smooth = gaussian_filter(values, sigma=min(values.shape) / 24, mode="nearest")
    return torch.from_numpy(smooth)
