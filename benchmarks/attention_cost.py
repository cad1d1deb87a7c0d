"""Time and memory of MobileViT's attention and of MobileViTv2's separable attention against the number of
tokens, and the exponents of the power laws fitted to them.

python benchmarks/attention_cost.py [--quick] [--picture FILE] [--json FILE]

Attention runs in two forms: as the paper writes it, with the matrix of weights, and fused, where PyTorch
never stores that matrix. Time is a forward pass without gradients; memory is what autograd keeps for the
backward pass, counted exactly from the saved tensors, weights of the layer left out.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.analysis import page
from vitrail.backbones.mobilevit import Attention
from vitrail.backbones.mobilevitv2 import SeparableAttention
from vitrail.bench.harness import Clock, Row, arguments, interleave, report, summary, threads

DIM, HEADS = 96, 4  # MobileViT-XS's first transformer
SIDES = (16, 24, 32, 48, 64, 80)
QUICK = (16, 32, 48, 64)
FURTHER = (96, 112)  # for the separable one alone: there attention's matrix would take GiBs
FIT_FROM = 1024  # tokens; below, calls and projections hide what is measured


@dataclass
class Curve:
    """One layer's cost against tokens. exponents: of time and of memory."""

    name: str
    colour: str
    width: float
    tokens: list[int]
    milliseconds: list[float]
    spread: list[float]
    megabytes: list[float]
    rounds: list[int]
    exponents: tuple[float, float] = (math.nan, math.nan)


def layers() -> list[tuple[Curve, nn.Module, Callable[[nn.Module, Tensor], Tensor]]]:
    """(an empty curve, the layer, how it runs on a map (1, DIM, side, side))."""
    torch.manual_seed(0)
    attention, separable = Attention(DIM, HEADS), SeparableAttention(DIM, patch_size=1)

    def tokens(x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)

    def curve(name: str, colour: str, width: float = 1.6) -> Curve:
        return Curve(name, colour, width, [], [], [], [], [])

    return [
        (curve("MobileViT attention", page.BAD), attention, lambda m, x: m(tokens(x), record={})),
        (curve("the same, fused", "#e0a45c", 4.5), attention, lambda m, x: m(tokens(x))),
        (curve("MobileViTv2 separable", page.ACCENT), separable, lambda m, x: m(x)),
    ]


def held_bytes(layer: nn.Module, run: Callable[[nn.Module, Tensor], Tensor], x: Tensor) -> int:
    """Bytes of all storages that autograd keeps for the backward pass, but for the layer's own weights."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    held: dict[int, Tensor] = {}  # kept alive, so that no address is used twice

    def keep(t: Tensor) -> Tensor:
        held.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run(layer, x.requires_grad_(True))
    return sum(t.untyped_storage().nbytes() for a, t in held.items() if a not in own)


def exponent(tokens: Sequence[int], values: Sequence[float]) -> float:
    """Slope of the least-squares line through the logarithms, from FIT_FROM tokens on."""
    points = [
        (math.log(n), math.log(v)) for n, v in zip(tokens, values, strict=True) if n >= FIT_FROM
    ]
    slope, _ = np.polyfit(*zip(*points, strict=True), 1)
    return float(slope)


def measure(sides: Sequence[int], seconds: float, clock: Clock) -> list[Curve]:
    curves = []
    for curve, layer, run in layers():
        linear = isinstance(layer, SeparableAttention)
        for side in (*sides, *FURTHER) if linear else sides:
            g = torch.Generator().manual_seed(side)
            x = torch.randn(1, DIM, side, side, generator=g)
            how = {"seconds": seconds, "min_rounds": 3, "max_rounds": 100, "clock": clock}
            with torch.inference_mode():
                (times,) = interleave([partial(run, layer, x)], **how)
            middle, spread = summary(times)
            curve.tokens.append(side * side)
            curve.milliseconds.append(middle)
            curve.spread.append(spread)
            curve.rounds.append(len(times))
            curve.megabytes.append(held_bytes(layer, run, x) / 2**20)
        curve.exponents = (
            exponent(curve.tokens, curve.milliseconds),
            exponent(curve.tokens, curve.megabytes),
        )
        print(f"{curve.name}: measured at {len(curve.tokens)} sizes", flush=True)
        curves.append(curve)
    return curves


def draw(curves: Sequence[Curve], path: Path) -> None:
    """Both costs on logarithmic axes, the exponents in the legends."""
    from matplotlib import pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(9.6, 3.9), layout="constrained")
    kinds = (
        ("time, ms", "milliseconds", 0),
        ("memory held for the backward pass, MiB", "megabytes", 1),
    )
    for ax, (title, values, which) in zip(axes, kinds, strict=True):
        for curve in curves:
            label = f"{curve.name}: N^{curve.exponents[which]:.2f}"
            ax.loglog(
                curve.tokens,
                getattr(curve, values),
                "o-",
                color=curve.colour,
                label=label,
                linewidth=curve.width,
                markersize=4,
            )
        ax.set_title(title, fontsize=11, loc="left")
        ax.set_xlabel("tokens N")
        ticks = curves[-1].tokens[::2]
        ax.set_xticks(ticks, [f"{n:,}" for n in ticks], minor=False)
        ax.minorticks_off()
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(True, color=page.SOFT, linewidth=0.8)
        ax.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(fig)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--picture", type=Path, metavar="FILE", help="draw the curves into this PNG"
    )
    flags = parser.parse_args()
    sides = QUICK if flags.quick else SIDES
    with threads(flags.threads):
        curves = measure(sides, 1.0 if flags.quick else 2.0, flags.clock)
    if flags.picture is not None:
        draw(curves, flags.picture)
    rows = [
        Row(
            name=f"{c.name}, {n} tokens, {c.megabytes[i]:.1f} MiB",
            ours=c.milliseconds[i],
            ours_spread=c.spread[i],
            rounds=c.rounds[i],
        )
        for c in curves
        for i, n in enumerate(c.tokens)
    ]
    facts = {
        "what": f"attention of width {DIM} on N tokens, batch 1, fp32; exponents from {FIT_FROM} tokens on",
        "clock": flags.clock,
        "tokens": {c.name: c.tokens for c in curves},
        "megabytes": {c.name: c.megabytes for c in curves},
        "exponents": {
            c.name: dict(zip(("time", "memory"), c.exponents, strict=True)) for c in curves
        },
    }
    report(rows, json_file=flags.json, **facts)
    print("\n| layer | time grows as | memory grows as |\n|---|---|---|")
    for c in curves:
        print(f"| {c.name} | N^{c.exponents[0]:.2f} | N^{c.exponents[1]:.2f} |")


if __name__ == "__main__":
    main()
