"""From a model's raw outputs to Predictions."""

from collections.abc import Sequence

import numpy as np

from vitrail_runtime.errors import InputError, NotFinite
from vitrail_runtime.prediction import Prediction


def finish_classification(
    logits: np.ndarray, classes: Sequence[str], top_k: int = 5
) -> list[Prediction]:
    """Logits (B, K) -> B Predictions with the `top_k` classes of highest probability, best first.

    Scores are softmax probabilities over all K classes; equal ones keep the order of the classes.
    Raises: InputError when the logits do not fit `classes` or top_k < 1, NotFinite when they are NaN or
        infinite.
    """
    logits = np.asarray(logits, dtype=np.float64)
    if logits.ndim != 2 or logits.shape[1] != len(classes):
        raise InputError(
            f"logits of shape {logits.shape} do not fit {len(classes)} classes; "
            f"expected (batch, {len(classes)})"
        )
    if top_k < 1:
        raise InputError(f"top_k must be at least 1, but is {top_k}")
    if not np.isfinite(logits).all():
        raise NotFinite("the model gave scores that are not finite; its weights are damaged")
    scores = np.exp(logits - logits.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    return [
        Prediction(
            labels=labels.astype(np.int64),
            scores=row[labels].astype(np.float32),
            names=[classes[int(i)] for i in labels],
        )
        for row, labels in zip(scores, order, strict=True)
    ]
