"""What a report says of panoptic segmentation: quality by class, things and stuff, the worst images."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from vitrail.modes import eval_mode
from vitrail.tasks.detect_report import small
from vitrail.tasks.panoptic import NAMES, PARTS
from vitrail.tasks.section import (
    ACCENT,
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
from vitrail.tasks.segment_report import legend
from vitrail.tasks.task import label_map
from vitrail_runtime.drawing import colour_of, with_segments
from vitrail_runtime.errors import InputError, listed
from vitrail_runtime.finish import finish_panoptic
from vitrail_runtime.preprocess import prepare

WORST = 8  # images
NOT_SAID = (90, 94, 102)  # crowds


def sections(found: Found) -> list[Section]:
    """found.scores: PQ, ..., per_class and stuff by name, as `Scores.to_dict` gives them; found.said: PQ (N,)
    and what it is made of, of each image."""
    scores = found.scores or {}
    if not {"per_class", "stuff", "PQ"} <= scores.keys():
        raise InputError(
            f"the scores of {found.model.info.name} on {found.split} are not known (metrics.json is gone or "
            "damaged); measure it anew: vitrail eval RUN --data DATA --report FILE.html"
        )
    names = tuple(map(as_text, found.model.classes))
    tiles = [
        (f"{scores['PQ']:.3f}", "panoptic quality"),
        *((f"{scores[k]:.3f}", called) for k, called in KINDS.items() if k in scores),
        parameters_tile(found.model),
    ]
    findings = Bullets([*advice(scores, names), *found.advice])
    said = [
        Section("", (Tiles(tiles),), opening=True),
        Section("What to look at first", (findings,), opening=True),
        Section("Per class", (class_table(scores, names),)),
        quality_section(scores),
    ]
    worst = worst_images(found)
    if worst:
        first = Text("Lowest quality first: the image, what is true, what the model says.")
        said.append(Section("Worst images", (first, legend(names), Images(worst, columns=3))))
    segments = sum(of["segments"] for of in scores["per_class"].values())
    counts = [("classes", f"{len(names)}"), ("segments", f"{segments:,}")]
    said.append(Section(f"Images of {found.split}", (data_rows(found.data, counts),)))
    return said


KINDS = {"PQ_things": "PQ of things", "PQ_stuff": "PQ of stuff"}


def advice(scores: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Findings that a person can act on, most useful first."""
    quoted = [isolated(repr(name)) for name in names]
    each = list(scores["per_class"].values())
    measured = [k for k, of in enumerate(each) if of["PQ"] is not None]
    said = []
    if scores["SQ"] - scores["RQ"] > 0.2:
        said.append(
            f"Segments that are found lie well (SQ {scores['SQ']:.2f}), but many are missed or wrong (RQ "
            f"{scores['RQ']:.2f}): train longer, or take larger images."
        )
    weakest = min(measured, key=lambda k: each[k]["PQ"])
    if len(measured) > 1:
        said.append(
            f"Weakest class: {quoted[weakest]} with a PQ of {each[weakest]['PQ']:.2f} "
            f"({each[weakest]['found']:,} of {each[weakest]['segments']:,} found, {each[weakest]['wrong']:,} "
            "answers wrong)."
        )
    never = [quoted[k] for k in measured if each[k]["segments"] and not each[k]["found"]]
    if never:
        said.append(f"Never found: {listed(never, limit=5)}.")
    absent = [quoted[k] for k, of in enumerate(each) if not of["segments"]]
    if absent:
        said.append(f"Not measured: no segment of {listed(absent, limit=5)} in this split.")
    return said


def class_table(scores: Mapping[str, Any], names: Sequence[str]) -> Rows:
    """Lowest PQ first, classes that cannot be measured last."""
    stuff = set(map(as_text, scores["stuff"]))
    rows = [
        (
            name,
            "stuff" if name in stuff else "thing",
            *(of[key] for key in ("segments", "found", "wrong")),
            *("none" if of[key] is None else float(of[key]) for key in NAMES),
        )
        for name, of in zip(names, scores["per_class"].values(), strict=True)
    ]
    rows.sort(key=lambda row: (isinstance(row[5], str), row[5]))
    return Rows(("class", "kind", "segments", "found", "wrong", *NAMES), rows)


def quality_section(scores: Mapping[str, Any]) -> Section:
    """How well segments are found, and how well those found lie."""
    there = [part for part in PARTS if f"PQ{part}" in scores]

    def draw(ax: Any) -> None:
        for place, (name, colour) in enumerate(zip(NAMES, (ACCENT, GOOD, INK), strict=True)):
            values = [scores[name + part] for part in there]
            at = np.arange(len(there)) + 0.27 * (place - 1)
            ax.bar(at, values, 0.24, color=colour, label=name)
            for x, value in zip(at, values, strict=True):
                ax.text(x, value, f"{value:.2f}", ha="center", va="bottom", fontsize=8, color=INK)
        ax.set_xticks(range(len(there)), [PARTS[part] for part in there])
        ax.set_ylim(0, 1.1)
        ax.legend(frameon=False, fontsize=8, ncols=3)

    text = Text(
        "A segment is found where it and an answer of its class have more than half in common (IoU). SQ is "
        "the mean IoU of those found, RQ their F1, PQ the product; means over the classes (Kirillov et al. "
        "2019)."
    )
    return Section("Found, and how well", (Plot(draw, 5.4, 2.8), text))


def worst_images(found: Found) -> list[tuple[Image.Image, str]]:
    """Image, truth and answers of those with the lowest quality; the model is asked again for them. None
    without a mistake."""
    said = {key: np.asarray(values) for key, values in found.said.items()}
    mistakes = said["segments"] - said["found"] + said["wrong"]
    order = np.lexsort((-mistakes, said["PQ"]))  # NaN, of images without anything, is last
    order = order[mistakes[order] > 0][:WORST]
    lookup = np.array(label_map(found.data.classes, found.model.classes), np.int64)
    shown = []
    for i in map(int, order):
        pixels = found.data.images.read(i)
        truth = found.data.truth.target(i, None)
        image, key = small(pixels), isolated(as_text(found.data.keys[i]))
        inks = [
            NOT_SAID if crowd else colour_of(k)
            for k, crowd in zip(lookup[truth.labels].tolist(), truth.crowd, strict=True)
        ]
        about = f"{said['found'][i]} of {said['segments'][i]} found, {said['wrong'][i]} wrong"
        answer = ask(found.model, pixels)
        shown.append((image, f"PQ {said['PQ'][i]:.2f}\n{key}"))
        shown.append((drawn(image, truth.segments, inks), "truth"))
        own = [colour_of(int(k)) for k in answer.labels]
        shown.append((drawn(image, answer.segments, own), f"answers: {about}"))
    return shown


def drawn(image: Image.Image, segments: np.ndarray, inks: Sequence[Any]) -> Image.Image:
    """The image under segments of its original's size."""
    whole = Image.fromarray(segments).resize(image.size, Image.Resampling.NEAREST)
    return with_segments(image, np.asarray(whole), inks)


def ask(model: Any, pixels: np.ndarray) -> Any:
    """The Prediction of an image (H, W, 3) uint8."""
    values, geometry = prepare(pixels, model.preprocessing)
    device = next(model.parameters()).device
    with eval_mode(model), torch.no_grad():
        outputs = model.forward_tensors(torch.from_numpy(values)[None].to(device))
    arrays = {name: value.float().cpu().numpy() for name, value in outputs.items()}
    (said,) = finish_panoptic(arrays, [geometry], model.classes)
    return said
