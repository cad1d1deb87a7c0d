"""The patches of many images of any sizes in one sequence: the batch of an update, as a `PackPlan` says."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vitrail.data.batch import moved, normalised, pinned, runs
from vitrail_runtime.preprocess import Geometry, Preprocessing, num_patches


@dataclass(frozen=True, eq=False)
class Packed:
    """Patches of images of any sizes, one image after another, in one or several packs.

    images: (T, 3 * p * p), uint8 as they are read, float32 once normalised; what fills up the last patches of
    an image is zero then. sizes: (height, width) of each image. packs: images of each pack. kept: which
    patches of each are here, or None. max_tokens, num_prefix_tokens: as in the plan.
    """

    images: Tensor
    targets: Any
    indices: Tensor
    sizes: tuple[tuple[int, int], ...]
    patch_size: int
    packs: tuple[int, ...]
    kept: tuple[tuple[int, ...], ...] | None = None
    max_tokens: int = 0
    num_prefix_tokens: int = 0
    step: int = 0
    geometries: tuple[Geometry, ...] = ()

    @property
    def num_images(self) -> int:
        return len(self.sizes)

    @property
    def padding(self) -> dict[str, Any]:
        return self.layout

    @property
    def layout(self) -> dict[str, Any]:
        """Where each image's patches are (`vitrail.packing.as_packed`)."""
        fields = ("sizes", "patch_size", "packs", "kept", "max_tokens", "num_prefix_tokens")
        return {"packing": {name: getattr(self, name) for name in fields}}

    @property
    def padded(self) -> float:
        tokens = len(self.images) + self.num_images * self.num_prefix_tokens
        return 1 - tokens / (len(self.packs) * self.max_tokens)

    @property
    def lengths(self) -> list[int]:
        """Patches of each image."""
        if self.kept is not None:
            return [len(places) for places in self.kept]
        return num_patches(np.array(self.sizes), self.patch_size).tolist()

    def to(self, device: torch.device, preprocessing: Preprocessing) -> "Packed":
        p, images = self.patch_size, self.images.to(device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = normalised(images.view(-1, 3, p, p), preprocessing)
            for i, patches in enumerate(images.split(self.lengths)):
                self._clear_edges(patches, i)
            images = images.flatten(1)
        return replace(self, images=images, targets=moved(self.targets, device))

    def _clear_edges(self, patches: Tensor, i: int) -> None:
        """Zeros where the patches of image i, (n, 3, p, p), reach beyond it."""
        (height, width), p = self.sizes[i], self.patch_size
        rows, columns = -(-height // p), -(-width // p)
        places = np.arange(rows * columns) if self.kept is None else np.array(self.kept[i])
        if height % p:
            last = torch.from_numpy(np.flatnonzero(places // columns == rows - 1))
            patches[last.to(patches.device), :, height % p :] = 0
        if width % p:
            last = torch.from_numpy(np.flatnonzero(places % columns == columns - 1))
            patches[last.to(patches.device), :, :, width % p :] = 0

    def pin_memory(self) -> "Packed":
        """As `Dense.pin_memory`."""
        return replace(self, images=self.images.pin_memory(), targets=pinned(self.targets))

    def split(self, parts: int) -> list["Packed"]:
        """Packs are not torn apart."""
        bounds = np.cumsum([0, *self.packs])
        tokens = np.cumsum([0, *self.lengths])
        out = []
        for some in runs(len(self.packs), parts):
            packs = self.packs[some]
            first, last = int(bounds[some.start]), int(bounds[some.start + len(packs)])
            out.append(
                replace(
                    self,
                    images=self.images[tokens[first] : tokens[last]],
                    targets=self.targets[first:last],
                    indices=self.indices[first:last],
                    sizes=self.sizes[first:last],
                    packs=packs,
                    kept=None if self.kept is None else self.kept[first:last],
                    geometries=self.geometries[first:last],
                )
            )
        return out
