"""A linear layer's product, by the library that multiplies fastest on this machine.

PyTorch hands float32 products of a CPU to Intel's MKL, which leaves AMD's AVX-512 unused: a core of an
EPYC (Zen 5) makes 90 GFLOP/s of it, and 190 to 210 of oneDNN, which PyTorch brings too (785 to 5,485 tokens,
widths of 384 and 1,536; gradients of weights 145 to 190). Everywhere else, and for small products, it is
`F.linear`.
"""

import platform
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack

LEAST = 2**23  # multiplications from which it pays: a call costs 15 microseconds more
CASTS = (torch.float32, torch.float16, torch.bfloat16)  # what autocast casts


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias: (..., C), (K, C), (K,) -> (..., K), as `F.linear`; differentiable as often."""
    if not _by_onednn(x, weight, bias):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, weight, bias)
    ):
        # By rows: what a Function returns must be no view, or activations could not work in its place.
        out = _Product.apply(x.flatten(0, -2), weight, bias)
        assert isinstance(out, Tensor)
        return out.unflatten(0, x.shape[:-1])
    return product(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear by `linear`: the same parameters and, but for rounding, the same result."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        for_x, for_weight, _ = ctx.needs_input_grad  # what none asks for may change, and is let go
        ctx.save_for_backward(x if for_weight else None, weight if for_x else None)
        return product(x, weight, bias)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, gradient: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            linear(gradient, weight.t()) if for_x else None,
            linear(gradient.t(), x.t()) if for_weight else None,
            gradient.sum(0) if for_bias else None,
        )


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias by oneDNN, of rows (N, C) or more axes. No gradient passes it."""
    bias = None if bias is None else bias.contiguous()  # oneDNN looks at no strides of it
    return torch.ops.mkldnn._linear_pointwise(_dense(x), _dense(weight), bias, "none", [], "")


def _dense(x: Tensor) -> Tensor:
    """Rows or columns one after another: oneDNN takes hundreds of times as long for parts of tensors."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the product is large and oneDNN takes it. What fits together in another way, or not at all, is
    PyTorch's: its messages name the shapes."""
    return (
        onednn_pays(x.device)  # before any size, which may be a traced one
        and x.ndim > 1
        and x.numel() * weight.shape[0] >= LEAST
        and weight.shape[1:] == x.shape[-1:]
        and (bias is None or bias.shape == weight.shape[:1])
        and onednn_takes(*(t for t in (x, weight, bias) if t is not None))
    )


def onednn_pays(device: torch.device) -> bool:
    """Whether oneDNN multiplies faster than PyTorch there, and no tracer or transform looks on."""
    on_cpu = device.type == "cpu" and not torch.compiler.is_compiling()
    return on_cpu and _pays() and not _watched()


def onednn_takes(*tensors: Tensor, dtype: torch.dtype = torch.float32) -> bool:
    """Whether these are plain tensors of the CPU in a dtype that oneDNN does not round, or in the one that
    autocast gives them."""
    cast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    return (
        torch.backends.mkldnn.enabled
        and (dtype != torch.bfloat16 or _has_bf16())
        and all(type(t) in (Tensor, nn.Parameter) and t.layout == torch.strided for t in tensors)
        and all(t.device.type == "cpu" for t in tensors)
        and all(dtype == (cast if cast and t.dtype in CASTS else t.dtype) for t in tensors)
    )


def _watched() -> bool:
    """Whether something sees single operations, and knows those of PyTorch's layers alone."""
    return (
        torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


@cache
def _pays() -> bool:
    """Whether this is an AMD CPU with AVX-512, and PyTorch was built with oneDNN."""
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkl.is_available():
        return False
    vendor = platform.processor()
    with suppress(OSError):  # not every system has it
        vendor += Path("/proc/cpuinfo").read_text(encoding="utf-8")[:1000]
    return "AuthenticAMD" in vendor and torch.backends.cpu.get_cpu_capability() == "AVX512"


@cache
def _has_bf16() -> bool:
    """Whether the CPU multiplies bfloat16 itself, rather than by way of float32."""
    return torch.cpu._is_avx512_bf16_supported()
