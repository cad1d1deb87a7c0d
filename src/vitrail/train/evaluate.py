"""A model measured on a data set, through the one preprocessing that Predictor and runtime share."""

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.data.images import ImageData
from vitrail.data.loader import FEWER, batch_indices, eval_batches
from vitrail.memory import enough_memory
from vitrail.modes import eval_mode
from vitrail.train.agreement import share
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing


# Not inference_mode: tables that a model caches by shape would be born unfit for a later training step.
@torch.no_grad()
def evaluate(
    model: Any,
    data: ImageData,
    preprocessing: Preprocessing | None = None,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    predictions: bool = False,
) -> dict[str, Any]:
    """Scores of a classifier with `classes` on labelled pictures, in eval mode and full precision.

    Classes are matched by name: the order of folders does not matter, a name that the model does not know is
    an InputError that shows both lists. With `world` processes each takes its share and all get the sums.

    Returns: top1, top5, loss, num_images, classes, per_class {name: precision, recall, f1, support} and
        confusion[truth][predicted]; with `predictions` also what was said of every picture, as arrays in the
        data's order: labels and predicted (N,), probabilities (N, K) float16, keys (N,).
    Raises: NotFinite, on every process, where an answer is NaN or infinite.
    """
    from vitrail.metrics import ClassificationMetrics  # torchmetrics takes seconds to import

    preprocessing = preprocessing or model.preprocessing
    assert preprocessing is not None
    device = torch.device(device or next(model.parameters()).device)
    lookup = torch.tensor(label_map(data.classes, model.classes))
    metrics = ClassificationMetrics(len(model.classes), device)
    kept: list[tuple[Tensor, ...]] = []
    problem: InputError | None = None
    done = 0
    sharded = world > 1 and is_sharded(model)
    # Who runs out of memory in the midst of a forward of sharded weights cannot go along with the others.
    sure = (
        nullcontext()
        if sharded
        else enough_memory(f"batches of up to {batch_size} pictures", FEWER)
    )
    with eval_mode(model):
        try:
            with sure:
                for batch in eval_batches(
                    data, preprocessing, batch_size, rank=rank, world=world, workers=workers
                ):
                    labels = lookup[batch.labels]
                    logits = model(batch.images.to(device)).float()
                    metrics.update(logits, labels.to(device))
                    done += 1
                    if predictions:
                        said = (logits.argmax(1).cpu(), logits.softmax(1).half().cpu())
                        kept.append((torch.as_tensor(batch.indices), labels, *said))
        except InputError as error:  # the other processes learn of it below
            problem = error
        if sharded:
            # Sharded weights are collected anew in every forward, by all processes together: whoever has
            # fewer batches than the others, or cannot read on, goes along, else they wait for ever.
            counts = [
                len(batch_indices(data, preprocessing, batch_size, r, world)) for r in range(world)
            ]
            nothing = torch.zeros(1, 3, *preprocessing.size, device=device)
            for _ in range(max(counts) - done):
                model(nothing)
    shared = share(problem)
    if shared is not None:
        raise shared from problem
    scores = metrics.compute()
    scores["classes"] = list(model.classes)
    scores["per_class"] = dict(zip(model.classes, scores["per_class"], strict=True))
    if predictions:
        scores["predictions"] = _in_order(kept, data, world)
    return scores


def is_sharded(model: Any) -> bool:
    """Whether several processes hold parts of each weight."""
    from torch.distributed.tensor import (
        DTensor,
    )  # seconds to import, which one process need not wait

    return any(isinstance(p, DTensor) for p in model.parameters())


def label_map(data_classes: Sequence[str], model_classes: Sequence[str]) -> list[int]:
    """The model's label of each of the data's labels, by name.

    Raises InputError showing both lists when the data has a class that the model does not know.
    """
    place = {name: i for i, name in enumerate(model_classes)}
    strange = [name for name in data_classes if name not in place]
    if strange:
        raise InputError(
            f"the data has classes that the model does not know: {_some(strange)}\n"
            f"  the model's {len(model_classes)}: {_some(model_classes)}\n"
            f"  the data's {len(data_classes)}: {_some(data_classes)}\n"
            "rename the folders to the model's names, or train a model on these classes"
        )
    return [place[name] for name in data_classes]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")


def _in_order(kept: list[tuple[Tensor, ...]], data: ImageData, world: int) -> dict[str, np.ndarray]:
    parts: list[Any] = [kept]
    if world > 1:
        parts = [None] * world
        torch.distributed.all_gather_object(parts, kept)
    rows = [row for part in parts for row in part]
    indices, labels, predicted, probabilities = (
        torch.cat([row[i] for row in rows]).numpy() for i in range(4)
    )
    order = np.argsort(indices)
    return {
        "labels": labels[order],
        "predicted": predicted[order],
        "probabilities": probabilities[order],
        "keys": np.array([data.keys[i] for i in indices[order]]),
    }
