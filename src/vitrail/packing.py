"""Many images of any sizes as one sequence of patches (Dehghani et al., "Patch n' Pack: NaViT", NeurIPS
2023, https://arxiv.org/abs/2307.06304, section 2). Pure functions; nothing is resized, padded to a batch
mate or lost.

A model's `forward_packed` takes a PackedImages and keeps the law: each image's result is what it is alone,
whatever its neighbours.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vitrail.features import Features, pad_to_multiple
from vitrail_runtime.errors import InputError

Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True)
class PackedImages:
    """Patches of N images, one image after another, each image's in row-major order.

    patches: (T, C * p * p); within a patch the order is (channel, row, column).
    grids: (h, w) in patches of each image; T is the sum of h * w.
    image_ids: where each image stood in the list given to `pack`.
    sizes: (height, width) in pixels of each image, before the zeros that fill up its last patches.
    """

    patches: Tensor
    grids: tuple[Size, ...]
    image_ids: tuple[int, ...]
    sizes: tuple[Size, ...]
    patch_size: int

    @property
    def lengths(self) -> list[int]:
        """Patches of each image."""
        return [h * w for h, w in self.grids]

    def to(self, *args: Any, **kwargs: Any) -> "PackedImages":
        """The same pack with its patches on another device or in another dtype, as `Tensor.to`."""
        return replace(self, patches=self.patches.to(*args, **kwargs))


@dataclass(frozen=True)
class PackedFeatures:
    """What a backbone makes of a PackedImages.

    maps: name -> (T, C), the map's tokens in the order of the patches.
    prefix: (N, P, C), or None.
    """

    maps: dict[str, Tensor]
    prefix: Tensor | None
    grids: tuple[Size, ...]
    image_ids: tuple[int, ...]

    def unpack(self) -> dict[int, Features]:
        """Index in the list given to `pack` -> that image's Features, with a batch axis of one."""
        lengths = [h * w for h, w in self.grids]
        pieces = {name: tokens.split(lengths) for name, tokens in self.maps.items()}
        features = {}
        for i, (image_id, grid) in enumerate(zip(self.image_ids, self.grids, strict=True)):
            maps = {
                name: piece[i].unflatten(0, grid).permute(2, 0, 1)[None]  # (1, C, h, w)
                for name, piece in pieces.items()
            }
            prefix = None if self.prefix is None else self.prefix[i : i + 1]
            features[image_id] = Features(maps, prefix)
        return features


def pack(
    images: Sequence[Tensor],
    patch_size: int = 16,
    max_tokens: int = 4096,
    num_prefix_tokens: int = 1,
) -> list[PackedImages]:
    """Images (C, H, W) of any sizes -> packs of at most `max_tokens` tokens each.

    num_prefix_tokens: tokens that the model adds to every image; they count against the budget.
    Every image is in exactly one pack. Raises InputError for an image that no pack can hold.
    """
    for i, image in enumerate(images):
        if image.ndim != 3 or 0 in image.shape:
            raise InputError(
                f"image {i} has shape {tuple(image.shape)}, but pack takes a list of non-empty "
                "(channels, height, width) tensors, without a batch axis"
            )
        if image.shape[0] != images[0].shape[0]:
            raise InputError(
                f"image {i} has {image.shape[0]} channels, but image 0 has {images[0].shape[0]}; "
                "convert all to the same"
            )
    sizes = [(image.shape[1], image.shape[2]) for image in images]
    packs = plan_packs(sizes, patch_size, max_tokens, num_prefix_tokens)
    return [
        PackedImages(
            patches=torch.cat([to_patches(images[i], patch_size) for i in ids]),
            grids=tuple(patch_grid(sizes[i], patch_size) for i in ids),
            image_ids=tuple(ids),
            sizes=tuple(sizes[i] for i in ids),
            patch_size=patch_size,
        )
        for ids in packs
    ]


def plan_packs(
    sizes: Sequence[Size], patch_size: int = 16, max_tokens: int = 4096, num_prefix_tokens: int = 1
) -> list[list[int]]:
    """Which images share a pack, from their (height, width) alone: lists of indices into `sizes`.

    Best-fit decreasing: the longest image first, each into the fullest pack that still holds it (at most
    11/9 of the fewest packs possible, plus one). Within a pack the longest stands first, so that
    images of equal length are neighbours. A pure function; ties go to the lower index.
    """
    if patch_size < 1 or max_tokens < 1 or num_prefix_tokens < 0:
        raise InputError(
            f"patch_size and max_tokens must be at least 1 and num_prefix_tokens at least 0, but got "
            f"{patch_size}, {max_tokens} and {num_prefix_tokens}"
        )
    needs = []
    for i, size in enumerate(sizes):
        h, w = patch_grid(size, patch_size)
        needs.append(h * w + num_prefix_tokens)
        if needs[i] > max_tokens:
            raise InputError(
                f"image {i} of {size[0]} x {size[1]} pixels needs {needs[i]} tokens ({h} x {w} patches "
                f"of {patch_size} + {num_prefix_tokens} prefix), but max_tokens is {max_tokens}; raise "
                f"max_tokens to {needs[i]} or more, or make the image smaller"
            )
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, number of the pack), sorted
    for i in sorted(range(len(needs)), key=lambda i: (-needs[i], i)):
        place = bisect.bisect_left(room, (needs[i], -1))
        if place == len(room):
            packs.append([])
            left, number = max_tokens, len(packs) - 1
        else:
            left, number = room.pop(place)
        packs[number].append(i)
        bisect.insort(room, (left - needs[i], number))
    return packs


def unpack(packed: PackedImages) -> dict[int, Tensor]:
    """Index in the list given to `pack` -> that image (C, H, W), exactly as it was."""
    pieces = packed.patches.split(packed.lengths)
    images = {}
    for i, (piece, grid, size) in enumerate(zip(pieces, packed.grids, packed.sizes, strict=True)):
        images[packed.image_ids[i]] = from_patches(piece, grid, packed.patch_size)[
            :, : size[0], : size[1]
        ]
    return images


def patch_grid(size: Size, patch_size: int) -> Size:
    """(height, width) in pixels -> in patches, the last ones filled up with zeros."""
    return -(-size[0] // patch_size), -(-size[1] // patch_size)


def to_patches(image: Tensor, patch_size: int) -> Tensor:
    """(C, H, W) -> (h * w, C * p * p), vectors in the order (channel, row, column)."""
    p = patch_size
    image = pad_to_multiple(image, p)
    channels, height, width = image.shape
    cut = image.reshape(channels, height // p, p, width // p, p)
    return cut.permute(1, 3, 0, 2, 4).reshape(-1, channels * p * p)


def from_patches(patches: Tensor, grid: Size, patch_size: int) -> Tensor:
    """(h * w, C * p * p) -> (C, h * p, w * p): the inverse of `to_patches`, zeros included."""
    p = patch_size
    cut = patches.reshape(*grid, -1, p, p).permute(2, 0, 3, 1, 4)  # (C, h, p, w, p)
    return cut.reshape(-1, grid[0] * p, grid[1] * p)
