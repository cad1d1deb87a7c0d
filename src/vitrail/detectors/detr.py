"""DETR (Carion et al., "End-to-End Object Detection with Transformers", ECCV 2020,
https://arxiv.org/abs/2005.12872).

No anchors, no proposals, no suppression of doubles: a transformer reads the backbone's coarsest map, and each
of a hundred learnt queries answers with one box and class, or that there is none. Queries look at each other,
so they agree who answers for what; the losses are those of the cheapest one-to-one pairs (`hungarian.py`).

Unlike the official code: boxes are pixels of the input, clipped to the image, best first; the sum of class
weights and the number of boxes, by which the losses are divided, are those of all processes and parts of a
batch; the backbone's BatchNorms are frozen only where `frozen_norm` says so; any backbone takes the ResNet's
place by its level of stride 32. DC5 is the ResNet's `dilated_c5=True`, whose "c5" of stride 16 is read as it
is.

It takes hundreds of epochs, and does not learn from little data (the paper's own remark):
`deformable_detr.py` does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.boxes import cxcywh_to_xyxy, xyxy_to_cxcywh
from vitrail.detectors.hungarian import (
    Objects,
    Pairs,
    Weights,
    box_losses,
    check_counts,
    class_loss,
    class_weight,
    match,
)
from vitrail.features import Features, FeatureSpec, adapt_levels, level_name
from vitrail.layers.frozen import freeze_norms
from vitrail.layers.position import sine_positions
from vitrail.ops.linear import Linear
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

Sizes = Sequence[tuple[int, int]]
Record = dict[str, Tensor] | None


@dataclass(frozen=True, kw_only=True)
class DETRConfig:
    dim: int = 256
    num_heads: int = 8
    mlp_dim: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_queries: int = 100  # the most objects that an image may have
    dropout: float = 0.1
    pre_norm: bool = False  # norms before attention and MLP, not behind them
    frozen_norm: bool = False  # the backbone's BatchNorms stay as they are loaded
    no_object: float = 0.1  # weight of the class of queries without an object
    box_weight: float = 5.0
    giou_weight: float = 2.0

    def __post_init__(self) -> None:
        check_sizes(self)


class Attention(nn.MultiheadAttention):
    """(B, N, dim) queries, (B, M, dim) keys and values -> (B, N, dim). pad_mask: (B, M), True where nobody
    looks. With `record` the weights (B, heads, N, M) are kept there as "name.weights"."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__(dim, num_heads, dropout, batch_first=True)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        pad_mask: Tensor | None = None,
        record: Record = None,
        name: str = "",
    ) -> Tensor:
        out, weights = super().forward(
            q, k, v, pad_mask, need_weights=record is not None, average_attn_weights=False
        )
        if record is not None and weights is not None:
            record[f"{name}.weights"] = weights
        return out


class Layer(nn.Module):
    """What encoder and decoder layers share: the MLP, and residuals with a norm behind or before them."""

    def __init__(self, dim: int, mlp_dim: int, dropout: float, norms: int, pre_norm: bool) -> None:
        super().__init__()
        self.linear1, self.linear2 = Linear(dim, mlp_dim), Linear(mlp_dim, dim)
        for i in range(1, norms + 1):
            setattr(self, f"norm{i}", nn.LayerNorm(dim))
        self.dropout = nn.Dropout(dropout)
        self.pre_norm = pre_norm

    def add(self, x: Tensor, norm: int, branch: Callable[[Tensor], Tensor]) -> Tensor:
        normed = getattr(self, f"norm{norm}")
        if self.pre_norm:
            return x + self.dropout(branch(normed(x)))
        return normed(x + self.dropout(branch(x)))

    def mlp(self, x: Tensor) -> Tensor:
        return self.linear2(self.dropout(F.relu(self.linear1(x))))


class EncoderLayer(Layer):
    """Cells look at cells. (B, N, dim) -> same."""

    def __init__(self, config: DETRConfig) -> None:
        super().__init__(config.dim, config.mlp_dim, config.dropout, 2, config.pre_norm)
        self.self_attn = Attention(config.dim, config.num_heads, config.dropout)

    def forward(
        self, x: Tensor, positions: Tensor, pad_mask: Tensor | None, record: Record, name: str
    ) -> Tensor:
        def look(y: Tensor) -> Tensor:
            at = y + positions
            return self.self_attn(at, at, y, pad_mask, record, f"{name}.self_attn")

        return self.add(self.add(x, 1, look), 2, self.mlp)


class DecoderLayer(Layer):
    """Queries look at each other, then at the cells. (B, Q, dim) -> same."""

    def __init__(self, config: DETRConfig) -> None:
        super().__init__(config.dim, config.mlp_dim, config.dropout, 3, config.pre_norm)
        self.self_attn = Attention(config.dim, config.num_heads, config.dropout)
        self.multihead_attn = Attention(config.dim, config.num_heads, config.dropout)

    def forward(
        self,
        x: Tensor,
        queries: Tensor,
        memory: Tensor,
        positions: Tensor,
        pad_mask: Tensor | None,
        record: Record,
        name: str,
    ) -> Tensor:
        def agree(y: Tensor) -> Tensor:
            at = y + queries
            return self.self_attn(at, at, y, None, record, f"{name}.self_attn")

        def look(y: Tensor) -> Tensor:
            keys, where = memory + positions, f"{name}.multihead_attn"
            return self.multihead_attn(y + queries, keys, memory, pad_mask, record, where)

        x = self.add(self.add(x, 1, agree), 2, look)
        return self.add(x, 3, self.mlp)


class Layers(nn.Module):
    """norm: behind the encoder of the pre-norm form, and behind what every decoder layer gives out, though
    not on the way to the next."""

    def __init__(self, layers: Sequence[nn.Module], norm: nn.Module | None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = norm


class Transformer(nn.Module):
    def __init__(self, config: DETRConfig) -> None:
        super().__init__()
        dim = config.dim
        first = [EncoderLayer(config) for _ in range(config.encoder_layers)]
        self.encoder = Layers(first, nn.LayerNorm(dim) if config.pre_norm else None)
        second = [DecoderLayer(config) for _ in range(config.decoder_layers)]
        self.decoder = Layers(second, nn.LayerNorm(dim))
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(
        self,
        x: Tensor,
        queries: Tensor,
        positions: Tensor,
        pad_mask: Tensor | None = None,
        record: Record = None,
    ) -> Tensor:
        """Cells (B, N, dim) at `positions` (B, N, dim), queries (B, Q, dim) -> of each decoder layer
        (L, B, Q, dim). pad_mask: (B, N), True for cells that are none: they change nothing."""
        memory = self.encode(x, positions, pad_mask, record)
        return self.decode(memory, queries, positions, pad_mask, record)

    def encode(
        self,
        x: Tensor,
        positions: Tensor,
        pad_mask: Tensor | None = None,
        record: Record = None,
    ) -> Tensor:
        """Cells that have looked at each other, (B, N, dim)."""
        for i, layer in enumerate(self.encoder.layers):
            x = layer(x, positions, pad_mask, record, f"encoder.layers.{i}")
        return x if self.encoder.norm is None else self.encoder.norm(x)

    def decode(
        self,
        memory: Tensor,
        queries: Tensor,
        positions: Tensor,
        pad_mask: Tensor | None = None,
        record: Record = None,
    ) -> Tensor:
        """What each layer makes of the queries, (L, B, Q, dim)."""
        y, out = torch.zeros_like(queries), []
        for i, layer in enumerate(self.decoder.layers):
            y = layer(y, queries, memory, positions, pad_mask, record, f"decoder.layers.{i}")
            assert self.decoder.norm is not None
            out.append(self.decoder.norm(y))
        return torch.stack(out)


class BoxHead(nn.Module):
    """Three linear layers: (..., dim) -> (..., 4), before the sigmoid."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(dim, dim), nn.Linear(dim, dim), nn.Linear(dim, 4)])

    def start(self, size: float) -> None:
        """Answer the same of all: no shift, and this logarithm of width and height."""
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        nn.init.constant_(last.bias[2:], size)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x)


class DETR(nn.Module):
    """images (B, 3, H, W) -> boxes, classes and scores of the queries.

    Labels are indices into `classes`. Boxes are xyxy in pixels of the input.
    """

    task = "detect"
    has_masks = False
    # For loading: see weights.layouts.other_classes.
    class_rows: Mapping[str, tuple[int, int]] = {"class_embed": (1, 1), "query_embed": (0, 0)}
    # Attached by models.create_model and load:
    info: Any
    weights_report: Any
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def __init__(self, backbone: Any, config: DETRConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.backbone = freeze_norms(backbone) if config.frozen_norm else backbone
        self.levels = LevelsAsNamed(backbone.feature_specs, (32,))
        (spec,) = self.levels.feature_specs.values()
        self.input_proj = nn.Conv2d(spec.channels, config.dim, 1)
        self.transformer = Transformer(config)
        self.query_embed = nn.Embedding(config.num_queries, config.dim)
        self.class_embed = nn.Linear(config.dim, num_classes + 1)
        self.bbox_embed = BoxHead(config.dim)

    def forward(self, images: Tensor, *, sizes: Sizes | None = None) -> list[dict[str, Tensor]]:
        """Of each image "boxes" (Q, 4), "labels" (Q,) and "scores" (Q,), best first."""
        return listed(self.forward_tensors(images, sizes=sizes))

    def forward_tensors(
        self, images: Tensor, record: Record = None, *, sizes: Sizes | None = None
    ) -> dict[str, Tensor]:
        """What is found: every query's best class, best first.

        sizes: (height, width) of each image in a padded batch.
        record: takes "encoder.layers.I.self_attn.weights" (B, heads, h * w, h * w) and
            "decoder.layers.I.multihead_attn.weights" (B, heads, Q, h * w), over the cells of the map by rows,
            "decoder.layers.I.self_attn.weights" (B, heads, Q, Q), "cells" (2,), its h and w, and "queries"
            (B, Q), the query of every answer.

        Returns: "boxes" (B, Q, 4), "scores" (B, Q), "labels" (B, Q) int64, "count" (B,) int64, always Q.
        """
        logits, boxes = self.heads(self.decoded(images, sizes, record)[-1:])
        scores, labels = logits[-1].softmax(-1)[..., :-1].max(-1)
        scores, order = best_first(scores)
        if record is not None:
            record["queries"] = order
        found = in_pixels(boxes[-1], images, sizes)
        return {
            "boxes": found.gather(1, order[..., None].expand(-1, -1, 4)),
            "scores": scores,
            "labels": labels.gather(1, order),
            "count": torch.full_like(order[:, 0], self.config.num_queries),
        }

    def decoded(self, images: Tensor, sizes: Sizes | None = None, record: Record = None) -> Tensor:
        """What each decoder layer makes of the queries, (L, B, Q, dim)."""
        return self.read(self.backbone(images), images, sizes, record).decoded

    def read(
        self, features: Features, images: Tensor, sizes: Sizes | None, record: Record = None
    ) -> "Read":
        """What the transformer makes of the backbone's features of the images."""
        (x,) = self.levels(features).values()
        x = self.input_proj(x)
        keep = kept_cells(images, sizes, x)
        positions = sine_positions(keep, self.config.dim, dtype=x.dtype).flatten(1, 2)
        if record is not None:
            record["cells"] = torch.tensor(x.shape[2:])
        queries = self.query_embed.weight.expand(x.shape[0], -1, -1)
        pad_mask = None if sizes is None else ~keep.flatten(1)
        cells = x.flatten(2).transpose(1, 2)
        memory = self.transformer.encode(cells, positions, pad_mask, record)
        decoded = self.transformer.decode(memory, queries, positions, pad_mask, record)
        return Read(x, memory.transpose(1, 2).unflatten(2, x.shape[2:]), keep, decoded)

    def heads(self, decoded: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (L, B, Q, K + 1), the last for no object, and boxes (L, B, Q, 4) cxcywh, relative to the
        image."""
        logits, boxes = self.class_embed(decoded), self.bbox_embed(decoded)
        dtype = torch.promote_types(boxes.dtype, torch.float32)
        return logits.to(dtype), boxes.to(dtype).sigmoid()

    def losses(
        self, images: Tensor, targets: Sequence[Mapping[str, Tensor]], *, sizes: Sizes | None = None
    ) -> dict[str, Tensor]:
        """The paper's losses of every decoder layer, as sums: cross-entropy over the queries ("class.0"), L1
        ("box.0") and 1 - GIoU ("giou.0") over the boxes. Each over its own of `weight(targets)` is the
        reference's, times its weight: the loss is their sum.

        targets: of each image "boxes" (n, 4) xyxy in pixels, "labels" (n,); n may be 0. sizes: (height,
            width) of each image in a padded batch.
        """
        logits, boxes = self.heads(self.decoded(images, sizes))
        return self.losses_of(logits, boxes, objects_of(images, targets, sizes))

    def matched(self, logits: Tensor, boxes: Tensor, objects: Objects) -> list[Pairs]:
        """Of each layer, which query stands for which object."""
        check_counts(objects.counts, logits.shape[2])
        weights = Weights(box=self.config.box_weight, giou=self.config.giou_weight)
        return match([-layer.softmax(-1) for layer in logits], list(boxes), objects, weights)

    def losses_of(
        self,
        logits: Tensor,
        boxes: Tensor,
        objects: Objects,
        pairs: Sequence[Pairs] | None = None,
    ) -> dict[str, Tensor]:
        """`losses` of what `heads` gave. pairs: of `matched`, where they are known."""
        config, out = self.config, {}
        for i, own in enumerate(pairs or self.matched(logits, boxes, objects)):
            apart, overlap = box_losses(boxes[i], own, objects)
            out[f"class.{i}"] = class_loss(logits[i], own, objects, config.no_object)
            out[f"box.{i}"] = config.box_weight * apart
            out[f"giou.{i}"] = config.giou_weight * overlap
        return out

    def weight(self, targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """What `losses` are divided by, one after the other, (3 * layers,): for each layer the class weights
        of all queries, summed, and twice the number of boxes."""
        counts, config = [len(target["labels"]) for target in targets], self.config
        check_counts(counts, config.num_queries)
        boxes = sum(counts)
        classes = class_weight(boxes, len(targets), config.num_queries, config.no_object)
        return torch.tensor([classes, boxes, boxes] * config.decoder_layers, dtype=torch.float64)


class Read(NamedTuple):
    """What DETR makes of an image: its cells (B, dim, h, w) before and behind the encoder (`memory`), which
    of them are no padding (`keep`, (B, h, w)), and what each decoder layer makes of the queries,
    (L, B, Q, dim)."""

    x: Tensor
    memory: Tensor
    keep: Tensor
    decoded: Tensor


class LevelsAsNamed(nn.Module):
    """A backbone's maps of these strides, by name where it has them all: a dilated "c5" of stride 16 stays
    one; else resampled (`adapt_levels`)."""

    def __init__(self, specs: Mapping[str, FeatureSpec], strides: Sequence[int]) -> None:
        super().__init__()
        self.names = [level_name(stride) for stride in strides]
        named = all(name in specs for name in self.names)
        self.adapt = None if named else adapt_levels(specs, strides)
        given = specs if self.adapt is None else self.adapt.feature_specs
        self.feature_specs = {name: given[name] for name in self.names}

    def forward(self, features: Features) -> dict[str, Tensor]:
        maps = features.maps if self.adapt is None else self.adapt(features)
        return {name: maps[name] for name in self.names}


def check_sizes(config: Any) -> None:
    """Raise InputError for a config of which no transformer can be built."""
    if config.dim % 4 or config.dim % config.num_heads:
        raise InputError(
            f"dim is {config.dim}, but must be a multiple of 4 (sines and cosines of two axes) and of the "
            f"{config.num_heads} heads"
        )
    for field in fields(config):
        value = getattr(config, field.name)
        if type(value) is int and value < 1:
            raise InputError(f"{field.name} is {value}, but must be at least 1")


def kept_cells(images: Tensor, sizes: Sizes | None, x: Tensor) -> Tensor:
    """(B, h, w) of a map `x` (B, C, h, w): False where a cell's first pixel is padding."""
    height, width = x.shape[-2:]
    if sizes is None:
        return torch.ones_like(x[:, 0], dtype=torch.bool)
    own = torch.tensor(sizes, device=x.device)[:, :, None]  # (B, 2, 1)
    rows = torch.arange(height, device=x.device) * images.shape[-2] // height
    columns = torch.arange(width, device=x.device) * images.shape[-1] // width
    return (rows < own[:, 0])[:, :, None] & (columns < own[:, 1])[:, None]


def objects_of(
    images: Tensor, targets: Sequence[Mapping[str, Tensor]], sizes: Sizes | None
) -> Objects:
    """Targets in pixels, relative to their images."""
    height, width = images.shape[-2:]
    boxes = []
    for target, (h, w) in zip(targets, sizes or [(height, width)] * len(images), strict=True):
        own = target["boxes"].to(torch.promote_types(images.dtype, torch.float32))
        boxes.append(xyxy_to_cxcywh(own) / own.new_tensor([w, h, w, h]))
    return Objects([target["labels"] for target in targets], boxes)


def best_first(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (B, Q) from the highest to the lowest, and the places (B, Q) they had; of equal ones the first
    comes first, NaN before all.

    That is `sort(descending=True, stable=True)`, which ONNX cannot say: here the place of each is counted.
    """
    known = torch.where(scores.isnan(), torch.inf, scores)
    mine, other = known[:, :, None], known[:, None]
    place = torch.arange(scores.shape[1], device=scores.device)
    before = (other > mine) | ((other == mine) & (place < place[:, None]))
    rank = before.sum(2)
    order = torch.zeros_like(rank).scatter(1, rank, place.expand_as(rank))
    return scores.gather(1, order), order


def in_pixels(boxes: Tensor, images: Tensor, sizes: Sizes | None) -> Tensor:
    """(B, N, 4) cxcywh, relative to the images -> xyxy in pixels, clipped to them."""
    height, width = images.shape[-2:]
    if sizes is not None:
        height, width = boxes.new_tensor(sizes).T[..., None]  # (B, 1) each
    x1, y1, x2, y2 = cxcywh_to_xyxy(boxes).clamp(0, 1).unbind(-1)
    return torch.stack((x1 * width, y1 * height, x2 * width, y2 * height), -1)


def listed(found: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """`forward_tensors`, image by image, without the rows behind the count."""
    counts = found.pop("count").tolist()
    return [{k: v[i, :n] for k, v in found.items()} for i, n in enumerate(counts)]
