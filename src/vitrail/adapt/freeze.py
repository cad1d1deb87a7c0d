"""Which parts of a model are trained, and the mode of those that are not."""

from torch import nn

from vitrail.registry import unknown
from vitrail_runtime.errors import InputError

# What is trained -> the top-level parts that stay as they are.
FROZEN: dict[str, tuple[str, ...]] = {"full": (), "head": ("backbone",)}


def freeze(model: nn.Module, what: str) -> None:
    """Choose what is trained, by `requires_grad`: "full", all; "head", everything but the backbone.

    Raises InputError for another word, or where nothing would be left to train.
    """
    if what not in FROZEN:
        raise unknown("part to train", what, FROZEN)
    parts = dict(model.named_children())
    if not any(list(part.parameters()) for name, part in parts.items() if name not in FROZEN[what]):
        raise InputError(
            f"{type(model).__name__} has nothing to train beside {' and '.join(FROZEN[what])}; "
            "take a model with a head, or train all of it ('full')"
        )
    model.requires_grad_(True)
    for name in FROZEN[what]:
        if name in parts:
            parts[name].requires_grad_(False)


def train_mode(model: nn.Module) -> None:
    """Training mode, but eval mode for each top-level part whose parameters are all frozen: it drops nothing,
    and its running statistics stay as they are."""
    model.train()
    for part in model.children():
        trained = [parameter.requires_grad for parameter in part.parameters()]
        if trained and not any(trained):
            part.eval()
