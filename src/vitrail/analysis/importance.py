"""Which channels matter: Taylor importance by stage and by Q, K, V and FFN.

To remove a weight w changes the loss by about gradient x w (Molchanov et al., "Pruning Convolutional Neural
Networks for Resource Efficient Inference", ICLR 2017, https://arxiv.org/abs/1611.06440, equation 7, and
"Importance Estimation for Neural Network Pruning", CVPR 2019, https://arxiv.org/abs/1906.10771). EfficientViT
(Liu et al., CVPR 2023, https://arxiv.org/abs/2305.07027, section 2.3) so found which parts of a transformer
are wider than they need to be: queries, keys and the hidden layers of FFNs shrank, values stayed.

What can be made slimmer (`prune`) is weighed: the ViT family and EfficientViT, whose configs have fields for
the widths of queries and FFNs. `slices` is the one place to add another; the others are refused.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.backbones.efficientvit import FFN, CascadedGroupAttention, EfficientViT
from vitrail.backbones.vit import Attention, SwiGLU, ViT
from vitrail.layers.mlp import Mlp
from vitrail.modes import eval_mode
from vitrail_runtime.errors import InputError

Part = Literal["Q", "K", "V", "FFN"]
QKV: tuple[Part, Part, Part] = ("Q", "K", "V")
PARTS: tuple[Part, ...] = (*QKV, "FFN")


@dataclass(frozen=True)
class Rows:
    """Channels of one tensor: entries `start` to `start + count` along `dim` of parameter or buffer `key`."""

    key: str
    start: int
    count: int
    dim: int = 0


@dataclass(frozen=True)
class Slice:
    """`count` channels of one part of one layer, which one head (or one FFN) reads.

    made_by: where each channel's own weights stand; importance is summed over them. read_by: where the next
    layer reads it, which goes when the channel goes.
    """

    name: str  # "blocks.3.attn.heads.1.Q"
    stage: int
    part: Part
    count: int
    made_by: tuple[Rows, ...]
    read_by: tuple[Rows, ...] = ()
    gain: tuple[Rows, ...] = ()  # to multiply these multiplies the channels


@dataclass(frozen=True)
class Importance:
    """Taylor importance of every channel: scores[i] (count,) belongs to slices[i]."""

    slices: tuple[Slice, ...]
    scores: tuple[Tensor, ...]
    images: int

    def of(self, stage: int, part: Part) -> Tensor:
        """The scores of a stage's channels of one part, all layers one after another."""
        found = [
            s
            for a, s in zip(self.slices, self.scores, strict=True)
            if (a.stage, a.part) == (stage, part)
        ]
        return torch.cat(found) if found else torch.empty(0)

    @property
    def stages(self) -> list[int]:
        return sorted({a.stage for a in self.slices})

    def share_for(self, stage: int, part: Part, of_total: float = 0.9) -> float:
        """The smallest share of the channels that holds `of_total` of the importance: near `of_total` when
        all matter alike, small when few do."""
        scores = self.of(stage, part).sort(descending=True).values
        if not scores.numel() or not scores.sum() > 0:
            return 0.0
        needed = int((scores.cumsum(0) < of_total * scores.sum()).sum()) + 1
        return min(needed, len(scores)) / len(scores)


def importance(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Importance:
    """|gradient x weight|, summed over each channel's own weights, the mean over batches.

    batches: (images (B, 3, H, W), labels (B,)) of data the model was trained for. The model stays as it is:
        it runs in eval mode, and no gradient is left behind.
    Raises InputError for a family whose channels are not known, without images, and where no gradient
        reaches the channels, as in a classifier that was never trained.
    """
    backbone: Any = model.backbone
    parts = tuple(slices(backbone))
    weights = {k: v for k, v in backbone.named_parameters() if v.is_floating_point()}
    wanted = {rows.key for a in parts for rows in a.made_by} & weights.keys()
    asked = {k: weights[k] for k in sorted(wanted)}
    frozen = [v for v in asked.values() if not v.requires_grad]
    scores = [torch.zeros(a.count, dtype=torch.float64) for a in parts]
    images = steps = 0
    try:
        for v in frozen:
            v.requires_grad_(True)
        with eval_mode(model), torch.enable_grad():
            for x, labels in batches:
                value = loss(model(x), labels)
                found = torch.autograd.grad(value, list(asked.values()), allow_unused=True)
                terms = {
                    k: (torch.zeros_like(v) if g is None else g * v.detach()).abs()
                    for (k, v), g in zip(asked.items(), found, strict=True)
                }
                for a, score in zip(parts, scores, strict=True):
                    for rows in a.made_by:
                        if rows.key in terms:  # running statistics have no gradient
                            score += _per_channel(terms[rows.key], rows).double().cpu()
                images, steps = images + len(x), steps + 1
    finally:
        for v in frozen:
            v.requires_grad_(False)
    if not steps:
        raise InputError("importance is measured on labelled images, but there are none")
    if not any(bool(s.any()) for s in scores):
        raise InputError(
            "no gradient reaches the channels of this model: its classifier or its blocks still stand at "
            "their zero start; importance is that of a trained model"
        )
    return Importance(parts, tuple((s / steps).float() for s in scores), images)


def slices(backbone: nn.Module) -> Iterator[Slice]:
    """The channels of a backbone that can be weighed, layer by layer.

    Raises InputError for a family whose channels are not known.
    """
    if not isinstance(backbone, (ViT, EfficientViT)):
        raise InputError(
            f"{type(backbone).__name__} cannot be made slimmer: its config has no fields for the widths of "
            "queries and FFNs; take the ViT family (vit, deit, dinov2, deepvit, hybrids) or efficientvit"
        )
    for name, module in backbone.named_modules():
        for kind, make in SLICED.items():
            if isinstance(module, kind):
                yield from make(name, module)
                break


def _attention(name: str, attn: Attention) -> Iterator[Slice]:
    # Rows of the one projection: queries of all heads, then keys, then values.
    own = [f"{name}.qkv.weight"] + ([] if attn.qkv.bias is None else [f"{name}.qkv.bias"])
    start = 0
    for part, width in zip(QKV, attn.widths, strict=True):
        count = width // attn.num_heads
        for head in range(attn.num_heads):
            made = tuple(Rows(key, start + head * count, count) for key in own)
            read = (Rows(f"{name}.proj.weight", head * count, count, 1),) if part == "V" else ()
            yield Slice(f"{name}.heads.{head}.{part}", 0, part, count, made, read, made)
        start += width


def _mlp(name: str, mlp: Mlp | SwiGLU) -> Iterator[Slice]:
    count = mlp.fc2.weight.shape[1]
    halves = (0, count) if isinstance(mlp, SwiGLU) else (0,)  # gates, then values
    own = [f"{name}.fc1.weight", f"{name}.fc1.bias"]
    made = tuple(Rows(key, start, count) for start in halves for key in own)
    read = (Rows(f"{name}.fc2.weight", 0, count, 1),)
    yield Slice(f"{name}.FFN", 0, "FFN", count, made, read)  # a plain ViT has one stage


def _cascaded(name: str, attn: CascadedGroupAttention) -> Iterator[Slice]:
    stage, heads = int(name.split(".")[1]), len(attn.qkvs)
    dim = attn.proj.conv.in_channels // heads  # of a head's values
    for head in range(heads):
        qkv, dw = f"{name}.qkvs.{head}", f"{name}.dws.{head}"
        start = 0
        for part, count in zip(QKV, (attn.key_dim, attn.key_dim, dim), strict=True):
            made, last = _normed(qkv, start, count), (qkv, start)
            read: tuple[Rows, ...] = ()
            if part == "Q":  # its token interaction is each channel's own
                made, last = made + _normed(dw, 0, count), (dw, 0)
            elif part == "V":
                read = (Rows(f"{name}.proj.conv.weight", head * dim, dim, 1),)
            gain = tuple(
                Rows(f"{last[0]}.bn.{leaf}", last[1], count) for leaf in ("weight", "bias")
            )
            yield Slice(f"{name}.heads.{head}.{part}", stage, part, count, made, read, gain)
            start += count


def _ffn(name: str, ffn: FFN) -> Iterator[Slice]:
    parts = name.split(".")
    # The first of a subsampling block works on the channels of the stage before.
    stage = int(parts[1]) - (parts[2:] == ["downsample", "ffn0"])
    count = ffn.pw1.conv.out_channels
    read = (Rows(f"{name}.pw2.conv.weight", 0, count, 1),)
    yield Slice(f"{name}.FFN", stage, "FFN", count, _normed(f"{name}.pw1", 0, count), read)


SLICED: dict[type[nn.Module], Callable[[str, Any], Iterator[Slice]]] = {
    Attention: _attention,
    CascadedGroupAttention: _cascaded,
    Mlp: _mlp,
    SwiGLU: _mlp,
    FFN: _ffn,
}


def _normed(name: str, start: int, count: int) -> tuple[Rows, ...]:
    """Output channels of a convolution and its BatchNorm."""
    leaves = ("conv.weight", "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")
    return tuple(Rows(f"{name}.{leaf}", start, count) for leaf in leaves)


def _per_channel(terms: Tensor, rows: Rows) -> Tensor:
    part = terms.narrow(rows.dim, rows.start, rows.count)
    return part.transpose(0, rows.dim).flatten(1).sum(1) if part.ndim > 1 else part
