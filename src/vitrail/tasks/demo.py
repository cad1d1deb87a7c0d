"""What `vitrail demo` does for each task: its digits, its recipe, and what it tells of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vitrail.registry import unknown
from vitrail.tasks.detect import SURE
from vitrail_runtime.coco import counted

if TYPE_CHECKING:
    from vitrail_runtime.prediction import Prediction


@dataclass(frozen=True)
class Demo:
    """digits: a key of `vitrail.data.digits.SETS`. recipe: of `vitrail.recipes`. score: what the headline is
    called in the last line. own: what a person's own data would be. choose: from what was said of all test
    images, the order in which they are worth a look. answer: a prediction in a few words. command: how this
    demo is started; folder: where it writes. shown: what of a prediction is worth showing.
    """

    digits: str
    recipe: str
    score: str
    own: str
    choose: Callable[[Mapping[str, np.ndarray]], np.ndarray]
    answer: Callable[["Prediction"], str]
    command: str
    folder: str
    shown: Callable[["Prediction"], "Prediction"] = lambda p: p


def mistake_first(said: Mapping[str, np.ndarray]) -> np.ndarray:
    """A wrong answer, where there is one, and right ones: a demo should show both."""
    right = said["predicted"] == said["labels"]
    return np.concatenate([np.flatnonzero(~right)[:1], np.flatnonzero(right)[::37]])


def worst_middle_best(said: Mapping[str, np.ndarray]) -> np.ndarray:
    """The image with the lowest mean IoU, that in the middle and that with the highest."""
    order = np.argsort(said["mIoU"], kind="stable")
    order = order[
        : np.isfinite(said["mIoU"]).sum()
    ]  # NaN, of images without a labelled pixel, is last
    return order[[0, len(order) // 2, -1]]


def wrong_right_crowded(said: Mapping[str, np.ndarray]) -> np.ndarray:
    """The image with most mistakes, then those without one, the most objects first."""
    mistakes = said["objects"] - said["found"] + said["wrong"]
    order = np.lexsort((-said["objects"], mistakes))
    return np.concatenate([[np.argmax(mistakes)], order])


DEMOS = {
    "classify": Demo(
        digits="classify",
        recipe="digits",
        score="accuracy",
        own="a folder with one folder per class",
        choose=mistake_first,
        answer=lambda p: f"{p.names[0]} ({p.scores[0]:.2f})",
        command="vitrail demo",
        folder="vitrail-demo",
    ),
    "segment": Demo(
        digits="semantic",
        recipe="digits_segment",
        score="mIoU",
        own="images/ and masks/, docs/data.md has the forms",
        choose=worst_middle_best,
        answer=lambda p: ", ".join(f"{n} {s:.1%}" for n, s in zip(p.names, p.scores, strict=True)),
        command="vitrail demo --task segment",
        folder="vitrail-demo-segment",
    ),
    "detect": Demo(
        digits="detect",
        recipe="digits_detect",
        score="AP",
        own="images with boxes: COCO, YOLO or Pascal VOC, docs/data.md has the forms",
        choose=wrong_right_crowded,
        answer=lambda p: counted(p.names) or "nothing found",
        command="vitrail demo --task detect",
        folder="vitrail-demo-detect",
        shown=lambda p: p.above(SURE),
    ),
    "contrast": Demo(
        digits="pairs",
        recipe="digits_pairs",
        score="recall@1",
        own="a CSV of file and caption, docs/pairs.md has the forms",
        choose=mistake_first,
        answer=lambda p: f"{p.names[0]} ({p.scores[0]:.2f})",
        command="vitrail demo --task contrast",
        folder="vitrail-demo-contrast",
    ),
}


def demo_of(task: str) -> Demo:
    """The demo of a task, by its name."""
    if task not in DEMOS:
        raise unknown("task", task, DEMOS)
    return DEMOS[task]
