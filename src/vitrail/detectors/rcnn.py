"""Faster R-CNN (Ren et al., NeurIPS 2015, https://arxiv.org/abs/1506.01497) and Mask R-CNN (He et al., ICCV
2017, https://arxiv.org/abs/1703.06870), over a feature pyramid on any backbone.

A first network proposes boxes that may hold an object; a second pools the features of each, names it and
moves the box to fit. Mask R-CNN adds a small network that says which cells of a box are the object's.

Where papers and codes differ this follows torchvision's `fasterrcnn_resnet50_fpn`: RoIAlign with 2 x 2
samples a cell and without the shift by half a cell, smooth L1 with its bend at 1/9, one box for each class.
Unlike torchvision's, labels are indices into the model's classes and background comes last.

The second network is a list of stages, of which these have one; `cascade.py` has several.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.boxes import clip, decode, encode
from vitrail.detectors.matching import match, sample
from vitrail.detectors.roi import BoxHead, MaskHead, RoIPooling, crop_masks, mask_entropy
from vitrail.detectors.rpn import RPN, Found, Sizes
from vitrail.features import Features, adapt_levels
from vitrail.layers.frozen import freeze_norms
from vitrail.necks.fpn import FPN
from vitrail.necks.simple_pyramid import SimplePyramid
from vitrail.packing import PackedImages, as_packed, packed_maps
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

Groups = Sequence[Sequence[Tensor]]  # the maps, finest first, of images of one size each

SMALLEST = 1e-2  # side of an answer, in pixels


@dataclass(frozen=True, kw_only=True)
class RCNNConfig:
    """Faster R-CNN's; those of its relatives add to it. Where two numbers stand for training and inference,
    training's is the first."""

    neck: Literal["fpn", "simple_pyramid"] = "fpn"  # the second for a backbone of one map
    neck_dim: int = 256
    neck_norm: bool = False  # BatchNorm in the FPN
    # Of the levels, beside which one twice as coarse is made for proposals; (): the backbone's as they are.
    strides: tuple[int, ...] = (4, 8, 16, 32)
    frozen_norm: bool = (
        False  # the backbone's BatchNorms stay as they are loaded: batches are small
    )
    anchor_sizes: tuple[float, ...] = (8.0,)  # sqrt(area) in strides of the level
    anchor_pixels: tuple[float, ...] = ()  # in pixels, the same at every level, in place of those
    anchor_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)  # height / width
    anchor_rounding: bool = True  # corners to whole pixels
    rpn_convs: int = 1
    proposal_ious: tuple[float, float] = (0.3, 0.7)  # below: background; from the second on: object
    proposal_samples: int = 256
    proposal_positive_share: float = 0.5
    proposal_beta: float = 1 / 9  # where smooth L1 bends
    proposals_before_nms: tuple[int, int] = (2000, 1000)  # of each level
    proposals: tuple[int, int] = (2000, 1000)  # of each image
    proposal_nms: float = 0.7
    proposal_score: float = 0.0  # below it an anchor proposes nothing
    pool_size: int = 7
    pool_samples: int = 2  # a side of each cell; 0: one for each pixel of the map
    pool_aligned: bool = False  # cells counted from their centres
    box_convs: int = 0
    box_conv_dim: int = 256
    box_fcs: int = 2
    box_dim: int = 1024
    box_beta: float = 1 / 9
    class_agnostic: bool = False  # one box for all classes
    clamp_small: bool = False  # log(size / anchor's size) is bounded from below too
    ious: tuple[float, ...] = (0.5,)  # of each stage: what overlaps an object so much stands for it
    samples: int = 512  # boxes of an image that a stage learns from
    positive_share: float = 0.25
    average: Literal["logits", "probabilities"] = "logits"  # of the stages
    score: float = 0.05  # below it nothing is answered
    nms: float = 0.5
    detections: int = 100

    def __post_init__(self) -> None:
        if not self.ious or not all(0 < iou <= 1 for iou in self.ious):
            raise InputError(
                "ious has the overlap of each stage, one at least, above 0 and at most 1, such as "
                f"0.5 0.6 0.7, but is {self.ious}"
            )

    @property
    def has_masks(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class MaskRCNNConfig(RCNNConfig):
    mask_pool_size: int = 14
    mask_convs: int = 4
    mask_dim: int = 256
    mask_norm: bool = False  # BatchNorm after the convolutions

    @property
    def has_masks(self) -> bool:
        return True


@dataclass
class Drawn:
    """Boxes of one image that a stage learns from: those that stand for an object first.

    boxes: (N, 4). labels: (N,), the number of classes for background. wanted: (P, 4) the objects' boxes and
    index: (P,) their numbers, of the first P. added: (N,) whether the box is an object's own.
    """

    boxes: Tensor
    labels: Tensor
    wanted: Tensor
    index: Tensor
    added: Tensor


class RCNN(nn.Module):
    """images (B, 3, H, W) -> boxes, classes and scores, and masks where the config has them.

    Labels are indices into `classes`. Boxes are xyxy in pixels of the input.
    """

    task = "detect"
    reads_maps = True
    class_rows: Mapping[str, tuple[int, int]]  # for loading: see weights.layouts.other_classes
    # Attached by models.create_model and load:
    info: Any
    weights_report: Any
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def __init__(self, backbone: Any, config: RCNNConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.class_rows = {"classes": (1, 1), "deltas": (4, 0)}
        self.backbone = freeze_norms(backbone) if config.frozen_norm else backbone
        specs, dim = backbone.feature_specs, config.neck_dim
        if config.neck == "simple_pyramid":
            self.levels = nn.Identity()
            self.neck = SimplePyramid(specs, dim, wanted=config.strides, pool=True)
        else:
            self.levels = _AsTheyAre()
            if config.strides:
                self.levels = adapt_levels(specs, config.strides)
                specs = self.levels.feature_specs
            self.neck = FPN(specs, dim, pool=True, norm=config.neck_norm)
        specs = self.neck.feature_specs
        self.rpn = RPN(config, specs)
        read = dict(list(specs.items())[:-1])  # the coarsest level is for proposals alone
        how = {"samples": config.pool_samples, "aligned": config.pool_aligned}
        self.pool = RoIPooling(read, config.pool_size, **how)
        self.stages = nn.ModuleList(BoxHead(config, dim, num_classes) for _ in config.ious)
        self.mask_stages = nn.ModuleList()
        if isinstance(config, MaskRCNNConfig):
            self.mask_pool = RoIPooling(read, config.mask_pool_size, **how)
            self.mask_stages.extend(MaskHead(config, dim, num_classes) for _ in config.ious)

    @property
    def has_masks(self) -> bool:
        return self.config.has_masks

    def forward(self, images: Tensor, *, sizes: Sizes | None = None) -> list[dict[str, Tensor]]:
        """Of each image "boxes" (n, 4), "labels" (n,), "scores" (n,) and, where there are masks, "mask_crops"
        (n, m, m), best first."""
        found = self.forward_tensors(images, sizes=sizes)
        counts = found.pop("count").tolist()
        return [{k: v[i, :n] for k, v in found.items()} for i, n in enumerate(counts)]

    @property
    def takes_packs(self) -> bool:
        """Whether its heads read each image of a pack by itself."""
        return not self.config.neck_norm  # BatchNorm, which would learn from one image at a time

    def forward_packed(self, packed: PackedImages) -> list[dict[str, Tensor]]:
        """As `forward`, of the images of a pack in its order."""
        packing = {"sizes": packed.sizes, "patch_size": packed.patch_size, "kept": packed.kept}
        found = self.forward_tensors(packed.patches, packing=packing)
        counts = found.pop("count").tolist()
        return [{k: v[i, :n] for k, v in found.items()} for i, n in enumerate(counts)]

    def maps(self, images: Tensor) -> list[Tensor]:
        """What the heads read, finest first."""
        return self._levels(self.backbone(images))

    def groups(self, images: Tensor, packing: Mapping[str, Any] | None) -> list[list[Tensor]]:
        """The same of images of one size, or of each group of neighbours in a pack whose maps are of one."""
        if packing is None:
            return [self.maps(images)]
        found = packed_maps(self.backbone, as_packed(images, packing))
        return [self._levels(features) for features in found.batches()]

    def _levels(self, features: Features) -> list[Tensor]:
        return list(self.neck(self.levels(features)).values())

    def forward_tensors(
        self,
        images: Tensor,
        record: dict[str, Tensor] | None = None,
        *,
        sizes: Sizes | None = None,
        packing: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """What is found, D = `detections` rows an image, best first.

        sizes: (height, width) of each image in a padded batch.
        packing: where `images` are the patches of several (`vitrail.packing.as_packed`).
        record: takes "proposals" (B, P, 4) and "stages.I.boxes" (B, P, 4), what stage I makes of its boxes.

        Returns: "boxes" (B, D, 4), "scores" (B, D), "labels" (B, D) int64, "count" (B,) int64 and with masks
            "mask_crops" (B, D, m, m), probabilities within each box. Rows behind the count are zero. What
            is NaN or infinite inside is no answer, so such an image has one, whose box and score are NaN.
        """
        sizes = _sizes(images, sizes, packing)
        groups = self.groups(images, packing)
        asked = [self.rpn(maps) for maps in groups]
        boxes = self._proposals(asked, sizes, training=False)
        if record is not None:
            record["proposals"] = _padded(boxes, self.config.proposals[1])
        proposed = [len(b) for b in boxes]
        total, every = None, torch.cat(boxes)
        for i, stage in enumerate(self.stages):
            logits, deltas = stage(_pooled(self.pool, groups, boxes))
            logits = logits.to(every.dtype)
            seen = logits.softmax(1) if self.config.average == "probabilities" else logits
            total = seen if total is None else total + seen
            every = self._decode(deltas, torch.cat(boxes), i)  # (N, R, 4)
            best = self._one_box(every, logits[:, :-1].argmax(1))
            boxes = [clip(b, *size) for b, size in zip(best.split(proposed), sizes, strict=True)]
            if record is not None:
                record[f"stages.{i}.boxes"] = _padded(boxes, self.config.proposals[1])
        assert total is not None
        scores = total / len(self.stages)
        if self.config.average == "logits":
            scores = scores.softmax(1)
        ends = [*zip(every.split(proposed), scores.split(proposed), sizes, strict=True)]
        answers = [self._best(*end) for end in ends]
        out = {
            name: _padded([answer[i] for answer in answers], self.config.detections)
            for i, name in enumerate(("boxes", "scores", "labels"))
        }
        counts = [len(answer[0]) for answer in answers]
        out["count"] = torch.tensor(counts, device=images.device)
        if self.has_masks:
            crops = self._masks(groups, [answer[0] for answer in answers], out["labels"], counts)
            out["mask_crops"] = _padded(crops, self.config.detections)
        starts = [row for found in asked for row in zip(found.logits, found.deltas, strict=True)]
        for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
            if not all(part.isfinite().all() for part in (*start, *end[:2])):
                out["boxes"][i, 0], out["scores"][i, 0] = math.nan, math.nan
                out["count"][i] = out["count"][i].clamp(min=1)
        return out

    def losses(
        self,
        images: Tensor,
        targets: Sequence[Mapping[str, Tensor]],
        *,
        sizes: Sizes | None = None,
        packing: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The papers' losses, as the references give them for this process's images (means over the boxes
        that were drawn), each times the number of images: divided by `weight(targets)` they are the
        references'.

        targets: of each image "boxes" (n, 4) xyxy in pixels, "labels" (n,) and, where masks are learnt,
            "masks" (n, h, w) uint8; n may be 0. sizes: (height, width) of each image in a padded batch.
        packing: as for `forward_tensors`.
        Returns: "rpn_class", "rpn_box", and of every stage "class", "box" and, with masks, "mask", numbered
            "class.0" where there are several. They are weighted already: the loss is their sum.
        """
        sizes = _sizes(images, sizes, packing)
        self._check(targets)
        groups = self.groups(images, packing)
        found = [self.rpn(maps) for maps in groups]
        out = self.rpn.losses(found, targets)
        boxes = self._proposals(found, sizes, training=True)
        for i, stage in enumerate(self.stages):
            drawn = [
                self.draw(b, t, self.config.ious[i]) for b, t in zip(boxes, targets, strict=True)
            ]
            logits, deltas = stage(_pooled(self.pool, groups, [d.boxes for d in drawn]))
            losses = self._box_losses(logits, deltas, drawn, i)
            if self.has_masks:
                losses["mask"] = self._mask_loss(groups, drawn, targets, i)
            name = "" if len(self.stages) == 1 else f".{i}"
            out |= {f"{k}{name}": v * self.stage_weight(i) for k, v in losses.items()}
            if i + 1 < len(self.stages):
                boxes = self._refined(logits, deltas, drawn, sizes, i)
        return {name: loss * len(sizes) for name, loss in out.items()}

    def weight(self, targets: Sequence[Any]) -> Tensor:
        """What `losses` are divided by: the number of images."""
        return torch.tensor(float(len(targets)))

    def stage_weight(self, i: int) -> float:
        """Of the losses of stage i: halved from one to the next."""
        return 0.5**i

    def code_weights(self, i: int) -> tuple[float, float, float, float]:
        """Of the regression code of stage i, whose boxes are nearer to their objects than those before."""
        centre, size = round(0.1 / (i + 1), 3), round(0.2 / (i + 1), 3)
        return 1 / centre, 1 / centre, 1 / size, 1 / size

    def draw(self, boxes: Tensor, target: Mapping[str, Tensor], iou: float) -> Drawn:
        """The boxes of one image that a stage learns from, among its proposals and the objects themselves."""
        objects = target["boxes"].to(boxes)
        added = torch.arange(len(boxes) + len(objects), device=boxes.device) >= len(boxes)
        boxes = torch.cat((boxes, objects))
        matched = match(boxes, objects, high=iou, low=iou)
        positive, negative = sample(matched, self.config.samples, self.config.positive_share)
        index, chosen = matched[positive], torch.cat((positive, negative))
        background = torch.full_like(negative, self.num_classes)
        labels = torch.cat((target["labels"][index].to(background), background))
        return Drawn(boxes[chosen], labels, objects[index], index, added[chosen])

    def _proposals(self, groups: Sequence[Found], sizes: Sizes, *, training: bool) -> list[Tensor]:
        """Of every image, (P, 4) each."""
        boxes: list[Tensor] = []
        for found in groups:
            own = sizes[len(boxes) : len(boxes) + len(found.logits)]
            boxes += self.rpn.propose(found, own, training=training)
        return boxes

    def _decode(self, deltas: Tensor, boxes: Tensor, i: int) -> Tensor:
        """(N, R, 4) and (N, 4) -> (N, R, 4), not clipped."""
        weights, small = self.code_weights(i), self.config.clamp_small
        return decode(deltas.to(boxes.dtype), boxes[:, None], weights, clamp_small=small)

    def _one_box(self, boxes: Tensor, labels: Tensor) -> Tensor:
        """(N, R, 4) -> (N, 4): that of the label, where each class has its own."""
        if self.config.class_agnostic:
            return boxes[:, 0]
        return boxes.gather(1, labels[:, None, None].expand(-1, 1, 4))[:, 0]

    def _box_losses(
        self, logits: Tensor, deltas: Tensor, drawn: Sequence[Drawn], i: int
    ) -> dict[str, Tensor]:
        labels = torch.cat([d.labels for d in drawn])
        number = max(1, len(labels))
        dtype = torch.promote_types(logits.dtype, torch.float32)
        entropy = F.cross_entropy(logits.to(dtype), labels, reduction="sum")
        positive = (labels < self.num_classes).nonzero()[:, 0]
        mine = self._one_box(deltas[positive], labels[positive]).to(dtype)
        near = torch.cat([d.boxes[: len(d.index)] for d in drawn])
        wanted = encode(torch.cat([d.wanted for d in drawn]), near, self.code_weights(i))
        apart = F.smooth_l1_loss(mine, wanted.to(dtype), reduction="sum", beta=self.config.box_beta)
        return {"class": entropy / number, "box": apart / number}

    def _mask_loss(
        self, groups: Groups, drawn: Sequence[Drawn], targets: Sequence[Any], i: int
    ) -> Tensor:
        boxes = [d.boxes[: len(d.index)] for d in drawn]
        labels = torch.cat([d.labels[: len(d.index)] for d in drawn])
        wanted = [
            crop_masks(target["masks"], own, d.index, 2 * self.mask_pool.size)
            for target, own, d in zip(targets, boxes, drawn, strict=True)
        ]
        pooled, truth = _pooled(self.mask_pool, groups, boxes), torch.cat(wanted)
        head = cast(MaskHead, self.mask_stages[i])
        return mask_entropy(head, pooled, labels, truth) / max(1, truth.numel())

    def _refined(
        self, logits: Tensor, deltas: Tensor, drawn: Sequence[Drawn], sizes: Sizes, i: int
    ) -> list[Tensor]:
        """What stage i makes of the boxes it learnt from, but for the objects that were added to them."""
        boxes = torch.cat([d.boxes for d in drawn])
        labels = torch.cat([d.labels for d in drawn])
        guessed = logits[:, :-1].argmax(1)
        labels = torch.where(labels < self.num_classes, labels, guessed)
        moved = self._one_box(self._decode(deltas.detach(), boxes, i), labels)
        parts = moved.split([len(d.boxes) for d in drawn])
        return [
            clip(part[~d.added], *size) for part, d, size in zip(parts, drawn, sizes, strict=True)
        ]

    def _best(
        self, boxes: Tensor, scores: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes (N, R, 4) and probabilities (N, K + 1) of one image -> boxes, scores, labels, best first."""
        from torchvision.ops import batched_nms  # takes seconds to import

        config = self.config
        row, label = (scores[:, :-1] > config.score).nonzero().unbind(1)
        boxes = clip(boxes[row, 0 if config.class_agnostic else label], *size)
        scores = scores[row, label]
        large = ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST).all(1).nonzero()[:, 0]
        boxes, scores, label = boxes[large], scores[large], label[large]
        keep = batched_nms(boxes, scores, label, config.nms)[: config.detections]
        return boxes[keep], scores[keep], label[keep]

    def _masks(
        self, groups: Groups, boxes: Sequence[Tensor], labels: Tensor, counts: list[int]
    ) -> list[Tensor]:
        """Of each image (n, m, m): the mean probability of the stages, for the class that was answered."""
        chosen = torch.cat([row[:n] for row, n in zip(labels, counts, strict=True)])
        pooled = _pooled(self.mask_pool, groups, boxes)
        rows = torch.arange(len(chosen), device=chosen.device)
        every = [stage(pooled)[rows, chosen].sigmoid() for stage in self.mask_stages]
        return list((torch.stack(every).mean(0)).to(boxes[0].dtype).split(counts))

    def _check(self, targets: Sequence[Mapping[str, Tensor]]) -> None:
        without = [i for i, target in enumerate(targets) if "masks" not in target]
        if self.has_masks and without:
            raise InputError(
                f"a mask head learns from masks, but image {without[0]} of the batch has boxes alone; "
                "train a model without one, such as faster_rcnn/..., or give data with masks"
            )


class _AsTheyAre(nn.Module):
    def forward(self, features: Features) -> dict[str, Tensor]:
        return features.maps


def _sizes(images: Tensor, sizes: Sizes | None, packing: Mapping[str, Any] | None) -> Sizes:
    if packing is not None:
        return [(height, width) for height, width in packing["sizes"]]
    height, width = images.shape[-2:]
    return [(height, width)] * len(images) if sizes is None else sizes


def _pooled(pool: nn.Module, groups: Groups, boxes: Sequence[Tensor]) -> Tensor:
    """What `pool` makes of the boxes of every image, from the maps of its group."""
    parts, first = [], 0
    for maps in groups:
        count = len(maps[0])
        parts.append(pool(maps, boxes[first : first + count]))
        first += count
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _padded(rows: Sequence[Tensor], length: int) -> Tensor:
    """Tensors (n, ...) -> (B, length, ...), zeros behind each."""
    out = rows[0].new_zeros(len(rows), length, *rows[0].shape[1:])
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
