"""A slimmer model from a trained one: queries, keys and the hidden layers of FFNs shrink, values stay, as in
EfficientViT (Liu et al., CVPR 2023, https://arxiv.org/abs/2305.07027, section 2.3). What goes is decided by
Taylor importance (Molchanov et al., ICLR 2017, https://arxiv.org/abs/1611.06440)."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vitrail.analysis.importance import Importance, Rows, slices
from vitrail.backbones.vit import ViTConfig
from vitrail.classifiers import Classifier
from vitrail.models import ModelInfo, assemble, describe
from vitrail.registry import with_fields
from vitrail_runtime.errors import InputError

STEPS = {"QK": 4, "FFN": 8}  # widths are multiples of these, which kernels like


@dataclass(frozen=True)
class Slimming:
    """What to keep. config: the slimmer one. kept: the channels of each slice, rising; slices that are not
    named keep all. widths: (stage, "QK" or "FFN", before, after), the channels of one head or one FFN."""

    config: Any
    kept: Mapping[str, Tensor]
    widths: tuple[tuple[int, str, int, int], ...]


def propose(model: Classifier, found: Importance, keep: float) -> Slimming:
    """The most important `keep` of the channels of queries and keys, and as much of those of FFNs.

    A query channel and its key channel go together: their scores are added. Channels compete over the whole
    network, by scores relative to those of their own layer (2017, equation 8, but by the root mean square,
    so that width does not count), and a stage where fewer matter gets narrower; within a stage the config
    has one width, so each head and each FFN keeps as many, its own best. Widths are multiples of 4 and 8,
    where they were wider than twice that.

    keep: in (0, 1]; 1 changes nothing.
    """
    if not 0 < keep <= 1:
        raise InputError(f"the share of channels to keep must lie in (0, 1], but is {keep}")
    groups = _groups(found)
    shares = _shares(groups, keep)
    kept: dict[str, Tensor] = {}
    widths = []
    for (stage, kind), group in groups.items():
        before = len(next(iter(group.values())))
        wanted = shares[stage, kind] * before
        after = before if keep == 1 else _rounded(wanted, before, STEPS[kind])
        widths.append((stage, kind, before, after))
        for name, scores in group.items():
            best = scores.sort(descending=True, stable=True).indices[:after].sort().values
            for part in ("Q", "K") if kind == "QK" else ("FFN",):
                kept[f"{name}.{part}"] = best
    return Slimming(slim_config(model.info.config, widths), kept, tuple(widths))


def slim_config(config: Any, widths: Sequence[tuple[int, str, int, int]]) -> Any:
    """`config` with the widths (stage, "QK" or "FFN", before, after); a width that stays leaves its field."""
    fields: dict[str, Any] = {}
    for kind in ("QK", "FFN"):
        mine = {stage: after for stage, k, _, after in widths if k == kind}
        if not any(k == kind and before != after for _, k, before, after in widths):
            continue
        if isinstance(config, ViTConfig):
            (width,) = mine.values()
            fields |= {"qk_dim": width} if kind == "QK" else {"mlp_ratio": width / config.embed_dim}
        else:
            each = tuple(mine[i] for i in range(len(config.dims)))
            ratios = tuple(w / dim for w, dim in zip(each, config.dims, strict=True))
            fields |= {"key_dim": each} if kind == "QK" else {"ffn_ratio": ratios}
    return with_fields("the slimmer model", config, fields)


def prune(model: Classifier, plan: Slimming) -> Classifier:
    """The slimmer model with the kept channels of `model`, for fine-tuning; `model` stays as it is.

    Attention divides its products by the root of the queries' width; the kept queries take the change of
    that root along, so that a channel which did nothing can go without any change of the result.
    """
    parts = {a.name: a for a in slices(model.backbone)}
    for name in plan.kept:
        if name not in parts:
            raise InputError(
                f"the plan names {name}, which this model has not; plan for this model"
            )
    state = {k: v.detach().clone() for k, v in model.state_dict().items()}
    gone: dict[tuple[str, int], set[int]] = defaultdict(set)
    for name, kept in plan.kept.items():
        part = parts[name]
        if part.part == "Q" and len(kept) != part.count:
            for rows in part.gain:
                _place(state, rows).mul_((len(kept) / part.count) ** 0.5)
        drop = set(range(part.count)) - set(kept.tolist())
        for rows in (*part.made_by, *part.read_by):
            gone[rows.key, rows.dim] |= {rows.start + i for i in drop}
    for (key, dim), drop in gone.items():
        tensor = state[f"backbone.{key}"]
        stay = [i for i in range(tensor.shape[dim]) if i not in drop]
        index = torch.tensor(stay, device=tensor.device)
        state[f"backbone.{key}"] = tensor.index_select(dim, index)
    info: ModelInfo = model.info
    configs = {**info.parts, "backbone": plan.config}
    with torch.device("meta"):
        slim = assemble(info.name, configs, len(info.classes))
    slim.load_state_dict(state, assign=True)
    describe(slim, ModelInfo(info.name, configs, info.classes, info.preprocessing))
    return slim.train(model.training)


def _groups(found: Importance) -> dict[tuple[int, str], dict[str, Tensor]]:
    """(stage, "QK" or "FFN") -> layer or head -> the scores of its channels."""
    scores = {a.name: s for a, s in zip(found.slices, found.scores, strict=True)}
    groups: dict[tuple[int, str], dict[str, Tensor]] = {}
    for a in found.slices:
        name = a.name.rpartition(".")[0]
        if a.part == "Q":
            group = groups.setdefault((a.stage, "QK"), {})
            group[name] = scores[a.name] + scores[f"{name}.K"]
        elif a.part == "FFN":
            groups.setdefault((a.stage, "FFN"), {})[name] = scores[a.name]
    return groups


def _shares(
    groups: Mapping[tuple[int, str], Mapping[str, Tensor]], keep: float
) -> dict[tuple[int, str], float]:
    """How much of each group is among the best `keep` of its kind, and matters at all."""
    shares = {}
    for kind in STEPS:
        scores = {
            g: torch.cat([x / x.square().mean().sqrt().clamp(min=1e-30) for x in s.values()])
            for g, s in groups.items()
            if g[1] == kind
        }
        if not scores:
            continue
        joined = torch.cat(list(scores.values()))
        best = torch.zeros(len(joined))
        best[joined.sort(descending=True, stable=True).indices[: round(keep * len(joined))]] = 1
        best[joined == 0] = 0
        parts = best.split([len(s) for s in scores.values()])
        shares |= {g: float(part.mean()) for g, part in zip(scores, parts, strict=True)}
    return shares


def _rounded(wanted: float, before: int, step: int) -> int:
    if before < 2 * step:
        step = 1
    return min(before, max(step, round(wanted / step) * step))


def _place(state: dict[str, Tensor], rows: Rows) -> Tensor:
    return state[f"backbone.{rows.key}"].narrow(rows.dim, rows.start, rows.count)
