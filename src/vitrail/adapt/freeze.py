"""Which parts of a model are trained, and the mode of those that are not."""

from torch import nn

from vitrail.registry import unknown
from vitrail_runtime.errors import InputError

# What is trained -> the top-level parts that stay as they are, or the attribute of the model that names those
# trained by themselves.
FROZEN: dict[str, tuple[str, ...] | str] = {
    "full": (),
    "head": ("backbone",),
    "masks": "trained_apart",
    "capsule": "capsule",
}
LACKS = {
    "masks": "has no part that draws masks and is trained by itself, as detr_panoptic/... has",
    "capsule": "has no capsule, which is all that a task owns beside a backbone that others share, as "
    "memory/... has",
}


def freeze(model: nn.Module, what: str) -> None:
    """Choose what is trained, by `requires_grad`: "full", all; "head", everything but the backbone; "masks",
    what draws masks on top of a detector that stays as it is; "capsule", what a task with memory owns.

    Raises InputError for another word, or where nothing would be left to train.
    """
    if what not in FROZEN:
        raise unknown("part to train", what, FROZEN)
    parts, stays = dict(model.named_children()), FROZEN[what]
    if isinstance(stays, str):
        apart = getattr(model, stays, ())
        if not apart:
            raise InputError(
                f"{type(model).__name__} {LACKS[what]}; train all of it ('full') or its head ('head')"
            )
        stays = tuple(name for name in parts if name not in apart)
    if not any(list(part.parameters()) for name, part in parts.items() if name not in stays):
        raise InputError(
            f"{type(model).__name__} has nothing to train beside {' and '.join(stays)}; "
            "take a model with a head, or train all of it ('full')"
        )
    model.requires_grad_(True)
    for name in stays:
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
