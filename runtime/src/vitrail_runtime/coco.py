"""Predictions in COCO's forms, boxes and segments: what evaluation servers and annotation tools take."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from vitrail_runtime.errors import InputError, listed
from vitrail_runtime.panoptic import colours_of, segments_of
from vitrail_runtime.prediction import Prediction

RESULTS, IMAGES = "coco_results.json", "coco_images.json"
PANOPTIC, FOLDER = "coco_panoptic.json", "coco_panoptic"


class CocoIds:
    """Ids of images and categories: those of a COCO annotation file, or 1, 2, 3, ...

    files: the images, in order. classes: of the model. annotations: parsed annotation file, whose images are
    known by their file names and whose categories by theirs; None: images are numbered here.
    category_ids: of each class, where there are no annotations; None: 1, 2, 3, ...
    Raises: InputError listing the files, or the classes, that are not in the annotations.
    """

    def __init__(
        self,
        files: Sequence[str],
        classes: Sequence[str],
        annotations: Mapping[str, Any] | None = None,
        category_ids: Sequence[int] | None = None,
    ) -> None:
        self.classes = tuple(classes)
        if annotations is None:
            self.images = {file: i for i, file in enumerate(files, 1)}
            self.categories = list(category_ids or range(1, len(classes) + 1))
            return
        try:
            names = [(str(image["file_name"]), int(image["id"])) for image in annotations["images"]]
            known = {str(c["name"]): int(c["id"]) for c in annotations["categories"]}
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                "a COCO annotation file has `images` with id and file_name and `categories` with id and "
                f"name, but this one has not ({type(error).__name__}: {error})"
            ) from error
        strange = [name for name in classes if name not in known]
        if strange:
            raise InputError(
                f"the annotations have no category for classes of the model: {listed(strange, limit=20)}\n"
                f"  the model's {len(classes)}: {listed(classes, limit=20)}\n"
                f"  the annotations' {len(known)}: {listed(known, limit=20)}"
            )
        self.categories = [known[name] for name in classes]
        found = {file: _place(file, names) for file in files}
        missing = [file for file, place in found.items() if place is None]
        if missing:
            raise InputError(
                f"{len(missing)} of {len(files)} images are not in the annotations: {listed(missing)}; file "
                "names are compared with the ends of paths"
            )
        self.images = {file: place for file, place in found.items() if place is not None}


def _place(file: str, names: Sequence[tuple[str, int]]) -> int | None:
    """The id of the image whose name is the longest end of the file's path."""
    path = "/" + Path(file).as_posix()
    fitting = [(len(name), place) for name, place in names if path.endswith("/" + name)]
    return max(fitting)[1] if fitting else None


class CocoResults:
    """Writes RESULTS, a list of boxes, and IMAGES, the images and categories that its ids mean, to a folder.
    Both are whole once it is closed."""

    def __init__(self, folder: Path, ids: CocoIds) -> None:
        self.folder, self.ids = folder, ids
        self.images: list[dict[str, Any]] = []
        self.file = (folder / RESULTS).open("w", encoding="utf-8")
        self.file.write("[")
        self.empty = True

    def add(self, prediction: Prediction) -> None:
        """All boxes of one image."""
        source = str(prediction.source)
        image_id = self.ids.images[source]
        for entry in prediction.to_coco(image_id, self.ids.categories):
            self.file.write(("\n" if self.empty else ",\n") + json.dumps(entry))
            self.empty = False
        height, width = prediction.size or (0, 0)
        self.images.append({"id": image_id, "file_name": source, "height": height, "width": width})

    def close(self) -> None:
        self.file.write("\n]\n")
        self.file.close()
        pairs = zip(self.ids.categories, self.ids.classes, strict=True)
        categories = [{"id": number, "name": name} for number, name in pairs]
        about = {"images": self.images, "annotations": [], "categories": categories}
        (self.folder / IMAGES).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def counted(names: Sequence[str]) -> str:
    """ "12 cell, 3 plate": how many of each name, the most first."""
    return ", ".join(f"{count} {name}" for name, count in Counter(names).most_common())


class CocoSegments:
    """Writes FOLDER, for each image a PNG of the ids of its segments, and PANOPTIC, which lists these, to a
    folder: COCO's panoptic form, with `score` beside each segment. The list is there once it is closed."""

    def __init__(self, folder: Path, ids: CocoIds) -> None:
        self.folder, self.ids = folder, ids
        self.images: list[dict[str, Any]] = []
        self.annotations: list[dict[str, Any]] = []
        self.stuff: set[int] = set()
        (folder / FOLDER).mkdir(exist_ok=True)

    def add(self, prediction: Prediction) -> None:
        """All segments of one image."""
        assert prediction.segments is not None
        source = str(prediction.source)
        image_id, name = self.ids.images[source], f"{self.ids.images[source]:012d}.png"
        Image.fromarray(colours_of(prediction.segments)).save(self.folder / FOLDER / name)
        kinds = [self.ids.categories[int(k)] for k in prediction.labels]
        told = segments_of(prediction.segments, dict(enumerate(kinds, 1)))
        for segment in told:
            segment["score"] = round(float(prediction.scores[segment["id"] - 1]), 6)
        self.annotations.append({"image_id": image_id, "file_name": name, "segments_info": told})
        height, width = prediction.segments.shape
        # Whole: beside this file another image may have the name, such as the copy that is drawn on.
        path = Path(source).absolute().as_posix()
        self.images.append({"id": image_id, "file_name": path, "height": height, "width": width})
        self.stuff |= set(prediction.stuff)

    def close(self) -> None:
        categories = [
            {"id": number, "name": name, "isthing": int(label not in self.stuff)}
            for label, (number, name) in enumerate(
                zip(self.ids.categories, self.ids.classes, strict=True)
            )
        ]
        about = {
            "images": self.images,
            "annotations": self.annotations,
            "categories": categories,
        }
        (self.folder / PANOPTIC).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def coco_form(prediction: Prediction) -> type[CocoResults] | type[CocoSegments] | None:
    """What writes predictions of this kind as COCO does, where COCO has a form for them."""
    if prediction.segments is not None:
        return CocoSegments
    return None if prediction.boxes is None else CocoResults
