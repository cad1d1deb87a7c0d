"""What the report of a model of images and captions says: how well each finds the other, and where not."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from vitrail.tasks.section import (
    Bullets,
    Found,
    Images,
    Rows,
    Section,
    Text,
    Tiles,
    as_text,
    data_rows,
    isolated,
    parameters_tile,
)
from vitrail_runtime.errors import InputError, listed

FAR = 5  # captions before an image's own from which it counts as far off


def sections(found: Found) -> list[Section]:
    """found.scores: recall, image_to_text@1, ..., as `Scores.to_dict` gives them; found.said: rank and best
    (N,) of each image."""
    scores = found.scores or {}
    if not {"recall", "num_captions", "per_class"} <= scores.keys():
        raise InputError(
            f"the scores of {found.model.info.name} on {found.split} are not known (metrics.json is gone or "
            "damaged); measure it anew: vitrail eval RUN --data DATA --report FILE.html"
        )
    tiles = [
        (f"{scores['recall']:.3f}", "recall@1, both ways"),
        (f"{scores['image_to_text@1']:.3f}", "images that find their caption first"),
        (f"{scores['text_to_image@1']:.3f}", "captions that find their image first"),
    ]
    if "zero_shot" in scores:
        tiles.append((f"{scores['zero_shot']:.1%}", "right class, by its name alone"))
    tiles.append(parameters_tile(found.model))
    said = [
        Section("", (Tiles(tiles),), opening=True),
        Section(
            "What to look at first",
            (Bullets([*advice(found, scores), *found.advice]),),
            opening=True,
        ),
        Section("Found among the first", (recall_table(scores),)),
    ]
    if scores["per_class"]:
        said.append(Section("Classes, by their names alone", (class_table(scores["per_class"]),)))
    worst = worst_images(found)
    if worst:
        first = Text("Those with most captions before their own first.")
        said.append(Section("Images taken for another caption", (first, Images(worst, columns=4))))
    captions = ("different captions", f"{scores['num_captions']:,}")
    said.append(Section(f"Images of {found.split}", (data_rows(found.data, [captions]),)))
    return said


def advice(found: Found, scores: Mapping[str, Any]) -> list[str]:
    """Findings that a person can act on, most useful first."""
    ranks = np.asarray(found.said["rank"])
    right = int((ranks == 0).sum())
    said = [
        f"{right:,} of {len(ranks):,} images find their caption among {scores['num_captions']:,} different "
        f"ones; by chance it would be one of {scores['num_captions']:,}."
    ]
    far = int((ranks >= FAR).sum())
    if far:
        said.append(f"{far:,} images have {FAR} or more other captions before their own.")
    known = {k: of for k, of in scores["per_class"].items() if of["accuracy"] is not None}
    if known:
        weakest = min(known, key=lambda k: known[k]["accuracy"])
        said.append(
            f"Weakest class by its name: {isolated(repr(as_text(weakest)))}, "
            f"{known[weakest]['accuracy']:.1%} of {known[weakest]['images']:,} images."
        )
    absent = [isolated(repr(as_text(k))) for k in scores["per_class"] if k not in known]
    if absent:
        said.append(f"Not measured: no image of {listed(absent, limit=5)} in this split.")
    return said


def recall_table(scores: Mapping[str, Any]) -> Rows:
    ways = {"image_to_text": "an image's caption", "text_to_image": "a caption's image"}
    places = sorted({int(k.partition("@")[2]) for k in scores if "@" in k})
    rows = [
        (name, *(f"{scores[f'{way}@{place}']:.3f}" for place in places))
        for way, name in ways.items()
    ]
    return Rows(("what is searched", *(f"first {place}" for place in places)), rows)


def class_table(per_class: Mapping[str, Any]) -> Rows:
    """Lowest accuracy first, classes without an image last."""
    rows = [
        (as_text(name), of["images"], "none" if of["accuracy"] is None else of["accuracy"])
        for name, of in per_class.items()
    ]
    rows.sort(key=lambda row: (isinstance(row[2], str), row[2]))
    return Rows(("class", "images", "accuracy"), rows)


def worst_images(found: Found, count: int = 12) -> list[tuple[Image.Image, str]]:
    """The image, its own caption and the one that it was taken for."""
    ranks, best = (np.asarray(found.said[key]) for key in ("rank", "best"))
    captions = found.data.truth.captions
    order = np.argsort(-ranks, kind="stable")[: min(count, int((ranks > 0).sum()))]
    shown = []
    for i in map(int, order):
        own, taken = (isolated(as_text(captions[k])) for k in (i, int(best[i])))
        text = f"{own}\ntaken for: {taken}\n{ranks[i]:,} before its own"
        shown.append((Image.fromarray(found.data.images.read(i)), text))
    return shown
