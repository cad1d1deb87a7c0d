"""Inputs on which the kernels are compared, and, run as a program, what Triton's interpreter makes of them.

    TRITON_INTERPRET=1 python -m tests.ops.kernel_cases FILE

Triton decides at import whether it interprets, so this needs a process of its own.
"""

import sys

import torch

from vitrail.ops.ms_deform_attn import ms_deform_attn

CASES = {  # shapes, batch, queries, heads, width, points, dtype of value, dtype of locations and weights
    "three_levels": ([(3, 5), (2, 2), (1, 1)], 2, 3, 2, 3, 2, "float32", "float32"),
    # 1024 // 256 queries a program: five need a second one, which is not full
    "two_blocks": ([(4, 3)], 1, 5, 1, 200, 1, "float32", "float32"),
    "bfloat16": ([(3, 5), (1, 2)], 2, 3, 2, 4, 2, "bfloat16", "bfloat16"),
    "float16": ([(3, 5), (1, 2)], 1, 3, 2, 4, 2, "float16", "float32"),
}


def draw(name):
    """value, locations (some outside) and weights of a case."""
    shapes, batch, queries, heads, width, points, dtype, others = CASES[name]
    g = torch.Generator().manual_seed(0)
    place = (batch, queries, heads, len(shapes), points)
    value = torch.randn(batch, sum(h * w for h, w in shapes), heads, width, generator=g)
    locations = torch.rand(*place, 2, generator=g) * 1.5 - 0.25
    weights = torch.rand(place, generator=g)
    return (
        value.to(getattr(torch, dtype)),
        locations.to(getattr(torch, others)),
        weights.to(getattr(torch, others)),
    )


def outcome(inputs, shapes, form):
    """Output and the gradients of all three inputs for a fixed, uneven gradient of the output."""
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    out = ms_deform_attn(inputs[0], shapes, *inputs[1:], implementation=form)
    slope = torch.linspace(-1, 2, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, slope)]


if __name__ == "__main__":
    torch.save({name: outcome(draw(name), CASES[name][0], "triton") for name in CASES}, sys.argv[1])
