"""Classification: one class for each image."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from vitrail.configuration import Range, check_choices, check_ranges
from vitrail.tasks.task import Scores, Table, Task, confused, label_map

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vitrail.data.batch import Batch, Dense
    from vitrail.data.examples import Examples, Labels


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How classifiers are trained."""

    label_smoothing: float = 0.1
    """Probability spread over all classes."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """"sigmoid" asks of each class by itself whether it is there; the answers' losses are added."""
    mixup: float = 0.0
    """Alpha of MixUp's Beta distribution (Zhang et al. 2018, arXiv 1710.09412); 0 is off. Where CutMix is on
    as well, each update takes one of them.
    """
    cutmix: float = 0.0
    """Alpha of CutMix's Beta distribution (Yun et al. 2019, arXiv 1905.04899); 0 is off."""
    mix_prob: float = 1.0
    """Probability that an update mixes at all."""
    sampling: Literal["uniform", "balanced"] = "uniform"
    """"balanced" draws every class equally often."""

    def __post_init__(self) -> None:
        check_choices(self, where="task")
        check_ranges(
            self,
            {
                "label_smoothing": Range(0, 1, below=True, hint="0 is off"),
                "mixup": Range(0),
                "cutmix": Range(0),
                "mix_prob": Range(0, 1),
            },
        )


class Classify(Task):
    name = "classify"
    truth = "labels"
    headline = "top1"
    shown = "top-1"
    settings = Settings

    def options(self, settings: Settings) -> dict[str, Any]:
        return {"label_smoothing": settings.label_smoothing, "loss": settings.loss}

    def prepare(
        self, batch: "Dense", key: tuple[int, int, int], settings: Settings, num_classes: int
    ) -> "Dense":
        from vitrail.data.augment import mix

        images, targets = mix(
            batch.images,
            batch.targets,
            key,
            num_classes=num_classes,
            mixup=settings.mixup,
            cutmix=settings.cutmix,
            mix_prob=settings.mix_prob,
        )
        return replace(batch, images=images, targets=targets)

    def multiple(self, settings: Settings) -> int:
        """MixUp and CutMix pair neighbours of a share: odd shares would make other pairs than one process."""
        return 2 if max(settings.mixup, settings.cutmix) > 0 else 1

    def weights(self, settings: Settings, truth: "Labels") -> "np.ndarray | None":
        from vitrail.data.plan import balanced_weights

        return balanced_weights(truth.labels) if settings.sampling == "balanced" else None

    def evaluator(self, model: Any, data: "Examples") -> "Evaluator":
        return Evaluator(model, data)


TASK = Classify()


class Evaluator:
    """Classes are matched by name: the order of folders does not matter."""

    def __init__(self, model: Any, data: "Examples") -> None:
        import torch

        from vitrail.metrics import ClassificationMetrics  # torchmetrics takes seconds to import

        self.classes = model.classes
        self.lookup = torch.tensor(label_map(data.classes, model.classes))
        device = next(model.parameters()).device
        self.metrics = ClassificationMetrics(len(model.classes), device)
        self.rows: list[dict[str, Tensor]] = []

    def update(self, outputs: "Mapping[str, Tensor]", batch: "Batch") -> None:
        import torch

        logits = outputs["logits"].float()
        labels = self.lookup[torch.tensor(batch.targets)]
        self.metrics.update(logits, labels.to(logits.device))
        self.rows.append(
            {
                "indices": batch.indices.cpu(),
                "labels": labels,
                "predicted": logits.argmax(1).cpu(),
                "probabilities": logits.softmax(1).half().cpu(),
            }
        )

    def said(self) -> "dict[str, np.ndarray]":
        """labels and predicted (N,), probabilities (N, K) float16."""
        import torch

        names = self.rows[0] if self.rows else ()
        return {name: torch.cat([row[name] for row in self.rows]).numpy() for name in names}

    def compute(self) -> Scores:
        return scores_of(self.metrics.compute(), self.classes)


def scores_of(found: dict[str, Any], classes: tuple[str, ...]) -> Scores:
    """What `ClassificationMetrics.compute` gave, in the form that every task's scores have.

    details: classes, per_class {name: precision, recall, f1, support} and confusion[truth][predicted].
    """
    per_class = dict(zip(classes, found["per_class"], strict=True))
    rows = tuple(
        (name, of["support"], of["precision"], of["recall"], of["f1"])
        for name, of in per_class.items()
    )
    wrong = confused(found["confusion"], classes)
    return Scores(
        {key: found[key] for key in ("top1", "top5", "loss", "num_images")},
        TASK.headline,
        (Table("", ("class", "images", "precision", "recall", "F1"), rows),),
        {"per_class": per_class, "confusion": found["confusion"], "classes": list(classes)},
        tuple(f"{count} x {truth} taken for {said}" for count, truth, said in wrong),
        called={"top1": "top-1", "top5": "top-5"},
    )
