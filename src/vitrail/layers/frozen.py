"""BatchNorm that stays as it was loaded, for detectors, whose batches are too small to estimate it."""

import torch
from torch import Tensor, nn


class FrozenNorm(nn.Module):
    """BatchNorm by fixed statistics and affine values, which are buffers under BatchNorm's names.
    (B, C, H, W) -> same."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(dim))
        self.register_buffer("bias", torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        # One pass, and no input kept for the backward pass.
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None])

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def freeze_norms(model: nn.Module) -> nn.Module:
    """The same model, every BatchNorm2d in it replaced by a frozen one of the same values."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                frozen = FrozenNorm(child.num_features, child.eps).to(child.weight.device)
                frozen.load_state_dict(child.state_dict(), strict=False)
                setattr(module, name, frozen)
    return model
