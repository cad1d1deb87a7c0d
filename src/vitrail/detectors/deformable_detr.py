"""Deformable DETR (Zhu et al., "Deformable DETR: Deformable Transformers for End-to-End Object Detection",
ICLR 2021, https://arxiv.org/abs/2010.04159).

DETR's queries look at every cell of one coarse map, and take hundreds of epochs to learn where to look. Here
each reads a few points around a place of its own, on maps of several strides, so a tenth of the epochs is
enough and small objects are found. Two variants build on each other: `refine`, each decoder layer moves the
boxes of the one before; and `two_stage`, queries begin at the best boxes that the encoder's cells propose.

Unlike the official code: boxes are pixels of the input, clipped to the image; the number of boxes, by which
the losses are divided, is that of all processes and parts of a batch; the backbone's BatchNorms are frozen
only where `frozen_norm` says so; any backbone takes the ResNet's place by its levels of stride 8, 16 and 32;
points and reference points learn at the rate of all else, not at a tenth of it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.detectors.detr import (
    Attention,
    BoxHead,
    Layer,
    Layers,
    LevelsAsNamed,
    Record,
    Sizes,
    check_sizes,
    in_pixels,
    kept_cells,
    listed,
    objects_of,
)
from vitrail.detectors.hungarian import (
    Objects,
    Pairs,
    Weights,
    box_losses,
    check_counts,
    match,
)
from vitrail.layers.frozen import freeze_norms
from vitrail.layers.position import sine_positions, sines
from vitrail.ops.linear import Linear
from vitrail.ops.ms_deform_attn import MSDeformAttn
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

Shapes = list[tuple[int, int]]
ALPHA, GAMMA = 0.25, 2.0  # of the focal loss (Lin et al., ICCV 2017)
GROUPS = 32  # of the norms behind the projections


@dataclass(frozen=True, kw_only=True)
class DeformableDETRConfig:
    dim: int = 256
    num_heads: int = 8
    mlp_dim: int = 1024
    encoder_layers: int = 6
    decoder_layers: int = 6
    num_queries: int = 300  # the most objects that an image may have
    num_levels: int = 4  # strides 8, 16, 32, and from there twice the one before; one: 32
    encoder_points: int = 4  # of each head on each level
    decoder_points: int = 4
    refine: bool = False  # each decoder layer moves the boxes of the one before
    two_stage: bool = False  # queries begin at the encoder's proposals; needs `refine`
    dropout: float = 0.1
    frozen_norm: bool = False  # the backbone's BatchNorms stay as they are loaded
    class_weight: float = 2.0
    box_weight: float = 5.0
    giou_weight: float = 2.0
    detections: int = 100

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.dim % GROUPS or self.dim < 2 * GROUPS:  # of a single cell one channel has no spread
            raise InputError(
                f"dim is {self.dim}, but must be a multiple of {GROUPS}, the groups of its norms, and at "
                f"least {2 * GROUPS}"
            )
        if self.two_stage and not self.refine:
            raise InputError("two_stage gives queries boxes to refine; it needs refine=True")


class EncoderLayer(Layer):
    """Cells read points around themselves on all levels. (B, S, dim) -> same."""

    def __init__(self, config: DeformableDETRConfig) -> None:
        super().__init__(config.dim, config.mlp_dim, config.dropout, 2, pre_norm=False)
        points = (config.num_levels, config.encoder_points)
        self.self_attn = MSDeformAttn(config.dim, config.num_heads, *points)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        reference: Tensor,
        cells: "Cells",
        record: Record,
        name: str,
    ) -> Tensor:
        def look(y: Tensor) -> Tensor:
            where = (reference, y, cells.shapes, cells.pad_mask, record, f"{name}.self_attn")
            return self.self_attn(y + positions, *where)

        return self.add(self.add(x, 1, look), 2, self.mlp)


class DecoderLayer(Layer):
    """Queries look at each other, then read points around their places. (B, Q, dim) -> same."""

    def __init__(self, config: DeformableDETRConfig) -> None:
        super().__init__(config.dim, config.mlp_dim, config.dropout, 3, pre_norm=False)
        points = (config.num_levels, config.decoder_points)
        self.cross_attn = MSDeformAttn(config.dim, config.num_heads, *points)
        self.self_attn = Attention(config.dim, config.num_heads, config.dropout)

    def forward(
        self,
        x: Tensor,
        queries: Tensor,
        reference: Tensor,
        memory: Tensor,
        cells: "Cells",
        record: Record,
        name: str,
    ) -> Tensor:
        def agree(y: Tensor) -> Tensor:
            at = y + queries
            return self.self_attn(at, at, y, None, record, f"{name}.self_attn")

        def look(y: Tensor) -> Tensor:
            where = (reference, memory, cells.shapes, cells.pad_mask, record, f"{name}.cross_attn")
            return self.cross_attn(y + queries, *where)

        x = self.add(self.add(x, 2, agree), 1, look)  # the official file's numbers of the norms
        return self.add(x, 3, self.mlp)


class Cells(NamedTuple):
    """Where the cells of all levels lie, S of them, one level after the other.

    shapes: (h, w) of each level. pad_mask: (B, S), True for padding, or None. kept: (B, L, 2), which share of
    each map's width and height is image.
    """

    shapes: Shapes
    pad_mask: Tensor | None
    kept: Tensor

    def centres(self) -> Tensor:
        """(B, S, 2) as (x, y), relative to the image; of cells in padding beyond 1."""
        out = []
        for (height, width), kept in zip(self.shapes, self.kept.unbind(1), strict=True):
            y = (torch.arange(height, device=kept.device, dtype=kept.dtype) + 0.5) / height
            x = (torch.arange(width, device=kept.device, dtype=kept.dtype) + 0.5) / width
            grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)
            out.append(grid / kept[:, None])
        return torch.cat(out, 1)

    def on_maps(self, places: Tensor) -> Tensor:
        """Points or boxes (B, N, 2 or 4) relative to the images -> (B, N, L, 2 or 4) to the maps."""
        return places[:, :, None] * self.kept.repeat(1, 1, places.shape[2] // 2)[:, None]


class Transformer(nn.Module):
    def __init__(self, config: DeformableDETRConfig) -> None:
        super().__init__()
        dim = config.dim
        self.encoder = Layers([EncoderLayer(config) for _ in range(config.encoder_layers)], None)
        self.decoder = Layers([DecoderLayer(config) for _ in range(config.decoder_layers)], None)
        self.level_embed = nn.Parameter(torch.empty(config.num_levels, dim))
        self.two_stage = config.two_stage
        if config.two_stage:
            self.enc_output, self.enc_output_norm = Linear(dim, dim), nn.LayerNorm(dim)
            self.pos_trans = Linear(2 * dim, 2 * dim)
            self.pos_trans_norm = nn.LayerNorm(2 * dim)
        else:
            self.reference_points = Linear(dim, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        nn.init.normal_(self.level_embed)
        if not self.two_stage:
            nn.init.zeros_(self.reference_points.bias)

    def encode(self, x: Tensor, positions: Tensor, cells: Cells, record: Record) -> Tensor:
        """Cells of all levels (B, S, dim) -> same."""
        reference = cells.on_maps(cells.centres())
        for i, layer in enumerate(self.encoder.layers):
            x = layer(x, positions, reference, cells, record, f"encoder.layers.{i}")
        return x


class Found(NamedTuple):
    """What the decoder layers say, one after the other: logits (B, Q, K) of classes, each yes or no, and
    boxes (B, Q, 4) cxcywh, relative to the image. proposals: the same of the encoder's cells, where they
    propose."""

    logits: list[Tensor]
    boxes: list[Tensor]
    proposals: tuple[Tensor, Tensor] | None


class DeformableDETR(nn.Module):
    """images (B, 3, H, W) -> boxes, classes and scores.

    Labels are indices into `classes`. Boxes are xyxy in pixels of the input.
    """

    task = "detect"
    has_masks = False
    class_rows: Mapping[str, tuple[int, int]] = {"query_embed": (0, 0)}
    # Attached by models.create_model and load:
    info: Any
    weights_report: Any
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def __init__(self, backbone: Any, config: DeformableDETRConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.backbone = freeze_norms(backbone) if config.frozen_norm else backbone
        strides = (8, 16, 32)[-min(config.num_levels, 3) :]
        self.levels = LevelsAsNamed(backbone.feature_specs, strides)
        dims = [spec.channels for spec in self.levels.feature_specs.values()]
        self.input_proj = nn.ModuleList(_projection(dim, config.dim, 1) for dim in dims)
        for i in range(config.num_levels - len(strides)):
            self.input_proj.append(_projection(config.dim if i else dims[-1], config.dim, 3))
        self.transformer = Transformer(config)
        if not config.two_stage:  # the place of each query and what it begins with
            self.query_embed = nn.Embedding(config.num_queries, 2 * config.dim)
        # One pair of heads for all layers, or one of each layer and one behind them for the proposals.
        heads = config.decoder_layers + config.two_stage if config.refine else 1
        classes = [nn.Linear(config.dim, num_classes) for _ in range(heads)]
        boxes = [BoxHead(config.dim) for _ in range(heads)]
        for one in classes:
            nn.init.constant_(one.bias, -math.log(99))  # a score of 0.01: most are no object
        for i, one in enumerate(boxes):  # where the queries are, small ones at first
            one.start(size=-2.0 if i == 0 and not config.two_stage else 0.0)
        self.class_embed, self.bbox_embed = nn.ModuleList(classes), nn.ModuleList(boxes)

    def forward(self, images: Tensor, *, sizes: Sizes | None = None) -> list[dict[str, Tensor]]:
        """Of each image "boxes" (n, 4), "labels" (n,) and "scores" (n,), best first."""
        return listed(self.forward_tensors(images, sizes=sizes))

    def forward_tensors(
        self, images: Tensor, record: Record = None, *, sizes: Sizes | None = None
    ) -> dict[str, Tensor]:
        """What is found, the D = `detections` highest scores of any query and class, best first.

        sizes: (height, width) of each image in a padded batch.
        record: takes what is read, "encoder.layers.I.self_attn" and "decoder.layers.I.cross_attn" with
            ".locations" (B, N, heads, L, P, 2) as (x, y) from 0 to 1 over the maps, and ".weights" (B, N,
            heads, L, P); "decoder.layers.I.self_attn.weights" (B, heads, Q, Q); "cells" (L, 2), height and
            width of each level; and "queries" (B, D), the query of every answer.

        Returns: "boxes" (B, D, 4), "scores" (B, D), "labels" (B, D) int64, "count" (B,) int64, which is D.
        """
        found = self.answers(images, sizes, record)
        logits, boxes = found.logits[-1], in_pixels(found.boxes[-1], images, sizes)
        rows = min(self.config.detections, self.config.num_queries * self.num_classes)
        scores, best = logits.sigmoid().flatten(1).topk(rows, 1)
        query = best // self.num_classes
        if record is not None:
            record["queries"] = query
        return {
            "boxes": boxes.gather(1, query[..., None].expand(-1, -1, 4)),
            "scores": scores,
            "labels": best % self.num_classes,
            "count": torch.full_like(best[:, 0], rows),
        }

    def answers(self, images: Tensor, sizes: Sizes | None = None, record: Record = None) -> Found:
        """What every decoder layer, and the encoder where it proposes, says of the images."""
        x, positions, cells = self.cells(images, sizes)
        if record is not None:
            record["cells"] = torch.tensor(cells.shapes)
        memory = self.transformer.encode(x, positions, cells, record)
        proposals = None
        if self.config.two_stage:
            logits, ends = self._propose(memory, cells)
            proposals = (logits, ends.sigmoid())
            queries, y, reference = self._begin(logits, ends)
        else:
            queries, y = self.query_embed.weight.expand(x.shape[0], -1, -1).chunk(2, 2)
            reference = _wide(self.transformer.reference_points(queries)).sigmoid()
        every: tuple[list[Tensor], list[Tensor]] = ([], [])
        for i, layer in enumerate(self.transformer.decoder.layers):
            name = f"decoder.layers.{i}"
            y = layer(y, queries, cells.on_maps(reference), memory, cells, record, name)
            head = i if self.config.refine else 0
            moved = _wide(self.bbox_embed[head](y))
            start = inverse_sigmoid(reference)
            boxes = (moved + F.pad(start, (0, 4 - start.shape[-1]))).sigmoid()
            every[0].append(_wide(self.class_embed[head](y)))
            every[1].append(boxes)
            if self.config.refine:
                reference = boxes.detach()
        return Found(*every, proposals)

    def cells(self, images: Tensor, sizes: Sizes | None) -> tuple[Tensor, Tensor, Cells]:
        """The cells of all levels (B, S, dim), their positions (B, S, dim), and where they lie."""
        maps = list(self.levels(self.backbone(images)).values())
        projected = [project(x) for project, x in zip(self.input_proj, maps, strict=False)]
        for i, project in enumerate(self.input_proj[len(maps) :]):
            projected.append(project(projected[-1] if i else maps[-1]))
        keeps = [kept_cells(images, sizes, x) for x in projected]
        dtype, positions, shares = projected[0].dtype, [], []
        for level, keep in zip(self.transformer.level_embed, keeps, strict=True):
            own = sine_positions(keep, self.config.dim, dtype=dtype, offset=-0.5)
            positions.append(own.flatten(1, 2) + level)
            kept = _wide(keep.to(dtype))
            shares.append(torch.stack((kept[:, 0].mean(1), kept[:, :, 0].mean(1)), 1))
        shapes = [(x.shape[2], x.shape[3]) for x in projected]
        pad_mask = None if sizes is None else ~torch.cat([k.flatten(1) for k in keeps], 1)
        x = torch.cat([x.flatten(2).transpose(1, 2) for x in projected], 1)
        return x, torch.cat(positions, 1), Cells(shapes, pad_mask, torch.stack(shares, 1))

    def _propose(self, memory: Tensor, cells: Cells) -> tuple[Tensor, Tensor]:
        """Of every cell logits (B, S, K) and a box (B, S, 4) before its sigmoid, from one that stands around
        the cell, the larger the coarser its level. Cells in padding or at the image's edge propose nothing:
        their boxes are infinite."""
        centres = cells.centres()
        sides = [0.05 * 2.0**i for i, (h, w) in enumerate(cells.shapes) for _ in range(h * w)]
        sides = centres.new_tensor(sides)[:, None].expand(centres.shape[0], -1, 2)
        boxes = torch.cat((centres, sides), 2)
        out = ~((boxes > 0.01) & (boxes < 0.99)).all(2)
        if cells.pad_mask is not None:
            out = out | cells.pad_mask
        own = memory.masked_fill(out[..., None], 0)
        own = self.transformer.enc_output_norm(self.transformer.enc_output(own))
        start = (boxes / (1 - boxes)).log().masked_fill(out[..., None], math.inf)
        return _wide(self.class_embed[-1](own)), _wide(self.bbox_embed[-1](own)) + start

    def _begin(self, logits: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Places of the queries and what they begin with, (B, Q, dim) each, and their boxes (B, Q, 4): the
        proposals of the highest first logit, which alone learns where an object is. Where an image has fewer
        cells than queries are asked for, the others begin as at a cell that proposes nothing."""
        number, first = self.config.num_queries, logits[..., 0]
        if not torch.compiler.is_compiling():  # a traced graph is for images of enough cells
            missing = max(0, number - logits.shape[1])
            first = F.pad(first, (0, missing), value=-math.inf)
            ends = F.pad(ends, (0, 0, 0, missing), value=math.inf)
        best = first.topk(number, 1).indices
        boxes = ends.gather(1, best[..., None].expand(-1, -1, 4)).detach().sigmoid()
        coded = sines(boxes, self.config.dim // 2).flatten(2)  # (B, Q, 2 * dim)
        weight = self.transformer.pos_trans.weight
        coded = self.transformer.pos_trans_norm(self.transformer.pos_trans(coded.to(weight.dtype)))
        queries, y = coded.chunk(2, 2)
        return queries, y, boxes

    def losses(
        self, images: Tensor, targets: Sequence[Mapping[str, Tensor]], *, sizes: Sizes | None = None
    ) -> dict[str, Tensor]:
        """The paper's losses of every decoder layer, as sums: focal loss of the classes ("class.0"), L1
        ("box.0") and 1 - GIoU ("giou.0") over the boxes; of two stages those of the proposals too, with one
        class ("class.proposals", ...). Over `weight(targets)` each is the reference's, times its weight: the
        loss is their sum.

        targets: of each image "boxes" (n, 4) xyxy in pixels, "labels" (n,); n may be 0. sizes: (height,
            width) of each image in a padded batch.
        """
        found = self.answers(images, sizes)
        return self.losses_of(found, objects_of(images, targets, sizes))

    def losses_of(self, found: Found, objects: Objects) -> dict[str, Tensor]:
        """`losses` of what `answers` gave."""
        check_counts(objects.counts, found.logits[0].shape[1])
        config = self.config
        weights = Weights(label=config.class_weight, box=config.box_weight, giou=config.giou_weight)
        names = [str(i) for i in range(config.decoder_layers)]
        given = [(found.logits, found.boxes, objects, names)]
        if found.proposals is not None:
            logits, boxes = found.proposals
            things = Objects([torch.zeros_like(labels) for labels in objects.labels], objects.boxes)
            given.append(([logits], [boxes], things, ["proposals"]))
        out = {}
        for logits, boxes, wanted, names in given:
            pairs = match([focal_costs(layer) for layer in logits], boxes, wanted, weights)
            for name, one, own, those in zip(names, logits, boxes, pairs, strict=True):
                apart, overlap = box_losses(own, those, wanted)
                out[f"class.{name}"] = config.class_weight * focal_loss(one, those, wanted)
                out[f"box.{name}"] = config.box_weight * apart
                out[f"giou.{name}"] = config.giou_weight * overlap
        return out

    def weight(self, targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """What `losses` are divided by: the number of boxes."""
        counts = [len(target["labels"]) for target in targets]
        check_counts(counts, self.config.num_queries)
        return torch.tensor(float(sum(counts)))


def focal_loss(logits: Tensor, pairs: Pairs, objects: Objects) -> Tensor:
    """Of all queries and classes (B, Q, K), each yes or no, summed (Lin et al., ICCV 2017, eq. 5)."""
    wanted = torch.zeros_like(logits)
    labels = torch.cat(list(objects.labels)).to(pairs.object)[pairs.object]
    wanted[pairs.image, pairs.query, labels] = 1
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    scores = logits.sigmoid()
    missed = scores + wanted - 2 * scores * wanted  # 1 - p where it is meant, else p
    share = (1 - ALPHA) + (2 * ALPHA - 1) * wanted
    return (share * missed**GAMMA * entropy).sum()


def focal_costs(logits: Tensor) -> Tensor:
    """What a query's standing for an object of each class adds to the focal loss. (B, Q, K) -> same."""
    scores, least = logits.sigmoid(), 1e-8
    yes = ALPHA * (1 - scores) ** GAMMA * -(scores + least).log()
    no = (1 - ALPHA) * scores**GAMMA * -(1 - scores + least).log()
    return yes - no


def inverse_sigmoid(x: Tensor, least: float = 1e-5) -> Tensor:
    return (x.clamp(min=least) / (1 - x).clamp(min=least)).log()


def _projection(dim: int, out: int, kernel: int) -> nn.Sequential:
    """To the transformer's width; a kernel of 3 halves the map."""
    stride = 1 if kernel == 1 else 2
    conv = nn.Conv2d(dim, out, kernel, stride, padding=kernel // 2)
    nn.init.xavier_uniform_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return nn.Sequential(conv, nn.GroupNorm(GROUPS, out))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
