"""softmax(q k^T / sqrt(D)) v of each head, by the library that multiplies fastest on this machine.

PyTorch's fused function multiplies by MKL on a CPU, which leaves AMD's AVX-512 unused: a core of an EPYC
(Zen 5) makes 63 to 78 GFLOP/s in it, in float32 and in bfloat16. Products by oneDNN (`vitrail.ops.linear`)
are faster there in bfloat16 (`vitrail.ops.attention_bf16`) and, with one math thread, in float32
(`vitrail.ops.attention_fp32`). Everywhere else, and for few tokens or narrow heads, it is the fused function.
In bfloat16 the tokens of all images count: few of one image may go the one way, and in a batch the other.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.ops.attention_bf16 import Run, attention_bf16
from vitrail.ops.attention_fp32 import attention_fp32
from vitrail.ops.linear import onednn_pays, onednn_takes

LEAST_FP32, WIDTH_FP32 = 2**16, 64  # scores of a head, and its width, from which it pays
LEAST_BF16, WIDTH_BF16 = 2**17, 32  # scores of all heads, and the width of one
QUERIES_BF16 = 64  # of an image, on average


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, heads, N, D), (B, heads, M, D), (B, heads, M, E) -> (B, heads, N, E), as
    `F.scaled_dot_product_attention`; differentiable once, as that is on a CPU."""
    # First whether oneDNN pays: a tracer could not follow the rest.
    if onednn_pays(q.device) and _fit(q, k, v):
        if _pays_fp32(q, k, v) and onednn_takes(q, k, v):
            return attention_fp32(q, k, v)
        runs = [(len(q), q.shape[2], k.shape[2])]
        if takes_bf16(q, k, v, q.shape[1], runs):
            x, y, z = (t.bfloat16().transpose(1, 2).flatten(0, 1) for t in (q, k, v))
            return attention_bf16(x, y, z, runs).unflatten(0, (len(q), -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v)


def takes_bf16(q: Tensor, k: Tensor, v: Tensor, heads: int, runs: Sequence[Run]) -> bool:
    """Whether these, their axes in any order but for the last, are bfloat16, or made so by autocast, and
    large enough for `attention_bf16`."""
    return (
        onednn_pays(q.device)
        and heads * sum(images * n * m for images, n, m in runs) >= LEAST_BF16
        and sum(images * (n - QUERIES_BF16) for images, n, _ in runs) >= 0
        and min(q.shape[-1], v.shape[-1]) >= WIDTH_BF16
        and onednn_takes(q, k, v, dtype=torch.bfloat16)
    )


def _fit(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the shapes fit together. What fits in another way, or not at all, is PyTorch's."""
    return (
        q.ndim == k.ndim == v.ndim == 4
        and q.shape[:2] == k.shape[:2] == v.shape[:2]
        and k.shape[2] == v.shape[2]
        and q.shape[3] == k.shape[3]
    )


def _pays_fp32(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        torch.get_num_threads() == 1
        and q.shape[2] * k.shape[2] >= LEAST_FP32
        and min(q.shape[3], v.shape[3]) >= WIDTH_FP32
    )
