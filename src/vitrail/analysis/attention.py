"""What attention does, read from what a backbone records: how alike its maps are from block to block and
from head to head, and how far they reach.

- Between blocks: DeepViT (Zhou et al., 2021, https://arxiv.org/abs/2103.11886), equation 2.
- Between heads of one block: EfficientViT (Liu et al., 2023, https://arxiv.org/abs/2305.07027), section 2.2.
- Distance: ViT (Dosovitskiy et al., ICLR 2021, https://arxiv.org/abs/2010.11929), figure 7.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.backbones import cmt, efficientvit, mobilevit, swin, vit, vit_comer
from vitrail.features import Features, FeatureSpec
from vitrail.modes import eval_mode
from vitrail_runtime.errors import InputError

Grid = tuple[int, int]
SUFFIX = ".weights"


@dataclass(frozen=True)
class Places:
    """Where the tokens of one attention layer stand on the image.

    prefix: tokens before the patches (class, registers), which stand nowhere.
    queries, keys: (rows, columns) of tokens in a group, row by row.
    query_stride, key_stride: pixels from one token to the next.
    groups: (rows, columns) of groups that attend by themselves: windows side by side, or with
        `interleaved` the places in a patch, each of which sees its like in all patches.
    size: (rows, columns) of the map; the last windows may reach beyond it.
    shift: (rows, columns) of tokens by which windows are moved down and right.
    """

    prefix: int
    queries: Grid
    keys: Grid
    query_stride: float
    key_stride: float
    size: Grid
    groups: Grid = (1, 1)
    interleaved: bool = False
    shift: Grid = (0, 0)

    def distances(self) -> Tensor:
        """(queries, keys) distances between the tokens' centres, in pixels."""
        q = _centres(self.queries, self.query_stride)
        return torch.cdist(q, _centres(self.keys, self.key_stride))

    def lay_out(self, values: Tensor) -> Tensor:
        """One value per key (groups, keys) -> a map over the image, of `size` unless keys are thinned."""
        (rows, cols), (h, w) = self.groups, self.keys
        x = values.reshape(rows, cols, h, w)
        order = (2, 0, 3, 1) if self.interleaved else (0, 2, 1, 3)
        x = x.permute(*order).reshape(rows * h, cols * w).roll(self.shift, (0, 1))
        return x[: self.size[0], : self.size[1]]


@dataclass
class LayerStudy:
    """One attention layer, averaged over images.

    head_similarity: (heads, heads) cosines of their maps. distance: (heads,) mean attention distance in
        pixels, None where the layer's geometry is not known.
    """

    name: str  # "blocks.3.attn"
    stage: str  # what blocks of one stage share: "" or "layers.2"
    block: int  # its number in the stage
    heads: int
    tokens: Grid  # queries, keys; on the largest image
    head_similarity: np.ndarray
    distance: np.ndarray | None

    @property
    def trivial(self) -> bool:
        """Whether there is one key, which every head must attend to."""
        return self.tokens[1] < 2

    @property
    def most_alike(self) -> float:
        """Mean over heads of the similarity to the head most like it (EfficientViT); 0 for one."""
        if self.heads < 2:
            return 0.0
        others = np.where(np.eye(self.heads, dtype=bool), -np.inf, self.head_similarity)
        return float(others.max(1).mean())

    @property
    def mean_alike(self) -> float:
        """Mean similarity over all pairs of heads; 0 for one head."""
        if self.heads < 2:
            return 0.0
        return float(self.head_similarity[~np.eye(self.heads, dtype=bool)].mean())


@dataclass
class StageStudy:
    """Blocks whose attention maps have one shape: `similarity` (L, L) compares each two of them."""

    name: str
    layers: list[str]
    similarity: np.ndarray

    def to_next(self, k: int = 1) -> np.ndarray:
        """(L - k,) similarity of each block to the k-th next; empty where there is none."""
        return np.diagonal(self.similarity, k) if k < len(self.layers) else np.empty(0)

    def similar(self, threshold: float, within: int = 1) -> list[str]:
        """The blocks whose maps are at least `threshold` similar to one of the `within` blocks before."""
        found = []
        for q, name in enumerate(self.layers):
            before = self.similarity[max(0, q - within) : q, q]
            if before.size and before.max() >= threshold:
                found.append(name)
        return found


@dataclass
class AttentionStudy:
    """What `study_attention` found, the mean over `images` images."""

    model: str
    images: int
    layers: list[LayerStudy] = field(default_factory=list)
    stages: list[StageStudy] = field(default_factory=list)

    def neighbours(self, k: int = 1) -> np.ndarray:
        """Similarities of blocks to their k-th next, stage after stage."""
        return np.concatenate([np.empty(0), *(stage.to_next(k) for stage in self.stages)])

    def similar(self, threshold: float, within: int = 1) -> list[str]:
        """See `StageStudy.similar`."""
        return [name for stage in self.stages for name in stage.similar(threshold, within)]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready numbers."""
        return {
            "model": self.model,
            "images": self.images,
            "stages": [
                {"name": s.name, "layers": s.layers, "similarity": s.similarity.tolist()}
                for s in self.stages
            ],
            "layers": [
                {
                    "name": layer.name,
                    "heads": layer.heads,
                    "head_similarity": layer.head_similarity.tolist(),
                    "most_alike": layer.most_alike,
                    "distance": None if layer.distance is None else layer.distance.tolist(),
                }
                for layer in self.layers
            ],
        }


def study_attention(
    backbone: nn.Module, images: Iterable[Tensor], *, name: str = ""
) -> AttentionStudy:
    """Similarities and distances of all attention layers, the mean over images. Layers where there is one
    token to attend to have trivial maps and are not compared with other blocks.

    images: preprocessed images (3, H, W), of any sizes; each is run alone, in eval mode.
    Raises InputError for a backbone that records no attention between tokens, or without images.
    """
    name = name or type(backbone).__name__
    found = [_one_image(backbone, image, name) for image in images]
    if not found:
        raise InputError(f"{name}: attention is studied on images, but there are none")
    layers, stages = defaultdict(list), defaultdict(list)
    for one in found:
        for layer in one.layers:
            layers[layer.name].append(layer)
        for stage in one.stages:  # which may be comparable on larger images only
            stages[stage.name].append(stage)
    return AttentionStudy(
        name, len(found), [*map(_mean_layer, layers.values())], [*map(_mean_stage, stages.values())]
    )


def record_attention(
    backbone: nn.Module, image: Tensor, name: str = ""
) -> tuple[dict[str, Tensor], Features]:
    """(attention weights by layer name, each (groups, heads, queries, keys); the features) of one
    preprocessed image (3, H, W), in eval mode, without gradients.

    Raises InputError for a backbone that records none.
    """
    name = name or type(backbone).__name__
    record: dict[str, Tensor] = {}
    with eval_mode(backbone), torch.no_grad():
        features = backbone(image[None], record=record)
    layers = {k.removesuffix(SUFFIX): v for k, v in record.items() if k.endswith(SUFFIX)}
    if not layers:
        separable = any(k.endswith(".scores") for k in record)
        why = (
            "its separable attention weighs each token once instead of comparing it with the others"
            if separable
            else "it has no attention"
        )
        raise InputError(
            f"{name} has no attention maps to study: {why}; take a model such as vit_tiny_patch16, "
            "deepvit_s, swin_tiny_patch4_window7 or efficientvit_m0"
        )
    return layers, features


def similarity_between_blocks(layers: Sequence[Tensor]) -> Tensor:
    """How alike the attention maps of L layers are: (L, L), ones on the diagonal.

    layers: weights (groups, heads, queries, keys), all of one shape. Two layers are compared by the cosine
    of what each key token gives to all queries, for each head, and the mean over heads and tokens is
    taken (DeepViT, equation 2).
    Raises InputError for layers of unequal shapes, which have no token in common to compare.
    """
    shapes = list(dict.fromkeys(tuple(w.shape) for w in layers))
    if len(shapes) > 1:
        raise InputError(
            f"attention maps of unequal shapes {' and '.join(map(str, shapes))} cannot be compared; "
            "compare the blocks of one stage"
        )
    unit = [nn.functional.normalize(w.float(), dim=-2).flatten() for w in layers]
    columns = layers[0].numel() // layers[0].shape[-2]
    out = torch.eye(len(layers))
    for p, a in enumerate(unit):
        for q in range(p + 1, len(unit)):
            out[p, q] = out[q, p] = torch.dot(a, unit[q]) / columns
    return out


def similarity_between_heads(weights: Tensor) -> Tensor:
    """(groups, heads, queries, keys) -> (heads, heads): cosines of whole maps, the mean over groups."""
    unit = nn.functional.normalize(weights.float().flatten(2), dim=-1)
    return (unit @ unit.transpose(1, 2)).mean(0).cpu()


def attention_distance(weights: Tensor, places: Places) -> Tensor:
    """(groups, heads, queries, keys) -> (heads,): the mean distance in pixels between a patch and the
    patches it attends to, weighted by attention (ViT, figure 7). Prefix tokens are left out; where weights
    may be negative (re-attention) their size counts.
    """
    patches = weights[..., places.prefix :, places.prefix :].float().abs()
    shares = patches / patches.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return (shares * places.distances().to(shares)).sum(-1).mean((0, 2)).cpu()


def received(weights: Tensor, places: Places) -> Tensor:
    """(groups, heads, queries, keys) -> (heads, rows, columns): the attention that each patch receives from
    the class token, or where there is none from all patches, the mean. As in `attention_distance` the size
    of a weight counts, not its sign."""
    rows = weights[:, :, :1] if places.prefix else weights
    values = rows[..., places.prefix :].float().abs().mean(2)  # (groups, heads, keys)
    return torch.stack([places.lay_out(head) for head in values.unbind(1)]).cpu()


def places_of(backbone: Any, name: str, features: Features) -> Places | None:
    """Where the tokens of attention layer `name` stand: by its paper, on the map of its stage. None for an
    attention that is not known here."""
    attn = backbone.get_submodule(name)
    specs: dict[str, FeatureSpec] = backbone.feature_specs
    level = list(specs)[-1]
    if stage := stage_of(name)[0]:
        # Stages count to the last map: the first ones of a convolutional stem give none.
        stages, index, *_ = stage.split(".")
        level = list(specs)[int(index) - len(backbone.get_submodule(stages))]
    stride, (height, width) = specs[level].stride, features.maps[level].shape[-2:]
    size = (height, width)
    match attn:
        case vit.Attention() if isinstance(backbone, vit_comer.ViTCoMer):
            # The image is padded to the coarsest stride, 32; the tokens' is half of it.
            size, stride = (2 * height, 2 * width), stride / 2
            block: Any = backbone.get_submodule(name.removesuffix(".attn"))
            if (side := block.window) is None:
                return Places(0, size, size, stride, stride, size)
            window = (side, side)
            return Places(0, window, window, stride, stride, size, _cut(size, side))
        case vit.Attention():
            prefix = 0 if features.prefix is None else features.prefix.shape[1]
            return Places(prefix, size, size, stride, stride, size)
        case cmt.Attention(sr_ratio=ratio):
            return Places(0, size, _cut(size, ratio), stride, stride * ratio, size)
        case mobilevit.Attention():
            p = backbone.config.patch_size
            grid, step = _cut(size, p), stride * p
            return Places(0, grid, grid, step, step, size, (p, p), interleaved=True)
        case swin.WindowAttention(window=side) | efficientvit.CascadedGroupAttention(window=side):
            cut, window = _cut(size, side), (side, side)
            moved = attn.shift if isinstance(attn, swin.WindowAttention) else 0
            shift = (moved if cut[0] > 1 else 0, moved if cut[1] > 1 else 0)
            return Places(0, window, window, stride, stride, size, cut, shift=shift)
    return None


def stage_of(name: str) -> tuple[str, int]:
    """("layers.2", 5) for "layers.2.blocks.5.attn", ("", 3) for "blocks.3.attn"."""
    parts = name.split(".")
    last = max(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: last - 1]), int(parts[last])


def _one_image(backbone: nn.Module, image: Tensor, name: str) -> AttentionStudy:
    recorded, features = record_attention(backbone, image, name)
    study = AttentionStudy(name, 1)
    stages: dict[str, list[str]] = defaultdict(list)
    for layer, weights in recorded.items():
        places = places_of(backbone, layer, features)
        distance = None if places is None else attention_distance(weights, places).numpy()
        stage, block = stage_of(layer)
        _, heads, queries, keys = weights.shape
        alike = similarity_between_heads(weights).numpy()
        facts = (layer, stage, block, heads, (queries, keys))
        study.layers.append(LayerStudy(*facts, alike, distance))
        if keys > 1:  # maps with one key are all ones
            stages[stage].append(layer)
    for stage, names in stages.items():
        similarity = similarity_between_blocks([recorded.pop(n) for n in names])
        study.stages.append(StageStudy(stage, names, similarity.numpy()))
    return study


def _mean_layer(found: list[LayerStudy]) -> LayerStudy:
    """Over images; the tokens of the largest."""
    distances = [one.distance for one in found if one.distance is not None]
    return replace(
        found[0],
        tokens=max(one.tokens for one in found),
        head_similarity=np.mean([one.head_similarity for one in found], 0),
        distance=np.mean(distances, 0) if distances else None,
    )


def _mean_stage(found: list[StageStudy]) -> StageStudy:
    return replace(found[0], similarity=np.mean([one.similarity for one in found], 0))


def _cut(size: Grid, side: int) -> Grid:
    return -(-size[0] // side), -(-size[1] // side)


def _centres(grid: Grid, stride: float) -> Tensor:
    y, x = torch.meshgrid(
        torch.arange(grid[0], dtype=torch.float32),
        torch.arange(grid[1], dtype=torch.float32),
        indexing="ij",
    )
    return (torch.stack((y, x), -1).reshape(-1, 2) + 0.5) * stride
