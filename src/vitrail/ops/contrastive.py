"""The losses of contrastive learning, over all pairs of a batch's images and texts, across processes.

Every image is held against every text, and only those of one pair belong together. Softmax (Radford et al.,
"Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv 2103.00020, figure
3): which text is this image's, among all, and which image is this text's. Sigmoid (Zhai et al., "Sigmoid Loss
for Language Image Pre-Training", ICCV 2023, arXiv 2303.15343, equation 1): each of the N x N pairs alone, is
it one or not.

The plain form is the definition and builds the matrix of all similarities, which at 16,384 pairs is a
gigabyte and is needed several times over. The chunked form goes through it in strips of some rows, forgets
them and computes the gradient in the same way; its value and gradients are the same.

A batch may be shared by processes. Each then gets its own share of the loss, and a gradient for its own
embeddings that is that of the whole sum: added over processes, as data parallel training does, losses and
gradients are those of one process with all pairs. So all of them must call, and scale the share alike.
"""

from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vitrail_runtime.errors import InputError

Implementation = Literal["chunked", "plain"]
CHUNK = 512  # rows of a strip: at 16,384 pairs 32 MiB, and no slower than larger ones


def softmax_pairs(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    *,
    implementation: Implementation = "chunked",
    chunk: int = CHUNK,
    alone: bool = False,
) -> Tensor:
    """The mean of both cross-entropies of each pair (image to texts, text to images), summed over the pairs.

    Args:
        images, texts: (N, D), row i of both is a pair; of unit length as the paper has them.
        scale: one number that similarities are multiplied by, 1 / temperature.
        chunk: how many rows of the matrix the chunked form holds at once.
        alone: these pairs are all there are, whatever other processes do.
    Returns: this process's share of the sum, float32 (float64 of float64); divide by the number of pairs.
    Raises: ValueError when images and texts are no pairs.
    """
    _check(images, texts, implementation)
    images, texts, scale = _wide(images, texts, scale)
    learns, alone = torch.is_grad_enabled(), alone or not _many()
    if implementation == "chunked":
        return _Chunked.apply(images, texts, scale, None, chunk, learns, alone)
    with torch.autocast(images.device.type, enabled=False):
        own = _own(images, alone)
        to_texts = scale * images @ _Gather.apply(texts, alone).T
        to_images = scale * texts @ _Gather.apply(images, alone).T
        both = [F.cross_entropy(s, own, reduction="sum") for s in (to_texts, to_images)]
        return (both[0] + both[1]) / 2


def sigmoid_pairs(
    images: Tensor,
    texts: Tensor,
    scale: Tensor,
    bias: Tensor,
    *,
    implementation: Implementation = "chunked",
    chunk: int = CHUNK,
    alone: bool = False,
) -> Tensor:
    """The binary cross-entropy of each image with each text, summed over all of them.

    Args: as for `softmax_pairs`; bias is one number that is added to the scaled similarities.
    Returns: this process's share of the sum; divide by the number of pairs N, as the paper does, not N x N.
    """
    _check(images, texts, implementation)
    images, texts, scale, bias = _wide(images, texts, scale, bias)
    learns, alone = torch.is_grad_enabled(), alone or not _many()
    if implementation == "chunked":
        return _Chunked.apply(images, texts, scale, bias, chunk, learns, alone)
    with torch.autocast(images.device.type, enabled=False):
        logits = scale * images @ _Gather.apply(texts, alone).T + bias
        truth = F.one_hot(_own(images, alone), logits.shape[1]).to(logits.dtype)
        return F.binary_cross_entropy_with_logits(logits, truth, reduction="sum")


class _Chunked(torch.autograd.Function):
    """Both losses, the sigmoid one where there is a bias. The gradient is computed with the value, because
    what both are made of is at hand once; going backward only multiplies it."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        texts: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        chunk: int,
        learns: bool,
        alone: bool,
    ) -> Tensor:
        with torch.autocast(images.device.type, enabled=False):
            everything, own = _gather(texts, alone), _own(images, alone)
            strips = [slice(start, start + chunk) for start in range(0, len(images), chunk)]
            if bias is None:
                pairs = _SoftmaxStrips(images, everything, own, scale, strips, alone)
            else:
                pairs = _SigmoidStrips(images, everything, own, scale, bias)
            loss = images.new_zeros(())
            of_images, of_texts = torch.empty_like(images), torch.zeros_like(everything)
            of_scale, of_bias = torch.zeros_like(scale), torch.zeros_like(scale)
            for strip in strips:
                value, gradient = pairs(strip)  # gradient: of this strip of the scaled similarities
                loss += value
                if not learns:
                    continue
                mixed = gradient @ everything
                of_images[strip] = scale * mixed
                of_scale += (images[strip] * mixed).sum()
                of_bias += gradient.sum()
                of_texts.addmm_(gradient.T, images[strip])
            if learns:
                of_texts = _sum(scale * of_texts, alone)[own]
                ctx.save_for_backward(of_images, of_texts, of_scale, of_bias)
        ctx.biased = bias is not None
        return loss

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, factor: Tensor
    ) -> tuple[Tensor | None, ...]:
        images, texts, scale, bias = (factor * gradient for gradient in ctx.saved_tensors)
        return images, texts, scale, bias if ctx.biased else None, None, None, None


class _SoftmaxStrips:
    """A strip of rows -> its share of the loss, and its gradient (rows, N).

    A first pass over all strips finds what every row and every column adds up to.
    """

    def __init__(
        self,
        images: Tensor,
        texts: Tensor,
        own: Tensor,
        scale: Tensor,
        strips: list[slice],
        alone: bool,
    ) -> None:
        self.images, self.texts, self.own, self.scale = images, texts, own, scale
        rows, columns = [], texts.new_full((len(texts),), -torch.inf)
        for strip in strips:
            similarity = self.similarity(strip)
            rows.append(similarity.logsumexp(1))
            columns = torch.logaddexp(columns, similarity.logsumexp(0))
        self.rows = torch.cat(rows) if rows else texts.new_zeros(0)
        self.columns = _gather(columns[None], alone).logsumexp(0)  # of every process's rows

    def similarity(self, strip: slice) -> Tensor:
        return self.scale * self.images[strip] @ self.texts.T

    def __call__(self, strip: slice) -> tuple[Tensor, Tensor]:
        similarity, rows, own = self.similarity(strip), self.rows[strip], self.own[strip]
        places = torch.arange(len(own), device=own.device)
        value = (rows + self.columns[own]).sum() / 2 - similarity[places, own].sum()
        gradient = (similarity - rows[:, None]).exp_()
        gradient += similarity.sub_(self.columns).exp_()
        gradient /= 2
        gradient[places, own] -= 1
        return value, gradient


class _SigmoidStrips:
    """A strip of rows -> its share of the loss, and its gradient (rows, N)."""

    def __init__(
        self, images: Tensor, texts: Tensor, own: Tensor, scale: Tensor, bias: Tensor
    ) -> None:
        self.images, self.texts, self.own = images, texts, own
        self.scale, self.bias = scale, bias

    def __call__(self, strip: slice) -> tuple[Tensor, Tensor]:
        own = self.own[strip]
        places = torch.arange(len(own), device=own.device)
        logits = (self.scale * self.images[strip] @ self.texts.T).add_(self.bias)
        # -log sigmoid(-x) = softplus(x), and -log sigmoid(x) = softplus(x) - x of the pairs themselves.
        value = F.softplus(logits).sum() - logits[places, own].sum()
        gradient = logits.sigmoid_()
        gradient[places, own] -= 1
        return value, gradient


class _Gather(torch.autograd.Function):
    """(n, D) of this process -> (N, D) of all, by rank; the gradient is added over processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alone: bool) -> Tensor:
        ctx.own, ctx.alone = _own(x, alone), alone
        return _gather(x, alone)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor, None]:
        return _sum(gradient, ctx.alone)[ctx.own], None


def _gather(x: Tensor, alone: bool) -> Tensor:
    """Rows of all processes, who may have different numbers of them."""
    if alone:
        return x
    counts = _counts(x)
    padded = F.pad(x, (0, 0, 0, max(counts) - len(x))).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _own(x: Tensor, alone: bool) -> Tensor:
    """(n,) which rows of all processes' are this one's."""
    before = 0 if alone else sum(_counts(x)[: dist.get_rank()])
    return torch.arange(before, before + len(x), device=x.device)


def _counts(x: Tensor) -> list[int]:
    mine = torch.tensor([len(x)], device=x.device)
    counts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, mine)
    return torch.cat(counts).tolist()


def _sum(x: Tensor, alone: bool) -> Tensor:
    if not alone:
        x = x.contiguous()
        dist.all_reduce(x)
    return x


def _many() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In float32 at least: similarities that are scaled by 100 and exponentiated need it. One number has no
    dimension."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    return tuple(x.to(wide) if x.dim() == 2 else x.to(wide).reshape(()) for x in tensors)


def _check(images: Tensor, texts: Tensor, implementation: str) -> None:
    if implementation not in (known := get_args(Implementation)):
        raise InputError(f"unknown implementation {implementation!r}; there are {', '.join(known)}")
    if images.dim() != 2 or images.shape != texts.shape:
        raise ValueError(
            f"images {tuple(images.shape)} and texts {tuple(texts.shape)} are no pairs; give both as (N, D), "
            "row i of one with row i of the other"
        )
