"""Deformable attention: ours beside the grid-sample form that transformers and the official code run.

    python benchmarks/deform_attn.py --json deform_attn.json
    python benchmarks/deform_attn.py --device cuda

The shapes are ViT-CoMer-Small's at 640 x 640: 8,400 queries and as many values in levels of 80, 40 and 20 a
side, 6 heads of 64, 4 points. Points lie within some cells of their query, as a trained network's do, and a
few outside. Before anything is timed, outputs and gradients of both are compared.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.models.deformable_detr.modeling_deformable_detr import (
    MultiScaleDeformableAttention,
)

from vitrail.bench.harness import Row, arguments, compare, report, threads
from vitrail.ops.ms_deform_attn import automatic, ms_deform_attn

SHAPES = ((80, 80), (40, 40), (20, 20))
HEADS, WIDTH, POINTS = 6, 64, 4
CELLS = 4.0  # standard deviation of a point's distance from its query


def inputs(dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """value, locations, weights of one image."""
    torch.manual_seed(0)
    centres = []
    for height, width in SHAPES:
        y, x = torch.meshgrid(
            (torch.arange(height) + 0.5) / height,
            (torch.arange(width) + 0.5) / width,
            indexing="ij",
        )
        centres.append(torch.stack([x.flatten(), y.flatten()], -1))
    reference = torch.cat(centres)[None, :, None, None, None]  # (1, Q, 1, 1, 1, 2)
    queries, levels = reference.shape[1], len(SHAPES)
    sizes = torch.tensor(SHAPES).flip(1)[:, None]
    offsets = CELLS * torch.randn(1, queries, HEADS, levels, POINTS, 2)
    weights = torch.randn(1, queries, HEADS, levels * POINTS).softmax(-1)
    value = torch.randn(1, queries, HEADS, WIDTH)
    given = value, reference + offsets / sizes, weights.unflatten(-1, (levels, POINTS))
    value, locations, weights = (x.to(device) for x in given)
    return value.to(dtype), locations, weights.to(dtype)


def peer(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    shapes = torch.tensor(SHAPES, device=value.device)
    starts = torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]))
    # Its grid_sample wants one dtype for maps and points.
    return MultiScaleDeformableAttention()(
        value, shapes, SHAPES, starts, locations.to(value.dtype), weights, 64
    )


def ours(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return ms_deform_attn(value, SHAPES, locations, weights)


def plain(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return ms_deform_attn(value, SHAPES, locations, weights, implementation="plain")


def backward(form: Callable[..., Tensor], given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in given]
    return torch.autograd.grad(form(*leaves).float().square().mean(), leaves)


def check(given: tuple[Tensor, Tensor, Tensor]) -> None:
    """Raise unless both say the same."""
    tolerance = 1e-4 if given[0].dtype == torch.float32 else 5e-2
    found = (ours(*given), *backward(ours, given)), (peer(*given), *backward(peer, given))
    for a, b in zip(*found, strict=True):
        worst = float((a - b).abs().max() / b.abs().max())
        if worst > tolerance:
            raise SystemExit(f"ours and the peer differ by {worst:.1e} of the largest value")


def synchronised(call: Callable[[], object], device: str) -> Callable[[], object]:
    if device == "cpu":
        return call

    def whole() -> None:
        call()
        torch.cuda.synchronize()

    return whole


def main() -> None:
    parser = arguments(__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    given = parser.parse_args()
    how = {"seconds": 5 if given.quick else 40, "clock": given.clock, "min_rounds": 3}
    rows: list[Row] = []
    with threads(given.threads):
        for dtype in (torch.float32, torch.bfloat16):
            data = inputs(dtype, given.device)
            if dtype == torch.float32:  # at 16 bits the peer's points are rounded, ours are not
                check(data)
            name = str(dtype).removeprefix("torch.")
            for other, called in ((peer, "transformers"), (plain, "plain")):
                with torch.no_grad():
                    a, b = (
                        synchronised(lambda f=f, d=data: f(*d), given.device) for f in (ours, other)
                    )
                    rows.append(compare(f"forward, {name}, beside {called}", a, b, **how))
                a, b = (
                    synchronised(lambda f=f, d=data: backward(f, d), given.device)
                    for f in (ours, other)
                )
                rows.append(compare(f"forward + backward, {name}, beside {called}", a, b, **how))
    capability = torch.backends.cpu.get_cpu_capability()
    report(rows, json_file=given.json, instructions=capability, form=automatic(data[0]))


if __name__ == "__main__":
    main()
