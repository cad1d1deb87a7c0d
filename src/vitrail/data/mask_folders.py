"""Images with masks: two folders whose files have the same names, or lists of both.

- ROOT/train.txt, val.txt, test.txt with a line `IMAGE MASK` for each image (a tab between them where names
  have spaces), relative to ROOT; or else
- ROOT/images/SPLIT/NAME.jpg and ROOT/masks/SPLIT/NAME.png (ADE20K: images/training, annotations/training;
  mmsegmentation: img_dir/train, ann_dir/train), or without splits ROOT/images/NAME.jpg and
  ROOT/masks/NAME.png.

What the masks mean: `vitrail.data.legend`.
"""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

from vitrail.data.folders import SPLIT_NAMES
from vitrail.data.image_files import ImageFiles, fingerprint_of
from vitrail.data.index import Index, Place
from vitrail.data.legend import Legend, read_legend
from vitrail.data.masks import ClassMaps, infer_legend, read_class_maps
from vitrail_runtime.errors import InputError, listed
from vitrail_runtime.preprocess import IMAGE_SUFFIXES

IMAGE_FOLDERS = ("images", "img_dir", "imgs")
MASK_FOLDERS = ("masks", "annotations", "ann_dir", "labels")


def is_mask_folder(path: Path) -> bool:
    """Whether a folder holds images with masks."""
    return bool(_lists(path)) or None not in (_named(path, IMAGE_FOLDERS), _masks_of(path))


class MaskFolders(ImageFiles):
    """Images and their masks. See `vitrail.data.masks.MaskSource`. A key is a path below the root."""

    def __init__(self, root: Path) -> None:
        self.name = str(root)
        self.root = root.absolute()
        self._pairs: dict[str, list[tuple[str, str]]] = {}
        self._lists = _lists(root)
        self._folders: dict[str, tuple[str, str]] = {}  # split -> folders of images and masks
        if not self._lists:
            self._folders = _split_folders(self.root, self.name)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_pairs": {}}  # workers read by key; listings stay here

    def splits(self) -> tuple[str, ...]:
        have = self._lists or self._folders
        return tuple(s for s in ("train", "val", "test", "") if s in have)

    def classes(self) -> tuple[str, ...]:
        return self.legend().classes

    def truth(self, split: str, index: Index, classes: Sequence[str]) -> ClassMaps:
        return read_class_maps(self, split, classes)

    def told_legend(self) -> Legend | None:
        return read_legend(self.root)

    def legend(self) -> Legend:
        return self._legend

    @cached_property
    def _legend(self) -> Legend:
        return self.told_legend() or infer_legend(self)

    def pairs(self, split: str) -> list[tuple[str, str]]:
        if split not in self._pairs:
            if self._lists:
                self._pairs[split] = _by_list(self.root, self.name, self._lists[split])
            else:
                self._pairs[split] = _paired(self.root, self.name, *self._folders[split])
        return self._pairs[split]

    def _present(self, split: str) -> list[str]:
        return [image for image, _ in self.pairs(split)]

    def masks_fingerprint(self, split: str) -> str:
        return fingerprint_of(self.root, (mask for _, mask in self.pairs(split)))

    def where(self, key: str, place: Place) -> str:
        return str(Path(self.name) / key)


def _named(root: Path, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if (root / name).is_dir()), None)


def _masks_of(root: Path) -> str | None:
    """The folder of masks; `labels` may hold the text files of another task."""
    name = _named(root, MASK_FOLDERS)
    return name if name and any(_files(root / name)) else None


def _lists(root: Path) -> dict[str, Path]:
    """split -> file of `IMAGE MASK` lines."""
    found: dict[str, Path] = {}
    for path in sorted(root.glob("*.txt")):
        split = SPLIT_NAMES.get(path.stem.lower())
        if split is None:
            continue
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            first = next((line for line in file if line.strip()), "")
        words = _words(first)
        if len(words) == 2 and all(_is_image(word) for word in words):
            if split in found:
                raise InputError(
                    f"{root} has two lists of the split {split!r}: {found[split].name} and {path.name}; "
                    "keep one"
                )
            found[split] = path
    return found


def _words(line: str) -> list[str]:
    return [w.strip() for w in line.split("\t")] if "\t" in line.strip() else line.split()


def _by_list(root: Path, name: str, path: Path) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    seen: dict[str, int] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); save it as UTF-8") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        words = _words(line)
        if len(words) != 2:
            raise InputError(
                f"{path}, line {number}: expected an image and its mask, but got {line.strip()!r}; put a tab "
                "between them where names have spaces"
            )
        image, mask = words
        if image in seen:
            raise InputError(
                f"{path}, line {number}: {image} is also in line {seen[image]}; list each image once"
            )
        seen[image] = number
        pairs.append((image, mask))
    for what, names in (("images", [i for i, _ in pairs]), ("masks", [m for _, m in pairs])):
        # A link to nothing is there, and broken.
        missing = [n for n in names if not os.path.lexists(root / n)]
        if missing:
            archive = path.with_suffix(".tar")
            hint = f"; {archive} lies beside it: unpack it there" if archive.is_file() else ""
            raise InputError(
                f"{path} lists {len(missing)} of {len(pairs)} {what} that do not exist below {name}: "
                f"{listed(missing)}{hint}"
            )
    return pairs


def _split_folders(root: Path, name: str) -> dict[str, tuple[str, str]]:
    images, masks = _named(root, IMAGE_FOLDERS), _masks_of(root)
    if images is None or masks is None:
        raise InputError(_no_pairs(name))
    of_images, of_masks = _splits_in(root / images), _splits_in(root / masks)
    if not of_images and not of_masks:
        return {"": (images, masks)}
    if of_images.keys() != of_masks.keys():
        raise InputError(
            f"{name} has splits in one of its folders only: {images} has "
            f"{listed(list(of_images)) or 'none'}, {masks} has {listed(list(of_masks)) or 'none'}; give both "
            "the same"
        )
    return {s: (f"{images}/{of_images[s]}", f"{masks}/{of_masks[s]}") for s in of_images}


def _no_pairs(name: str) -> str:
    return (
        f"{name} holds no images with masks; expected images/ and masks/ with files of the same names, or "
        "train.txt with a line `IMAGE MASK` for each image"
    )


def _splits_in(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        split = SPLIT_NAMES.get(path.name.lower())
        if split is None or not path.is_dir():
            continue
        if split in found:
            raise InputError(
                f"{folder} has two folders for the split {split!r}: {found[split]!r} and {path.name!r}; "
                "keep one"
            )
        found[split] = path.name
    return found


def _paired(root: Path, name: str, images: str, masks: str) -> list[tuple[str, str]]:
    """Pairs by path below the two folders, without the ending."""
    of_images, of_masks = _by_stem(root / images), _by_stem(root / masks)
    if not of_images:
        raise InputError(f"{Path(name) / images} holds no images; expected NAME.jpg or the like")
    for one, its, other, there in (
        ("images", of_images, "mask", masks),
        ("masks", of_masks, "image", images),
    ):
        alone = sorted(its.keys() - (of_masks if one == "images" else of_images).keys())
        if alone:
            folder = images if one == "images" else masks
            raise InputError(
                f"{len(alone)} of {len(its)} {one} in {Path(name) / folder} have no {other} in "
                f"{Path(name) / there}: {listed([its[stem] for stem in alone])}; the two have the same name "
                "up to the ending: add what is missing, or move these away"
            )
    return [(f"{images}/{of_images[s]}", f"{masks}/{of_masks[s]}") for s in sorted(of_images)]


def _by_stem(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for path in sorted(_files(folder)):
        stem = os.path.splitext(path)[0]
        if stem in found:
            raise InputError(
                f"{folder} has two files of one name, {found[stem]} and {path}; keep one, so that it is "
                "known which belongs to the other folder's"
            )
        found[stem] = path
    return found


def _files(folder: Path) -> Iterator[str]:
    """Images at any depth, as paths below the folder; hidden files and folders are passed over."""
    for where, folders, names in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        below = os.path.relpath(where, folder)
        for name in names:
            if not name.startswith(".") and _is_image(name):
                yield name if below == "." else f"{below}/{name}"


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
