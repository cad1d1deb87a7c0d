"""A model measured on a data set, through the one preprocessing that Predictor and runtime share."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from vitrail.data.examples import Examples
from vitrail.data.loader import FEWER, batch_indices, eval_batches
from vitrail.memory import enough_memory
from vitrail.modes import eval_mode
from vitrail.tasks.task import Scores, fitting, task_of
from vitrail.train.ranks import share
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing


# Not inference_mode: tables that a model caches by shape would be born unfit for a later training step.
@torch.no_grad()
def evaluate(
    model: Any,
    data: Examples,
    preprocessing: Preprocessing | None = None,
    *,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    predictions: bool = False,
) -> Scores:
    """Scores of a model with `classes` on a data set, in eval mode and full precision.

    Classes are matched by name: a name that the model does not know is an InputError that shows both lists.
    With `world` processes each takes its share and all get the sums. With `predictions` the scores also hold
    what was `said` of every image: arrays in the data's order, and `keys`.

    Raises: NotFinite, on every process, where an answer is NaN or infinite; InputError where the data is not
        for the model's task.
    """
    preprocessing = preprocessing or model.preprocessing
    assert preprocessing is not None
    device = torch.device(device or next(model.parameters()).device)
    task = task_of(model.task)
    data = fitting(task, data, model.info.name)
    evaluator = task.evaluator(model, data)
    problem: InputError | None = None
    done = 0
    sharded = world > 1 and is_sharded(model)
    # Who runs out of memory in the midst of a forward of sharded weights cannot go along with the others.
    sure = (
        nullcontext() if sharded else enough_memory(f"batches of up to {batch_size} images", FEWER)
    )
    with eval_mode(model):
        try:
            with sure:
                for batch in eval_batches(
                    data, preprocessing, batch_size, rank=rank, world=world, workers=workers
                ):
                    on_device = replace(batch, images=batch.images.to(device))
                    evaluator.update(model.forward_tensors(on_device.images), on_device)
                    del batch, on_device  # before the next is read: class maps are large
                    done += 1
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
                model.forward_tensors(nothing)
    shared = share(problem)
    if shared is not None:
        raise shared from problem
    scores = evaluator.compute()
    return replace(scores, said=_in_order(evaluator.said(), data, world)) if predictions else scores


def is_sharded(model: Any) -> bool:
    """Whether several processes hold parts of each weight."""
    from torch.distributed.tensor import DTensor  # seconds to import, which one process is spared

    return any(isinstance(p, DTensor) for p in model.parameters())


def _in_order(said: dict[str, np.ndarray], data: Examples, world: int) -> dict[str, np.ndarray]:
    """What all processes have of all images, in the data's order."""
    parts: list[Any] = [said]
    if world > 1:
        parts = [None] * world
        torch.distributed.all_gather_object(parts, said)
    rows = [part for part in parts if part]  # a process may have had no image
    whole = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    indices = whole.pop("indices")
    order = np.argsort(indices)
    keys = np.array([data.keys[i] for i in indices[order]])
    return {name: values[order] for name, values in whole.items()} | {"keys": keys}
