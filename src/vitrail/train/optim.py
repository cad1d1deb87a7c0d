"""The optimiser and its groups: what is not decayed, and smaller steps for earlier layers."""

import re

import torch
from torch import nn

from vitrail.train.config import TrainConfig

# Tables and tokens that weight decay would only pull towards zero, whatever their shape.
_NO_DECAY = re.compile(r"token|pos_embed|position|bias|\.memory$")
_BLOCK = re.compile(
    r"backbone\.(?:(?:.+\.)?blocks\d*\.\d+|(?:stages|layers)\.\d+\.\d+|layer\d+\.\d+)(?=\.)"
)


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Groups of trainable parameters by (decayed or not, layer); "lr_scale" multiplies the schedule's rate.

    Not decayed: everything of one axis or none (biases, norms, scales), class and register tokens, memory,
    position and relative-bias tables. With `layer_decay` d < 1 the layer i of n gets d ** (n - i), the head 1
    (Clark et al., ELECTRA, ICLR 2020; BEiT, ICLR 2022). `backbone_lr` multiplies that of the whole backbone.
    """
    layers, count = layer_numbers(model)
    groups: dict[tuple[bool, int, float], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decayed = parameter.ndim > 1 and not _NO_DECAY.search(name)
        layer = layers[name] if config.layer_decay < 1.0 else count
        share = config.backbone_lr if name.startswith("backbone.") else 1.0
        group = groups.setdefault(
            (decayed, layer, share),
            {
                "params": [],
                "weight_decay": config.weight_decay if decayed else 0.0,
                "lr_scale": share * config.layer_decay ** (count - layer),
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def layer_numbers(model: nn.Module) -> tuple[dict[str, int], int]:
    """Parameter name -> layer, and the number of the last layer.

    Layer 0 is the stem with tokens and tables; every block is a layer; what stands between two blocks (a
    downsampling) belongs to the later one; what follows the last block (final norm, head) is the last layer,
    and so are the backbone's `new_parameters`: tables of its own that a checkpoint has nothing for.
    """
    names = [name for name, _ in model.named_parameters()]
    new = getattr(getattr(model, "backbone", None), "new_parameters", ())
    names.sort(key=[f"backbone.{name}" for name in new].__contains__)  # stable: those to the end
    blocks = list(dict.fromkeys(b for b in map(_block, names) if b is not None))
    number = {block: i + 1 for i, block in enumerate(blocks)}
    last = len(blocks) + 1
    layers, coming = {}, last
    for name in reversed(names):
        block = _block(name)
        if block is not None:
            coming = number[block]
        layers[name] = coming
    first_block = next((i for i, n in enumerate(names) if _block(n) is not None), 0)
    for name in names[:first_block]:
        layers[name] = 0
    return {name: layers[name] for name in names}, last


def _block(name: str) -> str | None:
    """ "backbone.stages.1.blocks.0" of "backbone.stages.1.blocks.0.mlp.fc1.weight"; else None."""
    match = _BLOCK.match(name)
    return match.group() if match else None


def is_block(name: str) -> bool:
    """Whether a module's name is that of one of the backbone's blocks."""
    return _block(name + ".") == name


def create_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, ICLR 2019) or SGD with Nesterov momentum over `parameter_groups`."""
    groups = parameter_groups(model, config)
    # The rate of every step comes from the schedule; one kernel for all parameters, on CPU and GPU.
    if config.optimizer == "adamw":
        return torch.optim.AdamW(
            groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True
        )
    return torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True
    )
