"""Which answer stands for which object, one to one, and what the pairs cost (Carion et al., "End-to-End
Object Detection with Transformers", ECCV 2020, https://arxiv.org/abs/2005.12872, section 3.1).

A detector that answers with a set of boxes must be held against a set of objects, whose order means nothing:
of all ways to give each object an answer of its own the cheapest is taken (Kuhn's Hungarian method), and the
losses are those of its pairs. An answer without an object is to say that there is none; so no two answers
learn to say the same, and nothing has to be suppressed afterwards.

Unlike the official code, which weighs the answers of a batch against the objects of all its images and then
cuts out those of each image, only what belongs to one image is reckoned, for all decoder layers before the
first number leaves the GPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.boxes import cxcywh_to_xyxy, giou, paired_giou
from vitrail_runtime.errors import InputError


class Objects(NamedTuple):
    """Of each image "labels" (n,) and "boxes" (n, 4) cxcywh, relative to the image; n may be 0."""

    labels: Sequence[Tensor]
    boxes: Sequence[Tensor]

    @property
    def counts(self) -> list[int]:
        return [len(labels) for labels in self.labels]


class Pairs(NamedTuple):
    """Of all images of a batch, each (P,): the image, the query in it, and the object, counted through the
    batch. By image, then by query."""

    image: Tensor
    query: Tensor
    object: Tensor


@dataclass(frozen=True, kw_only=True)
class Weights:
    """How much a wrong class, the distance of two boxes (L1) and their GIoU count, in the matching or in the
    loss."""

    label: float = 1.0
    box: float = 5.0
    giou: float = 2.0


def match(
    class_costs: Sequence[Tensor], boxes: Sequence[Tensor], objects: Objects, weights: Weights
) -> list[Pairs]:
    """The cheapest pairs of answers and objects, layer by layer.

    Args:
        class_costs: of each layer (B, Q, K), what it costs that a query stands for an object of a class.
        boxes: of each layer (B, Q, 4) cxcywh, relative to the image.

    Of an image with more objects than queries some have no pair. Costs that are no numbers are the highest:
    a training that diverges is told by its loss.
    """
    with torch.no_grad():
        every = zip(class_costs, boxes, strict=True)
        costs = [pair_costs(scores, own, objects, weights) for scores, own in every]
        assigned = _assign(torch.stack(costs).cpu(), objects.counts)
        device = boxes[0].device
        return [Pairs(*pairs.to(device)) for pairs in assigned]


def pair_costs(class_costs: Tensor, boxes: Tensor, objects: Objects, weights: Weights) -> Tensor:
    """(B, Q, T) of every query of an image and every object of it, T the most that any image has; what lies
    behind an image's own objects means nothing."""
    dtype = torch.promote_types(boxes.dtype, torch.float32)
    labels = _padded(objects.labels)[:, None].expand(-1, class_costs.shape[1], -1)
    wanted, boxes = _padded(objects.boxes).to(dtype), boxes.to(dtype)
    label = class_costs.to(dtype).gather(2, labels.to(class_costs.device))
    apart = torch.cdist(boxes, wanted, p=1)
    overlap = giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(wanted))
    return weights.label * label + weights.box * apart - weights.giou * overlap


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _assign(costs: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """(L, B, Q, T) -> of each layer (3, P): image, query, object."""
    from scipy.optimize import linear_sum_assignment  # a second to import

    big = torch.finfo(costs.dtype).max
    found = costs.nan_to_num(nan=big, posinf=big, neginf=big).numpy()
    out = []
    for layer in found:
        parts, first = [], 0
        for image, (cost, count) in enumerate(zip(layer, counts, strict=True)):
            query, own = map(torch.from_numpy, linear_sum_assignment(cost[:, :count]))
            parts.append(torch.stack((torch.full_like(query, image), query, own + first)))
            first += count
        out.append(torch.cat(parts, 1))
    return out


def class_loss(logits: Tensor, pairs: Pairs, objects: Objects, no_object: float) -> Tensor:
    """Cross-entropy over all queries, summed; those without an object have the last class, at a weight of
    `no_object`. logits: (B, Q, K + 1). `class_weight` is what the sum is divided by."""
    last = logits.shape[2] - 1
    wanted = torch.full(logits.shape[:2], last, device=logits.device)
    wanted[pairs.image, pairs.query] = torch.cat(list(objects.labels)).to(wanted)[pairs.object]
    weights = logits.new_ones(last + 1)
    weights[last] = no_object
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), weights, reduction="sum")


def class_weight(objects: int, images: int, queries: int, no_object: float) -> float:
    """The sum of the weights of all queries in `class_loss`."""
    return objects + no_object * (images * queries - objects)


def box_losses(boxes: Tensor, pairs: Pairs, objects: Objects) -> tuple[Tensor, Tensor]:
    """Of the pairs the distance of the boxes (L1) and 1 - GIoU, summed. boxes: (B, Q, 4)."""
    mine = boxes[pairs.image, pairs.query]
    wanted = torch.cat(list(objects.boxes)).to(mine)[pairs.object]
    overlap = paired_giou(cxcywh_to_xyxy(mine), cxcywh_to_xyxy(wanted))
    return (mine - wanted).abs().sum(), (1 - overlap).sum()


def check_counts(counts: Sequence[int], queries: int) -> None:
    """Raise InputError where an image has more objects than there are queries."""
    most = max(counts, default=0)
    if most > queries:
        image = list(counts).index(most)
        raise InputError(
            f"image {image} of the batch has {most} objects, but the model has {queries} queries, each for "
            f"one object at most; take --head-fields num_queries={most} or more, or a detector without "
            "queries, such as faster_rcnn/..."
        )
