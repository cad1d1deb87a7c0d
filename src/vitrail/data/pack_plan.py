"""Images of any shape, many in one sequence of patches: which image in which pack of which step, at which
resolution, with how many of its patches.

Dehghani et al., "Patch n' Pack: NaViT, a Vision Transformer for any Aspect Ratio and Resolution", NeurIPS
2023, https://arxiv.org/abs/2307.06304, sections 2 and 3.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from vitrail.data.best_fit import best_fit, best_fit_of_kinds, filled_steps, whole_steps
from vitrail.data.packing import Packing
from vitrail.data.plan import BatchPlan, drawn_patch_sizes, random_bits
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import limited_sizes, num_patches

_SIDES, _DROPS = 4, 5  # streams of random numbers within one epoch, beside those of BatchPlan
CYCLE = 8192  # images that are packed as one stream, where an epoch has fewer
LEAST_STEPS = 8  # of an epoch, so that it shares a pack with the next
# Images, of all epochs and each in every size of patches, that are planned at the start: 0.3 s of a processor
# (EPYC) at their own sizes, 1 s where sides and shares to leave out are drawn.
AHEAD = 200_000


@dataclass(frozen=True)
class PlannedImage:
    """An image of a pack. `epoch` and `position` in it key its augmentation."""

    index: int
    epoch: int
    position: int
    size: tuple[int, int]  # (height, width) that it is brought to, pixels
    kept: int  # of its patches


@dataclass(frozen=True)
class PlannedPacks:
    """One global step, whose images are cut into patches of one size."""

    step: int
    packs: tuple[tuple[PlannedImage, ...], ...]
    patch_size: int

    def part(self, rank: int, world: int) -> "PlannedPacks":
        """The share of one of `world` processes: as many packs as every other's.

        Raises InputError when `world` does not divide the packs.
        """
        if len(self.packs) % world:
            raise InputError(
                f"{world} processes cannot share {len(self.packs)} packs equally (step {self.step}); choose "
                "a number of packs that they divide (--packing.packs)"
            )
        share = len(self.packs) // world
        return replace(self, packs=self.packs[rank * share : (rank + 1) * share])


@dataclass(frozen=True, kw_only=True, eq=False)
class PackPlan:
    """The packs of every step of every epoch, told from the images' sizes before any is decoded: at which
    resolution an image is shown, how many of its patches are left out, and with which others it comes.

    Like a BatchPlan it knows nothing of processes and workers, and is read from any step on. Images come in
    the random order of `samples`; of the next `packing.window` of them the longest waiting one begins a pack,
    and the largest that fits is added until none does. Small epochs, whose last packs would be a loss, are
    packed in one stream: every image comes once for each epoch, and packs at a border hold images of both.

    samples: the order of every epoch. sizes: (N, 2) heights and widths of the images. patch_size,
    num_prefix_tokens: the model's. epochs: of the run, whose last pack is not filled up by a further one.
    where: what messages call image i.
    patch_sizes: each step draws one of these for its images (FlexiViT, Beyer et al. 2023, arXiv 2212.08013),
        which says how many tokens they have; empty: patch_size.
    """

    samples: BatchPlan
    sizes: np.ndarray
    packing: Packing
    patch_size: int
    num_prefix_tokens: int
    epochs: int
    where: Callable[[int], str] = "image {}".format
    patch_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if len(self.sizes) != self.samples.length or self.epochs < 1 or self.patch_size < 1:
            raise InputError(
                f"a plan of packs needs the sizes of {self.samples.length} images, epochs and patch_size of "
                f"at least 1, but got {len(self.sizes)}, {self.epochs} and {self.patch_size}"
            )
        if self.limit < 1:
            raise InputError(
                f"max_tokens is {self.packing.max_tokens}, but the model adds {self.num_prefix_tokens} "
                "tokens to each image; an image needs at least one more (--packing.max-tokens)"
            )
        if self.packing.too_long == "error" and self._too_long:
            raise InputError(
                f"{self._too_long}; give larger --packing.max-tokens, or --packing.too-long resize"
            )

    @property
    def length(self) -> int:
        return self.samples.length

    @property
    def seed(self) -> int:
        return self.samples.seed

    @property
    def weights(self) -> Any:
        return self.samples.weights

    @property
    def kinds(self) -> tuple[int, ...]:
        """Sizes of patches."""
        return self.patch_sizes or (self.patch_size,)

    @property
    def limit(self) -> int:
        """The most patches of an image."""
        held = self.packing.max_tokens - self.num_prefix_tokens
        wanted = self.packing.tokens_per_image
        return held if wanted is None else min(held, wanted)

    @property
    def batch_size(self) -> int:
        """Images of a step, about."""
        ends = self._ends(0)
        return max(1, round(self.length * len(ends) / ends[-1]))

    @property
    def size(self) -> tuple[int, int]:
        """A square of as many patches as an image has on average."""
        patches = num_patches(
            limited_sizes(self.sizes, self.limit, self.patch_size), self.patch_size
        )
        side = max(1, round(float(patches.mean()) ** 0.5)) * self.patch_size
        return side, side

    def batch_sizes(self) -> dict[tuple[int, int], int]:
        """None: images have no common size."""
        return {}

    def left_out(self, epoch: int) -> int:
        """None: what fills no pack is carried over."""
        return 0

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What becomes of images that a pack cannot hold, or that are no whole patch."""
        notes = []
        if self._too_long and self.packing.resolution == "own":
            notes.append(f"{self._too_long}: shown smaller, their ratio kept")
        largest = max(self.kinds)
        small = np.flatnonzero((np.asarray(self.sizes) < largest).any(1))
        if len(small):
            notes.append(
                f"{len(small)} of {self.length} images have a side of less than a patch of {largest} "
                f"pixels, such as {_named(self.sizes, small[0], self.where)}: zeros fill it up"
            )
        return tuple(notes)

    @cached_property
    def _too_long(self) -> str:
        return counted_too_long(self.sizes, self.limit, min(self.kinds), self.where)

    def steps(self, epoch: int) -> int:
        """Number of steps of an epoch. It varies a little from epoch to epoch."""
        first, last = self._steps_of(epoch)
        return last - first

    def steps_between(self, first: int, stop: int) -> int:
        """Number of steps from the epoch `first` up to the epoch `stop`.

        Of a large plan (AHEAD) the first epochs and the stream of `first` are counted; those behind are taken
        to have as many steps as the first ones on average. Epochs vary where each step draws its size of
        patches: 50 of 20,000 images (8, 16 and 32 pixels, 4 packs of 4,096 tokens) have 265 to 332 steps,
        deviation 5 %, and the whole run's 14,890 are told as 14,881 to 14,962.
        """
        counted = min(stop, max(self._ahead, (first // self._cycle + 1) * self._cycle))
        known = sum(map(self.steps, range(first, counted)))
        if stop <= counted:
            return known
        mean = sum(map(self.steps, range(self._ahead))) / self._ahead
        return known + math.ceil((stop - counted) * mean)

    @property
    def estimates(self) -> bool:
        """Whether `steps_between` of the whole run is an estimate."""
        return self._ahead < self.epochs

    def check(self) -> None:
        """Raise InputError where the images of any epoch are too few to fill its last step.

        Before the first update: a later epoch, whose packs are others, may lack what the first had. Every
        epoch is planned for it, but for those of a large plan that cannot lack any.
        """
        if not (self.estimates and self._always_fills):
            for epoch in range(self.epochs):
                self._steps_of(epoch)

    @property
    def _always_fills(self) -> bool:
        """Whether the images of a stream fill its last step in whatever order they come.

        With P packs an update, N images lack where fewer than P are second or further ones of their pack.
        Small ones, which never need more than half a pack, are this unless the next small one is still
        outside the window of the one that begins a pack: of N / window that can be.
        """
        packs, images = self.packing.packs, self.length
        if images % packs == 0:
            return True
        sizes = np.asarray(self.sizes)
        if self.packing.resolution != "own":
            sizes = resampled(sizes, self.packing, np.ones(images))  # the largest that are drawn
        patches = np.minimum(num_patches(sizes, min(self.kinds)), self.limit)
        window = max(1, min(self.packing.window, images // 2))
        small = 2 * (patches + self.num_prefix_tokens) <= self.packing.max_tokens
        if self.weights is not None and not small.all():
            return False  # which images an epoch has is drawn
        return int(small.sum()) > 2 * packs + images / window

    def batches(self, epoch: int, start: int = 0) -> Iterator[PlannedPacks]:
        """The steps of an epoch from `start` on."""
        first, last = self._steps_of(epoch)
        if not 0 <= start <= last - first:
            raise InputError(
                f"epoch {epoch} has {last - first} steps, so it cannot start at {start}"
            )
        stream = self._stream(epoch // self._cycle)
        for step in range(first + start, last):
            packs = range(step * self.packing.packs, (step + 1) * self.packing.packs)
            yield PlannedPacks(
                step - first, tuple(map(stream.pack, packs)), self.kinds[stream.kinds[step]]
            )

    def padding(self, epoch: int) -> float:
        """Share of an epoch's budget of tokens that no image fills."""
        packs = [pack for batch in self.batches(epoch) for pack in batch.packs]
        tokens = sum(image.kept + self.num_prefix_tokens for pack in packs for image in pack)
        return 1 - tokens / (len(packs) * self.packing.max_tokens)

    def _steps_of(self, epoch: int) -> tuple[int, int]:
        """Where an epoch begins and ends in its stream."""
        if not 0 <= epoch < self.epochs:
            raise InputError(f"the plan is for epochs 0 to {self.epochs - 1}, but got {epoch}")
        cycle, place = divmod(epoch, self._cycle)
        ends = self._ends(cycle)
        return (ends[place - 1] if place else 0), ends[place]

    def _ends(self, cycle: int) -> list[int]:
        """The step behind each epoch of a stream. They stay known once it was made."""
        if cycle not in self._known_ends:
            self._known_ends[cycle] = self._stream(cycle).ends
        return self._known_ends[cycle]

    @cached_property
    def _known_ends(self) -> dict[int, list[int]]:
        return {}

    @cached_property
    def _ahead(self) -> int:
        """Epochs that are planned at the start: whole streams, one at least."""
        cheap = AHEAD // (self.length * len(self.kinds))
        return min(self.epochs, max(1, -(-cheap // self._cycle)) * self._cycle)

    @cached_property
    def _cycle(self) -> int:
        """Epochs that are packed as one stream."""
        needs = self._draw(0).needs.sum(1).mean()
        share = needs / (self.packing.max_tokens * self.packing.packs)
        if self.length >= CYCLE or share < LEAST_STEPS:
            return 1
        return -(-CYCLE // self.length)

    def _stream(self, cycle: int) -> "_Stream":
        if cycle not in self._streams:
            first = cycle * self._cycle
            epochs = range(first, min(first + self._cycle, self.epochs))
            stream = _Stream(self, [self._draw(epoch) for epoch in epochs])
            self._streams.clear()  # one at a time is read
            self._streams[cycle] = stream
        return self._streams[cycle]

    @cached_property
    def _streams(self) -> "dict[int, _Stream]":
        return {}

    def _draw(self, epoch: int) -> "_Drawn":
        """How the images of an epoch are shown, in its order."""
        order = self.samples.order(epoch)
        sizes = np.asarray(self.sizes, np.int64)[order]
        if self.packing.resolution != "own":
            sizes = resampled(sizes, self.packing, _uniform(len(sizes), (self.seed, epoch, _SIDES)))
        uniform = None
        if self.packing.drops:
            uniform = _uniform(len(sizes), (self.seed, epoch, _DROPS))
        found = [self._shown(sizes, patch_size, uniform) for patch_size in self.kinds]
        sizes, kept = (np.stack(part) for part in zip(*found, strict=True))
        return _Drawn(epoch, order, sizes, kept, kept + self.num_prefix_tokens)

    def _shown(
        self, sizes: np.ndarray, patch_size: int, uniform: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """(N, 2) sizes at which images are shown in such patches, and (N,) how many are kept."""
        sizes = limited_sizes(sizes, self.limit, patch_size)
        patches = num_patches(sizes, patch_size)
        if uniform is None:
            return sizes, patches
        shares = dropped_shares(patches, self.packing, uniform)
        return sizes, np.maximum(1, np.floor(patches * (1 - shares)).astype(np.int64))


def counted_too_long(
    sizes: np.ndarray, most: int, patch_size: int, where: Callable[[int], str]
) -> str:
    """How many images have more patches than that, and the largest of them; "" where none has."""
    patches = num_patches(np.asarray(sizes), patch_size)
    count = int((patches > most).sum())
    if not count:
        return ""
    largest = _named(sizes, patches.argmax(), where)
    counted = f"{count} of {len(sizes)} images have more than {most} patches of {patch_size} pixels"
    return f"{counted}, such as {largest}"


def _named(sizes: np.ndarray, i: np.integer, where: Callable[[int], str]) -> str:
    height, width = sizes[i].tolist()
    return f"{where(int(i))} ({height} x {width})"


class _Drawn(NamedTuple):
    """An epoch in its order, of N images, for each of K sizes of patches."""

    epoch: int
    order: np.ndarray  # (N,)
    sizes: np.ndarray  # (K, N, 2)
    kept: np.ndarray  # (K, N)
    needs: np.ndarray  # (K, N) tokens


class _Stream:
    """Epochs packed one after another. ends: the step behind each, counted from the first. kinds: of each
    step the size of its patches, of the plan's."""

    def __init__(self, plan: PackPlan, epochs: Sequence[_Drawn]) -> None:
        self.epochs, self.length = epochs, plan.length
        needs = np.concatenate([drawn.needs for drawn in epochs], 1)
        multiple = plan.packing.packs
        # Two epochs in one window, but hardly an image twice in one pack.
        window = plan.packing.window
        if len(epochs) > 1:
            window = max(1, min(window, plan.length // 2))
        if len(needs) == 1:
            packs = best_fit(needs[0], plan.packing.max_tokens, window)
            packs = whole_steps(packs, multiple)
            self.kinds = [0] * (len(packs) // multiple)
        else:
            every, steps = range(len(needs)), needs.shape[1]
            self.kinds = drawn_patch_sizes(every, steps, plan.seed, epochs[0].epoch)
            kinds = np.repeat(self.kinds, multiple).tolist()
            packs = best_fit_of_kinds(needs, kinds, plan.packing.max_tokens, window)
            packs = filled_steps(packs, multiple)
        # Longest first: images of equal length are neighbours, and share a call.
        tokens = needs.tolist()
        self.members = np.array(
            [
                i
                for number, pack in enumerate(packs)
                for i in sorted(
                    pack, key=tokens[self.kinds[number // multiple]].__getitem__, reverse=True
                )
            ]
        )
        self.multiple, self.bounds = multiple, np.cumsum([0, *map(len, packs)])
        by_step = self.bounds[multiple::multiple]
        self.ends = [
            int(np.searchsorted(by_step, (i + 1) * plan.length)) + 1 for i in range(len(epochs))
        ]

    def pack(self, number: int) -> tuple[PlannedImage, ...]:
        kind = self.kinds[number // self.multiple]
        members = self.members[self.bounds[number] : self.bounds[number + 1]]
        return tuple(self._image(i, kind) for i in members.tolist())

    def _image(self, i: int, kind: int) -> PlannedImage:
        drawn, position = self.epochs[i // self.length], i % self.length
        height, width = drawn.sizes[kind, position].tolist()
        return PlannedImage(
            int(drawn.order[position]),
            drawn.epoch,
            position,
            (height, width),
            int(drawn.kept[kind, position]),
        )


def resampled(sizes: np.ndarray, packing: Packing, uniform: np.ndarray) -> np.ndarray:
    """(N, 2) sizes of the same ratios for sides drawn by `uniform`, (N,) in [0, 1) (section 2.3).

    "normal" is the paper's: a normal of mean -0.5 and deviation 1 cut at -1 and 1, brought to low and high.
    """
    low, high = packing.sides
    if packing.resolution == "normal":
        from scipy.special import ndtr, ndtri

        ends = ndtr(np.array((-0.5, 1.5)))  # of -1 and 1, in deviations from the mean
        normal = ndtri(ends[0] + uniform * (ends[1] - ends[0])) - 0.5
        uniform = (normal.clip(-1, 1) + 1) / 2
    drawn = low + uniform * (high - low)
    height, width = sizes.T.astype(np.float64)
    own = np.sqrt(height * width) if packing.side_of == "area" else np.maximum(height, width)
    return np.maximum(1, np.rint(sizes * (drawn / own)[:, None])).astype(np.int64)


def dropped_shares(patches: np.ndarray, packing: Packing, uniform: np.ndarray) -> np.ndarray:
    """(N,) shares of the images' patches to leave out, drawn by `uniform`, (N,) in [0, 1), from a Beta
    distribution each (section 2.3): of the mean that belongs to its number of patches."""
    from scipy.special import betaincinv

    small, large = packing.drop_means
    least, most = patches.min(), patches.max()
    mean = small + (large - small) * (patches - least) / max(1, most - least)
    if packing.drop_std == 0:
        return mean
    known = np.where(mean > 0, mean, 0.5)
    spread = np.maximum(known * (1 - known) / packing.drop_std**2 - 1, 1e-3)
    return np.where(mean > 0, betaincinv(known * spread, (1 - known) * spread, uniform), 0.0)


def _uniform(count: int, key: tuple[int, int, int]) -> np.ndarray:
    """(count,) float64 in [0, 1)."""
    return (random_bits(count, key) >> np.uint64(11)) * 2.0**-53
