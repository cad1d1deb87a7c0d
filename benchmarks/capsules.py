"""Many tasks on one backbone: capsules beside vit-pytorch's Adapter, a pass of the network each.

    python benchmarks/capsules.py [--quick] [--threads N] [--clock wall] [--json FILE]

ViT-Ti/16 at 224 x 224, batch 8, fp32, inference; five rows of memory in each block, 100 classes a task.

base alone: the classifier without any task, beside vit-pytorch's ViT of the same shape.
base + N: its own answers and those of N tasks. The peer runs its ViT and N Adapters around it, each the whole
network: its time is that of the ViT and N times that of one Adapter, both measured in the same round.

That the base answers the same bit for bit, and each task as its model alone, is checked first. The last lines
say what N tasks cost in units of the base alone, ours of ours and the peer's of its own; medians over rounds.
"""

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitrail.adapt.capsules import Capsules, capsule_of, save_capsule
from vitrail.bench.harness import Row, arguments, interleave, report, summary, threads
from vitrail.models import create_model

NAME, SIZE, BATCH, ROWS, CLASSES = "vit_tiny_patch16", 224, 8, 5, 100
COUNTS = (1, 5, 20)


def tasks_on(base: nn.Module, count: int) -> list[Any]:
    """Models of `count` tasks on one base, with answers."""
    weights = {"backbone": base.backbone.state_dict()}
    models = []
    for _ in range(count):
        model = create_model(
            f"memory/{NAME}", num_classes=CLASSES, weights=weights, head={"rows": ROWS}
        )
        nn.init.normal_(model.head.fc.weight)
        models.append(model.eval())
    return models


def check(base: nn.Module, both: Capsules, models: list[Any], images: Tensor) -> None:
    """Raise unless all answer as each does alone."""
    found = both.predict(images)
    same = torch.equal(found["base"], base(images)) and all(
        torch.equal(found[f"task {i}"], model(images)) for i, model in enumerate(models)
    )
    if not same:
        raise SystemExit("tasks in one pass do not answer as each does alone")


def peers() -> list[nn.Module]:
    """vit-pytorch's ViT of the same shape and an Adapter around it; none where it is not installed."""
    if find_spec("vit_pytorch") is None:
        return []
    from vit_pytorch.learnable_memory_vit import Adapter, ViT

    shape = {"dim": 192, "depth": 12, "heads": 3, "dim_head": 64, "mlp_dim": 768}
    vit = ViT(image_size=SIZE, patch_size=16, num_classes=1000, **shape).eval()
    memory = {"num_memories_per_layer": ROWS, "num_classes": CLASSES}
    return [vit, Adapter(vit=vit, **memory).eval()]


def row_of(name: str, ours: list[float], peer: list[float] | None) -> Row:
    middle, spread = summary(ours)
    if peer is None:
        return Row(name=name, ours=middle, ours_spread=spread, rounds=len(ours))
    ratio = statistics.median(p / o for o, p in zip(ours, peer, strict=True))
    theirs = dict(zip(("peer", "peer_spread"), summary(peer), strict=True))
    return Row(
        name=name,
        ours=middle,
        ours_spread=spread,
        ratio=round(ratio, 3),
        rounds=len(ours),
        **theirs,
    )


def cost(times: list[float], base: list[float]) -> float:
    """In units of the base, the median over rounds."""
    return round(statistics.median(t / b for t, b in zip(times, base, strict=True)), 3)


def size_of(model: nn.Module) -> int:
    """Bytes of its capsule."""
    with tempfile.TemporaryDirectory() as folder:
        save_capsule(model, Path(folder) / "task.capsule")
        return (Path(folder) / "task.capsule").stat().st_size


def main() -> None:
    given = arguments(__doc__.splitlines()[0], clock="cpu").parse_args()
    torch.manual_seed(0)
    with threads(given.threads), torch.no_grad():
        base = create_model(NAME).eval()
        images = torch.randn(BATCH, 3, SIZE, SIZE)
        models = tasks_on(base, max(COUNTS))
        calls: list[Callable[[], object]] = [partial(base, images)]
        for count in COUNTS:
            both = Capsules(base)
            for i, model in enumerate(models[:count]):
                both.attach(capsule_of(model, f"task {i}"))
            check(base, both, models[:count], images)
            calls.append(partial(both, images))
        calls += [partial(model, images) for model in peers()]
        seconds = 15 if given.quick else 120
        found = interleave(calls, seconds=seconds, min_rounds=3, warmup=1, clock=given.clock)
    ours, theirs = found[: len(COUNTS) + 1], found[len(COUNTS) + 1 :]
    rows, costs, peer_costs = [], {}, {}
    for count, times in zip((0, *COUNTS), ours, strict=True):
        name = f"base + {count}" if count else "base alone"
        peer = None
        if theirs:
            vit, adapter = theirs
            peer = [v + count * a for v, a in zip(vit, adapter, strict=True)]
            peer_costs[name] = cost(peer, vit)
        rows.append(row_of(name, times, peer))
        costs[name] = cost(times, ours[0])
    size = size_of(models[0])
    facts = {"clock": given.clock, "of_base_alone": costs, "peer_of_base_alone": peer_costs}
    report(rows, json_file=given.json, bytes_of_a_capsule=size, **facts)
    for name, of in costs.items():
        peer = f" (peer {peer_costs[name]:.2f})" if theirs else ""
        print(f"{name}: {of:.2f} of base alone{peer}")
    print(f"a capsule of {CLASSES} classes and {ROWS} rows: {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
