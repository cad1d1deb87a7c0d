"""Multiply-adds and parameters of a model, counted from the model itself."""

import math
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from vitrail.modes import eval_mode


def count_macs(model: nn.Module, height: int, width: int, *, method: str = "forward") -> int:
    """Multiply-adds of one (1, 3, height, width) image: convolutions, linear layers, attention products.
    method: of the model, that takes it.

    Norms and activations are left out, as in the papers' tables; at another size than the model's own the
    products that resample a table of positions count; of deformable convolutions and attention the reading
    between pixels does not. Nothing is computed: shapes run through the operators
    on `meta`, with the weights of a model on any device, or of none. Raises NotImplementedError where what is
    computed depends on what is seen, as behind a detector's proposals.
    """
    asked = _Asked(model, method)
    tensors = chain(asked.named_parameters(), asked.named_buffers())
    shapes = {name: tensor.detach().to("meta") for name, tensor in tensors}
    image = torch.empty(1, 3, height, width, device="meta")
    counter = FlopCounterMode(display=False, custom_mapping=_deformable())
    with eval_mode(model), torch.no_grad(), counter:
        functional_call(asked, shapes, (image,))
    return counter.get_total_flops() // 2  # the counter takes a multiply-add as two


class _Asked(nn.Module):
    """A model whose forward is one of its methods."""

    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        self.model, self.method = model, method

    def forward(self, image: torch.Tensor) -> Any:
        return getattr(self.model, self.method)(image)


def _deformable() -> dict[Any, Any]:
    """What the counter lacks: torchvision's operator, as the convolution that it is beside the reading."""
    import torchvision.ops  # takes seconds to import; registers the operator

    def flops(images: Any, weight: Any, *_: Any, out_shape: Any, **__: Any) -> int:
        return 2 * math.prod(out_shape) * math.prod(weight[1:])

    assert torchvision.ops.deform_conv2d
    return {torch.ops.torchvision.deform_conv2d: flops}


def count_params(model: nn.Module) -> int:
    """Numbers that training changes: all parameters, once each, without running statistics."""
    return sum(p.numel() for p in model.parameters())
