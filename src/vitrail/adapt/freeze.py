"""Which parts of a model are trained, and the mode of those that are not."""

from torch import nn

from vitrail.registry import unknown
from vitrail_runtime.errors import InputError

# What is trained -> the top-level parts that stay as they are; None: all but the model's `trained_apart`.
FROZEN: dict[str, tuple[str, ...] | None] = {"full": (), "head": ("backbone",), "masks": None}


def freeze(model: nn.Module, what: str) -> None:
    """Choose what is trained, by `requires_grad`: "full", all; "head", everything but the backbone; "masks",
    what draws masks on top of a detector that stays as it is.

    Raises InputError for another word, or where nothing would be left to train.
    """
    if what not in FROZEN:
        raise unknown("part to train", what, FROZEN)
    parts, stays = dict(model.named_children()), FROZEN[what]
    if stays is None:
        apart = getattr(model, "trained_apart", ())
        if not apart:
            raise InputError(
                f"{type(model).__name__} has no part that draws masks and is trained by itself, as "
                "detr_panoptic/... has; train all of it ('full') or its head ('head')"
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
