"""What a model is fed with: images and what is true of them, as one batch.

Behind one protocol: whoever trains or measures need not know how images of several sizes are put together.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from vitrail_runtime.preprocess import Geometry, Preprocessing


class Batch(Protocol):
    """A process's share of an update, or of an evaluation.

    targets: what a task makes of the truth: in training tensors, or a tuple of them by image; in evaluation a
    tuple of what is true of each image as it stands. indices: (B,) into the data. step: number in the epoch.
    geometries: in evaluation, the ways back to the original images.
    """

    @property
    def images(self) -> Tensor: ...

    @property
    def targets(self) -> Any: ...

    @property
    def indices(self) -> Tensor: ...

    @property
    def step(self) -> int: ...

    @property
    def geometries(self) -> tuple[Geometry, ...]: ...

    @property
    def num_images(self) -> int: ...

    @property
    def padding(self) -> dict[str, Any]:
        """What a model's `losses` must know of the padding beside images and targets. Plain data."""
        ...

    @property
    def layout(self) -> dict[str, Any]:
        """What its `forward_tensors` must know beside the images."""
        ...

    @property
    def padded(self) -> float:
        """Share of what is computed that is no image."""
        ...

    def to(self, device: torch.device, preprocessing: Preprocessing) -> Self:
        """On the device; 8-bit images are normalised there."""
        ...

    def split(self, parts: int) -> list[Self]:
        """At most so many parts of nearly equal numbers of images, in order."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """Images of one size. images: (B, 3, h, w), uint8 as they are read, float32 once normalised.
    patch_size: that a model cuts them into, where the plan drew one."""

    images: Tensor
    targets: Any
    indices: Tensor
    step: int = 0
    geometries: tuple[Geometry, ...] = ()
    patch_size: int | None = None

    @property
    def num_images(self) -> int:
        return len(self.images)

    @property
    def padding(self) -> dict[str, Any]:
        return self.layout

    @property
    def layout(self) -> dict[str, Any]:
        return {} if self.patch_size is None else {"patch_size": self.patch_size}

    @property
    def padded(self) -> float:
        return 0.0

    def to(self, device: torch.device, preprocessing: Preprocessing) -> "Dense":
        images = normalised(self.images.to(device, non_blocking=True), preprocessing)
        return replace(self, images=images, targets=moved(self.targets, device))

    def pin_memory(self) -> "Dense":
        """In memory from which a GPU copies by itself; a loader asks for it."""
        return replace(self, images=self.images.pin_memory(), targets=pinned(self.targets))

    def split(self, parts: int) -> list["Dense"]:
        return [
            replace(
                self,
                images=self.images[some],
                targets=self.targets[some],
                indices=self.indices[some],
                geometries=self.geometries[some],
            )
            for some in runs(self.num_images, parts)
        ]


@dataclass(frozen=True, eq=False)
class Padded:
    """Images of several sizes in one tensor as large as the largest of each axis, right and bottom padded
    with zeros after normalisation, as detectors are trained. sizes: (height, width) of each."""

    images: Tensor
    targets: Any
    indices: Tensor
    sizes: tuple[tuple[int, int], ...]
    step: int = 0
    geometries: tuple[Geometry, ...] = ()

    @property
    def num_images(self) -> int:
        return len(self.images)

    @property
    def padding(self) -> dict[str, Any]:
        """Which part of each image is none."""
        return {"sizes": self.sizes}

    @property
    def layout(self) -> dict[str, Any]:
        return {}

    @property
    def padded(self) -> float:
        return 1 - sum(h * w for h, w in self.sizes) / self.images[:, 0].numel()

    def to(self, device: torch.device, preprocessing: Preprocessing) -> "Padded":
        images = normalised(self.images.to(device, non_blocking=True), preprocessing)
        for image, (height, width) in zip(images, self.sizes, strict=True):
            image[:, height:] = 0
            image[:, :, width:] = 0
        return replace(self, images=images, targets=moved(self.targets, device))

    def pin_memory(self) -> "Padded":
        """As `Dense.pin_memory`."""
        return replace(self, images=self.images.pin_memory(), targets=pinned(self.targets))

    def split(self, parts: int) -> list["Padded"]:
        """A part is as small as its own images allow."""
        out = []
        for some in runs(self.num_images, parts):
            sizes = self.sizes[some]
            height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
            out.append(
                replace(
                    self,
                    images=self.images[some, :, :height, :width],
                    targets=self.targets[some],
                    indices=self.indices[some],
                    sizes=sizes,
                    geometries=self.geometries[some],
                )
            )
        return out


def collate(
    images: Sequence[Tensor],
    targets: Any,
    indices: Tensor,
    *,
    step: int = 0,
    geometries: tuple[Geometry, ...] = (),
) -> Dense | Padded:
    """A batch of images (3, h, w): `Dense` where they are of one size, else `Padded`."""
    sizes = tuple((image.shape[1], image.shape[2]) for image in images)
    if len(set(sizes)) == 1:
        return Dense(torch.stack(list(images)), targets, indices, step, geometries)
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    padded = images[0].new_zeros(len(images), 3, height, width)
    for row, image in zip(padded, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return Padded(padded, targets, indices, sizes, step, geometries)


def normalised(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """8-bit images (B, 3, h, w) as a model takes them; floats are, already."""
    if images.dtype != torch.uint8:
        return images
    images = images.float()
    mean = images.new_tensor(preprocessing.mean)[:, None, None] * 255
    std = images.new_tensor(preprocessing.std)[:, None, None] * 255
    return (images - mean) / std


def moved(targets: Any, device: torch.device) -> Any:
    return _each(targets, lambda tensor: tensor.to(device, non_blocking=True))


def pinned(targets: Any) -> Any:
    return _each(targets, lambda tensor: tensor.pin_memory())


def _each(targets: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Every tensor within, changed; all else as it is."""
    if isinstance(targets, Tensor):
        return change(targets)
    if isinstance(targets, dict):
        return {key: _each(value, change) for key, value in targets.items()}
    if isinstance(targets, tuple):
        return tuple(_each(value, change) for value in targets)
    return targets


def runs(count: int, parts: int) -> list[slice]:
    """As `Tensor.chunk` splits."""
    length = -(-count // parts)
    return [slice(start, start + length) for start in range(0, count, length)]
