"""Parameters and multiply-adds of every variant, counted a second way."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from vitrail.cli.models import paper_size, stored_counts
from vitrail.models import create_model, list_models
from vitrail.registry import backbone_entry
from vitrail.weights.layouts import Uninitialised


class MultiplyAdds(TorchFunctionMode):
    """Adds up the products of convolutions, linear layers and attention, from the shapes alone."""

    total = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.conv2d, F.linear) or str(func) == "torchvision.deform_conv2d":
            self.total += out.numel() * args[1][0].numel()
        elif func is torch.conv_transpose2d:
            self.total += args[0].numel() * args[1][0].numel()
        elif func in (torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__):
            self.total += out.numel() * args[0].shape[-1]
        elif func is torch.baddbmm:
            self.total += out.numel() * args[1].shape[-1]
        elif func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            self.total += q.shape[:-1].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        return out


@pytest.mark.parametrize("name", list_models())
def test_the_stored_counts_are_those_of_the_shapes(name):
    size, sized = paper_size(name), hasattr(backbone_entry(name).config, "image_size")
    with torch.device("meta"), Uninitialised():
        model = create_model(name, **({"image_size": size} if sized else {})).eval()
    with torch.no_grad(), MultiplyAdds() as products:
        model(torch.empty(1, 3, size, size, device="meta"))
    params = sum(p.numel() for p in model.parameters())
    assert stored_counts()[name] == [params, products.total]
