"""Where a detector's queries look, and the encoder from the places of what they found (Carion et al., ECCV
2020, figures 3 and 6; Zhu et al., ICLR 2021, figure 6). Read from what DETR and Deformable DETR record."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from vitrail.modes import eval_mode
from vitrail_runtime.errors import InputError

Record = dict[str, Tensor]
FINE = 4  # pixels of a place, where points are read and not cells
SPREAD = 1.5  # of such a point, in places


@dataclass(frozen=True)
class Answer:
    """What one query found: a box xyxy in pixels of the model's input, its label and score, and two maps over
    the image, each >= 0: what the query looked at in the last decoder layer, and what the encoder's cell in
    the middle of the box did in the last of its layers."""

    box: np.ndarray
    label: int
    score: float
    query: int
    looked: np.ndarray
    around: np.ndarray

    @property
    def middle(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        x1, y1, x2, y2 = self.box.tolist()
        return (x1 + x2) / 2, (y1 + y2) / 2


def answers(model: Any, image: Tensor, *, count: int, score: float) -> list[Answer]:
    """The best answers of a preprocessed image (3, H, W), one of a query and `count` at most, of this score
    at least; where none has it, the best one. Raises InputError for a model without queries."""
    record: Record = {}
    with eval_mode(model), torch.no_grad():
        found = model.forward_tensors(image[None], record)
    if "queries" not in record:
        raise InputError(
            f"{model.info.name} has no queries that look at an image; give a model such as detr/resnet50 or "
            "deformable_detr/resnet50"
        )
    height, width = image.shape[1:]
    counted = max(1, int(found["count"][0]))  # a model may be sure of none
    scores = found["scores"][0, :counted].tolist()
    out: dict[int, Answer] = {}
    for i, own in enumerate(scores):
        box, query = found["boxes"][0, i].cpu().numpy(), int(record["queries"][0, i])
        if len(out) == count or (out and own < score):
            break
        if query in out:  # its second best class
            continue
        x, y = (box[0] + box[2]) / 2 / width, (box[1] + box[3]) / 2 / height
        name = _last(record, "decoder", ("multihead_attn", "cross_attn"))
        looked = _seen(record, name, query, (height, width))
        name = _last(record, "encoder", ("self_attn",))
        around = _seen(record, name, cell_of(record["cells"], x, y), (height, width))
        out[query] = Answer(box, int(found["labels"][0, i]), own, query, looked, around)
    return list(out.values())


def cell_of(cells: Tensor, x: float, y: float) -> int:
    """The number of the cell at a place, from 0 to 1, of the finest map. cells: (2,) or (L, 2), height and
    width."""
    height, width = cells.reshape(-1, 2)[0].tolist()
    row, column = min(int(y * height), height - 1), min(int(x * width), width - 1)
    return row * width + column


def _last(record: Record, part: str, kinds: tuple[str, ...]) -> str:
    """The attention of the last layer: "decoder.layers.5.cross_attn"."""
    names = [
        key.removesuffix(".weights")
        for key in record
        if key.startswith(f"{part}.") and key.endswith(tuple(f".{kind}.weights" for kind in kinds))
    ]
    return max(names, key=lambda name: int(name.split(".")[2]))


def _seen(record: Record, name: str, row: int, size: tuple[int, int]) -> np.ndarray:
    """The attention of one query, or cell, the mean over heads, as a map."""
    weights = record[f"{name}.weights"][0].cpu().float()
    places = record.get(f"{name}.locations")
    if places is None:  # (heads, rows, cells)
        return weights[:, row].mean(0).reshape(*record["cells"].tolist()).numpy()
    height, width = (-(-side // FINE) for side in size)
    own = places[0, row].cpu().float().reshape(-1, 2).numpy()
    share = (weights[row] / len(weights[row])).flatten().numpy()
    inside = ((own >= 0) & (own < 1)).all(1)
    x, y = (own[inside] * (width, height)).astype(int).T
    out = np.zeros((height, width), np.float32)
    np.add.at(out, (y, x), share[inside])
    return gaussian_filter(out, SPREAD, mode="constant")
