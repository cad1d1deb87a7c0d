"""Pages of `vitrail inspect collapse` and `vitrail inspect heads`: what was found, in words and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from vitrail.analysis import page
from vitrail.analysis.attention import (
    AttentionStudy,
    LayerStudy,
    StageStudy,
    places_of,
    received,
    record_attention,
)
from vitrail_runtime.preprocess import Preprocessing

COLOURS = ("#2f6fb3", "#b8433f", "#2d8a57", "#8a5aa8", "#c9822b", "#4b5563")
RANDOM = (
    "The weights of {0} are random: fresh attention is almost even, so its maps are alike everywhere. "
    "Load weights or a trained run to learn about a trained model."
)
REACH = 4  # neighbours that the page looks ahead


def collapse_words(study: AttentionStudy, threshold: float, within: int = 1) -> str:
    """What the similarities say, in one or two sentences."""
    near = study.neighbours()
    total = sum(len(stage.layers) for stage in study.stages)
    if not near.size:
        return f"{study.model}: no two attention blocks have maps of one shape to compare."
    found = len(study.similar(threshold, within))
    before = "the block before" if within == 1 else f"one of the {within} blocks before"
    words = (
        f"{study.model}: {found} of {total} attention blocks have maps at least {threshold:.2f} similar to "
        f"{before}; neighbours are {near.mean():.2f} similar on average"
    )
    if len(study.stages) == 1 and len(near) >= 6:
        third = len(near) // 3
        first, last = near[:third].mean(), near[-third:].mean()
        if abs(last - first) > 0.02:
            way = "rising" if last > first else "falling"
            words += f", {way} from {first:.2f} in the first third of the depth to {last:.2f} in the last"
    return words + "."


def heads_words(study: AttentionStudy) -> str:
    """What similarity between heads and distances say, in a few sentences."""
    layers = [layer for layer in study.layers if not layer.trivial]
    several = [layer for layer in layers if layer.heads > 1]
    if several:
        mean = float(np.mean([layer.most_alike for layer in several]))
        worst = max(several, key=lambda layer: layer.most_alike)
        words = (
            f"{study.model}: a head's map is {mean:.2f} similar to that of the head most like it, the mean "
            f"over {len(several)} layers; the most alike heads are in {worst.name} ({worst.most_alike:.2f})"
        )
    else:
        words = f"{study.model}: no layer has heads to compare"
    distances = [float(layer.distance.mean()) for layer in layers if layer.distance is not None]
    if distances:
        words += (
            f". A patch attends {distances[0]:.0f} pixels away on average in the first layer and "
            f"{distances[-1]:.0f} in the last"
        )
    if len(layers) < len(study.layers):
        left = len(study.layers) - len(layers)
        words += f". Left out: {left} layers where there is only one token to attend to"
    return words + "."


def collapse_page(
    path: Path,
    studies: Sequence[AttentionStudy],
    shown: Mapping[str, Any],
    *,
    threshold: float,
    within: int = 1,
    random: Sequence[str] = (),
) -> Path:
    """Write the page that compares blocks, of one model or of several side by side.

    shown: model name -> HTML of attention maps over a picture (`attention_pictures`).
    random: names of those with random weights, which the page then says.
    """
    words = [collapse_words(study, threshold, within) for study in studies]
    out = page.Page("Attention from block to block", words[0] if len(words) == 1 else "")
    out.tiles(
        tile
        for study in studies
        for near in (study.neighbours(),)
        for tile in (
            (
                f"{len(study.similar(threshold, within))} of {_blocks(study)}",
                f"similar blocks, {study.model}",
            ),
            (
                f"{near.mean():.2f}" if near.size else "none",
                f"similarity of neighbours, {study.model}",
            ),
        )
    )
    said = [*words, *(RANDOM.format(name) for name in random)]
    out.section("What was found", page.bullets(said))
    out.section(
        "Against depth",
        page.paragraph(
            "Similarity of each block's attention maps to the k-th next block of its stage: the cosine of "
            "what a token gives to all others, for each head, averaged over heads, tokens and "
            f"{studies[0].images} pictures. The dashed line is the threshold of {threshold:.2f}."
        ),
        page.plots(
            *(_depth_plot(studies, k, threshold) for k in (1, REACH)),
            *([_similar_plot(studies, threshold, within)] if len(studies) > 1 else []),
        ),
    )
    for study in studies:
        stages = [s for s in study.stages if len(s.layers) > 1]
        if stages:
            out.section(
                f"Every pair of blocks: {study.model}",
                _shift_note(study),
                page.plots(*(_matrix(stage) for stage in stages)),
            )
        if study.model in shown:
            out.section(f"Attention over a picture: {study.model}", shown[study.model])
    return out.write(path)


def heads_page(
    path: Path,
    studies: Sequence[AttentionStudy],
    shown: Mapping[str, Any],
    *,
    random: Sequence[str] = (),
) -> Path:
    """Write the page on the heads of each layer and how far they reach; arguments as `collapse_page`."""
    words = [heads_words(study) for study in studies]
    out = page.Page("Attention heads", words[0] if len(words) == 1 else "")
    out.section("What was found", page.bullets([*words, *(RANDOM.format(n) for n in random)]))
    out.section(
        "How alike are the heads of a layer?",
        page.paragraph(
            "For each head the cosine similarity to the head most like it, the mean over the layer's heads "
            f"and {studies[0].images} pictures. Near 1, heads compute the same thing twice."
        ),
        page.plots(_heads_plot(studies)),
    )
    for study in studies:
        known = [a for a in study.layers if a.distance is not None and not a.trivial]
        if known:
            note = "One dot per head: the mean distance in pixels between a patch and what it attends to. "
            if len(known) < len(study.layers):
                note += "Layers of one token, or whose geometry is not known, are left out. "
            out.section(
                f"How far do heads reach? {study.model}",
                page.paragraph(note + "Local heads lie low, global ones high."),
                page.plots(_distance_plot(known)),
            )
        out.section(f"Layer by layer: {study.model}", _layer_table(study))
        if study.model in shown:
            out.section(f"Attention over a picture: {study.model}", shown[study.model])
    return out.write(path)


def attention_pictures(
    backbone: nn.Module,
    image: Tensor,
    preprocessing: Preprocessing,
    *,
    name: str = "",
    blocks: int = 4,
    heads: int = 3,
) -> str:
    """HTML: the attention that each place of one preprocessed picture (3, H, W) receives, in a few heads of a
    few blocks from the first to the last."""
    device = next(backbone.parameters()).device
    layers, features = record_attention(backbone, image.to(device), name)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (preprocessing.mean, preprocessing.std))
    pixels = ((image.cpu() * std + mean) * 255).round().clamp(0, 255)
    picture = pixels.to(torch.uint8).permute(1, 2, 0).numpy()
    names = [name for name, weights in layers.items() if weights.shape[-1] > 1] or list(layers)
    chosen = sorted({round(i) for i in np.linspace(0, len(names) - 1, min(blocks, len(names)))})
    drawn, lost = [(page.Image.fromarray(picture), "the picture, as the model gets it")], []
    for layer in (names[i] for i in chosen):
        weights = layers[layer]
        places = places_of(backbone, layer, features)
        if places is None:
            lost.append(layer)
            continue
        maps = received(weights, places).numpy()
        for head in range(min(heads, len(maps))):
            drawn.append((page.heat(picture, maps[head]), f"{layer}, head {head}"))
    asks = "the class token" if features.prefix is not None else "all patches, on average,"
    text = f"Bright: what {asks} attend{'s' if features.prefix is not None else ''} to."
    if lost:
        text += f" Not drawn, for their geometry is not known: {', '.join(lost)}."
    return page.paragraph(text) + page.gallery(drawn)


def _depth_plot(studies: Sequence[AttentionStudy], k: int, threshold: float) -> str:
    fig, ax = page.figure(5.0, 3.3)
    for i, study in enumerate(studies):
        at, colour, label = 0, COLOURS[i % len(COLOURS)], page.shortened(study.model)
        for stage in study.stages:
            values = stage.to_next(k)
            if values.size:
                x = np.arange(at, at + len(values))
                ax.plot(x, values, "o-", color=colour, markersize=3.5, linewidth=1.4, label=label)
                label = None  # stages of one model are pieces of one line
            at += len(stage.layers)
    ax.axhline(threshold, color=page.INK, linewidth=1, linestyle="--")
    ax.set_ylim(top=1.02)
    _numbered(ax, "block", f"similarity to the {'next' if k == 1 else f'{k}th next'} block")
    if ax.lines[:-1]:
        ax.legend(frameon=False, fontsize=9)
    return page.svg(fig)


def _numbered(ax: Any, label: str, title: str) -> None:
    """An axis of whole numbers."""
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(label)
    ax.set_title(title, fontsize=11)


def _similar_plot(studies: Sequence[AttentionStudy], threshold: float, within: int) -> str:
    fig, ax = page.figure(5.0, 3.3)
    at = range(len(studies))
    counts = [len(study.similar(threshold, within)) for study in studies]
    ax.barh(at, [_blocks(s) for s in studies], color=page.SOFT, label="blocks")
    ax.barh(at, counts, color=[COLOURS[i % len(COLOURS)] for i in at])
    ax.set_yticks(at, [page.shortened(study.model) for study in studies])
    ax.invert_yaxis()
    _numbered(ax, "", "similar blocks of all attention blocks")
    return page.svg(fig)


def _matrix(stage: StageStudy) -> str:
    size = 2.6 + 0.08 * len(stage.layers)
    fig, ax = page.figure(size + 0.6, size)
    drawn = ax.imshow(stage.similarity, vmin=0, vmax=1, cmap="viridis")
    ax.grid(False)
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    _numbered(ax, "", stage.name or "blocks")
    fig.colorbar(drawn, ax=ax, shrink=0.8)
    return page.svg(fig)


def _heads_plot(studies: Sequence[AttentionStudy]) -> str:
    fig, ax = page.figure(7.2, 3.4)
    for i, study in enumerate(studies):
        alike = {
            n: layer.most_alike
            for n, layer in enumerate(study.layers)
            if layer.heads > 1 and not layer.trivial
        }
        look = {"color": COLOURS[i % len(COLOURS)], "markersize": 4, "linewidth": 1.4}
        ax.plot(
            *zip(*alike.items(), strict=True) if alike else ([], []),
            "o-",
            label=page.shortened(study.model),
            **look,
        )
    ax.set_ylim(0, 1.02)
    _numbered(ax, "attention layer", "similarity of a head to the one most like it")
    ax.legend(frameon=False, fontsize=9)
    return page.svg(fig)


def _distance_plot(layers: Sequence[LayerStudy]) -> str:
    fig, ax = page.figure(7.2, 3.4)
    top, how = 0.0, {"color": page.ACCENT, "alpha": 0.8, "linewidths": 0}
    for i, layer in enumerate(layers):
        assert layer.distance is not None
        heads = np.sort(layer.distance)
        ax.scatter(np.full(len(heads), i), heads, s=18, clip_on=False, **how)
        top = max(top, float(heads[-1]))
    ax.set_ylim(0, 1.05 * top or 1.0)  # room for whole dots, also where all are about equal
    ax.set_ylabel("pixels")
    _numbered(ax, "attention layer", "mean attention distance of each head")
    return page.svg(fig)


def _layer_table(study: AttentionStudy) -> str:
    rows = [
        (
            layer.name,
            f"{layer.tokens[0]} x {layer.tokens[1]}",
            layer.heads,
            layer.most_alike if layer.heads > 1 else "one head",
            layer.mean_alike if layer.heads > 1 else "",
            "not known" if layer.distance is None else _span(layer.distance),
        )
        for layer in study.layers
    ]
    header = ("layer", "queries x keys", "heads", "to the most alike", "all pairs", "distance, px")
    return page.table(header, rows)


def _shift_note(study: AttentionStudy) -> str:
    """Windows of neighbouring Swin blocks hold other tokens: only the pattern within them is compared."""
    if not any(name.startswith("layers.") for name in study.stages[0].layers):
        return ""
    return page.paragraph(
        "Windows are shifted from block to block, so the same place of a window is another token: the "
        "pattern within windows is what is compared."
    )


def _span(distance: np.ndarray) -> str:
    return f"{distance.min():.0f} to {distance.max():.0f}"


def _blocks(study: AttentionStudy) -> int:
    return sum(len(stage.layers) for stage in study.stages)
