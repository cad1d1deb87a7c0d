"""The mode of a model's modules: eval mode for a while, and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def eval_mode(model: "nn.Module") -> Iterator[None]:
    """Inside, every module is in eval mode; afterwards each is in the mode it was in, whatever happened.

    Module by module: `model.train()` would also wake what was frozen on purpose, such as a BatchNorm.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
