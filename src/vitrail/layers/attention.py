"""The core of multi-head attention, and the ways between tokens and maps."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.ops.attention import attention


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    record: dict[str, Tensor] | None = None,
    name: str = "",
) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v. q (B, heads, N, D), k and v (B, heads, M, D), bias broadcastable to
    (B, heads, N, M) -> (B, heads, N, D). With `record` the weights (B, heads, N, M) are kept there as
    "name.weights"."""
    # With a bias the product is explicit in graphs too: the memory order that the fused function returns
    # depends on whether the bias asks for a gradient, and a graph may be traced again under another setting.
    if record is None and (bias is None or not torch.compiler.is_compiling()):
        if bias is None:
            return attention(q, k, v)
        if not torch.is_grad_enabled():
            # A view of a parameter still asks for a gradient, which the CPU's fast kernel does not give.
            bias = bias.detach()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
    weights = (scores if bias is None else scores + bias).softmax(-1)
    if record is not None:
        record[f"{name}.weights"] = weights
    return weights @ v


def tokens_to_map(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, H * W, C) -> (B, C, H, W), a view in channels-last order."""
    x = tokens.transpose(1, 2)
    if torch.compiler.is_compiling():
        # The strides of such a view would put a condition on a width that may be 1.
        x = x.contiguous()
    return x.unflatten(2, (height, width))


def map_to_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H * W, C)."""
    return x.flatten(2).transpose(1, 2)
