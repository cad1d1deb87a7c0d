"""What a segmenter's report says: scores by class, what is taken for what, the worst images."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitrail.modes import eval_mode
from vitrail.tasks.section import (
    Bullets,
    Found,
    Images,
    Plot,
    Rows,
    Section,
    Text,
    Tiles,
    as_text,
    confusion_section,
    confusions,
    data_rows,
    isolated,
    parameters_tile,
)
from vitrail.tasks.segment import IGNORE, class_lookup
from vitrail_runtime.drawing import colour_of, overlay
from vitrail_runtime.errors import InputError, listed
from vitrail_runtime.finish import finish_segmentation
from vitrail_runtime.preprocess import prepare

CONFUSION = Text("Per cent of the pixels of a true class (row) that are taken for each class.")
RARE = 0.2  # pixel accuracy so far above the mIoU: rare classes are missed


def sections(found: Found) -> list[Section]:
    """found.scores: mIoU, ..., per_class and confusion by name, as `Scores.to_dict` gives them; found.said:
    mIoU and pixel_accuracy (N,) of each image."""
    scores = found.scores or {}
    if not {"per_class", "confusion", "mIoU"} <= scores.keys():
        raise InputError(
            f"the scores of {found.model.info.name} on {found.split} are not known (metrics.json is gone or "
            "damaged); measure it anew: vitrail eval RUN --data DATA --report FILE.html"
        )
    names = tuple(map(as_text, found.model.classes))
    confusion = np.array(scores["confusion"])
    tiles = [
        (f"{scores['mIoU']:.3f}", "mean IoU"),
        (f"{scores['pixel_accuracy']:.3f}", "pixel accuracy"),
        (f"{scores['mean_accuracy']:.3f}", "mean accuracy of classes"),
        parameters_tile(found.model),
    ]
    findings = Bullets([*advice(scores, confusion, names), *found.advice])
    said = [
        Section("", (Tiles(tiles),), opening=True),
        Section("What to look at first", (findings,), opening=True),
        Section("Per class", (class_table(scores, names),)),
        confusion_section("Confusion of classes", confusion, names, "pixels", CONFUSION),
    ]
    worst = worst_images(found)
    if worst:
        first = Text("Lowest mean IoU first: the image, what is true, what the model says.")
        said.append(Section("Worst images", (first, legend(names), Images(worst, columns=3))))
    labelled = ("labelled pixels", f"{int(confusion.sum()):,}")
    classes = ("classes", f"{len(names)}")
    said.append(Section(f"Images of {found.split}", (data_rows(found.data, [classes, labelled]),)))
    return said


def advice(scores: Mapping[str, Any], confusion: np.ndarray, names: tuple[str, ...]) -> list[str]:
    """Findings that a person can act on, most useful first."""
    quoted = [isolated(repr(name)) for name in names]
    each = list(scores["per_class"].values())
    measured = [k for k, of in enumerate(each) if of["iou"] is not None]
    said = []
    weakest = min(measured, key=lambda k: each[k]["iou"])
    said.append(
        f"Weakest class: {quoted[weakest]} with an IoU of {each[weakest]['iou']:.2f} "
        f"({each[weakest]['pixels']:,} pixels)."
    )
    for truth, predicted, count in confusions(confusion, 1):
        share = count / each[truth]["pixels"]
        said.append(
            f"Most confused: {quoted[truth]} taken for {quoted[predicted]}, {count:,} pixels, "
            f"{share:.0%} of the class."
        )
    absent = [quoted[k] for k in range(len(names)) if each[k]["pixels"] == 0]
    if absent:
        said.append(f"Not measured: no pixel of {listed(absent, limit=5)} in this split.")
    if scores["pixel_accuracy"] - scores["mIoU"] > RARE:
        said.append(
            "Most pixels are right but rare classes are missed: try --task.class-weights balanced, larger "
            "images, or more images of these classes."
        )
    return said


def class_table(scores: Mapping[str, Any], names: tuple[str, ...]) -> Rows:
    """Lowest IoU first, classes that cannot be measured last."""
    total = sum(of["pixels"] for of in scores["per_class"].values())
    rows = [
        (
            name,
            of["pixels"],
            f"{of['pixels'] / total:.1%}",
            *("none" if of[key] is None else of[key] for key in ("iou", "accuracy")),
        )
        for name, of in zip(names, scores["per_class"].values(), strict=True)
    ]
    rows.sort(key=lambda row: (isinstance(row[3], str), row[3]))
    return Rows(("class", "pixels", "share", "IoU", "accuracy"), rows)


def legend(names: tuple[str, ...]) -> Plot:
    """Which colour is which class."""
    columns = 4
    rows = -(-len(names) // columns)

    def draw(ax: Any) -> None:
        for label, name in enumerate(names):
            colour = np.array(colour_of(label)) / 255
            ax.bar(0, 0, color=colour, label=name.replace("$", r"\$"))
        ax.set_axis_off()
        ax.legend(loc="center", ncols=columns, frameon=False, fontsize=9)

    return Plot(draw, 9.0, 0.25 * rows + 0.2)


def worst_images(found: Found, count: int = 12) -> list[tuple[Image.Image, str]]:
    """Image, truth and prediction of those with the lowest mean IoU; the model is asked again for them."""
    iou = np.asarray(found.said["mIoU"])
    order = np.argsort(iou, kind="stable")  # NaN, of images without a labelled pixel, is last
    order = order[: np.isfinite(iou).sum()][:count]
    lookup = class_lookup(found.data.classes, found.model.classes)
    shown = []
    for i in map(int, order):
        pixels = found.data.images.read(i)
        truth = lookup[np.asarray(found.data.truth.target(i, None))].astype(np.int64)
        image = Image.fromarray(pixels)
        key = isolated(as_text(found.data.keys[i]))
        shown.append((image, f"mean IoU {iou[i]:.2f}\n{key}"))
        shown.append((overlay(image, np.where(truth == IGNORE, -1, truth)), "truth"))
        shown.append((overlay(image, predict(found.model, pixels)), "prediction"))
    return shown


def predict(model: Any, pixels: np.ndarray) -> np.ndarray:
    """(H, W) the class of every pixel of an image (H, W, 3) uint8, -1 where the model does not look."""
    values, geometry = prepare(pixels, model.preprocessing)
    device = next(model.parameters()).device
    with eval_mode(model), torch.no_grad():
        logits = model.forward_tensors(torch.from_numpy(values)[None].to(device))["logits"]
    logits = logits.float().cpu().numpy()
    (said,) = finish_segmentation(logits, [geometry], model.classes)
    assert said.segmentation is not None
    return said.segmentation
