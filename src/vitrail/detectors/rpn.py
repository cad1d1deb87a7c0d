"""Region proposal network (Ren et al., "Faster R-CNN: Towards Real-Time Object Detection with Region Proposal
Networks", NeurIPS 2015, https://arxiv.org/abs/1506.01497), over the levels of a pyramid (Lin et al., CVPR
2017, section 4.1).

At every cell of every map, anchors of a few shapes are held against the image: is there an object, and how
must the anchor be moved and stretched to fit it? The best of them, without near doubles, are the proposals.

Unlike torchvision, whose anchors stand apart by the quotient of the image's and the map's sizes, they stand
by the map's true stride: the same wherever the coarsest map fits the image. Only the best anchors of a level
are decoded, and an object that no anchor overlaps claims none (torchvision's claims all that overlap
nothing).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.boxes import anchor_grid, anchor_shapes, clip, decode, encode
from vitrail.detectors.matching import match, sample
from vitrail.features import FeatureSpec

Sizes = Sequence[tuple[int, int]]
SMALLEST = 1e-3  # side of a proposal, in pixels


@dataclass
class Found:
    """What the network says of the anchors, in the order of levels, rows, columns, shapes.

    logits: (B, N). deltas: (B, N, 4). anchors: (N, 4) xyxy, which the images of a batch share. levels: how
    many of the N each level has.
    """

    logits: Tensor
    deltas: Tensor
    anchors: Tensor
    levels: list[int]


class RPN(nn.Module):
    """Maps of one width -> proposals. config: an RCNNConfig. specs: the maps', finest first."""

    def __init__(self, config: Any, specs: Mapping[str, FeatureSpec]) -> None:
        super().__init__()
        self.config = config
        self.strides = [spec.stride for spec in specs.values()]
        dim = next(iter(specs.values())).channels
        num = len(config.anchor_ratios) * len(config.anchor_pixels or config.anchor_sizes)
        self.convs = nn.ModuleList(
            nn.Conv2d(dim, dim, 3, padding=1) for _ in range(config.rpn_convs)
        )
        self.objectness = nn.Conv2d(dim, num, 1)
        self.deltas = nn.Conv2d(dim, 4 * num, 1)
        for conv in (*self.convs, self.objectness, self.deltas):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            nn.init.trunc_normal_(conv.weight, std=0.01)
            nn.init.zeros_(conv.bias)

    def forward(self, maps: Sequence[Tensor]) -> Found:
        """(B, dim, h, w) of each level -> what is found at its anchors."""
        logits, deltas = [], []
        for x in maps:
            for conv in self.convs:
                x = F.relu(conv(x))
            logits.append(self.objectness(x).permute(0, 2, 3, 1).flatten(1))
            found = self.deltas(x).permute(0, 2, 3, 1)  # (B, h, w, shapes * 4)
            deltas.append(found.reshape(len(x), -1, 4))
        anchors = self.anchors(maps)
        return Found(
            torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors), list(map(len, anchors))
        )

    def anchors(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """(h * w * shapes, 4) xyxy of each level, in pixels of the images."""
        config, out = self.config, []
        for x, stride in zip(maps, self.strides, strict=True):
            sizes = config.anchor_pixels or [size * stride for size in config.anchor_sizes]
            shapes = anchor_shapes(sizes, config.anchor_ratios)
            if config.anchor_rounding:
                shapes = shapes.round()
            dtype = torch.promote_types(x.dtype, torch.float32)
            shapes = shapes.to(device=x.device, dtype=dtype)
            out.append(anchor_grid(shapes, x.shape[-2], x.shape[-1], stride))
        return out

    def propose(self, found: Found, sizes: Sizes, *, training: bool) -> list[Tensor]:
        """The proposals of each image, (P, 4) xyxy, best first; no gradient passes through them.

        sizes: (height, width) of each image within the batch, to which its proposals are clipped.
        """
        from torchvision.ops import batched_nms  # takes seconds to import

        config = self.config
        before, after = config.proposals_before_nms, config.proposals
        before, after = (before[0], after[0]) if training else (before[1], after[1])
        logits, deltas = found.logits.detach(), found.deltas.detach().to(found.anchors.dtype)
        boxes, scores, levels = [], [], []
        parts = (logits.split(found.levels, 1), deltas.split(found.levels, 1))
        for level, (score, delta, anchors) in enumerate(
            zip(*parts, found.anchors.split(found.levels), strict=True)
        ):
            score, best = score.topk(min(before, score.shape[1]), 1)
            delta = delta.gather(1, best[..., None].expand(-1, -1, 4))
            boxes.append(decode(delta, anchors[best], clamp_small=config.clamp_small))
            scores.append(score.sigmoid())
            levels.append(torch.full_like(best[0], level))
        of_level = torch.cat(levels)
        out = []
        for box, score, size in zip(torch.cat(boxes, 1), torch.cat(scores, 1), sizes, strict=True):
            box = clip(box, *size)
            kept = ((box[:, 2:] - box[:, :2]) >= SMALLEST).all(1) & (score >= config.proposal_score)
            box, score, level = box[kept], score[kept].to(box.dtype), of_level[kept]
            out.append(box[batched_nms(box, score, level, config.proposal_nms)[:after]])
        return out

    def losses(
        self, groups: Sequence[Found], targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Means over the anchors drawn: "rpn_class", binary cross-entropy, and "rpn_box", smooth L1.

        groups: of images of one size each, one after another. targets: of all of them.
        """
        config, dtype = self.config, groups[0].anchors.dtype
        logits, truth, deltas, wanted = [], [], [], []
        images = [(found, i) for found in groups for i in range(len(found.logits))]
        for (found, i), target in zip(images, targets, strict=True):
            anchors = found.anchors
            objects = target["boxes"].to(anchors)
            matched = match(
                anchors,
                objects,
                high=config.proposal_ious[1],
                low=config.proposal_ious[0],
                every_object=True,
            )
            positive, negative = sample(
                matched, config.proposal_samples, config.proposal_positive_share
            )
            logits += [found.logits[i, positive], found.logits[i, negative]]
            truth += [torch.ones_like(logits[-2]), torch.zeros_like(logits[-1])]
            deltas.append(found.deltas[i, positive])
            wanted.append(encode(objects[matched[positive]], anchors[positive]))
        number = max(1, sum(map(len, logits)))
        asked, truly = torch.cat(logits).to(dtype), torch.cat(truth).to(dtype)
        entropy = F.binary_cross_entropy_with_logits(asked, truly, reduction="sum")
        apart = F.smooth_l1_loss(
            torch.cat(deltas).to(dtype),
            torch.cat(wanted),
            reduction="sum",
            beta=config.proposal_beta,
        )
        return {"rpn_class": entropy / number, "rpn_box": apart / number}
