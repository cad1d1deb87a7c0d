"""Many images of any sizes as one sequence of patches (Dehghani et al., "Patch n' Pack: NaViT", NeurIPS
2023, https://arxiv.org/abs/2307.06304, section 2). Pure functions; nothing is resized, padded to a batch
mate or lost.

A model's `forward_packed` takes a PackedImages and keeps the law: each image's result is what it is alone,
whatever its neighbours.
"""

import bisect
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from vitrail.features import Features, pad_to_multiple
from vitrail_runtime.errors import InputError, listed

Size = tuple[int, int]  # (height, width)
Run = tuple[int, int]  # images, tokens of each: neighbours of equal length in a packed sequence


@dataclass(frozen=True)
class Spans:
    """Where the tokens of each image lie in one sequence: `lengths` of the images, one after another.

    What follows from them is computed once, for all layers of a network.
    """

    lengths: tuple[int, ...]

    @property
    def total(self) -> int:
        """Tokens of the sequence."""
        return sum(self.lengths)

    @cached_property
    def runs(self) -> list[Run]:
        """Neighbours of equal length: they share one batched call."""
        return equal_runs(self.lengths)

    def offsets(self, device: torch.device) -> Tensor:
        """(N + 1,) int32: where each image begins, and where the last ends."""
        return self.kept(("offsets", device), lambda: _offsets(self.lengths, device))

    def images(self, device: torch.device) -> Tensor:
        """(T,) int64: the image of each token."""
        return self.kept(("images", device), lambda: self._images(device))

    def spread(self, values: Tensor) -> Tensor:
        """Values of each image (N, ...) -> of each token (T, ...)."""
        return values[self.images(values.device)]

    def _images(self, device: torch.device) -> Tensor:
        counts = torch.tensor(self.lengths, device=device)
        return torch.repeat_interleave(counts, output_size=self.total)

    @cached_property
    def _known(self) -> dict[Hashable, Any]:
        return {}

    def kept(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gives, made once and kept under `key`."""
        if key not in self._known:
            with torch.inference_mode(False):  # it may serve a training step later
                self._known[key] = make()
        return self._known[key]


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    ends = itertools.accumulate(lengths, initial=0)
    return torch.tensor(list(ends), dtype=torch.int32, device=device)


@dataclass(frozen=True)
class PackedImages:
    """Patches of N images, one image after another, each image's in row-major order.

    patches: (T, C * p * p); within a patch the order is (channel, row, column).
    grids: (h, w) in patches of each image; T is the sum of h * w.
    image_ids: where each image stood in the list given to `pack`.
    sizes: (height, width) in pixels of each image, before the zeros that fill up its last patches.
    kept: of each image the numbers of the patches, row by row, that are here, where token dropping left out
        others; T is then the sum of their numbers. None: all of them.
    """

    patches: Tensor
    grids: tuple[Size, ...]
    image_ids: tuple[int, ...]
    sizes: tuple[Size, ...]
    patch_size: int
    kept: tuple[tuple[int, ...], ...] | None = None

    @property
    def lengths(self) -> list[int]:
        """Patches of each image."""
        if self.kept is not None:
            return [len(places) for places in self.kept]
        return [h * w for h, w in self.grids]

    def spans(self, num_prefix_tokens: int = 0) -> Spans:
        """Of a sequence where such prefix tokens stand before each image's patches."""
        return Spans(tuple(num_prefix_tokens + length for length in self.lengths))

    def to(self, *args: Any, **kwargs: Any) -> "PackedImages":
        """The same pack with its patches on another device or in another dtype, as `Tensor.to`."""
        return replace(self, patches=self.patches.to(*args, **kwargs))


@dataclass(frozen=True)
class PackedFeatures:
    """What a backbone makes of a PackedImages.

    maps: name -> (T, C), the map's tokens in the order of the patches.
    prefix: (N, P, C), or None.
    grids: (h, w) of each image's map. Of tokens that dropping left, which are no grid any more: (1, number).
    """

    maps: dict[str, Tensor]
    prefix: Tensor | None
    grids: tuple[Size, ...]
    image_ids: tuple[int, ...]

    def batches(self) -> list[Features]:
        """Features of neighbours of equal grid as one batch each; together they are all images in order."""
        groups = [(len(list(group)), grid) for grid, group in itertools.groupby(self.grids)]
        sizes = [count * h * w for count, (h, w) in groups]
        pieces = {name: tokens.split(sizes) for name, tokens in self.maps.items()}
        batches, start = [], 0
        for i, (count, grid) in enumerate(groups):
            maps = {
                name: piece[i].unflatten(0, (count, *grid)).permute(0, 3, 1, 2)  # (B, C, h, w)
                for name, piece in pieces.items()
            }
            prefix = None if self.prefix is None else self.prefix[start : start + count]
            batches.append(Features(maps, prefix))
            start += count
        return batches

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


def as_packed(patches: Tensor, packing: Mapping[str, Any]) -> PackedImages:
    """Patches (T, C * p * p) of images whose `patch_size` and `sizes` the mapping holds, and which of their
    patches are `kept`. As plain data it may have been written to a file and read again."""
    patch_size = packing["patch_size"]
    sizes = tuple((h, w) for h, w in packing["sizes"])
    kept = packing.get("kept")
    return PackedImages(
        patches=patches,
        grids=tuple(patch_grid(size, patch_size) for size in sizes),
        image_ids=tuple(range(len(sizes))),
        sizes=sizes,
        patch_size=patch_size,
        kept=None if kept is None else tuple(map(tuple, kept)),
    )


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


def equal_runs(lengths: Sequence[int]) -> list[Run]:
    """Neighbours of equal length as (count, length)."""
    return [(len(list(group)), length) for length, group in itertools.groupby(lengths)]


def split_prefix(x: Tensor, spans: Spans, skip: int) -> tuple[Tensor, Tensor]:
    """Packed tokens with prefixes (T, C) -> prefixes (N, P, C), the other tokens (T - N * P, C)."""
    sizes = [count * length for count, length in spans.runs]
    parts = [part.unflatten(0, run) for part, run in zip(x.split(sizes), spans.runs, strict=True)]
    prefix = torch.cat([part[:, :skip] for part in parts])
    return prefix, torch.cat([part[:, skip:].flatten(0, 1) for part in parts])


def check_packed(packed: PackedImages, model: Any) -> None:
    """Raise InputError unless these are normalised RGB patches of one of `model.patch_sizes`."""
    name, known = type(model).__name__, model.patch_sizes
    if packed.patch_size not in known:
        raise InputError(
            f"the images were packed in patches of {packed.patch_size}, but this model's are of "
            f"{listed(list(map(str, known)))}; pack with patch_size={known[0]}"
        )
    wanted = 3 * packed.patch_size**2
    if packed.patches.shape[-1] != wanted:
        raise InputError(
            f"packed patches have {packed.patches.shape[-1]} numbers, but {name} takes "
            f"{wanted} (3 channels of {packed.patch_size} x {packed.patch_size}); pack RGB images"
        )
    if not packed.patches.is_floating_point():
        raise InputError(
            f"packed patches are {packed.patches.dtype}, but {name} takes normalised "
            "floats; normalise the images before pack"
        )


def packed_positions(packed: PackedImages, table: Callable[[Size], Tensor]) -> Tensor:
    """The position of every patch of a pack (T, C), where `table` gives those of a grid (h * w, C)."""
    tables = {grid: table(grid) for grid in dict.fromkeys(packed.grids)}
    rows = [tables[grid] for grid in packed.grids]
    if packed.kept is not None:
        rows = [row[list(places)] for row, places in zip(rows, packed.kept, strict=True)]
    return torch.cat(rows)


def packed_features(
    packed: PackedImages, maps: dict[str, Tensor], prefix: Tensor | None
) -> PackedFeatures:
    """What a backbone made of `packed`; tokens that dropping left are a grid of one row."""
    grids = packed.grids
    if packed.kept is not None:
        grids = tuple((1, len(places)) for places in packed.kept)
    return PackedFeatures(maps=maps, prefix=prefix, grids=grids, image_ids=packed.image_ids)


def packed_maps(backbone: Any, packed: PackedImages) -> PackedFeatures:
    """What a backbone makes of whole images, for heads that read maps. Raises InputError where dropping left
    some of an image's tokens, which are no map any more."""
    if packed.kept is not None:
        raise InputError(
            "token dropping leaves holes in the maps that this model's head reads; give --packing.drop 0"
        )
    return backbone.forward_packed(packed)


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
