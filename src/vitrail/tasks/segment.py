"""Semantic segmentation: a class for every pixel."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vitrail.configuration import check_choices
from vitrail.data.legend import IGNORE
from vitrail.tasks.task import Scores, Table, Task, confused, label_map
from vitrail_runtime.errors import InputError, NotFinite, listed

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vitrail.data.examples import Examples
    from vitrail.data.masks import ClassMaps
    from vitrail_runtime.preprocess import Geometry


SHOWN = ("mIoU", "pixel_accuracy", "mean_accuracy", "loss", "num_images")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How segmenters are trained."""

    class_weights: Literal["none", "balanced"] = "none"
    """"balanced": pixels of rare classes count more in the loss, by median frequency balancing (Eigen and
    Fergus 2015, arXiv 1411.4734)."""

    def __post_init__(self) -> None:
        check_choices(self, where="task")


class Segment(Task):
    name = "segment"
    truth = "class maps"
    headline = "mIoU"
    shown = "mIoU"
    settings = Settings

    def model_options(self, settings: Settings, truth: "ClassMaps") -> dict[str, Any]:
        from vitrail.data.masks import class_weights

        if settings.class_weights == "none":
            return {"class_weights": None}
        return {"class_weights": tuple(class_weights(truth.counts).tolist())}

    def evaluator(self, model: Any, data: "Examples") -> "Evaluator":
        return Evaluator(model, data)


TASK = Segment()


class Evaluator:
    """Compares class maps at the original image's size, one image after another; keeps none of them.

    Classes are matched by name. The loss is the cross-entropy of the labelled pixels as the model sees them.
    """

    def __init__(self, model: Any, data: "Examples") -> None:
        from torchmetrics import SumMetric

        from vitrail.metrics import SegmentationMetrics  # torchmetrics takes seconds to import

        self.classes = model.classes
        self.lookup = class_lookup(data.classes, model.classes)
        device = next(model.parameters()).device
        self.metrics = SegmentationMetrics(len(model.classes), device, ignore=IGNORE)
        sums = (SumMetric(nan_strategy="disable").to(device) for _ in range(4))
        self.loss, self.pixels, self.images, self.not_finite = sums
        self.rows: list[tuple[int, float, float]] = []

    def update(self, outputs: "Mapping[str, Tensor]", batch: Any) -> None:
        images = (
            outputs["logits"].float(),
            batch.targets,
            batch.geometries,
            batch.indices.tolist(),
        )
        for logits, truth, geometry, index in zip(*images, strict=True):
            self._update_one(logits, truth, geometry, index)

    def _update_one(self, logits: "Tensor", truth: Any, geometry: "Geometry", index: int) -> None:
        import numpy as np
        import torch
        import torch.nn.functional as F

        from vitrail_runtime.finish import finish_segmentation

        self.images.update(1)
        finite = bool(logits.isfinite().all())
        self.not_finite.update(0 if finite else 1)
        if not finite:
            return
        truth = self.lookup[np.asarray(truth)]
        (said,) = finish_segmentation(logits[None].cpu().numpy(), [geometry], self.classes)
        assert said.segmentation is not None
        scores = self.metrics.update(torch.from_numpy(said.segmentation), torch.from_numpy(truth))
        self.rows.append((index, scores["pixel_accuracy"], scores["mIoU"]))
        target = torch.from_numpy(seen(truth, geometry, logits.shape[-2:])).to(logits.device)
        target, how = target[None].long(), {"ignore_index": IGNORE, "reduction": "sum"}
        self.loss.update(F.cross_entropy(logits[None], target, **how))
        self.pixels.update((target != IGNORE).sum())

    def said(self) -> "dict[str, np.ndarray]":
        """pixel_accuracy and mIoU (N,) of each image; NaN where none of its pixels has a class."""
        import numpy as np

        if not self.rows:
            return {}
        indices, accuracy, iou = zip(*self.rows, strict=True)
        return {
            "indices": np.array(indices),
            "pixel_accuracy": np.array(accuracy),
            "mIoU": np.array(iou),
        }

    def compute(self) -> Scores:
        bad, total = int(self.not_finite.compute()), int(self.images.compute())
        if bad:
            raise NotFinite(
                f"the model's scores are not finite (NaN or infinite) on {bad} of {total} images; its weights"
                " are damaged or its training diverged: take an earlier model, or train with a lower --lr"
            )
        found = self.metrics.compute()
        if not found["num_pixels"]:
            raise InputError(
                f"none of the {total} images has a pixel with a class, so nothing can be measured; look at "
                "the masks: vitrail data show"
            )
        loss = self.loss.compute() / self.pixels.compute()
        found |= {"loss": loss.item(), "num_images": total}
        return scores_of(found, self.classes)


def class_lookup(data_classes: tuple[str, ...], model_classes: tuple[str, ...]) -> "np.ndarray":
    """(256,) uint8: the model's class of each of the data's; IGNORE stays."""
    import numpy as np

    lookup = np.full(256, IGNORE, np.uint8)
    lookup[: len(data_classes)] = label_map(data_classes, model_classes)
    return lookup


def seen(truth: "np.ndarray", geometry: "Geometry", size: Sequence[int]) -> "np.ndarray":
    """The class map (H, W) of an original as the model's input (h, w) shows it: of the nearest pixel."""
    import numpy as np

    rows, columns = (
        ((np.arange(cells) + 0.5 + offset) / scale).astype(np.int64).clip(0, length - 1)
        for cells, offset, scale, length in zip(
            size, geometry.offset, geometry.scale, truth.shape, strict=True
        )
    )
    return truth[rows[:, None], columns]


def scores_of(found: dict[str, Any], classes: tuple[str, ...]) -> Scores:
    """What `SegmentationMetrics.compute` gave, in the form that every task's scores have.

    details: classes, per_class {name: iou, accuracy, pixels}, None where nothing can be told, and
    confusion[truth][predicted] in pixels.
    """
    per_class = {
        name: {key: None if math.isnan(value) else value for key, value in of.items()}
        for name, of in zip(classes, found["per_class"], strict=True)
    }
    rows = tuple(
        (name, of["pixels"], *("none" if of[k] is None else of[k] for k in ("iou", "accuracy")))
        for name, of in per_class.items()
    )
    wrong = confused(found["confusion"], classes)
    notes = [f"{truth} taken for {said}: {count:,} pixels" for count, truth, said in wrong]
    absent = [name for name, of in per_class.items() if of["iou"] is None]
    if absent:
        notes.append(
            f"left out of the mean, neither in the masks nor predicted: {listed(absent, limit=5)}"
        )
    return Scores(
        {key: found[key] for key in SHOWN},
        TASK.headline,
        (Table("", ("class", "pixels", "IoU", "accuracy"), rows),),
        {"per_class": per_class, "confusion": found["confusion"], "classes": list(classes)},
        tuple(notes),
    )
