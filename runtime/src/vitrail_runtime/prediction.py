"""What a model says of one picture, in words and numbers that need no model to read."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(eq=False)
class Prediction:
    """What a model says of one picture; N answers, the best first.

    labels: (N,) int64, indices into the model's classes. scores: (N,) float32 in [0, 1].
    names: the N class names. boxes: (N, 4) float32 xyxy in pixels of the original picture.
    source: the file, where there is one. size: (height, width) of the original picture, upright.
    """

    labels: np.ndarray
    scores: np.ndarray
    names: list[str]
    boxes: np.ndarray | None = None
    source: str | None = None
    size: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: `path`, `size`, the best `label` (its name), its `score`, and all N under `top`."""
        top: list[dict[str, Any]] = [
            {"label": name, "index": int(label), "score": round(float(score), 6)}
            for name, label, score in zip(self.names, self.labels, self.scores, strict=True)
        ]
        if self.boxes is not None:
            for entry, box in zip(top, self.boxes, strict=True):
                entry["box"] = [round(float(v), 2) for v in box]
        best = {"label": top[0]["label"], "score": top[0]["score"]} if top else {}
        return {
            "path": self.source,
            "size": list(self.size) if self.size else None,
            **best,
            "top": top,
        }
