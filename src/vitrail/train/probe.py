"""How good a frozen backbone is on a data set, before any training: k nearest neighbours and a linear
probe.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.data import ImageData
from vitrail.data.loader import eval_batches
from vitrail.features import Features
from vitrail.train.evaluate import eval_mode
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

DECAYS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # of the linear probe, tried on held-out features


def probe_scores(
    kind: str, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor], classes: tuple[str, ...]
) -> dict[str, Any]:
    """Scores as of `evaluate`, from (features (N, D), labels (N,)) of training and test pictures.

    kind: "knn" or "linear".
    """
    from vitrail.metrics import ClassificationMetrics  # torchmetrics takes seconds to import

    predict = {"knn": knn_logits, "linear": linear_logits}[kind]
    logits = predict(*train, test[0], len(classes))
    metrics = ClassificationMetrics(len(classes), logits.device)
    metrics.update(logits, test[1])
    scores = metrics.compute()
    scores["classes"] = list(classes)
    scores["per_class"] = dict(zip(classes, scores["per_class"], strict=True))
    return scores


@torch.no_grad()
def extract_features(
    backbone: Any,
    data: ImageData,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 64,
    workers: int = 0,
) -> tuple[Tensor, Tensor]:
    """Features (N, D) float32 and labels (N,) of every picture, in the data's order, on the backbone's
    device.
    """
    device = next(backbone.parameters()).device
    rows: list[Tensor] = []
    indices: list[Tensor] = []
    with eval_mode(backbone):
        for batch in eval_batches(data, preprocessing, batch_size, workers=workers):
            rows.append(pooled(backbone(batch.images.to(device)), backbone.config).float())
            indices.append(batch.indices)
    order = torch.cat(indices).argsort().to(device)
    return torch.cat(rows)[order], torch.as_tensor(data.labels, device=device)


def pooled(features: Features, config: Any) -> Tensor:
    """(B, D): what the model's own classifier reads. The class token where the paper's does, the mean of the
    coarsest map where there is none, both side by side where both are read."""
    pool = getattr(config, "pool", "avg")
    mean = list(features.maps.values())[-1].mean((2, 3))
    if pool == "avg" or features.prefix is None:
        return mean
    token = features.prefix[:, 0]
    return token if pool == "token" else torch.cat([token, mean], 1)


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


def linear_logits(features: Tensor, labels: Tensor, queries: Tensor, num_classes: int) -> Tensor:
    """Logits (Q, K) of a logistic regression on standardised features, to its optimum.

    The strength of its weight decay is the best of `DECAYS` on every fifth training picture, held out; the
    regression is then fitted to all of them.
    """
    mean, std = features.mean(0), features.std(0).clamp_min(1e-6)
    features, queries = (features - mean) / std, (queries - mean) / std
    held = torch.arange(len(features), device=features.device) % 5 == 0
    if held.sum() == 0 or held.all():
        raise InputError(f"a linear probe needs at least two pictures, but got {len(features)}")

    def loss(decay: float) -> float:
        weight, bias = _regression(features[~held], labels[~held], num_classes, decay)
        return F.cross_entropy(features[held] @ weight.T + bias, labels[held]).item()

    weight, bias = _regression(features, labels, num_classes, min(DECAYS, key=loss))
    return queries @ weight.T + bias


def _regression(
    features: Tensor, labels: Tensor, num_classes: int, decay: float
) -> tuple[Tensor, Tensor]:
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
