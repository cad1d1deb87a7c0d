"""EfficientDet (Tan, Pang and Le, "EfficientDet: Scalable and Efficient Object Detection", CVPR 2020,
https://arxiv.org/abs/1911.09070), on any backbone.

One look at the image: from a weighted bidirectional pyramid (`necks/bifpn.py`) two small networks, the same
ones at every level but for their norms, say of each anchor which classes it shows and how to move it to fit.
Nothing is proposed and pooled first; a focal loss keeps the many anchors of background from drowning the few
objects. All parts grow together with one number (`efficientdet_scales.py`).

Where paper and codes differ this follows the official code and effdet, which carries its weights: focal loss
with gamma 1.5, Huber loss with its bend at 0.1 and a weight of 50; an anchor stands for the object it
overlaps most from an IoU of 0.5 on, and the anchor that an object overlaps most stands for that object,
whatever it overlaps itself; shapes of 1.4 x 0.7 rather than of equal area. Unlike there, losses are divided
by the number of these anchors without adding one (by one, where there is none), a target that is exactly 0
counts like any other, and an image is padded with zeros to a multiple of the coarsest stride (128), not to a
square: at sizes that are both, all tensors are equal.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.boxes import anchor_grid, clip, decode, encode
from vitrail.detectors.matching import match
from vitrail.detectors.rpn import Sizes
from vitrail.features import adapt_levels, pad_to_multiple
from vitrail.necks.bifpn import BiFPN, Fusion, SeparableConv2d
from vitrail.registry import Tensors, rename_keys
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

STRIDES = (8, 16, 32)  # of the backbone's maps that are read
SMALLEST = 1e-2  # side of an answer, in pixels
PRIOR = 0.01  # what a fresh model holds each class of an anchor for


@dataclass(frozen=True, kw_only=True)
class EfficientDetConfig:
    """Of D0. Those of the other scales: `efficientdet_scales.SCALES`."""

    neck_dim: int = 64  # of the heads too
    neck_cells: int = 3
    head_convs: int = 3
    levels: int = 5  # p3 to p7
    fusion: Fusion = "fast"
    same_pad: bool = True  # max pooling as TensorFlow pads
    bias: bool = True  # convolutions before a norm have biases too, as in the official code
    norm_momentum: float = 0.01
    anchor_scale: float = 4.0  # side of the smallest square, in strides of the level
    anchor_octaves: int = 3  # sizes from one level to the next
    anchor_shapes: tuple[tuple[float, float], ...] = ((1.0, 1.0), (1.4, 0.7), (0.7, 1.4))  # (w, h)
    iou: float = 0.5  # from it on an anchor stands for an object
    alpha: float = 0.25  # weight of what is there, in the focal loss; 1 - alpha of what is not
    gamma: float = 1.5
    delta: float = 0.1  # where the Huber loss bends
    box_weight: float = 50.0
    score: float = 0.0  # below it nothing is answered
    candidates: int = 5000  # of an image, before suppression
    nms: float = 0.5
    detections: int = 100

    def __post_init__(self) -> None:
        if self.levels <= len(STRIDES):
            raise InputError(
                f"EfficientDet adds levels to the {len(STRIDES)} of the backbone: levels is at least "
                f"{len(STRIDES) + 1}, but is {self.levels}"
            )
        if self.fusion not in ("fast", "softmax", "sum"):
            raise InputError(f"fusion is 'fast', 'softmax' or 'sum', but is {self.fusion!r}")

    @property
    def num_anchors(self) -> int:
        """At each place of a map."""
        return self.anchor_octaves * len(self.anchor_shapes)


class Head(nn.Module):
    """Separable convolutions that all levels share, with norms of their own. Maps -> num_outputs channels
    each."""

    def __init__(self, config: EfficientDetConfig, num_outputs: int) -> None:
        super().__init__()
        dim = config.neck_dim
        self.convs = nn.ModuleList(
            SeparableConv2d(dim, dim, bias=config.bias) for _ in range(config.head_convs)
        )
        self.norms = nn.ModuleList(  # of each convolution, of each level
            nn.ModuleList(
                nn.BatchNorm2d(dim, eps=1e-3, momentum=config.norm_momentum)
                for _ in range(config.levels)
            )
            for _ in range(config.head_convs)
        )
        self.predict = SeparableConv2d(dim, num_outputs, bias=True)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = math.prod(module.weight.shape[1:])
                nn.init.normal_(module.weight, std=fan_in**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        out = []
        for level, x in enumerate(maps):
            for conv, norms in zip(self.convs, self.norms, strict=True):
                assert isinstance(norms, nn.ModuleList)
                x = F.silu(norms[level](conv(x)))
            out.append(self.predict(x))
        return out


class EfficientDet(nn.Module):
    """images (B, 3, H, W) of any size -> boxes, classes and scores.

    Labels are indices into `classes`. Boxes are xyxy in pixels of the input.
    """

    task = "detect"
    has_masks = False
    class_rows: Mapping[str, tuple[int, int]]  # for loading: see weights.layouts.other_classes
    # Attached by models.create_model and load:
    info: Any
    weights_report: Any
    classes: tuple[str, ...]
    preprocessing: Preprocessing

    def __init__(self, backbone: Any, config: EfficientDetConfig, num_classes: int) -> None:
        super().__init__()
        self.config = config
        self.num_classes = num_classes
        self.class_rows = {"pointwise": (config.num_anchors, 0)}
        self.backbone = backbone
        self.levels = adapt_levels(backbone.feature_specs, STRIDES)
        self.neck = BiFPN(
            self.levels.feature_specs,
            config.neck_dim,
            config.neck_cells,
            levels=config.levels,
            fusion=config.fusion,
            same_pad=config.same_pad,
            bias=config.bias,
            norm_momentum=config.norm_momentum,
        )
        self.strides = [spec.stride for spec in self.neck.feature_specs.values()]
        self.multiple = math.ceil(self.strides[-1])
        self.class_net = Head(config, config.num_anchors * num_classes)
        self.box_net = Head(config, config.num_anchors * 4)
        bias = self.class_net.predict.pointwise.bias
        assert bias is not None
        nn.init.constant_(bias, -math.log((1 - PRIOR) / PRIOR))

    def forward(self, images: Tensor, *, sizes: Sizes | None = None) -> list[dict[str, Tensor]]:
        """Of each image "boxes" (n, 4), "labels" (n,) and "scores" (n,), best first."""
        found = self.forward_tensors(images, sizes=sizes)
        counts = found.pop("count").tolist()
        return [{k: v[i, :n] for k, v in found.items()} for i, n in enumerate(counts)]

    def maps(self, images: Tensor) -> list[Tensor]:
        """What the heads read, finest first, of the padded images."""
        padded = pad_to_multiple(images, self.multiple)
        return list(self.neck(self.levels(self.backbone(padded))).values())

    def raw(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What is said of the anchors: the part whose cost follows from the size of the images alone."""
        return self.said(self.maps(images))

    def said(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (B, N, K) and deltas (B, N, 4) of the anchors; levels, rows, columns, shapes, the last
        fastest."""
        both, whole = [], torch.contiguous_format
        for head, numbers in ((self.class_net, self.num_classes), (self.box_net, 4)):
            # A copy before axes are joined: the search for a view would ask a traced graph whether a level
            # has a single place.
            levels = [x.permute(0, 2, 3, 1).clone(memory_format=whole) for x in head(maps)]
            out = torch.cat([x.reshape(len(x), -1, numbers) for x in levels], 1)
            both.append(out.to(torch.promote_types(out.dtype, torch.float32)))
        return both[0], both[1]

    def anchors(self, height: int, width: int, like: Tensor) -> Tensor:
        """(N, 4) xyxy of an image of this size, in the dtype and on the device of `like`."""
        config = self.config
        high, wide = (math.ceil(n / self.multiple) * self.multiple for n in (height, width))
        out = []
        for stride in self.strides:
            shapes = [
                (-side * w / 2, -side * h / 2, side * w / 2, side * h / 2)
                for octave in range(config.anchor_octaves)
                for side in (config.anchor_scale * stride * 2 ** (octave / config.anchor_octaves),)
                for w, h in config.anchor_shapes
            ]
            rows, columns = math.ceil(high / stride), math.ceil(wide / stride)
            out.append(anchor_grid(like.new_tensor(shapes), rows, columns, stride, offset=0.5))
        return torch.cat(out)

    def forward_tensors(
        self,
        images: Tensor,
        record: dict[str, Tensor] | None = None,
        *,
        sizes: Sizes | None = None,
    ) -> dict[str, Tensor]:
        """What is found, D = `detections` rows an image, best first.

        sizes: (height, width) of each image in a padded batch.
        record: takes of each level "p3.logits" (B, h, w, shapes, K) and "p3.deltas" (B, h, w, shapes, 4).

        Returns: "boxes" (B, D, 4), "scores" (B, D), "labels" (B, D) int64, "count" (B,) int64. Rows behind
            the count are zero. What is NaN or infinite inside is no answer, so such an image has one, whose
            box and score are NaN.
        """
        maps = self.maps(images)
        logits, deltas = self.said(maps)
        if record is not None:
            self._record(record, maps, logits, deltas)
        height, width = images.shape[-2:]
        anchors = self.anchors(height, width, logits)
        own = self._own_anchors(images, sizes)
        rows, number = self.config.detections, len(images)
        out = {
            "boxes": deltas.new_zeros(number, rows, 4),
            "scores": logits.new_zeros(number, rows),
            "labels": torch.zeros(number, rows, dtype=torch.int64, device=images.device),
            "count": torch.zeros(number, dtype=torch.int64, device=images.device),
        }
        for i in range(number):
            there = None if own is None else own[i]
            size = (height, width) if sizes is None else sizes[i]
            answers = self._best(logits[i], deltas[i], anchors, there, size)
            for name, values in zip(("boxes", "scores", "labels"), answers, strict=True):
                out[name][i, : len(values)] = values
            out["count"][i] = len(answers[0])
            if not (logits[i].isfinite().all() and deltas[i].isfinite().all()):
                out["boxes"][i, 0], out["scores"][i, 0] = math.nan, math.nan
                out["count"][i] = out["count"][i].clamp(min=1)
        return out

    def losses(
        self, images: Tensor, targets: Sequence[Mapping[str, Tensor]], *, sizes: Sizes | None = None
    ) -> dict[str, Tensor]:
        """The paper's losses, summed over the anchors; divided by `weight(targets)` they are the paper's.

        targets: of each image "boxes" (n, 4) xyxy in pixels and "labels" (n,); n may be 0. sizes: (height,
            width) of each image in a padded batch: anchors beyond them do not count.
        Returns: "class", the focal loss, and "box", the Huber loss times its weight.
        """
        logits, deltas = self.raw(images)
        height, width = images.shape[-2:]
        own, config = self._own_anchors(images, sizes), self.config
        anchors = self.anchors(height, width, deltas)
        entropy, apart = logits.new_zeros(()), deltas.new_zeros(())
        for i, target in enumerate(targets):
            matched = self.match(target["boxes"], height, width)
            positive = (matched >= 0).nonzero()[:, 0]
            index = matched[positive]
            labels = target["labels"][index].to(logits.device)
            there = logits[i] if own is None else logits[i][own[i]]
            said = logits[i, positive, labels]
            # Every class of every anchor is absent, but for those that are not.
            entropy = entropy + self._absent(there).sum() - self._absent(said).sum()
            entropy = entropy + self._present(said).sum()
            wanted = encode(target["boxes"].to(anchors)[index], anchors[positive])
            apart = apart + F.huber_loss(
                deltas[i, positive], wanted, reduction="sum", delta=config.delta
            )
        return {"class": entropy, "box": apart * (config.box_weight / 4)}

    def weight(self, targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """What `losses` are divided by: the number of anchors that stand for an object, over all images.

        It follows from the objects alone: an anchor whose centre lies beyond them overlaps none by half, nor
        more than one nearer to it. So it is the same however images are padded and shared among processes.
        """
        count = 0
        for target in targets:
            boxes = target["boxes"]
            if len(boxes):
                width, height = boxes[:, 2:].amax(0).ceil().int().tolist()
                count += int((self.match(boxes, height, width) >= 0).sum())
        return torch.tensor(float(count))

    def match(self, boxes: Tensor, height: int, width: int) -> Tensor:
        """(N,) the object that each anchor of an image of this size stands for, or `matching.BACKGROUND`."""
        boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
        anchors, iou = self.anchors(height, width, boxes), self.config.iou
        return match(anchors, boxes, high=iou, low=iou, every_object="alone")

    def _present(self, logits: Tensor) -> Tensor:
        """Focal loss of classes that are there: -alpha (1 - p)^gamma log p."""
        return self.config.alpha * (-logits).sigmoid() ** self.config.gamma * F.softplus(-logits)

    def _absent(self, logits: Tensor) -> Tensor:
        """Of those that are not: -(1 - alpha) p^gamma log(1 - p)."""
        return (1 - self.config.alpha) * logits.sigmoid() ** self.config.gamma * F.softplus(logits)

    def _own_anchors(self, images: Tensor, sizes: Sizes | None) -> Tensor | None:
        """(B, N) which anchors each image would have alone; None: all of them."""
        if sizes is None:
            return None
        high, wide = images.shape[-2:]
        everywhere = torch.ones(len(images), 1, 1, self.config.num_anchors, dtype=torch.bool)
        levels = []
        for stride in self.strides:
            full = (self._cells(high, stride), self._cells(wide, stride))
            mask = everywhere.expand(-1, *full, -1).clone()
            for own, (height, width) in zip(mask, sizes, strict=True):
                own[self._cells(height, stride) :] = False
                own[:, self._cells(width, stride) :] = False
            levels.append(mask.flatten(1))
        return torch.cat(levels, 1).to(images.device)

    def _cells(self, length: int, stride: float) -> int:
        """Of a level, along a side of so many pixels."""
        return math.ceil(math.ceil(length / self.multiple) * self.multiple / stride)

    def _best(
        self,
        logits: Tensor,
        deltas: Tensor,
        anchors: Tensor,
        own: Tensor | None,
        size: tuple[int, int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, K) and deltas (N, 4) of one image -> boxes, scores, labels, best first."""
        from torchvision.ops import batched_nms  # takes seconds to import

        config = self.config
        if own is not None:
            logits = logits.masked_fill(~own[:, None], -math.inf)
        best, place = logits.flatten().topk(min(config.candidates, logits.numel()))
        scores = best.sigmoid()
        row, label = place // self.num_classes, place % self.num_classes
        boxes = clip(decode(deltas[row], anchors[row]), *size)
        large = ((boxes[:, 2:] - boxes[:, :2]) >= SMALLEST).all(1) & (scores > config.score)
        boxes, scores, label = boxes[large], scores[large], label[large]
        keep = batched_nms(boxes, scores, label, config.nms)[: config.detections]
        return boxes[keep], scores[keep], label[keep]

    def _record(
        self, record: dict[str, Tensor], maps: Sequence[Tensor], logits: Tensor, deltas: Tensor
    ) -> None:
        shapes = self.config.num_anchors
        cells = [x.shape[-2] * x.shape[-1] * shapes for x in maps]
        for name, of in (("logits", logits), ("deltas", deltas)):
            levels = zip(self.neck.feature_specs, maps, of.split(cells, 1), strict=True)
            for level, x, part in levels:
                record[f"{level}.{name}"] = part.reshape(len(x), *x.shape[-2:], shapes, -1)


def from_effdet(state: Tensors) -> Tensors:
    """effdet's `tf_efficientdet_*` (and `efficientdet_*`, of same_pad and bias off); keys that are ours
    already stay, those of the backbone keep timm's layout. Its boxes are coded (y, x, height, width)."""
    norms = [key.split(".") for key in state if key.startswith("class_net.bn_rep.0.")]
    if not norms:
        return dict(state)
    down = max(int(parts[3]) for parts in norms)  # nodes on the way down: one less than levels

    def node(found: re.Match[str]) -> str:
        """Nodes are counted as they are computed: down from the last level but one, then up."""
        cell, number, lateral = found[1], int(found[2]), "_laterals" if found[3] else ""
        way, i = ("down", down - 1 - number) if number < down else ("up", number - down)
        return f"neck.cells.{cell}.{way}{lateral}.{i}."

    start = r"^fpn\.cell\.(\d+)\.fnode\.(\d+)\."
    out = rename_keys(
        state,
        [
            (start + r"combine\.(resample)\.\d+\.conv\.", node),
            (start + r"(?:after_combine|combine)\.()", node),
            (r"^(neck\..*)\.edge_weights$", r"\1.weights"),
            (r"^fpn\.resample\.\d+\.conv\.", "neck.extra."),
            (r"^(neck|class_net|box_net)\.(.*)conv_dw\.", r"\1.\2depthwise."),
            (r"^(neck|class_net|box_net)\.(.*)conv_pw\.", r"\1.\2pointwise."),
            (r"^(neck\..*?)(?:\.conv)?\.bn\.", r"\1.norm."),
            (r"^(class_net|box_net)\.conv_rep\.", r"\1.convs."),
            (r"^(class_net|box_net)\.bn_rep\.(\d+)\.(\d+)\.bn\.", r"\1.norms.\2.\3."),
        ],
    )
    for key in ("box_net.predict.pointwise.weight", "box_net.predict.pointwise.bias"):
        rows = out[key].unflatten(0, (-1, 4))
        out[key] = torch.stack([rows[:, i] for i in (1, 0, 3, 2)], 1).flatten(0, 1)
    return out
