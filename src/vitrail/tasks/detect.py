"""Detection: boxes around objects, and their masks where data and model have them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vitrail.configuration import Range, check_ranges
from vitrail.tasks.task import Scores, Table, Task, label_map
from vitrail_runtime.errors import InputError, NotFinite, listed

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vitrail.data.batch import Batch
    from vitrail.data.boxes import Boxes
    from vitrail.data.examples import Examples
    from vitrail_runtime.prediction import Prediction

SURE = 0.5  # an answer of this score is shown to a person, and counts in what is said of one image
KINDS = {"box": "", "mask": "mask_"}  # what is compared: how its scores are called
SHOWN = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR", "AP_100", "AR_100")
SIZES = {"APs": "small (below 32 x 32 pixels)", "APm": "medium", "APl": "large (96 x 96 and more)"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How detectors are trained."""

    mosaic: float = 0.0
    """Share of the batches whose images are put together four in one (Bochkovskiy et al. 2020, arXiv
    2004.10934); 0 is off."""

    def __post_init__(self) -> None:
        check_ranges(self, {"mosaic": Range(0, 1, hint="0 is off")})


class Detect(Task):
    name = "detect"
    truth = "boxes"
    headline = "AP"
    shown = "AP"
    settings = Settings

    def taken(self, data: "Examples") -> "Examples":
        """Segments of things and of stuff are objects too, of which the boxes are learnt."""
        if data.truth.kind != "segments":
            return data
        return replace(data, truth=data.truth.told)

    def model_options(self, settings: Settings, truth: "Boxes") -> dict[str, Any]:
        """What results in COCO's format call the classes."""
        return {"category_ids": truth.category_ids.tolist()}

    def notes(self, model: Any, truth: "Boxes") -> list[str]:
        return beyond_queries(model, truth)

    def prepare(
        self, batch: "Batch", key: tuple[int, int, int], settings: Settings, num_classes: int
    ) -> "Batch":
        from vitrail.data.mosaic import mosaic

        return mosaic(batch, key, settings.mosaic)

    def multiple(self, settings: Settings) -> int:
        """Four neighbours of a share make a mosaic: other shares would make others than one process."""
        return 4 if settings.mosaic else 1

    def evaluator(self, model: Any, data: "Examples") -> "Evaluator":
        return Evaluator(model, data)


TASK = Detect()


def beyond_queries(model: Any, truth: "Boxes") -> list[str]:
    """What is to be said where images have more objects than a model has queries: a batch that shows them
    all is an error, which may come late, as augmentation crops."""
    import numpy as np

    from vitrail.data.boxes import MOST_OBJECTS

    queries = getattr(model.config, "num_queries", None)  # of DETR and its relatives
    if queries is None:
        return []
    of_objects = np.repeat(np.arange(len(truth)), np.diff(truth.starts))[~truth.crowd]
    counts = np.bincount(of_objects, minlength=len(truth)).clip(max=MOST_OBJECTS)
    many, most = int((counts > queries).sum()), int(counts.max(initial=0))
    if not many:
        return []
    return [
        f"{many} of {len(truth)} images have more objects than the model has queries ({queries}), the most "
        f"{most}; the first batch that shows so many of one ends the training: --head-fields "
        f"num_queries={most}"
    ]


class Evaluator:
    """Compares boxes, and masks where both sides have them, in pixels of the original images.

    Classes are matched by name. Images are known by COCO's id, where the data has one, and by their place.
    """

    def __init__(self, model: Any, data: "Examples") -> None:
        import numpy as np
        from torchmetrics import SumMetric

        from vitrail.metrics.detection import DetectionMetrics

        self.classes = model.classes
        self.lookup = np.array(label_map(data.classes, model.classes), np.int64)
        self.image_ids = data.truth.image_ids
        self.masks = bool(model.has_masks and data.truth.has_masks)
        kinds = ("box", "mask") if self.masks else ("box",)
        self.metrics = DetectionMetrics(len(model.classes), kinds=kinds)
        self.not_finite = SumMetric().to(next(model.parameters()).device)
        self.not_finite.update(0)
        self.rows: list[tuple[int, int, int, int]] = []

    def update(self, outputs: "Mapping[str, Tensor]", batch: "Batch") -> None:
        from vitrail_runtime.finish import finish_detection

        arrays = {name: value.float().cpu().numpy() for name, value in outputs.items()}
        images = zip(batch.targets, batch.geometries, batch.indices.tolist(), strict=True)
        for i, (truth, geometry, index) in enumerate(images):
            alone = {name: values[i : i + 1] for name, values in arrays.items()}
            try:
                (said,) = finish_detection(alone, [geometry], self.classes)
            except NotFinite:
                self.not_finite.update(1)
            else:
                self._update_one(said, truth, index)

    def _update_one(self, said: "Prediction", truth: Any, index: int) -> None:
        from vitrail.metrics.detection import Annotated, Found

        assert said.boxes is not None
        masks = said.rles if self.masks else None
        found = Found(said.boxes, said.scores, said.labels, masks)
        labels = self.lookup[truth.labels]
        true = Annotated(truth.boxes, labels, truth.crowd, truth.areas, truth.masks)
        self.metrics.update((int(self.image_ids[index]), index), found, true)
        self.rows.append((index, *counted(found, true)))

    def said(self) -> "dict[str, np.ndarray]":
        """Of each image (N,): how many objects it has (crowds left out), how many of them answers of at
        least SURE `found` at an IoU of 0.5, and how many such answers are `wrong`; `F1` of these, NaN
        where there is no object and no answer."""
        import numpy as np

        if not self.rows:
            return {}
        indices, objects, found, wrong = np.array(self.rows, np.int64).T
        both = objects + found + wrong
        with np.errstate(invalid="ignore"):
            f1 = 2 * found / both
        return {"indices": indices, "objects": objects, "found": found, "wrong": wrong, "F1": f1}

    def compute(self) -> Scores:
        found = self.metrics.compute()
        bad = int(self.not_finite.compute())
        if bad:
            raise NotFinite(
                f"the model's boxes are not finite (NaN or infinite) on {bad} of "
                f"{bad + found['num_images']} images; its weights are damaged or its training diverged: take "
                "an earlier model, or train with a lower --lr"
            )
        if not sum(found["num_objects"]):
            raise InputError(
                f"none of the {found['num_images']} images has an object, so nothing can be measured; look "
                "at the data: vitrail data show"
            )
        return scores_of(found, self.classes)


def counted(found: Any, truth: Any) -> tuple[int, int, int]:
    """(objects, objects found, wrong answers) of one image, by the answers of at least SURE."""
    import numpy as np

    from vitrail.metrics.detection_errors import IGNORED, RIGHT, mistakes

    order = np.argsort(-found.scores, kind="stable")
    order = order[found.scores[order] >= SURE]
    kinds, _ = mistakes(found.boxes[order], found.labels[order], truth)
    right = int((kinds == RIGHT).sum())
    return int((~truth.crowd).sum()), right, int((kinds != IGNORED).sum()) - right


def scores_of(found: dict[str, Any], classes: Sequence[str]) -> Scores:
    """What `DetectionMetrics.compute` gave, in the form that every task's scores have.

    Of masks names begin with "mask_". What cannot be told is left out of the values: AP of a size of which
    there is no object. details: classes, per_class {name: objects, AP, AP50, AP75, AR, mask_AP, ...}, None
    where there is no object; errors {kind: count, dAP50}; AP_by_iou and precision (see
    `metrics.detection.measured`), mask_AP_by_iou and mask_precision; max_detections.
    """
    there = [kind for kind in KINDS if kind in found]
    values: dict[str, Any] = {}
    details: dict[str, Any] = {"classes": list(classes)}
    per_class: dict[str, dict[str, Any]] = {
        name: {"objects": count} for name, count in zip(classes, found["num_objects"], strict=True)
    }
    for kind in there:
        of, prefix = found[kind], KINDS[kind]
        values |= {prefix + key: of[key] for key in SHOWN if not math.isnan(of.get(key, math.nan))}
        details |= {prefix + "AP_by_iou": of["by_iou"], prefix + "precision": of["precision"]}
        for name, scores in zip(classes, of["per_class"], strict=True):
            per_class[name] |= {
                prefix + key: None if math.isnan(value) else value for key, value in scores.items()
            }
    values["num_images"] = found["num_images"]
    limit = found["box"]["max_detections"]
    details |= {"per_class": per_class, "errors": found["errors"], "max_detections": limit}
    return Scores(
        values,
        TASK.headline,
        (class_table(per_class, masks="mask" in there), error_table(found["errors"])),
        details,
        tuple(notes(values, per_class)),
    )


def class_table(per_class: Mapping[str, Mapping[str, Any]], *, masks: bool) -> Table:
    columns = {"AP": "AP", "AP50": "AP50", "AP75": "AP75", "AR": "AR"}
    if masks:
        columns |= {"mask_AP": "mask AP", "mask_AP50": "mask AP50"}
    rows = [
        (name, of["objects"], *("none" if of[key] is None else of[key] for key in columns))
        for name, of in per_class.items()
    ]
    return Table("", ("class", "objects", *columns.values()), tuple(rows))


def error_table(errors: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = sorted(errors.items(), key=lambda item: -item[1]["dAP50"])
    return Table(
        "",
        ("mistakes", "number", "AP50 they cost"),
        tuple((kind, of["count"], of["dAP50"]) for kind, of in rows),
    )


def notes(values: Mapping[str, Any], per_class: Mapping[str, Mapping[str, Any]]) -> list[str]:
    said = []
    absent = [name for name, of in per_class.items() if not of["objects"]]
    if absent:
        said.append(f"left out of the means, without an object here: {listed(absent, limit=5)}")
    sizes = [what for key, what in SIZES.items() if key not in values]
    if sizes:
        said.append(f"no object is {' or '.join(sizes)}")
    if "AP_100" in values:
        said.append(
            "AP and AR count all answers of the model; AP_100 and AR_100, as COCO does, the best 100 of an "
            "image and class"
        )
    return said
