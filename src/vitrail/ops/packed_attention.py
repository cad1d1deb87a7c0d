"""Attention within each image of a packed sequence (Dehghani et al., "Patch n' Pack: NaViT", NeurIPS 2023,
https://arxiv.org/abs/2307.06304, section 2).

Tokens of many images stand in one sequence, and each attends to those of its own image alone. One function,
four forms that agree in the output and in every gradient:

- "dense": one softmax over the whole sequence under a mask of images. It is the definition; its cost grows
  with the square of the sequence.
- "runs": one fused call for every run of neighbours of equal length. Exact, on every device, in training and
  inference; on a CPU nothing else is as fast.
- "varlen": one call for all images, in CUDA's 16-bit kernel for sequences of any lengths.
- "flex": FlexAttention, compiled, under a mask of images by blocks, which all layers of a network share. For
  CUDA tensors; on a CPU it has no backward pass.
"""

import itertools
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.ops.attention import attention, takes_bf16
from vitrail.ops.attention_bf16 import Run, attention_bf16
from vitrail.packing import Spans
from vitrail_runtime.errors import InputError

Implementation = Literal["auto", "runs", "varlen", "flex", "dense"]
Core = Callable[[Tensor, Tensor, Tensor], Tensor]

BLOCK = 128  # tokens of a block of FlexAttention's mask


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spans: Spans,
    key_spans: Spans | None = None,
    *,
    implementation: Implementation = "auto",
) -> Tensor:
    """softmax(q k^T / sqrt(D)) v within each image.

    Args:
        q: (T, heads, D). k: (S, heads, D). v: (S, heads, E).
        spans: where each image's queries lie. key_spans: where its keys and values lie; None: likewise.
            Pooling has one query an image and a key for each of its tokens.
        implementation: "auto" takes "varlen" for CUDA tensors of 16 bits where its kernel takes them, "flex"
            for other CUDA tensors that it takes, "runs" elsewhere.

    Returns: (T, heads, E).
    Raises: InputError for tokens that the spans do not cover, or a form that cannot be had.
    """
    keys = spans if key_spans is None else key_spans
    _check(q, k, v, spans, keys)
    if implementation == "auto":
        implementation = automatic(q, v)
    if implementation not in FORMS:
        known = ", ".join(get_args(Implementation))
        raise InputError(f"unknown implementation {implementation!r}; there are {known}")
    return FORMS[implementation](q, k, v, spans, keys)


def automatic(q: Tensor, v: Tensor) -> Implementation:
    """The form that "auto" takes."""
    if q.device.type != "cuda" or torch.compiler.is_compiling():
        return "runs"
    if varlen_takes(q, v):
        return "varlen"
    return "flex" if flex_takes(q, v) else "runs"


def varlen_takes(q: Tensor, v: Tensor) -> bool:
    """Whether the kernel for sequences of any lengths does: 16 bits, on a GPU from Ampere on."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    width = q.shape[-1]
    fits = width == v.shape[-1] and width % 8 == 0 and width <= 256
    return half and fits and torch.cuda.get_device_capability(q.device) >= (8, 0)


def flex_takes(q: Tensor, v: Tensor) -> bool:
    """Whether FlexAttention's kernel does: heads of at least 16 channels, and Triton to compile it."""
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    return q.dtype in dtypes and min(q.shape[-1], v.shape[-1]) >= 16 and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def by_runs(
    core: Core, q: Tensor, k: Tensor, v: Tensor, spans: Spans, keys: Spans | None = None
) -> Tensor:
    """`core` on each run of neighbours of equal length as one batch.

    core: (B, heads, N, D), (B, heads, M, D), (B, heads, M, E) -> (B, heads, N, E). All else as
    `packed_attention`.
    """
    runs = _runs(spans, keys or spans)
    of_queries = [count * queries for count, queries, _ in runs]
    of_keys = [count * offered for count, _, offered in runs]
    parts = zip(q.split(of_queries), k.split(of_keys), v.split(of_keys), runs, strict=True)
    outs = []
    for part_q, part_k, part_v, (count, queries, offered) in parts:
        out = core(
            part_q.unflatten(0, (count, queries)).transpose(1, 2),
            part_k.unflatten(0, (count, offered)).transpose(1, 2),
            part_v.unflatten(0, (count, offered)).transpose(1, 2),
        )
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def _runs(spans: Spans, keys: Spans) -> list[Run]:
    pairs = itertools.groupby(zip(spans.lengths, keys.lengths, strict=True))
    return [(len([*images]), queries, offered) for (queries, offered), images in pairs]


def runs_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans, keys: Spans) -> Tensor:
    runs = _runs(spans, keys)
    if takes_bf16(q, k, v, q.shape[1], runs):
        return attention_bf16(q.bfloat16(), k.bfloat16(), v.bfloat16(), runs)
    return by_runs(attention, q, k, v, spans, keys)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans, keys: Spans) -> Tensor:
    same = spans.images(q.device)[:, None] == keys.images(q.device)  # (T, S)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (heads, T or S, D)
    scores = q * q.shape[-1] ** -0.5 @ k.transpose(1, 2)
    weights = scores.masked_fill(~same, float("-inf")).softmax(-1)
    return (weights @ v).transpose(0, 1)


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans, keys: Spans) -> Tensor:
    if q.device.type != "cuda":
        raise InputError(
            f"implementation='varlen' is CUDA's kernel, but these tensors are on {q.device}; pass 'auto'"
        )
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q,
        k,
        v,
        spans.offsets(q.device),
        keys.offsets(q.device),
        max(spans.lengths),
        max(keys.lengths),
    )
    assert isinstance(out, Tensor)
    return out


def flex_attention(q: Tensor, k: Tensor, v: Tensor, spans: Spans, keys: Spans) -> Tensor:
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.device.type == "cpu" and grad:
        raise InputError(
            "implementation='flex' has no backward pass on a CPU; pass 'auto', or compute under "
            "torch.no_grad()"
        )
    rows, columns = padded_length(spans.total), padded_length(keys.total)
    q, k, v = (
        F.pad(x, (0, 0, 0, 0, 0, length - x.shape[0])).transpose(0, 1)[None]
        for x, length in ((q, rows), (k, columns), (v, columns))
    )
    out = _compiled()(q, k, v, block_mask=image_mask(spans, keys, q.device))
    return out[0, :, : spans.total].transpose(0, 1)


FORMS: dict[str, Callable[[Tensor, Tensor, Tensor, Spans, Spans], Tensor]] = {
    "runs": runs_attention,
    "varlen": varlen_attention,
    "flex": flex_attention,
    "dense": dense_attention,
}


@cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention as plain

    # Of fixed sizes: dynamic ones with a mask of each batch's own gave NaN (pytorch issue 186775).
    return torch.compile(plain, dynamic=False)


def padded_length(total: int) -> int:
    """The length that a sequence is padded to for FlexAttention, which is compiled anew for each: whole
    blocks, at most eight lengths from one power of two to the next."""
    step = max(BLOCK, 1 << max(0, (total - 1).bit_length() - 4))
    return -(-total // step) * step


def image_mask(spans: Spans, keys: Spans, device: torch.device) -> Any:
    """FlexAttention's BlockMask of "the same image", made once for a pack on each device.

    Images lie one after another, so the blocks of keys that a block of queries sees are neighbours: they are
    told from the images' ends alone, where `create_block_mask` would try all pairs of tokens.
    """
    key = ("image mask", device, keys.lengths)
    return spans.kept(key, lambda: _image_mask(spans, keys, device))


def _image_mask(spans: Spans, keys: Spans, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    rows, columns = padded_length(spans.total), padded_length(keys.total)
    of_query = F.pad(spans.images(device), (0, rows - spans.total), value=-1)
    of_key = F.pad(keys.images(device), (0, columns - keys.total), value=-1)
    # What fills up is an image of its own, the last: no row is without a key to attend to.
    if columns == keys.total:
        of_query = of_query.masked_fill(of_query < 0, len(keys.lengths) - 1)
    ends = keys.offsets(device).tolist()
    ends = [*ends, columns]
    whole = of_query.masked_fill(of_query < 0, len(spans.lengths)).view(-1, BLOCK)
    first, last = whole[:, 0].tolist(), whole[:, -1].tolist()
    lows = [ends[image] // BLOCK for image in first]
    highs = [-(-ends[image + 1] // BLOCK) for image in last]
    counts = torch.tensor([high - low for low, high in zip(lows, highs, strict=True)])
    indices = torch.arange(columns // BLOCK).expand(len(lows), -1) + torch.tensor(lows)[:, None]
    indices = indices % (columns // BLOCK)

    def same_image(batch: Tensor, head: Tensor, query: Tensor, offered: Tensor) -> Tensor:
        return of_query[query] == of_key[offered]

    return BlockMask.from_kv_blocks(
        counts.to(device, torch.int32)[None, None],
        indices.to(device, torch.int32)[None, None].contiguous(),
        BLOCK_SIZE=BLOCK,
        mask_mod=same_image,
        seq_lengths=(rows, columns),
    )


def _check(q: Tensor, k: Tensor, v: Tensor, spans: Spans, keys: Spans) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if q.ndim != 3 or k.shape[1:] != q.shape[1:] or v.shape[:2] != k.shape[:2]:
        raise InputError(f"{shapes} do not fit: expected (tokens, heads, width) of equal heads")
    if (q.shape[0], k.shape[0]) != (spans.total, keys.total):
        raise InputError(
            f"the spans cover {spans.total} queries and {keys.total} keys, but got {shapes}"
        )
    if len(spans.lengths) != len(keys.lengths) or not all((*spans.lengths, *keys.lengths)):
        raise InputError(
            f"the spans are of {len(spans.lengths)} images' queries and {len(keys.lengths)} images' keys: "
            "expected as many of both, each of at least one token"
        )
