"""Activation checkpointing under the compiler; the training tests hold it against none without it."""

import warnings

import torch
from torch import nn

from vitrail.layers.checkpoint import checkpointed


def test_under_the_compiler_gradients_are_those_without_checkpointing():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 6, 5, generator=generator)
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 2, 1))

    def loss(x: torch.Tensor) -> torch.Tensor:
        return checkpointed(block, x).square().sum()

    want = torch.autograd.grad(block(x).square().sum(), list(block.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
        got = torch.autograd.grad(compiled(x), list(block.parameters()))
    torch.testing.assert_close(got, want)
