"""Contrast: which caption belongs to which image, learnt from pairs of both."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from vitrail.configuration import Range, check_ranges
from vitrail.tasks.task import Scores, Table, Task
from vitrail_runtime.errors import InputError, NotFinite

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vitrail.data.examples import Examples
    from vitrail.data.pairs import Captions

RIGHT_AT = (1, 5)  # places at which what is searched is said to be found


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How models of images and captions are trained."""

    merges: int = 48894
    """Most merges of the vocabulary that is learnt from the captions, where the weights bring none; a model
    takes as many of them as its vocab_size has room for."""

    def __post_init__(self) -> None:
        check_ranges(self, {"merges": Range(0)})


class Contrast(Task):
    name = "contrast"
    truth = "captions"
    headline = "recall"
    shown = "recall@1"
    settings = Settings
    any_names = True

    def check(self, config: Any) -> None:
        if config.accumulate > 1:
            raise InputError(
                f"--accumulate {config.accumulate} would hold each part's images against its own captions "
                "alone, which is another loss than that of the batch; take a smaller --batch-size, more "
                "processes, or --grad-checkpointing"
            )
        if config.parallel == "fsdp":
            raise InputError(
                "--parallel fsdp shards a model whose parts all work in every step; a text tower is asked by "
                "itself too: take --parallel data"
            )

    def model_options(self, settings: Settings, truth: "Captions") -> dict[str, Any]:
        from vitrail.backbones.text_tokens import learn_merges

        return {"merges": learn_merges(truth.captions, settings.merges)}

    def notes(self, model: Any, truth: "Captions") -> list[str]:
        cut = model.text.too_long(truth.captions)
        if not cut:
            return []
        return [
            f"{cut} of {len(truth)} captions are longer than the {model.config.context} tokens that the "
            "model reads, and are cut; --head-fields context=N reads more"
        ]

    def answering(
        self, model: Any, classes: Sequence[str] | None, data: "Examples | None" = None
    ) -> Any:
        """A classifier by names: of `classes`, or of labelled data; of data with captions as it stands."""
        from vitrail.towers import zero_shot

        if data is not None and data.truth.kind == "labels" and classes is None:
            classes = data.classes
        if data is not None and classes is None:
            return model
        return zero_shot(model, classes)

    def evaluator(self, model: Any, data: "Examples") -> "Evaluator":
        return Evaluator(model, data)


TASK = Contrast()


class Evaluator:
    """Finds captions by images and images by captions, and classes by their names where images have labels.

    It keeps the embeddings of all pairs, no image. Captions that read the same are one caption.
    """

    def __init__(self, model: Any, data: "Examples") -> None:
        import torch

        from vitrail.towers import zero_shot

        self.model, self.classes, self.total = model, data.classes, len(data)
        self.names: Tensor | None = None
        if self.classes and bool((data.truth.labels >= 0).any()):
            with torch.no_grad():
                self.names = cast(Any, zero_shot(model, self.classes).head).names
        self.images: list[Tensor] = []
        self.texts: list[Tensor] = []
        self.captions: list[str] = []
        self.labels: list[int] = []
        self.indices: list[int] = []
        self.rows: dict[str, np.ndarray] = {}

    def update(self, outputs: "Mapping[str, Tensor]", batch: Any) -> None:
        captions, labels = zip(*batch.targets, strict=True)
        self.images.append(outputs["embeddings"].float().cpu())
        self.texts.append(self.model.embed(captions).cpu())
        self.captions += captions
        self.labels += labels
        self.indices += batch.indices.tolist()

    def said(self) -> "dict[str, np.ndarray]":
        """Of each image: rank, how many captions stand before its own; caption_rank, how many images stand
        before it for its caption; best, an image that has the caption said to be its own; and, with classes,
        labels and predicted."""
        return self.rows

    def compute(self) -> Scores:
        import numpy as np
        import torch

        from vitrail.metrics.retrieval import ranks, recall

        own = {
            "images": torch.cat(self.images).numpy() if self.images else None,
            "texts": torch.cat(self.texts).numpy() if self.texts else None,
            "captions": self.captions,
            "labels": self.labels,
            "indices": self.indices,
        }
        parts = [part for part in gathered(own) if part["captions"]]
        images, texts = (np.concatenate([part[k] for part in parts]) for k in ("images", "texts"))
        captions = [caption for part in parts for caption in part["captions"]]
        labels, indices = (
            np.array([i for part in parts for i in part[k]]) for k in ("labels", "indices")
        )
        if not (np.isfinite(images).all() and np.isfinite(texts).all()):
            raise NotFinite(
                "the model's embeddings are not finite (NaN or infinite); its weights are damaged or its "
                "training diverged: take an earlier model, or train with a lower --lr"
            )
        distinct, first, group = np.unique(captions, return_index=True, return_inverse=True)
        to_caption = ranks(images, texts[first], group, np.arange(len(distinct)))
        to_image = ranks(texts[first], images, np.arange(len(distinct)), group)
        best = (images @ texts[first].T).argmax(1)
        values = {}
        for what, found in (("image_to_text", to_caption), ("text_to_image", to_image)):
            values |= {f"{what}@{k}": recall(found, k) for k in RIGHT_AT}
        values = {"recall": (values["image_to_text@1"] + values["text_to_image@1"]) / 2} | values
        rows = {
            "indices": indices,
            "rank": to_caption,
            "caption_rank": to_image[group],
            "best": indices[first][best],
            "labels": labels,
        }
        per_class: dict[str, Any] = {}
        if self.names is not None:
            rows["predicted"] = (images @ self.names.cpu().numpy().T).argmax(1)
            values["zero_shot"], per_class = by_class(rows["predicted"], labels, self.classes)
        mine = np.isin(indices, self.indices)
        self.rows = {name: value[mine] for name, value in rows.items()}
        values["loss"] = self._loss(torch.from_numpy(images), torch.from_numpy(texts))
        values["num_images"] = len(images)
        return scores_of(values, per_class, len(distinct), self.classes)

    def _loss(self, images: "Tensor", texts: "Tensor") -> float:
        """Of all pairs together: of more pairs it is larger."""
        import torch

        device = self.model.pairs.log_scale.device
        with torch.no_grad():
            loss = self.model.pairs(images.to(device), texts.to(device), alone=True)
        return float(loss) / len(images)


def by_class(
    predicted: "np.ndarray", labels: "np.ndarray", classes: tuple[str, ...]
) -> tuple[float, dict[str, Any]]:
    """The accuracy over what has a label, and of each class; None where it has no image."""
    known = labels >= 0
    right = predicted == labels
    each = {}
    for k, name in enumerate(classes):
        of = labels == k
        each[name] = {
            "images": int(of.sum()),
            "accuracy": float(right[of].mean()) if of.any() else None,
        }
    return float(right[known].mean()), each


def gathered(own: Any) -> list[Any]:
    """What each process has, on all of them."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [own]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return parts


def scores_of(
    values: dict[str, Any], per_class: dict[str, Any], captions: int, classes: tuple[str, ...]
) -> Scores:
    """details: num_captions, different ones; with classes, per_class {name: images, accuracy} by their names
    alone."""
    called = {"recall": "recall@1", "zero_shot": "zero-shot top-1"}
    for key in values:
        if "@" in key:
            called[key] = key.replace("_to_", " to ")
    rows = tuple(
        (name, of["images"], "none" if of["accuracy"] is None else of["accuracy"])
        for name, of in per_class.items()
    )
    tables = (Table("", ("class, by its name alone", "images", "accuracy"), rows),) if rows else ()
    return Scores(
        values,
        TASK.headline,
        tables,
        {"num_captions": captions, "per_class": per_class, "classes": list(classes)},
        (f"{captions} different captions",),
        called=called,
    )
