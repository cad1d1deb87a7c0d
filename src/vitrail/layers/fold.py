"""BatchNorm folded into its neighbour, for inference.

In eval mode BatchNorm is a factor and an offset per channel, which a convolution or a linear layer can carry.
Which layer stands before or after a norm is seen by running the model once: modules say nothing of the order
in which they are called.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


def fold_batchnorm(model: nn.Module, example: Tensor | None = None) -> nn.Module:
    """A copy of `model` in eval mode, whose BatchNorms are folded into their neighbours.

    A norm disappears (an Identity stands in its place) where its input is the output of one convolution or
    linear layer that nothing else reads, or where its output goes only into one linear layer or one 1x1
    convolution of stride 1 (before wider ones come zeros that the norm must not see). Layers and norms
    called more than once stay, and so do weights that are computed, as in weight standardisation. The result
    is for inference: its state_dict has other keys. Outputs are the same to rounding, 1e-5 in float32.

    Args:
        model: any module with running statistics.
        example: its input, to run once; default: one 64 x 64 picture in the model's dtype and on its device.
    """
    model = copy.deepcopy(model).eval()
    norms = {id(m.running_mean): m for m in model.modules() if _has_statistics(m)}
    if not norms:
        return model
    if example is None:
        first = next(model.parameters())
        example = torch.zeros(1, 3, 64, 64, dtype=first.dtype, device=first.device)
    trace = _Trace(model)
    # Inference tensors count no writes, by which the trace knows what works in place.
    with torch.inference_mode(False), torch.no_grad(), trace:
        model(example.clone() if example.is_inference() else example)
    folded = set()
    for call in trace.calls:
        norm = norms.get(id(call.given.get("running_mean")))
        if norm is None or trace.times_read(norm.running_mean) != 1:
            continue
        if (layer := trace.layer_before(call)) is not None:
            _fold_back(layer, norm)
        elif (layer := trace.layer_after(call)) is not None:
            _fold_on(layer, norm)
        else:
            continue
        folded.add(norm)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if child in folded:
                setattr(parent, name, nn.Identity())
    return model


class _Call:
    """One call of a convolution, linear layer or BatchNorm: its tensors by the function's own names."""

    def __init__(self, func: Callable[..., Any], args: Any, kwargs: Any, result: Tensor) -> None:
        norm = func is F.batch_norm
        names = ("input", "running_mean") if norm else ("input", "weight", "bias")
        self.given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        self.result = result


class _Trace(TorchFunctionMode):
    """Which functions were called on which tensors while the model ran."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.layers = {id(m.weight): m for m in model.modules() if isinstance(m, Layer)}
        self.biases = {id(m.weight): m.bias for m in self.layers.values()}
        self.calls: list[_Call] = []
        self.readers: dict[int, list[_Call | None]] = {}  # id of a tensor -> who made tensors of it
        self.makers: dict[int, _Call] = {}
        self.kept: list[Any] = []  # every tensor, so that none takes the id of another

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        before = _writes((args, kwargs))
        result = func(*args, **kwargs)
        in_place = before != _writes((args, kwargs))
        self.kept.append((args, kwargs, result))
        given, made = list(_ids((args, kwargs))), list(_ids(result))
        if not made or (len(given) == 1 and made == given and not in_place):
            return result  # asked for a size, or passed through, as dropout in eval
        call = None
        if func in (*CONVOLUTIONS, F.linear, F.batch_norm):
            call = _Call(func, args, kwargs, result)
            self.calls.append(call)
            self.makers[id(result)] = call
        for tensor in given:
            self.readers.setdefault(tensor, []).append(call)
        return result

    def times_read(self, tensor: Any) -> int:
        return len(self.readers.get(id(tensor), []))

    def layer_before(self, norm: _Call) -> Layer | None:
        """The layer that made the norm's input, if nothing else reads that."""
        source = norm.given["input"]
        maker = self.makers.get(id(source))
        return self.layer_of(maker) if maker and self.times_read(source) == 1 else None

    def layer_after(self, norm: _Call) -> Layer | None:
        """The layer that alone reads the norm's output, if it sees no zeros around it, at any size."""
        readers = self.readers.get(id(norm.result), [])
        layer = self.layer_of(readers[0]) if len(readers) == 1 and readers[0] else None
        if isinstance(layer, nn.Linear):
            return layer if norm.result.ndim == 2 else None  # else channels are not the last axis
        if (
            layer is None
            or {*layer.kernel_size, *layer.stride} != {1}
            or layer.padding_mode != "zeros"
        ):
            return None
        return None if isinstance(layer.padding, str) or any(layer.padding) else layer

    def layer_of(self, call: _Call) -> Layer | None:
        """The module whose own weight and bias a call used, if it was the only call that did."""
        weight = call.given.get("weight")
        layer = self.layers.get(id(weight))
        if layer is None or call.given.get("bias") is not self.biases[id(weight)]:
            return None
        return layer if self.times_read(weight) == 1 else None


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those within arguments or results."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for v in value:
            yield from _tensors(v)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _ids(value: Any) -> Iterator[int]:
    return map(id, _tensors(value))


def _writes(value: Any) -> list[int]:
    """How often each of the tensors was written in place."""
    return [0 if t.is_inference() else t._version for t in _tensors(value)]


def _has_statistics(module: nn.Module) -> TypeGuard[_BatchNorm]:
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _factor_and_offset(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """BatchNorm in eval mode as x * factor + offset, in float64: one rounding at the end."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.affine:
        factor = factor * norm.weight.double()
    offset = -norm.running_mean.double() * factor
    return factor, offset + norm.bias.double() if norm.affine else offset


def _fold_back(layer: Layer, norm: _BatchNorm) -> None:
    """norm(layer(x)) as one layer."""
    factor, offset = _factor_and_offset(norm)
    weight = layer.weight.double() * factor.view(-1, *[1] * (layer.weight.ndim - 1))
    _set(layer, weight, offset if layer.bias is None else layer.bias.double() * factor + offset)


def _fold_on(layer: Layer, norm: _BatchNorm) -> None:
    """layer(norm(x)) as one layer."""
    factor, offset = _factor_and_offset(norm)
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    # (groups, out / groups, in / groups); a kernel of one has no other axis
    weight = layer.weight.double().reshape(groups, -1, layer.weight.shape[1])
    bias = (weight @ offset.view(groups, -1, 1)).flatten()
    weight = (weight * factor.view(groups, 1, -1)).view_as(layer.weight)
    _set(layer, weight, bias if layer.bias is None else bias + layer.bias.double())


@torch.no_grad()
def _set(layer: Layer, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)
    layer.bias = nn.Parameter(bias.detach().to(layer.weight.dtype))
