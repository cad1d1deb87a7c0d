"""The contract of a task, and the table of those that there are.

A task joins what is true of images (`vitrail.data.examples.Truth`) to a model that says it: its settings,
what changes a whole batch, how good answers are, what a report shows. Importing this, or a task, does not
import torch.
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from vitrail.detectors.efficientdet_scales import SCALES
from vitrail.registry import unknown
from vitrail_runtime.errors import InputError, listed

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vitrail.data.batch import Batch
    from vitrail.data.examples import Examples

TASKS = {
    "classify": "vitrail.tasks.classify",
    "segment": "vitrail.tasks.segment",
    "detect": "vitrail.tasks.detect",
    "panoptic": "vitrail.tasks.panoptic",
    "contrast": "vitrail.tasks.contrast",
}
DEFAULT = "classify"  # of a model that is called by its backbone alone


@dataclass(frozen=True)
class Table:
    """Figures for a person: a float is shown with three decimals."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Scores:
    """How good a model is on a data set.

    values: by name, in the order they are shown; called: what one is called in a line, where that is not its
    name. headline: the one that chooses best/; higher is better. details: plain data beside them for JSON.
    notes: lines for a person. said: where it was asked for, what the model said of every image, as arrays in
    the data's order with `keys`.
    """

    values: dict[str, float]
    headline: str
    tables: tuple[Table, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    said: "Mapping[str, np.ndarray] | None" = None
    called: Mapping[str, str] = field(default_factory=dict)

    @property
    def best(self) -> float:
        return self.values[self.headline]

    def __getitem__(self, name: str) -> Any:
        return self.values[name] if name in self.values else self.details[name]

    def line(self) -> str:
        """The values for a person: "top-1 0.8123  loss 0.6012  1000 images"."""
        shown = (
            f"{value} images"
            if name == "num_images"
            else f"{self.called.get(name, name)} {value:.4f}"
            for name, value in self.values.items()
        )
        return "  ".join(shown)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self.values | self.details


class Evaluator(Protocol):
    """Collects the answers of a model, batch by batch; never holds more than one batch of images."""

    def update(self, outputs: "Mapping[str, Tensor]", batch: "Batch") -> None:
        """outputs: of the model's `forward_tensors`. batch: of evaluation, on the model's device."""
        ...

    def said(self) -> "dict[str, np.ndarray]":
        """What was said of each image so far: rows of arrays, with `indices` into the data."""
        ...

    def compute(self) -> Scores:
        """Over all processes, on each. Raises NotFinite, on every process, where an answer is NaN."""
        ...


class Task(Protocol):
    """What the rest of the house asks of a task, which inherits what it does not do in its own way.

    truth: the kind of truth that it learns from. settings: a frozen dataclass, its own group of flags.
    shown: how its headline is called in a line. any_names: whether its models answer to any class names.
    """

    name: str
    truth: str
    headline: str
    shown: str
    settings: type
    any_names: bool = False

    def options(self, settings: Any) -> dict[str, Any]:
        """Keywords for the model's `losses`."""
        return {}

    def model_options(self, settings: Any, truth: Any) -> dict[str, Any]:
        """Attributes of the model that the training data decides, such as the weights of classes."""
        return {}

    def check(self, config: Any) -> None:
        """Raise InputError where a run's settings do not go with the task."""

    def taken(self, data: "Examples") -> "Examples":
        """The data as the task learns from it, where it makes use of another kind of truth."""
        return data

    def notes(self, model: Any, truth: Any) -> list[str]:
        """What a person should know of the training data and the model together."""
        return []

    def answering(self, model: Any, classes: "Sequence[str] | None", data: Any = None) -> Any:
        """The model as it is asked for these classes, or about labelled data; None: as it stands."""
        if classes is not None:
            raise InputError(
                f"{model.info.name} knows its own {len(model.classes)} classes; --classes is for models that "
                "answer to any names (vitrail models --task contrast)"
            )
        return model

    def prepare(
        self, batch: Any, key: tuple[int, int, int], settings: Any, num_classes: int
    ) -> Any:
        """What changes a whole batch on its device, by key (seed, epoch, step): the same on every process."""
        return batch

    def multiple(self, settings: Any) -> int:
        """A process's share of a batch must be a multiple of this many images."""
        return 1

    def weights(self, settings: Any, truth: Any) -> "np.ndarray | None":
        """(N,) how often each example is drawn, relative to the others; None: each once an epoch."""
        return None

    def evaluator(self, model: Any, data: "Examples") -> Evaluator:
        """Raises InputError where the data's classes are not the model's."""
        ...

    def sections(self, found: Any) -> list[Any]:
        """Of the report (`vitrail.tasks.section`), from the task's file beside its own."""
        return importlib.import_module(f"vitrail.tasks.{self.name}_report").sections(found)


def confused(
    confusion: Sequence[Sequence[int]], classes: Sequence[str]
) -> list[tuple[int, str, str]]:
    """(count, truth, said) of the five most frequent mistakes."""
    cells = [
        (count, classes[truth], classes[said])
        for truth, row in enumerate(confusion)
        for said, count in enumerate(row)
        if count and truth != said
    ]
    return sorted(cells, reverse=True)[:5]


def task_of(name: str) -> Task:
    """The task of this name, such as `model.task`."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return importlib.import_module(TASKS[name]).TASK


def task_of_model(name: str) -> Task:
    """The task of the models of this name: "HEAD/BACKBONE" says it by its head, and so does a paper's own
    name."""
    if "/" not in name and name not in SCALES:
        return task_of(DEFAULT)
    from vitrail.models import parse_name  # and with it torch

    head, _ = parse_name(name)
    return task_of(DEFAULT if head is None else head.task)


def fitting(task: Task, data: "Examples", model: str) -> "Examples":
    """The data as this task learns from it. Raises InputError where it does not say that."""
    data = task.taken(data)
    if data.truth.kind != task.truth:
        others = [name for name in TASKS if task_of(name).truth == data.truth.kind]
        names = " or ".join(map(repr, others))
        raise InputError(
            f"{model} does the task {task.name!r}, which learns from {task.truth}, but "
            f"{data.images.source.name} holds {data.truth.kind}, for the task {names}; "
            "take a model for that (vitrail models --task NAME), or other data"
        )
    return data


def label_map(data_classes: Sequence[str], model_classes: Sequence[str]) -> list[int]:
    """The model's label of each of the data's labels, by name.

    Raises InputError showing both lists when the data has a class that the model does not know.
    """
    place = {name: i for i, name in enumerate(model_classes)}
    strange = [name for name in data_classes if name not in place]
    if strange:
        raise InputError(
            f"the data has classes that the model does not know: {listed(strange, limit=20)}\n"
            f"  the model's {len(model_classes)}: {listed(model_classes, limit=20)}\n"
            f"  the data's {len(data_classes)}: {listed(data_classes, limit=20)}\n"
            "rename the folders to the model's names, or train a model on these classes"
        )
    return [place[name] for name in data_classes]
