"""Which pictures, at which resolution, in which step: the batches of an epoch as a pure function.

The plan knows nothing of processes and workers. It is drawn from (seed, epoch, the number of pictures or
their weights, the global batch); a process takes its slice of each batch, and a run that was stopped goes
on from its step.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vitrail_runtime.errors import InputError

PIXEL_TOLERANCE = 0.15  # how far the pixels of a multi-scale step may be from constant
REPEATED_RUN = 8  # samples; copies are this far apart
# Streams of random numbers within one epoch; 4 and 5 are those of packs.
_ORDER, _SCALES, _OFFSET, _AGAIN, _PATCHES = 0, 1, 2, 3, 6


@dataclass(frozen=True)
class PlannedBatch:
    """One global step. `positions` count samples from the start of the epoch and key their augmentation.
    patch_size: that images are cut into, where the plan draws one."""

    step: int
    indices: tuple[int, ...]
    positions: tuple[int, ...]
    size: tuple[int, int]  # (height, width) of every picture in it, pixels
    patch_size: int | None = None

    def part(self, rank: int, world: int) -> "PlannedBatch":
        """The share of one of `world` processes: the rank-th of `world` equal, contiguous runs.

        Raises InputError when `world` does not divide the batch.
        """
        if len(self.indices) % world:
            raise InputError(
                f"{world} processes cannot share a batch of {len(self.indices)} equally (step {self.step}); "
                "choose a batch size that they divide, and drop_last=True"
            )
        share = len(self.indices) // world
        mine = slice(rank * share, (rank + 1) * share)
        return replace(self, indices=self.indices[mine], positions=self.positions[mine])


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchPlan:
    """The batches of every epoch.

    length: number of samples. batch_size: global, at `size`. size: (height, width) in pixels.
    scales: sizes for multi-scale batches (MobileViT, Mehta and Rastegari 2021, arXiv 2110.02178, section
        3.3): each step draws one, and takes batch_size * pixels(size) / pixels(drawn) samples, rounded to a
        multiple of a power of two up to 8, so that its pixels stay within 15 % of constant. Empty: every
        step has `size`.
    weights: (length,) relative frequencies; an epoch still has `length` samples, each drawn
        floor or ceil of its expected times. None: every sample once. See `balanced_weights`.
    strata: (length,) integers, such as labels: under `weights`, the samples of each stratum together come
        floor or ceil of their expected times as well.
    repeats: repeated augmentation (Hoffer et al. 2020, arXiv 1901.09335): the epoch keeps its length, but
        holds length / repeats different samples, each `repeats` times near each other under different
        augmentations.
    drop_last: leave out the samples at the end of an epoch that fill no batch; else they make a smaller one.
    groups: (length,) integers, such as `shape_groups`: a batch has samples of one group, so that images which
        are padded to one size are alike; what fills no batch of its group makes mixed ones at the end.
    shuffle: False gives the order of the data.
    patch_sizes: each step draws one for its images (FlexiViT, Beyer et al. 2023, arXiv 2212.08013). Empty:
        the model's own.
    """

    length: int
    batch_size: int
    size: tuple[int, int]
    seed: int = 0
    scales: tuple[tuple[int, int], ...] = ()
    weights: Sequence[float] | np.ndarray | None = None
    strata: Sequence[int] | np.ndarray | None = None
    groups: Sequence[int] | np.ndarray | None = None
    repeats: int = 1
    drop_last: bool = True
    shuffle: bool = True
    patch_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.length < 1 or self.batch_size < 1 or self.repeats < 1:
            raise InputError(
                "a batch plan needs length, batch_size and repeats of at least 1, but got "
                f"{self.length}, {self.batch_size} and {self.repeats}"
            )
        for height, width in (self.size, *self.scales):
            if height < 1 or width < 1:
                raise InputError(
                    f"sizes must be at least 1 x 1 pixels, but one is {height} x {width}"
                )
        if self.groups is not None and (len(self.groups) != self.length or self.scales):
            raise InputError(
                f"groups need one number for each of {self.length} samples, and no scales, but got "
                f"{len(self.groups)} numbers and {len(self.scales)} scales"
            )
        if self.seed < 0:
            raise InputError(f"seed must not be negative, but is {self.seed}")
        if self.strata is not None and (self.weights is None or len(self.strata) != self.length):
            raise InputError(
                f"strata need weights and one integer for each of {self.length} samples"
            )
        if self.weights is not None:
            weights = np.asarray(self.weights, np.float64)
            if weights.shape != (self.length,):
                raise InputError(
                    f"weights need one number for each of {self.length} samples, "
                    f"but have shape {weights.shape}"
                )
            if not (np.isfinite(weights).all() and (weights >= 0).all() and weights.sum() > 0):
                raise InputError("weights must be finite, not negative, and not all zero")
        largest = max(self._batch_sizes())
        if self.drop_last and largest > self.length:
            raise InputError(
                f"a batch of {largest} is larger than the data set of {self.length} samples; "
                "choose a batch size of at most "
                f"{max(1, self.batch_size * self.length // largest)} (vitrail train: --batch-size)"
            )

    def steps(self, epoch: int) -> int:
        """Number of batches of an epoch. Under multi-scale batches it varies a little from epoch to epoch."""
        return len(self._bounds(epoch)[1])

    def steps_between(self, first: int, stop: int) -> int:
        """Number of batches from the epoch `first` up to the epoch `stop`."""
        return sum(map(self.steps, range(first, stop)))

    @property
    def estimates(self) -> bool:
        """Whether `steps_between` of the whole run is an estimate."""
        return False

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of it."""
        return ()

    def left_out(self, epoch: int) -> int:
        """Number of samples at the end of an epoch that fill no batch. Which ones, its order draws anew."""
        ends = self._bounds(epoch)[1]
        return self.length - (ends[-1] if ends else 0)

    def batches(self, epoch: int, start: int = 0) -> Iterator[PlannedBatch]:
        """The batches of an epoch from step `start` on."""
        choices, ends = self._bounds(epoch)
        if not 0 <= start <= len(ends):
            raise InputError(f"epoch {epoch} has {len(ends)} steps, so it cannot start at {start}")
        order = self.order(epoch)
        patches = drawn_patch_sizes(self.patch_sizes, len(ends), self.seed, epoch)
        first = ends[start - 1] if start else 0
        for step in range(start, len(ends)):
            last = ends[step]
            yield PlannedBatch(
                step,
                tuple(order[first:last].tolist()),
                tuple(range(first, last)),
                self._sizes()[choices[step]],
                patches[step] if patches else None,
            )
            first = last

    def order(self, epoch: int) -> np.ndarray:
        """(length,) int64: the sample at each position of an epoch."""
        shuffled = np.arange(self.length)
        if self.shuffle:
            shuffled = _permutation(self.length, (self.seed, epoch, _ORDER))
        if self.weights is not None:
            shuffled = self._weighted(shuffled, epoch)
        if self.repeats > 1:
            # Runs of samples, then the same run again: neighbours differ, because they are what MixUp mixes.
            distinct = shuffled[: -(-self.length // self.repeats)]
            runs = np.split(distinct, range(REPEATED_RUN, len(distinct), REPEATED_RUN))
            shuffled = np.concatenate([np.tile(run, self.repeats) for run in runs])
        order = shuffled[: self.length]
        return order if self.groups is None else self._grouped(order)

    def _grouped(self, order: np.ndarray) -> np.ndarray:
        """The samples in the same order, dealt to their groups: a batch follows when it is full."""
        groups = np.asarray(self.groups)[order]
        full: list[
            tuple[int, np.ndarray]
        ] = []  # where in the order the last of a batch stood, and the batch
        rest: list[tuple[int, np.ndarray]] = []
        for group in np.unique(groups):
            places = np.flatnonzero(groups == group)
            ends = range(self.batch_size, len(places) + 1, self.batch_size)
            full += [(int(places[end - 1]), places[end - self.batch_size : end]) for end in ends]
            left = places[len(ends) * self.batch_size :]
            rest += [(int(left[0]), left)] if len(left) else []
        dealt = [places for _, places in (*sorted(full, key=_first), *sorted(rest, key=_first))]
        return order[np.concatenate(dealt)] if dealt else order

    def _weighted(self, shuffled: np.ndarray, epoch: int) -> np.ndarray:
        # Systematic resampling: equally spaced marks over the cumulated weights. Every sample comes
        # floor or ceil of its expected times, where independent draws would vary by chance; so does
        # every run of neighbours, and strata stand together.
        if self.strata is not None:
            shuffled = shuffled[np.argsort(np.asarray(self.strata)[shuffled], kind="stable")]
        ends = np.cumsum(np.asarray(self.weights, np.float64)[shuffled])
        offset = random_bits(1, (self.seed, epoch, _OFFSET))[0] / 2**64
        marks = (np.arange(self.length) + offset) * (ends[-1] / self.length)
        # Rounding must not put the last mark behind the last sample of positive weight.
        last = int(np.searchsorted(ends, ends[-1]))
        chosen = shuffled[np.minimum(np.searchsorted(ends, marks, side="right"), last)]
        if not self.shuffle:
            return np.sort(chosen)
        return chosen[_permutation(self.length, (self.seed, epoch, _AGAIN))]

    def batch_sizes(self) -> dict[tuple[int, int], int]:
        """Samples of a step by its (height, width); the last step of an epoch may have fewer."""
        return dict(zip(self._sizes(), self._batch_sizes(), strict=True))

    def _sizes(self) -> tuple[tuple[int, int], ...]:
        return self.scales or (self.size,)

    def _batch_sizes(self) -> list[int]:
        """Samples per step for each of `_sizes`."""
        if not self.scales:
            return [self.batch_size]
        pixels = self.batch_size * self.size[0] * self.size[1]
        exact = [pixels / (h * w) for h, w in self.scales]
        for multiple in (8, 4, 2, 1):  # the coarsest that keeps the promise: worlds divide it
            rounded = [max(multiple, multiple * round(n / multiple)) for n in exact]
            if all(abs(r / n - 1) <= PIXEL_TOLERANCE for r, n in zip(rounded, exact, strict=True)):
                return rounded
        raise InputError(
            f"no whole batch at {max(self.scales)} has about the pixels of {self.batch_size} at {self.size}; "
            "choose a larger batch_size or smaller scales"
        )

    def _bounds(self, epoch: int) -> tuple[list[int], list[int]]:
        """For each step, which of `_sizes` it has and the position that it ends at."""
        counts = self._batch_sizes()
        if len(counts) == 1:
            most = -(-self.length // counts[0])
            choices = [0] * most
        else:
            most = -(-self.length // min(counts))
            choices = (random_bits(most, (self.seed, epoch, _SCALES)) % len(counts)).tolist()
        ends = list(itertools.accumulate(counts[c] for c in choices))
        full = sum(1 for end in ends if end <= self.length)
        ends = ends[:full]
        if not self.drop_last and (not ends or ends[-1] < self.length):
            ends.append(self.length)
        return choices[: len(ends)], ends


def _first(pair: tuple[int, np.ndarray]) -> int:
    return pair[0]


def shape_groups(sizes: np.ndarray) -> np.ndarray:
    """(N,) groups of images of similar shape from (N, 2) sizes: the aspect ratio in steps of half an octave.

    At their own sizes images of one ratio are nearly equally large, and padding them costs little.
    """
    height, width = np.asarray(sizes, np.float64).T
    return np.rint(2 * np.log2(width / height)).astype(np.int64)


def balanced_weights(labels: np.ndarray) -> np.ndarray:
    """(N,) weights under which every class that occurs has the same share of an epoch."""
    counts = np.bincount(labels)
    return 1.0 / counts[labels]


def square_scales(low: int, high: int, step: int = 32) -> tuple[tuple[int, int], ...]:
    """((low, low), ..., (high, high)), every `step` pixels. MobileViT's own set is not evenly spaced: 160,
    192, 256, 288 and 320 (section 4.1), without 224."""
    if not 0 < low <= high or step < 1:
        raise InputError(
            f"scales need 0 < low <= high and step >= 1, but got {low}, {high}, {step}"
        )
    return tuple((side, side) for side in range(low, high + 1, step))


def drawn_patch_sizes(sizes: Sequence[int], steps: int, seed: int, epoch: int) -> list[int]:
    """Of each step one of the sizes, all equally likely; [] where there are none."""
    if not sizes:
        return []
    drawn = random_bits(steps, (seed, epoch, _PATCHES)) % len(sizes)
    return [sizes[i] for i in drawn.tolist()]


def random_bits(count: int, key: tuple[int, int, int]) -> np.ndarray:
    """(count,) uint64 by key (seed, epoch, stream). Raw output of the bit generator: its stream is promised
    not to change with numpy."""
    seed, epoch, stream = key
    return np.random.Philox(np.random.SeedSequence([seed, epoch, stream])).random_raw(count)


def _permutation(count: int, key: tuple[int, int, int]) -> np.ndarray:
    return np.argsort(random_bits(count, key), kind="stable")
