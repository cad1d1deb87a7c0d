"""How good a frozen backbone is on labelled images: k nearest neighbours and a linear probe."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.backbones import vit
from vitrail.data.examples import Examples
from vitrail.data.loader import eval_batches
from vitrail.data.opening import hold_out
from vitrail.features import Features
from vitrail.modes import eval_mode
from vitrail.tasks.classify import TASK, scores_of
from vitrail.tasks.task import Scores, fitting, task_of
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

DECAYS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # of the linear probe, tried on held-out features


def probe_scores(
    kind: str,
    train: tuple[Tensor, Tensor],
    test: tuple[Tensor, Tensor],
    classes: tuple[str, ...],
    digests: Sequence[str],
) -> Scores:
    """Scores as of `evaluate`, from (features (N, D), labels (N,)) of training and test images.

    kind: "knn" or "linear". digests: of the training images' content (`Images.digests`).
    """
    from vitrail.metrics import ClassificationMetrics  # torchmetrics takes seconds to import

    if kind == "knn":
        logits = knn_logits(*train, test[0], len(classes))
    else:
        logits = linear_logits(*train, test[0], len(classes), digests)
    metrics = ClassificationMetrics(len(classes), logits.device)
    metrics.update(logits, test[1])
    return scores_of(metrics.compute(), classes)


@torch.no_grad()
def extract_features(
    backbone: Any,
    data: Examples,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 64,
    workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Features (N, D) float32 and labels (N,) of every picture, in the data's order, on the backbone's
    device.

    Raises: InputError where the data holds no labels.
    """
    fitting(task_of(TASK.name), data, "a probe")
    device = next(backbone.parameters()).device
    rows: list[Tensor] = []
    indices: list[Tensor] = []
    with eval_mode(backbone):
        for batch in eval_batches(data, preprocessing, batch_size, workers=workers):
            rows.append(pooled(backbone(batch.images.to(device)), backbone.config).float())
            indices.append(batch.indices)
    order = torch.cat(indices).argsort().to(device)
    return torch.cat(rows)[order], torch.as_tensor(data.truth.labels, device=device)


def pooled(features: Features, config: Any) -> Tensor:
    """(B, D): what the model's own classifier reads. The class token where the paper's does, the mean of the
    coarsest map where there is none, both side by side where both are read."""
    return vit.pooled(
        features, "avg" if features.prefix is None else getattr(config, "pool", "avg")
    )


def knn_logits(
    features: Tensor,
    labels: Tensor,
    queries: Tensor,
    num_classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    """Logarithm of the votes (Q, K) of each query's k nearest neighbours by cosine, each weighing
    exp(cosine / temperature), as in DINO (Caron et al., ICCV 2021, arXiv 2104.14294, from Wu et al. 2018)."""
    known = F.normalize(features, dim=1)
    k = min(k, len(known))
    votes = []
    for part in F.normalize(queries, dim=1).split(1024):
        nearest, which = (part @ known.T).topk(k)
        weights = (nearest / temperature).exp()
        vote = torch.zeros(len(part), num_classes, dtype=weights.dtype, device=weights.device)
        votes.append(vote.scatter_add_(1, labels[which], weights))
    share = torch.cat(votes)
    # A class without a vote keeps a little, so that the loss stays finite.
    return (share / share.sum(1, keepdim=True) + 1e-6).log()


def linear_logits(
    features: Tensor, labels: Tensor, queries: Tensor, num_classes: int, digests: Sequence[str]
) -> Tensor:
    """Logits (Q, K) of a logistic regression on standardised features, to its optimum.

    digests: of the images' content. They, and not the order of the images, say which are held out to choose
    the weight decay.
    """
    # In an order of its own: the order of a sum decides its last bits.
    order = sorted(range(len(labels)), key=lambda i: (digests[i], labels[i].item()))
    features, labels = features[order], labels[order]
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    features, queries = (features - mean) / std, (queries - mean) / std
    decay = choose_decay(features, labels, num_classes, [digests[i] for i in order])
    weight, bias = regression(features, labels, num_classes, decay)
    return queries @ weight.T + bias


def choose_decay(
    features: Tensor, labels: Tensor, num_classes: int, digests: Sequence[str]
) -> float:
    """The one of `DECAYS` with the lowest loss on a fifth of each class, held out by content.

    Raises: InputError when no class has two images.
    """
    held = torch.from_numpy(hold_out(labels.cpu().numpy(), digests, 0.2, seed=0))
    held = held.to(features.device)
    if not held.any():
        raise InputError(
            "a linear probe holds out some images to choose its weight decay, but no class of the "
            f"{len(held)} images has two; add images, or take --probe knn"
        )

    def loss(decay: float) -> float:
        weight, bias = regression(features[~held], labels[~held], num_classes, decay)
        return F.cross_entropy(features[held] @ weight.T + bias, labels[held]).item()

    return min(DECAYS, key=loss)


def regression(
    features: Tensor, labels: Tensor, num_classes: int, decay: float
) -> tuple[Tensor, Tensor]:
    """Weight (K, D) and bias (K,) of least mean cross-entropy + decay * the weight's squared norm."""
    weight = torch.zeros(num_classes, features.shape[1], device=features.device)
    bias = torch.zeros(num_classes, device=features.device)
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=200, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight.T + bias, labels) + decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return weight.detach(), bias.detach()
