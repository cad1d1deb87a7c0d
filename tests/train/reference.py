"""A training loop as a textbook writes it, in torch alone: what `vitrail.train` must equal.

It shares no code with what it checks. Images come as ready tensors, and so do class maps and the numbers that
were drawn to mix images; which parameters decay, and in which layer they stand, is told by the caller, who
wrote it out.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Update:
    """images (B, 3, H, W), normalised; labels (B,), or class maps (B, H, W); what to mix them with: a share,
    or a box that is cut."""

    images: Tensor
    labels: Tensor
    share: float = 1.0  # that a sample keeps of itself
    box: tuple[int, int, int, int] | None = None  # top, bottom, left, right: its partner's pixels


@dataclass
class Trained:
    weights: dict[str, Tensor]
    average: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Classifying:
    num_classes: int
    smoothing: float

    def prepared(self, update: Update) -> tuple[Tensor, Tensor]:
        images, targets = mixed(update, self.num_classes)
        return images, (1 - self.smoothing) * targets + self.smoothing / self.num_classes

    def loss(self, model: Any, images: Tensor, targets: Tensor) -> Tensor:
        """A sum, of which `weight` of the whole batch makes a mean."""
        return -(targets * F.log_softmax(model(images).float(), 1)).sum()

    def weight(self, targets: Tensor) -> float:
        return len(targets)


@dataclass(frozen=True)
class Segmenting:
    """weights: of each class. auxiliary: of the loss of the auxiliary head, 0 where there is none."""

    weights: Tensor
    auxiliary: float = 0.0

    def prepared(self, update: Update) -> tuple[Tensor, Tensor]:
        return update.images, update.labels

    def loss(self, model: Any, images: Tensor, targets: Tensor) -> Tensor:
        maps = model.maps(images)
        loss = self.entropy(model.head(maps), targets)
        if self.auxiliary:
            loss = loss + self.auxiliary * self.entropy(model.auxiliary(maps), targets)
        return loss

    def entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Of the pixels with a class, each by the weight of its class."""
        logits = F.interpolate(logits, targets.shape[1:], mode="bilinear", align_corners=False)
        values = F.log_softmax(logits.float(), 1).movedim(1, 3)[targets < 255]
        classes = targets[targets < 255].long()
        return -(self.weights[classes] * values[torch.arange(len(classes)), classes]).sum()

    def weight(self, targets: Tensor) -> float:
        return sum(
            self.weights[c].item() * (targets == c).sum().item() for c in range(len(self.weights))
        )


def train(
    model: Any,
    updates: Sequence[Update],
    config: Any,
    *,
    decayed: set[str],
    layers: Mapping[str, int],
    warmup_steps: int,
    task: Classifying | Segmenting,
    world: int = 1,
) -> Trained:
    model.backbone.requires_grad_(config.train_only == "full")
    groups = [
        {
            "params": [p],
            "weight_decay": config.weight_decay if name in decayed else 0.0,
            "scale": config.layer_decay ** (max(layers.values()) - layers[name]),
        }
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True)
    else:
        momentum = config.momentum
        optimizer = torch.optim.SGD(groups, momentum=momentum, nesterov=momentum > 0, fused=True)
    done = Trained(model.state_dict(), {k: v.clone() for k, v in model.state_dict().items()})

    for step, update in enumerate(updates):
        if step < warmup_steps:
            rate = config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup_steps
        elif config.schedule == "constant":
            rate = config.lr
        else:
            turned = math.pi * (step - warmup_steps) / (len(updates) - warmup_steps)
            rate = config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(turned)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]

        model.train()
        if config.train_only == "head":
            model.backbone.eval()
        optimizer.zero_grad()
        images, targets = task.prepared(update)
        loss = 0.0
        shares = zip(images.chunk(world), targets.chunk(world), strict=True)
        for rank, (own_images, own_targets) in enumerate(shares):
            seed = np.random.SeedSequence([config.seed, step, rank]).generate_state(1, np.uint64)
            torch.manual_seed(int(seed[0]) // 2)
            statistics = {name: b.clone() for name, b in model.named_buffers()}
            for x, y in zip(
                own_images.chunk(config.accumulate),
                own_targets.chunk(config.accumulate),
                strict=True,
            ):
                with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                    part = task.loss(model, x, y) / task.weight(targets)
                part.backward()
                loss += part.item()
            if rank:  # the first process's running statistics are kept
                for name, b in model.named_buffers():
                    b.copy_(statistics[name])

        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients))
        if config.clip_grad is not None and config.clip_mode == "norm":
            for g in gradients:
                g.mul_(min(1.0, config.clip_grad / (norm + 1e-6)))
        elif config.clip_grad is not None:
            for p in list(model.parameters())[:-2]:  # the classifier stands last
                if p.grad is not None:
                    largest = config.clip_grad * unit_norms(p.detach()).clamp(min=1e-3)
                    p.grad.mul_((largest / unit_norms(p.grad)).clamp(max=1))
        optimizer.step()
        keep = min(config.ema, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            old = done.average[name]
            done.average[name] = (
                keep * old + (1 - keep) * value if value.is_floating_point() else value.clone()
            )
        done.losses.append(loss)
        done.rates.append(rate)
        done.norms.append(norm)
    return done


def mixed(update: Update, num_classes: int) -> tuple[Tensor, Tensor]:
    """Samples 0 and 1, 2 and 3, ... take from each other; the last of an odd batch stays."""
    images, targets = update.images.clone(), F.one_hot(update.labels, num_classes).float()
    result, keep = images.clone(), update.share
    if update.box is not None:
        top, bottom, left, right = update.box
        keep = 1 - (bottom - top) * (right - left) / (images.shape[2] * images.shape[3])
    result_targets = targets.clone()
    for i in range(len(images) - len(images) % 2):
        other = i + 1 if i % 2 == 0 else i - 1
        if update.box is not None:
            result[i, :, top:bottom, left:right] = images[other, :, top:bottom, left:right]
        else:
            result[i] = keep * images[i] + (1 - keep) * images[other]
        result_targets[i] = keep * targets[i] + (1 - keep) * targets[other]
    return result, result_targets


def unit_norms(x: Tensor) -> Tensor:
    if x.ndim < 2:
        return x.square().sum().sqrt()
    return x.flatten(1).square().sum(1).sqrt().view(-1, *[1] * (x.ndim - 1))


@torch.no_grad()
def validation_loss(
    model: nn.Module, weights: Mapping[str, Tensor], images: Tensor, labels: Tensor
):
    """Of all images, or of all pixels that have a class; every class counts as the others."""
    model.load_state_dict(weights)
    model.eval()
    chosen = F.log_softmax(model(images), 1).gather(1, labels.clamp(max=2)[:, None])[:, 0]
    return -chosen[labels < 255].mean().item()
