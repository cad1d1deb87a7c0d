"""Panoptic segmentation: every pixel belongs to one thing, or to stuff of a class."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vitrail.tasks.detect import beyond_queries
from vitrail.tasks.task import Scores, Table, Task, label_map
from vitrail_runtime.errors import InputError, NotFinite, listed

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vitrail.data.batch import Batch
    from vitrail.data.examples import Examples
    from vitrail.data.panoptic import Panoptic as Truth
    from vitrail.data.panoptic import Segments
    from vitrail_runtime.prediction import Prediction

PARTS = {"": "all", "_things": "things", "_stuff": "stuff"}  # of the classes: what they are called
NAMES = ("PQ", "SQ", "RQ")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Nothing to set."""


class Panoptic(Task):
    name = "panoptic"
    truth = "segments"
    headline = "PQ"
    shown = "PQ"
    settings = Settings

    def model_options(self, settings: Settings, truth: "Truth") -> dict[str, Any]:
        """Which classes are stuff, and what results in COCO's format call all of them."""
        return {"stuff": sorted(truth.stuff), "category_ids": truth.told.category_ids.tolist()}

    def notes(self, model: Any, truth: "Truth") -> list[str]:
        return beyond_queries(model, truth.told)

    def evaluator(self, model: Any, data: "Examples") -> "Evaluator":
        return Evaluator(model, data)


TASK = Panoptic()


class Evaluator:
    """Compares segments at the original image's size, one image after another; keeps none of them.

    Classes are matched by name. Pixels that are of no segment in the truth, and those of crowds, count
    neither for nor against an answer.
    """

    def __init__(self, model: Any, data: "Examples") -> None:
        import numpy as np
        from torchmetrics import SumMetric

        from vitrail.metrics.panoptic import PanopticMetrics  # torchmetrics takes seconds to import

        self.classes, self.stuff = model.classes, tuple(model.stuff)
        self.lookup = np.array(label_map(data.classes, model.classes), np.int64)
        seen = set(self.lookup[data.truth.told.labels].tolist())  # of others the data need not tell
        check_stuff(model, {int(self.lookup[k]) for k in data.truth.stuff}, seen)
        device = next(model.parameters()).device
        self.metrics = PanopticMetrics(len(model.classes), self.stuff, device)
        self.images, self.not_finite = (SumMetric().to(device) for _ in range(2))
        for one in (self.images, self.not_finite):
            one.update(0)
        self.rows: list[tuple[float, ...]] = []

    def update(self, outputs: "Mapping[str, Tensor]", batch: "Batch") -> None:
        from vitrail_runtime.finish import finish_panoptic

        images = zip(batch.targets, batch.geometries, batch.indices.tolist(), strict=True)
        for i, (truth, geometry, index) in enumerate(images):
            alone = {name: v[i : i + 1].float().cpu().numpy() for name, v in outputs.items()}
            self.images.update(1)
            try:
                (said,) = finish_panoptic(alone, [geometry], self.classes)
            except NotFinite:
                self.not_finite.update(1)
            else:
                self._update_one(said, truth, index)

    def _update_one(self, said: "Prediction", truth: "Segments", index: int) -> None:
        import numpy as np
        import torch

        from vitrail.metrics.panoptic import counted

        assert said.segments is not None
        own = np.where(np.append(False, truth.crowd)[truth.segments], 0, truth.segments)
        pairs = []
        for ids, labels in ((said.segments, said.labels), (own, self.lookup[truth.labels])):
            of_pixels = np.append(-1, labels)[ids]
            pairs.append((torch.from_numpy(of_pixels), torch.from_numpy(ids)))
        self.metrics.update(*pairs)
        self.rows.append(
            (index, *counted(said.segments, said.labels, own, self.lookup[truth.labels]))
        )

    def said(self) -> "dict[str, np.ndarray]":
        """Of each image (N,): how many `segments` it has, how many of them are `found`, and how many answers
        are `wrong`; `PQ` of these, as of one class, NaN where there is no segment and no answer."""
        import numpy as np

        if not self.rows:
            return {}
        *whole, quality = zip(*self.rows, strict=True)
        names = ("indices", "segments", "found", "wrong")
        counts = {name: np.array(v, np.int64) for name, v in zip(names, whole, strict=True)}
        return counts | {"PQ": np.array(quality)}

    def compute(self) -> Scores:
        bad, total = int(self.not_finite.compute()), int(self.images.compute())
        if bad:
            raise NotFinite(
                f"the model's masks or scores are not finite (NaN or infinite) on {bad} of {total} images; "
                "its weights are damaged or its training diverged: take an earlier model, or train with a "
                "lower --lr"
            )
        found = self.metrics.compute()
        if not sum(right + missed for right, _, missed in found["counts"]):
            raise InputError(
                f"none of the {total} images has a segment, so nothing can be measured; look at the data: "
                "vitrail data show"
            )
        return scores_of(found | {"num_images": total}, self.classes, self.stuff)


def check_stuff(model: Any, stuff: set[int], known: set[int]) -> None:
    """Raise InputError where model and data do not agree which of the classes are stuff."""
    odd = sorted((stuff ^ set(model.stuff)) & known)
    if odd:
        names = listed(repr(model.classes[k]) for k in odd)
        raise InputError(
            f"the model and the data do not agree whether {names} are things or stuff; the model's stuff is "
            f'{listed(model.classes[k] for k in model.stuff) or "nothing"}: put "isthing" right in the '
            "data's JSON, or train on this data"
        )


def scores_of(found: dict[str, Any], classes: Sequence[str], stuff: Sequence[int]) -> Scores:
    """What `PanopticMetrics.compute` gave, in the form that every task's scores have.

    Of things and stuff names end in "_things" and "_stuff"; means of no class are left out. details: classes,
    stuff (names), per_class {name: segments, found, wrong, PQ, SQ, RQ}, None where nothing can be told.
    """
    values = {
        name + part: found[name + part]
        for part in PARTS
        for name in NAMES
        if not math.isnan(found[name + part])
    }
    per_class = {}
    rows = zip(classes, found["per_class"], found["counts"], strict=True)
    for name, of, (right, wrong, missed) in rows:
        told = {"segments": right + missed, "found": right, "wrong": wrong}
        per_class[name] = told | (of or dict.fromkeys(NAMES))
    table = [
        (
            name,
            "stuff" if k in stuff else "thing",
            *(of[key] for key in ("segments", "found", "wrong")),
            *("none" if of[key] is None else of[key] for key in NAMES),
        )
        for k, (name, of) in enumerate(per_class.items())
    ]
    absent = [name for name, of in per_class.items() if of["PQ"] is None]
    notes = [f"left out of the means, neither there nor said: {listed(absent, limit=5)}"]
    header = ("class", "kind", "segments", "found", "wrong", *NAMES)
    return Scores(
        values | {"num_images": found["num_images"]},
        TASK.headline,
        (Table("", header, tuple(table)),),
        {
            "per_class": per_class,
            "classes": list(classes),
            "stuff": [classes[k] for k in stuff],
        },
        tuple(notes) if absent else (),
    )
