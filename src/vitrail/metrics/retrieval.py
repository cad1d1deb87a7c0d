"""How well images find their captions, and captions their images."""

import numpy as np

AT_ONCE = 1024  # rows of similarities that are held at a time


def ranks(
    queries: np.ndarray, answers: np.ndarray, wanted: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    """(Q,) how many answers stand before the best right one: 0 where that is the first.

    Args:
        queries: (Q, D), answers: (A, D); the larger their product, the more alike they are.
        wanted: (Q,) the group of answers that is right for each query. groups: (A,) that of each answer.
    An answer that is as alike as the right one counts as standing before it: who says the same of everything
    finds nothing.
    """
    out = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), AT_ONCE):
        some = slice(start, start + AT_ONCE)
        alike = queries[some] @ answers.T
        right = wanted[some, None] == groups
        best = np.where(right, alike, -np.inf).max(1, keepdims=True)
        out[some] = ((alike >= best) & ~right).sum(1)
    return out


def recall(found: np.ndarray, most: int) -> float:
    """The share of ranks among the first so many."""
    return float((found < most).mean())
