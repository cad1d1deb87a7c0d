"""DETR that says of every pixel what it belongs to (Carion et al., "End-to-End Object Detection with
Transformers", ECCV 2020, section 4.4, https://arxiv.org/abs/2005.12872).

Things and stuff are all one to it: each query answers with a class, a box and a mask, and of the masks of
those that are sure the most probable one has each pixel. It is trained in two steps: a DETR of boxes, around
stuff too, and then the mask head alone (`--train-only masks`) on what it has learnt; or all at once.

Unlike the official code: the losses of an image's masks are means over its own pixels, not over the padding
of its batch as well; masks are merged as the paper's text says and transformers does
(`vitrail_runtime.panoptic`), without the official code's filter of small areas.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.detectors.detr import (
    DETR,
    DETRConfig,
    LevelsAsNamed,
    Read,
    Record,
    Sizes,
    best_first,
    in_pixels,
    objects_of,
)
from vitrail.detectors.detr_masks import AttentionMaps, MaskHead, mask_losses
from vitrail.detectors.hungarian import Pairs
from vitrail.features import Features
from vitrail_runtime.errors import InputError
from vitrail_runtime.panoptic import SURE

AT_ONCE = 16  # queries of an image whose masks are made together: a hundred take much memory


@dataclass(frozen=True, kw_only=True)
class DETRPanopticConfig(DETRConfig):
    stuff: tuple[int, ...] = ()  # labels; training takes them from its data
    sure: float = SURE  # score from which a query is an answer
    segments: int = (
        100  # the most queries of an image, the best, whose masks are made for an answer
    )
    mask_weight: float = 1.0
    dice_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sure < 1:
            raise InputError(f"sure is {self.sure}, but must be from 0 to below 1")


class DETRPanoptic(DETR):
    """images (B, 3, H, W) -> boxes, classes, scores and masks of the queries.

    Labels are indices into `classes`. Boxes are xyxy in pixels of the input.
    """

    task = "panoptic"
    has_masks = True
    trained_apart = ("bbox_attention", "mask_head")  # by --train-only masks
    config: DETRPanopticConfig

    def __init__(self, backbone: Any, config: DETRPanopticConfig, num_classes: int) -> None:
        super().__init__(backbone, config, num_classes)
        check_stuff(config.stuff, num_classes)
        self.finer = LevelsAsNamed(backbone.feature_specs, (4, 8, 16))
        channels = [spec.channels for spec in self.finer.feature_specs.values()]
        self.bbox_attention = AttentionMaps(config.dim, config.num_heads)
        self.mask_head = MaskHead(config.dim, config.num_heads, channels[::-1])

    @property
    def stuff(self) -> tuple[int, ...]:
        """Labels of which an image has one segment at most. Training data decides them; they are saved."""
        return self.config.stuff

    @stuff.setter
    def stuff(self, labels: Sequence[int]) -> None:
        check_stuff(labels, self.num_classes)
        self.config = replace(self.config, stuff=tuple(labels))
        self.info = replace(self.info, parts={**self.info.parts, "head": self.config})

    def forward(self, images: Tensor, *, sizes: Sizes | None = None) -> list[dict[str, Tensor]]:
        """Of each image the answers, best first: "boxes" (n, 4), "labels" (n,), "scores" (n,) above `sure`,
        and "masks" (n, h, w), their probabilities at stride 4."""
        found = self.forward_tensors(images, sizes=sizes)
        names = ("boxes", "labels", "scores", "masks")
        counts = found["count"].tolist()
        return [{name: found[name][i, :n] for name in names} for i, n in enumerate(counts)]

    def forward_tensors(
        self, images: Tensor, record: Record = None, *, sizes: Sizes | None = None
    ) -> dict[str, Tensor]:
        """What is found: every query's best class, best first; of `segments` queries at most.

        sizes, record: as of `DETR`; and "bbox_attention.weights" (B, S, heads, h, w) of the answers.

        Returns: "boxes" (B, S, 4), "scores" (B, S), "labels" (B, S) int64, "masks" (B, S, h, w), their
            probabilities at stride 4, "stuff" (B, K) bool, which classes are stuff, "count" (B,)
            int64, how many rows are answers: those of a score above `sure`; and "input_size" (B, 2) int64,
            the height and width that the masks cover.
        """
        features = self.backbone(images)
        seen = self.read(features, images, sizes, record)
        logits, boxes = self.heads(seen.decoded[-1:])
        scores, labels = logits[-1].softmax(-1)[..., :-1].max(-1)
        scores, order = best_first(scores)
        most = min(self.config.segments, self.config.num_queries)
        scores, order = scores[:, :most], order[:, :most]
        if record is not None:
            record["queries"] = order
        labels = labels.gather(1, order)
        found = in_pixels(boxes[-1], images, sizes)
        masks = self.masks(self.finer_maps(features, images), seen, order, sizes, record)
        stuff = torch.tensor(
            [k in self.stuff for k in range(self.num_classes)], device=labels.device
        )
        height, width = images.shape[-2:]
        return {
            "boxes": found.gather(1, order[..., None].expand(-1, -1, 4)),
            "scores": scores,
            "labels": labels,
            "masks": masks,
            "stuff": stuff.expand(order.shape[0], -1),
            "count": (scores > self.config.sure).sum(1),
            "input_size": torch.tensor([height, width], device=labels.device).expand(
                order.shape[0], 2
            ),
        }

    def finer_maps(self, features: Features, images: Tensor) -> list[Tensor]:
        """The backbone's maps of strides 16, 8 and 4, of as many cells as lie in the images: resampled from
        coarser ones they reach further."""
        maps = []
        for name, x in self.finer(features).items():
            stride = Fraction(self.finer.feature_specs[name].stride)
            height, width = (
                -(-side * stride.denominator // stride.numerator) for side in images.shape[-2:]
            )
            maps.append(x[..., :height, :width])
        return maps[::-1]

    def masks(
        self,
        maps: Sequence[Tensor],
        seen: Read,
        order: Tensor,
        sizes: Sizes | None,
        record: Record = None,
    ) -> Tensor:
        """Probabilities (B, S, h, w) of the masks of queries `order` (B, S)."""
        images, most = order.shape
        every, looks = [], []
        for start in range(0, most, AT_ONCE):
            some = order[:, start : start + AT_ONCE]
            image = torch.arange(images, device=order.device).repeat_interleave(some.shape[1])
            logits, look = self.mask_logits(maps, seen, image, some.flatten(), sizes)
            every.append(logits.sigmoid().unflatten(0, (images, some.shape[1])))
            looks.append(look.unflatten(0, (images, some.shape[1])))
        if record is not None:
            record["bbox_attention.weights"] = torch.cat(looks, 1)
        return torch.cat(every, 1)

    def mask_logits(
        self,
        maps: Sequence[Tensor],
        seen: Read,
        image: Tensor,
        query: Tensor,
        sizes: Sizes | None,
    ) -> tuple[Tensor, Tensor]:
        """Of queries `query` (P,) of the images `image` (P,): masks (P, h, w) at stride 4, and where they
        look, (P, heads, h / 8, w / 8). maps: `finer_maps`."""
        pad_mask = None if sizes is None else ~seen.keep
        queries = seen.decoded[-1][image, query]
        look = self.bbox_attention(queries, image, seen.memory, pad_mask)
        return self.mask_head(seen.x, look, image, maps), look

    def losses(
        self, images: Tensor, targets: Sequence[Mapping[str, Tensor]], *, sizes: Sizes | None = None
    ) -> dict[str, Tensor]:
        """The losses of `DETR`, and of the last layer's pairs the focal ("mask") and DICE ("dice") losses of
        their masks, summed over the objects.

        targets: of each image "boxes" (n, 4) xyxy in pixels, "labels" (n,) and "masks" (n, H, W), of its own
            size; n may be 0. sizes: as of `DETR`.
        """
        features = self.backbone(images)
        seen = self.read(features, images, sizes)
        logits, boxes = self.heads(seen.decoded)
        objects = objects_of(images, targets, sizes)
        pairs = self.matched(logits, boxes, objects)
        out = self.losses_of(logits, boxes, objects, pairs)
        last = pairs[-1]
        maps = self.finer_maps(features, images)
        drawn, _ = self.mask_logits(maps, seen, last.image, last.query, sizes)
        focal, dice = self.losses_of_masks(drawn, last, targets, images, sizes)
        return out | {
            "mask": self.config.mask_weight * focal,
            "dice": self.config.dice_weight * dice,
        }

    def losses_of_masks(
        self,
        drawn: Tensor,
        pairs: Pairs,
        targets: Sequence[Mapping[str, Tensor]],
        images: Tensor,
        sizes: Sizes | None,
    ) -> tuple[Tensor, Tensor]:
        """Of the masks (P, h, w) of pairs, image by image: enlarged, the largest would not fit at once."""
        wide = drawn.to(torch.promote_types(drawn.dtype, torch.float32))
        focal = dice = wide.sum() * 0
        first = 0
        for i, target in enumerate(targets):
            mine = pairs.image == i
            height, width = images.shape[-2:] if sizes is None else sizes[i]
            wanted = target["masks"][pairs.object[mine] - first]
            large = F.interpolate(wide[mine][:, None], images.shape[-2:], mode="bilinear")[:, 0]
            losses = mask_losses(large[:, :height, :width], wanted)
            focal, dice = focal + losses[0], dice + losses[1]
            first += len(target["labels"])
        return focal, dice

    def weight(self, targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """As of `DETR`, and the number of objects for the losses of masks, twice."""
        objects = sum(len(target["labels"]) for target in targets)
        own = torch.tensor([objects, objects], dtype=torch.float64)
        return torch.cat((super().weight(targets), own))


def check_stuff(labels: Sequence[int], num_classes: int) -> None:
    """Raise InputError where a label is no class."""
    strange = [k for k in labels if not 0 <= k < num_classes]
    if strange:
        raise InputError(
            f"stuff names the labels {strange}, but the model's {num_classes} classes are 0 to "
            f"{num_classes - 1}"
        )
