"""softmax(q k^T / sqrt(D)) v of each head, by the library that multiplies fastest on this machine.

PyTorch's fused function multiplies by MKL on a CPU, which leaves AMD's AVX-512 unused: a core of an EPYC
(Zen 5) makes 68 to 78 GFLOP/s in it. Products by oneDNN (`vitrail.ops.linear`), with blocks of scores that
stay in the caches, are 1.3 to 1.6 times as fast for 300 to 1,024 tokens and six heads of 64, and with their
gradients 1.1 to 1.4 times. That is with one math thread, as in each of several processes: the fused function
parts heads among threads and loses nothing, where products this small wait for each other (two threads: 1.08
times as fast in inference, 0.95 in training). Everywhere else, and for few tokens or narrow heads, it is the
fused function.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitrail.ops.linear import onednn_pays, onednn_takes, product

LEAST = 2**16  # scores of a head, and its width, from which it pays
WIDTH = 64
ROWS, SCORES = 512, 2**18  # the most of a block: one megabyte


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, heads, N, D), (B, heads, M, D), (B, heads, M, E) -> (B, heads, N, E), as
    `F.scaled_dot_product_attention`; differentiable once, as that is on a CPU."""
    if not _by_products(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        out = _Attention.apply(q, k, v)
        assert isinstance(out, Tensor)
    else:
        out = _attended(q, k, v)
    return out.transpose(1, 2)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return _attended(q, k, v)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, ...]:
        q, k, v = _ready(*ctx.saved_tensors)
        of_q, of_k, of_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for head, rows in _blocks(q, k):
            weights = product(q[head][rows], k[head], None).softmax(-1)
            own = gradient[head[0], rows, head[1]].contiguous()
            of_v[head] += product(weights.mT, own.mT, None)
            of_weights = product(own, v[head], None)
            scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_q[head][rows] = product(scores, k[head].mT, None)
            of_k[head] += product(scores.mT, q[head][rows].mT, None)
        return of_q * q.shape[-1] ** -0.5, of_k, of_v


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, N, heads, E): in this order heads are joined without a copy."""
    batch, heads, queries, _ = q.shape
    q, k, v = _ready(q, k, v)
    out = q.new_empty(batch, queries, heads, v.shape[-1])
    for head, rows in _blocks(q, k):
        weights = product(q[head][rows], k[head], None).softmax(-1)
        out[head[0], rows, head[1]] = product(weights, v[head].mT, None)
    return out


def _ready(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each head by itself in memory, and the queries scaled."""
    return q.contiguous() * q.shape[-1] ** -0.5, k.contiguous(), v.contiguous()


def _blocks(q: Tensor, k: Tensor) -> Iterator[tuple[tuple[int, int], slice]]:
    """Every head as (place in the batch, number), and of its queries blocks of about as many each."""
    batch, heads, queries, _ = q.shape
    most = max(1, min(ROWS, SCORES // k.shape[2]))
    step = -(-queries // -(-queries // most))
    for head in itertools.product(range(batch), range(heads)):
        for start in range(0, queries, step):
            yield head, slice(start, start + step)


def _by_products(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        onednn_pays(q.device)  # before the rest, which a tracer could not follow
        and torch.get_num_threads() == 1
        and q.ndim == k.ndim == v.ndim == 4
        and q.shape[:2] == k.shape[:2] == v.shape[:2]
        and k.shape[2] == v.shape[2]
        and q.shape[3] == k.shape[3]
        and q.shape[2] * k.shape[2] >= LEAST
        and min(q.shape[3], v.shape[3]) >= WIDTH
        and onednn_takes(q, k, v)
    )
