"""What a detector's report says: scores by class and overlap, what mistakes cost, the worst images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitrail.boxes import iou
from vitrail.modes import eval_mode
from vitrail.tasks.detect import KINDS, SURE
from vitrail.tasks.section import (
    ACCENT,
    BAD,
    GOOD,
    INK,
    Bullets,
    Found,
    Images,
    Plot,
    Rows,
    Section,
    Text,
    Tiles,
    as_text,
    data_rows,
    isolated,
    parameters_tile,
)
from vitrail.tasks.task import label_map
from vitrail_runtime.drawing import draw_objects
from vitrail_runtime.errors import InputError, listed
from vitrail_runtime.finish import finish_detection
from vitrail_runtime.preprocess import prepare

IOUS = np.linspace(0.5, 0.95, 10)
CALLED = {"": "boxes", "mask_": "masks"}
SAMPLE = 48  # images that a cascade's stages are looked at on
SHOWN = 320  # side of the worst images
COSTLY = 0.02  # AP50: mistakes that cost less are not worth advice
MANY = 40  # objects: above, their names would hide the image

HELP = {
    "classification": "look for wrong labels and classes that look alike, or train longer",
    "localisation": "boxes are found but lie badly: larger images, a cascade head, or tighter annotations",
    "both": "neither class nor place is right: look at the images below",
    "duplicate": "an object has several answers: a lower IoU for suppressing them (--head-fields nms=0.4)",
    "background": "answers where nothing is: look for objects that are not annotated",
    "missed": "objects without any answer: larger images, smaller anchors, or more images of them",
}


def sections(found: Found) -> list[Section]:
    """found.scores: AP, ..., per_class and errors by name, as `Scores.to_dict` gives them; found.said: F1
    (N,) and what it is made of, of each image."""
    scores = found.scores or {}
    if not {"per_class", "errors", "AP", "AP_by_iou"} <= scores.keys():
        raise InputError(
            f"the scores of {found.model.info.name} on {found.split} are not known (metrics.json is gone or "
            "damaged); measure it anew: vitrail eval RUN --data DATA --report FILE.html"
        )
    names = tuple(map(as_text, found.model.classes))
    tiles = [(f"{scores[key]:.3f}", called) for key, called in headlines(scores)]
    findings = Bullets([*advice(scores, names), *found.advice])
    said = [
        Section("", (Tiles([*tiles, parameters_tile(found.model)]),), opening=True),
        Section("What to look at first", (findings,), opening=True),
        Section("Per class", (class_table(scores, names),)),
        curves_section(scores),
        mistakes_section(scores["errors"]),
    ]
    stages = stage_ious(found)
    if stages:
        said.append(stages_section(stages))
    worst = worst_images(found)
    if worst:
        first = Text(
            f"Lowest F1 first, of answers with a score of at least {SURE:g} at an IoU of 0.5: the image, "
            "what is true, what the model says."
        )
        said.append(Section("Worst images", (first, Images(worst, columns=3))))
    counts = [
        ("classes", f"{len(names)}"),
        ("objects", f"{sum(of['objects'] for of in scores['per_class'].values()):,}"),
        ("images without objects", f"{int((np.asarray(found.said['objects']) == 0).sum()):,}"),
        ("answers that count, of an image and class", f"{scores['max_detections']}"),
    ]
    said.append(Section(f"Images of {found.split}", (data_rows(found.data, counts),)))
    return said


def headlines(scores: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, what it is) of the scores that stand on top."""
    keys = [("AP", "AP"), ("AP50", "AP50"), ("AP75", "AP75"), ("AR", "AR")]
    if "mask_AP" in scores:
        keys = [("AP", "box AP"), ("AP50", "box AP50"), ("mask_AP", "mask AP")]
        keys.append(("mask_AP50", "mask AP50"))
    return keys


def advice(scores: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Findings that a person can act on, most useful first."""
    quoted = [isolated(repr(name)) for name in names]
    each = list(scores["per_class"].values())
    measured = [k for k, of in enumerate(each) if of["AP"] is not None]
    said = []
    errors = sorted(scores["errors"].items(), key=lambda item: -item[1]["dAP50"])
    kind, of = errors[0]
    if of["dAP50"] >= COSTLY:
        said.append(f"Most costly mistakes: {kind} ({of['dAP50']:.3f} of AP50); {HELP[kind]}.")
    weakest = min(measured, key=lambda k: each[k]["AP"])
    if len(measured) > 1:
        said.append(
            f"Weakest class: {quoted[weakest]} with an AP of {each[weakest]['AP']:.2f} "
            f"({each[weakest]['objects']:,} objects)."
        )
    sizes = [(scores[key], what) for key, what in SIZES.items() if key in scores]
    if len(sizes) > 1 and max(sizes)[0] > 2 * min(sizes)[0]:
        low, what = min(sizes)
        high, better = max(sizes)
        said.append(
            f"Objects that are {what} are found worse ({low:.2f}) than {better} ones ({high:.2f})."
        )
    absent = [name for name, of in zip(quoted, each, strict=True) if not of["objects"]]
    if absent:
        said.append(f"Not measured: no object of {listed(absent, limit=5)} in this split.")
    return said


SIZES = {"APs": "small", "APm": "medium", "APl": "large"}


def class_table(scores: Mapping[str, Any], names: Sequence[str]) -> Rows:
    """Lowest AP first, classes that cannot be measured last."""
    keys = ["AP", "AP50", "AP75", "AR"]
    if "mask_AP" in scores:
        keys += ["mask_AP", "mask_AP50", "mask_AP75"]
    rows = [
        (name, of["objects"], *("none" if of[key] is None else float(of[key]) for key in keys))
        for name, of in zip(names, scores["per_class"].values(), strict=True)
    ]
    rows.sort(key=lambda row: (isinstance(row[2], str), row[2]))
    return Rows(("class", "objects", *(key.replace("_", " ") for key in keys)), rows)


def curves_section(scores: Mapping[str, Any]) -> Section:
    """AP against the overlap that counts, and precision against recall."""
    there = [prefix for prefix in KINDS.values() if f"{prefix}AP_by_iou" in scores]

    def overlap(ax: Any) -> None:
        for prefix, colour in zip(there, (ACCENT, GOOD), strict=False):
            values = scores[f"{prefix}AP_by_iou"]
            ax.plot(IOUS, values, color=colour, marker="o", markersize=4, label=CALLED[prefix])
        ax.set_ylim(0, 1.03)
        ax.set_xlabel("IoU from which an answer is right")
        ax.set_ylabel("AP")
        ax.legend(frameon=False, fontsize=8)

    def precision(ax: Any) -> None:
        recalls = np.linspace(0, 1, 101)
        for prefix, colour in zip(there, (ACCENT, GOOD), strict=False):
            for threshold, style in (("0.50", "-"), ("0.75", "--")):
                ax.plot(
                    recalls,
                    scores[f"{prefix}precision"][threshold],
                    style,
                    color=colour,
                    linewidth=1.4,
                    label=f"{CALLED[prefix]}, IoU {threshold}",
                )
        ax.set_xlim(0, 1.03)
        ax.set_ylim(0, 1.03)
        ax.set_xlabel("recall")
        ax.set_ylabel("precision, mean of the classes")
        ax.legend(frameon=False, fontsize=8)

    text = Text(
        "AP is the mean over these IoUs. A curve that falls early says that boxes are found but lie badly."
    )
    return Section("Overlap, precision and recall", (Plot(overlap), Plot(precision), text))


def mistakes_section(errors: Mapping[str, Mapping[str, Any]]) -> Section:
    """What each kind of mistake costs."""
    kinds = list(errors)[::-1]

    def draw(ax: Any) -> None:
        costs = [errors[kind]["dAP50"] for kind in kinds]
        ax.barh(range(len(kinds)), costs, color=BAD, height=0.6)
        for place, cost in enumerate(costs):
            ax.text(cost, place, f" {cost:.3f}", va="center", fontsize=8, color=INK)
        ax.set_yticks(range(len(kinds)), kinds)
        ax.set_xlim(0, max(0.01, 1.18 * max(costs)))
        ax.set_xlabel("AP50 gained if all mistakes of the kind were put right")

    rows = [(kind, of["count"], float(of["dAP50"])) for kind, of in errors.items()]
    text = Text(
        "Classification: well placed, wrong class. Localisation: right class, IoU from 0.1 to 0.5. Both: "
        "some overlap, neither right. Duplicate: a better answer has the object. Background: nothing there. "
        "Missed: no answer, not even one of the first two kinds. Numbers are of all answers, whatever their "
        "score; costs do not add up (TIDE, Bolya et al. 2020)."
    )
    return Section(
        "Mistakes", (Plot(draw, 5.4, 2.8), Rows(("mistakes", "number", "cost"), rows), text)
    )


def stage_ious(found: Found) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each stage of a cascade: the overlap with its object of each box that it was given, and of the box
    that it made of it; of SAMPLE images. Nothing of a model without stages."""
    picked = np.unique(np.linspace(0, len(found.data) - 1, SAMPLE).astype(int))
    stages: list[list[tuple[np.ndarray, np.ndarray]]] = []
    for i in picked.tolist():
        truth = found.data.truth.target(i, None)
        record: dict[str, torch.Tensor] = {}
        _, geometry = ask(found.model, found.data.images.read(i), record)
        given = record.get("proposals")
        number = 0
        while given is not None and (made := record.get(f"stages.{number}.boxes")) is not None:
            if number == len(stages):
                stages.append([])
            objects = torch.from_numpy(geometry.boxes_to_input(truth.boxes[~truth.crowd]))
            stages[number].append(overlaps(given[0].cpu().float(), made[0].cpu().float(), objects))
            given, number = made, number + 1
    if len(stages) < 2:  # one stage is no cascade
        return []
    return [
        (np.concatenate([b for b, _ in pairs]), np.concatenate([a for _, a in pairs]))
        for pairs in stages
    ]


def overlaps(
    given: torch.Tensor, made: torch.Tensor, objects: torch.Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """Of boxes (P, 4) the IoU with the object that each overlaps most, and that of what was made of it with
    the same object; empty rows and boxes that overlap nothing left out."""
    there = (given[:, 2:] > given[:, :2]).all(1)
    given, made = given[there], made[there]
    if not len(objects) or not len(given):
        return np.zeros(0), np.zeros(0)
    before, nearest = iou(given, objects).max(1)
    after = iou(made, objects).gather(1, nearest[:, None])[:, 0]
    touching = before > 0
    return before[touching].numpy(), after[touching].numpy()


def stages_section(stages: Sequence[tuple[np.ndarray, np.ndarray]]) -> Section:
    """Output IoU against input IoU, as figure 1 (c) of Cascade R-CNN's paper."""
    edges = np.linspace(0.3, 1.0, 15)

    def draw(ax: Any) -> None:
        ax.plot([0.3, 1], [0.3, 1], color="#aab3c2", linestyle="--", linewidth=1)
        for number, (before, after) in enumerate(stages):
            x, y = means(before, after, edges)
            colour = (ACCENT, GOOD, BAD, INK)[number % 4]
            label = f"stage {number + 1}"
            ax.plot(x, y, color=colour, marker="o", markersize=3, linewidth=1.4, label=label)
        ax.set_xlim(0.3, 1)
        ax.set_ylim(0.3, 1)
        ax.set_xlabel("IoU of a box before the stage")
        ax.set_ylabel("mean IoU behind it")
        ax.legend(frameon=False, fontsize=8)

    rows = [
        (f"stage {number + 1}", len(before), float(before.mean()), float(after.mean()))
        for number, (before, after) in enumerate(stages)
    ]
    text = Text(
        f"Of {SAMPLE} images at most. Above the dashed line a stage makes boxes better. Stages are trained "
        "for rising IoUs: each should be best where the one before leaves its boxes (Cai and Vasconcelos "
        "2018)."
    )
    header = ("", "boxes that touch an object", "IoU before", "IoU behind")
    return Section(
        "What each stage does to boxes", (Plot(draw, 4.6, 4.0), Rows(header, rows), text)
    )


def means(
    before: np.ndarray, after: np.ndarray, edges: np.ndarray, fewest: int = 5
) -> tuple[np.ndarray, np.ndarray]:
    """Mean of both within each bin of `before` that has at least `fewest`."""
    index = np.digitize(before, edges) - 1
    bins = [b for b in range(len(edges) - 1) if (index == b).sum() >= fewest]
    x, y = ([values[index == b].mean() for b in bins] for values in (before, after))
    return np.array(x), np.array(y)


def worst_images(found: Found, count: int = 8) -> list[tuple[Image.Image, str]]:
    """Image, truth and answers of those with the lowest F1, of equal ones those with most mistakes; the model
    is asked again for them. None without a mistake."""
    said = {key: np.asarray(values) for key, values in found.said.items()}
    mistakes = said["objects"] - said["found"] + said["wrong"]
    order = np.lexsort((-mistakes, said["F1"]))  # NaN, of images without anything, is last
    order = order[mistakes[order] > 0][:count]
    lookup = np.array(label_map(found.data.classes, found.model.classes), np.int64)
    shown = []
    for i in map(int, order):
        pixels = found.data.images.read(i)
        key = isolated(as_text(found.data.keys[i]))
        image = small(pixels)
        (answer, _) = ask(found.model, pixels)
        about = f"{said['found'][i]} of {said['objects'][i]} found, {said['wrong'][i]} wrong"
        shown.append((image, f"F1 {said['F1'][i]:.2f}\n{key}"))
        shown.append(
            (true_objects(image, found.data.truth.target(i, None), found, lookup, pixels), "truth")
        )
        shown.append((answered(image, answer.above(SURE), pixels), f"answers: {about}"))
    return shown


def small(pixels: np.ndarray) -> Image.Image:
    """At a size at which boxes can be drawn once and shown as they are."""
    image = Image.fromarray(pixels)
    scale = SHOWN / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def true_objects(
    image: Image.Image, truth: Any, found: Found, lookup: np.ndarray, pixels: np.ndarray
) -> Image.Image:
    labels = lookup[truth.labels]
    names = [as_text(found.model.classes[k]) for k in labels.tolist()]
    texts = [f"{n} (crowd)" if c else n for n, c in zip(names, truth.crowd, strict=True)]
    size = pixels.shape[:2]
    return draw_objects(image.copy(), size, truth.boxes, labels, few(texts), truth.masks)


def answered(image: Image.Image, answer: Any, pixels: np.ndarray) -> Image.Image:
    texts = [f"{as_text(n)} {s:.0%}" for n, s in zip(answer.names, answer.scores, strict=True)]
    size = pixels.shape[:2]
    return draw_objects(image.copy(), size, answer.boxes, answer.labels, few(texts), answer.rles)


def few(texts: list[str]) -> list[str]:
    """The texts, or none of them where they would hide the image."""
    return texts if len(texts) <= MANY else [""] * len(texts)


def ask(
    model: Any, pixels: np.ndarray, record: dict[str, torch.Tensor] | None = None
) -> tuple[Any, Any]:
    """The Prediction of an image (H, W, 3) uint8, and where the model's input lies on it. record: takes what
    the model says on the way."""
    values, geometry = prepare(pixels, model.preprocessing)
    device = next(model.parameters()).device
    with eval_mode(model), torch.no_grad():
        outputs = model.forward_tensors(torch.from_numpy(values)[None].to(device), record)
    arrays = {name: value.float().cpu().numpy() for name, value in outputs.items()}
    (said,) = finish_detection(arrays, [geometry], model.classes)
    return said, geometry
