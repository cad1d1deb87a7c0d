"""What a data set is: where its images are (`Images`) and what is true of them (a `Truth`), side by side."""

import dataclasses
import difflib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np

from vitrail.data.index import Index, Source, digest
from vitrail_runtime.errors import InputError, listed
from vitrail_runtime.preprocess import decode

if TYPE_CHECKING:
    from vitrail.data.view import View  # and with it torch


@dataclass(frozen=True, eq=False)
class Images:
    """N images of one split. They are decoded on `read`; all else is known beforehand.

    keys: unique names. sizes: (N, 2) int32, upright (height, width). digests: of the encoded images.
    places: (N, 3) where each lies inside an archive.
    """

    keys: list[str]
    sizes: np.ndarray
    digests: list[str]
    places: np.ndarray
    source: Source

    def __len__(self) -> int:
        return len(self.keys)

    def read_bytes(self, i: int) -> bytes:
        """The encoded image. Raises InputError when it is gone or is not what was indexed."""
        try:
            payload = self.source.read(self.keys[i], self._place(i))
        except OSError as error:
            raise InputError(
                f"{self.where(i)} cannot be read: {error.strerror or error}"
            ) from error
        # An image swapped under a running training would train on a wrong size or label.
        if digest(payload) != self.digests[i]:
            raise InputError(
                f"{self.where(i)} has changed since it was indexed; start again to index it anew"
            )
        return payload

    def read(self, i: int, at_least: tuple[int, int] | None = None) -> np.ndarray:
        """Upright RGB, uint8 (H, W, 3). A JPEG may come reduced, never below `at_least` (height, width)."""
        return self.decode(i, self.read_bytes(i), at_least)

    def decode(self, i: int, payload: bytes, at_least: tuple[int, int] | None) -> np.ndarray:
        """Decode `payload`, which `read_bytes(i)` gave; an InputError names image i."""
        return decode(payload, at_least=at_least, name=self.where(i))

    def where(self, i: int) -> str:
        """How messages call image i: its file, or its shard and member."""
        return self.source.where(self.keys[i], self._place(i))

    def select(self, ids: np.ndarray) -> "Images":
        """These images, in this order."""
        return dataclasses.replace(
            self,
            keys=[self.keys[i] for i in ids],
            sizes=self.sizes[ids],
            digests=[self.digests[i] for i in ids],
            places=self.places[ids],
        )

    def joined(self, others: Sequence["Images"]) -> "Images":
        """These and others of the same source, one after another."""
        parts = [self, *others]
        return dataclasses.replace(
            self,
            keys=[k for p in parts for k in p.keys],
            sizes=np.concatenate([p.sizes for p in parts]),
            digests=[d for p in parts for d in p.digests],
            places=np.concatenate([p.places for p in parts]),
        )

    def _place(self, i: int) -> tuple[int, int, int]:
        file, offset, size = self.places[i].tolist()
        return file, offset, size


class Truth(Protocol):
    """What is true of N images: a column beside them, such as labels or class maps.

    kind: what it is called in messages; a task says which kind it learns from.
    every_class_needed: whether a class without an example in train or val is an error.
    problems: position -> (name, what is wrong) where nothing can be said of an image, which is broken then.
    bad: (name, what is wrong) of annotations that cannot be used, where an image has several.
    notes: what a person should know. All three are of a whole split, as its source gives it.
    """

    kind: str
    every_class_needed: bool

    @property
    def problems(self) -> dict[int, tuple[str, str]]: ...

    @property
    def bad(self) -> tuple[tuple[str, str], ...]: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names in the order of the labels."""
        ...

    def __len__(self) -> int: ...

    def select(self, ids: np.ndarray) -> Self:
        """What is true of these images, in this order."""
        ...

    def joined(self, others: Sequence[Any]) -> Self:
        """This and others, one after another."""
        ...

    def strata(self) -> np.ndarray:
        """(N,) int64: groups of which a held-out part takes the same share each."""
        ...

    def target(self, i: int, view: "View | None") -> Any:
        """What image i teaches where it is seen in this view: a number or an array. Without a view: what is
        true of it as it stands, for evaluation."""
        ...

    def digest(self, i: int) -> str:
        """Changes when what is said of image i does."""
        ...

    def missing(self) -> list[str]:
        """Classes of which there is no example."""
        ...


@dataclass(frozen=True, eq=False)
class Labels:
    """One class for each image. labels: (N,) int64, indices into `classes`."""

    classes: tuple[str, ...]
    labels: np.ndarray
    kind = "labels"
    every_class_needed = True
    problems: ClassVar[dict[int, tuple[str, str]]] = {}
    bad: ClassVar[tuple[tuple[str, str], ...]] = ()
    notes: ClassVar[tuple[str, ...]] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, ids: np.ndarray) -> "Labels":
        return Labels(self.classes, self.labels[ids])

    def joined(self, others: Sequence["Labels"]) -> "Labels":
        return Labels(
            self.classes, np.concatenate([self.labels, *(other.labels for other in others)])
        )

    def strata(self) -> np.ndarray:
        return self.labels

    def target(self, i: int, view: "View | None") -> int:
        return int(self.labels[i])

    def digest(self, i: int) -> str:
        return str(self.labels[i])

    def missing(self) -> list[str]:
        counts = np.bincount(self.labels, minlength=len(self.classes))
        return [name for name, count in zip(self.classes, counts, strict=True) if count == 0]


def labels_by_name(source: Source, split: str, index: Index, classes: tuple[str, ...]) -> Labels:
    """The `truth` of a source that says the name of a class of each image."""
    if len(classes) < 2:
        raise InputError(
            f"{source.name} has one class only ({listed(classes)}); a classifier needs at least two"
        )
    label_of = {name: label for label, name in enumerate(classes)}
    strangers = sorted(set(index.names) - label_of.keys())
    if strangers:
        closest = difflib.get_close_matches(strangers[0], classes, n=1)
        hint = f" (closest to {strangers[0]!r}: {closest[0]!r})" if closest else ""
        raise InputError(
            f"{source.name} {split or 'data'} has classes that are not among those to be learnt: "
            f"{listed(strangers)}; known are {listed(classes)}{hint}"
        )
    return Labels(classes, np.array([label_of[name] for name in index.names], np.int64))


@dataclass(frozen=True, eq=False)
class Examples:
    """N images of one split and what is true of them.

    broken: (name, what is wrong) of the images left out by `skip_broken`; bad: of the
    annotations left out or cut by `drop_bad`. notes: what `open_data` decided by itself and a person should
    know.
    """

    images: Images
    truth: Any  # a Truth
    split: str = ""
    broken: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    bad: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def classes(self) -> tuple[str, ...]:
        return self.truth.classes

    @property
    def keys(self) -> list[str]:
        return self.images.keys

    def where(self, i: int) -> str:
        """How messages call image i."""
        return self.images.where(i)

    @cached_property
    def content_hash(self) -> str:
        """Over classes, keys, every image's bytes and what is true of it."""
        total = hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        for i, (key, content) in enumerate(zip(self.keys, self.images.digests, strict=True)):
            line = f"{key}\0{self.truth.digest(i)}\0{content}\n"
            total.update(line.encode("utf-8", "surrogateescape"))
        return total.hexdigest()

    def subset(self, ids: Sequence[int] | np.ndarray) -> "Examples":
        """The same classes, these images, in this order."""
        ids = np.asarray(ids, np.int64)
        return dataclasses.replace(
            self, images=self.images.select(ids), truth=self.truth.select(ids)
        )
