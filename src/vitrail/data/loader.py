"""Batches of tensors: decode and augment what the plan says, in this process or in workers.

What a batch holds never depends on the number of workers or processes: every random number comes from the
sample's key.
"""

import atexit
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vitrail.data.augment import DROPPING, Augmentation, Key, draw, generator, render
from vitrail.data.batch import Batch, Dense, Padded, collate
from vitrail.data.decoding import read_pixels
from vitrail.data.examples import Examples
from vitrail.data.pack_plan import PackPlan, PlannedImage, PlannedPacks
from vitrail.data.packed import Packed
from vitrail.data.plan import BatchPlan, PlannedBatch
from vitrail.memory import enough_memory
from vitrail.packing import to_patches
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing, decode_size, prepare, preprocessed_size

STOPS = (signal.SIGINT, signal.SIGTERM)
FEWER = "take fewer pictures at a time (--batch-size), or smaller ones"


class TrainLoader:
    """Training batches of any epoch; workers live from the first epoch to the last.

    rank, world: this process and how many share every batch. workers: processes that decode and augment, 0
    for this one. Each worker computes with one thread. own_sizes: each image comes at the size that this
    preprocessing gives it, and a batch of several sizes is `Padded`; None: all at the size of their step.
    """

    def __init__(
        self,
        data: Examples,
        plan: BatchPlan | PackPlan,
        augmentation: Augmentation,
        *,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
        own_sizes: Preprocessing | None = None,
    ) -> None:
        _check_share(rank, world, workers)
        if augmentation.jitters and own_sizes is None:
            raise InputError(
                "scale_jitter is for images at their own sizes, as detectors take them; here all images of a "
                "batch have one size: leave --augmentation.scale-jitter away"
            )
        if plan.length != len(data):
            raise InputError(f"the plan is for {plan.length} samples, but the data has {len(data)}")
        self.plan, self.rank, self.world = plan, rank, world
        if isinstance(plan, PackPlan):
            job = _PackJob(data, plan, augmentation)
        else:
            job = _TrainJob(data, augmentation, plan.seed, own_sizes)
        self._source = _Jobs(job, workers, pin_memory)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on."""
        return self._source.run(_train_jobs(self.plan, epoch, start, self.rank, self.world))


def train_batches(
    data: Examples,
    plan: BatchPlan | PackPlan,
    augmentation: Augmentation,
    *,
    epoch: int,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    own_sizes: Preprocessing | None = None,
) -> Iterator[Batch]:
    """The batches of one epoch. For many epochs with workers a `TrainLoader` starts them once."""
    loader = TrainLoader(
        data, plan, augmentation, rank=rank, world=world, workers=workers, own_sizes=own_sizes
    )
    return loader.epoch(epoch, start)


def eval_batches(
    data: Examples,
    preprocessing: Preprocessing,
    batch_size: int,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[Dense]:
    """Every picture once, in batches of one preprocessed size, which are never mixed.

    Each process gets every world-th picture of each size, so the numbers of batches of two processes may
    differ: gather results at the end, not batch by batch.
    """
    _check_share(rank, world, workers)
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, but is {batch_size}")
    batches = batch_indices(data, preprocessing, batch_size, rank, world)
    yield from _Jobs(_EvalJob(data, preprocessing), workers, pin_memory).run(batches)


def batch_indices(
    data: Examples, preprocessing: Preprocessing, batch_size: int, rank: int = 0, world: int = 1
) -> list[list[int]]:
    """The pictures of each batch that `eval_batches` gives a process."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, (height, width) in enumerate(data.images.sizes.tolist()):
        groups.setdefault(preprocessed_size(height, width, preprocessing), []).append(i)
    batches = []
    taken = 0
    for group in groups.values():
        # Dealt on from group to group: with a size for every picture the first process had them all.
        mine = group[(rank - taken) % world :: world]
        taken += len(group)
        batches += [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    return batches


def _train_jobs(
    plan: BatchPlan | PackPlan, epoch: int, start: int, rank: int, world: int
) -> Iterator[tuple[int, PlannedBatch | PlannedPacks]]:
    for batch in plan.batches(epoch, start):
        yield epoch, batch.part(rank, world)


class _TrainJob(Dataset):
    """(epoch, batch) -> what the process trains on: 8-bit images, and their targets stacked. Or the
    InputError that it met."""

    def __init__(
        self,
        data: Examples,
        augmentation: Augmentation,
        seed: int,
        own_sizes: Preprocessing | None = None,
    ) -> None:
        self.data, self.augmentation, self.seed = data, augmentation, seed
        self.own_sizes = own_sizes

    def __getitem__(self, job: tuple[int, PlannedBatch]) -> Dense | Padded | InputError:
        epoch, batch = job
        indices = torch.tensor(batch.indices)
        places = zip(batch.indices, batch.positions, strict=True)
        shown = (self._shown(i, (self.seed, epoch, at), batch.size) for i, at in places)
        try:
            with enough_memory(_batch(len(batch.indices), batch.size), FEWER):
                if self.own_sizes is not None:
                    several, targets = zip(*shown, strict=True)
                    return collate(several, _stacked(targets), indices, step=batch.step)
                images = torch.empty(len(batch.indices), 3, *batch.size, dtype=torch.uint8)
                targets = []
                for row, (image, target) in zip(images, shown, strict=True):
                    row.copy_(image)
                    targets.append(target)
        except InputError as error:
            return error  # as a value: a worker's exception would come wrapped in a traceback
        targets = _stacked(targets)
        return Dense(images, targets, indices, batch.step, patch_size=batch.patch_size)

    def _shown(self, i: int, key: Key, size: tuple[int, int]) -> tuple[Tensor, Any]:
        """Image i in the view of this key, and what it teaches there."""
        height, width = self.data.images.sizes[i].tolist()
        if self.own_sizes is not None:
            size = preprocessed_size(height, width, self.own_sizes)
        drawn = draw(height, width, size, self.augmentation, key)
        pixels = read_pixels(self.data.images, i, drawn.view.needed())
        return render(pixels, drawn, self.augmentation), self.data.truth.target(i, drawn.view)


class _PackJob(Dataset):
    """(epoch, packs) -> their patches, 8-bit, and their targets. Or the InputError that it met."""

    def __init__(self, data: Examples, plan: PackPlan, augmentation: Augmentation) -> None:
        if augmentation.crop != "whole":
            raise InputError(
                f"packed images are shown whole, but crop is {augmentation.crop!r}; give "
                "--augmentation.crop whole"
            )
        self.data, self.augmentation, self.seed = data, augmentation, plan.seed
        self.packing = plan.packing
        self.num_prefix_tokens = plan.num_prefix_tokens

    def __getitem__(self, job: tuple[int, PlannedPacks]) -> Packed | InputError:
        _, step = job
        images = [image for pack in step.packs for image in pack]
        tokens = sum(image.kept for image in images)
        try:
            with enough_memory(f"packs of {tokens} patches", "give smaller --packing.max-tokens"):
                shown = (self._shown(image, step.patch_size) for image in images)
                patches, targets, kept = zip(*shown, strict=True)
                return Packed(
                    torch.cat(patches),
                    _stacked(targets),
                    torch.tensor([image.index for image in images]),
                    sizes=tuple(image.size for image in images),
                    packs=tuple(map(len, step.packs)),
                    patch_size=step.patch_size,
                    kept=kept if self.packing.drops else None,
                    max_tokens=self.packing.max_tokens,
                    num_prefix_tokens=self.num_prefix_tokens,
                    step=step.step,
                )
        except InputError as error:
            return error

    def _shown(self, image: PlannedImage, patch_size: int) -> tuple[Tensor, Any, tuple[int, ...]]:
        """Patches (kept, 3 * p * p) of an image, what it teaches, and which of its patches they are."""
        height, width = self.data.images.sizes[image.index].tolist()
        key = (self.seed, image.epoch, image.position)
        drawn = draw(height, width, image.size, self.augmentation, key)
        pixels = read_pixels(self.data.images, image.index, drawn.view.needed())
        _check_size(pixels, (height, width), self.data.images.where(image.index))
        patches = to_patches(render(pixels, drawn, self.augmentation), patch_size)
        places = range(len(patches))
        if image.kept < len(patches):
            order = generator(key, DROPPING).permutation(len(patches))
            places = np.sort(order[: image.kept]).tolist()
            patches = patches[places]
        return patches, self.data.truth.target(image.index, drawn.view), tuple(places)


def _check_size(pixels: np.ndarray, indexed: tuple[int, int], where: str) -> None:
    """Raise InputError unless the pixels are an image of the indexed size, or a reduced form of it."""
    found = pixels.shape[:2]
    reduced = [tuple(-(-side // factor) for side in indexed) for factor in (1, 2, 4, 8)]
    if found not in reduced:
        raise InputError(
            f"{where} has {found[0]} x {found[1]} pixels, but was indexed as {indexed[0]} x {indexed[1]}: "
            "its pack was planned for that; start again to index it anew"
        )


class _EvalJob(Dataset):
    """Indices of images that come out equally large -> normalised images and what is true of each as it
    stands. Or the InputError that it met."""

    def __init__(self, data: Examples, preprocessing: Preprocessing) -> None:
        self.data, self.preprocessing = data, preprocessing

    def __getitem__(self, indices: Sequence[int]) -> Dense | InputError:
        p = self.preprocessing
        height, width = self.data.images.sizes[indices[0]].tolist()
        size = preprocessed_size(height, width, p)
        targets, geometries = [], []
        try:
            with enough_memory(_batch(len(indices), size), FEWER):
                # All of it before any image: Pillow takes memory until the kernel ends the process.
                images = torch.empty(len(indices), 3, *size)
                for row, i in enumerate(indices):
                    height, width = self.data.images.sizes[i].tolist()
                    pixels = self.data.images.read(i, decode_size(p))
                    prepared, geometry = prepare(pixels, p, original=(height, width))
                    images[row] = torch.from_numpy(prepared)
                    targets.append(self.data.truth.target(i, None))
                    geometries.append(geometry)
        except InputError as error:
            return error
        return Dense(images, tuple(targets), torch.tensor(indices), geometries=tuple(geometries))


def _stacked(targets: Sequence[Any]) -> Any:
    """One tensor of what each image teaches, where all have one form; else a tuple of tensors, or of dicts of
    them."""
    if isinstance(targets[0], dict):
        return tuple(
            {name: torch.as_tensor(value) for name, value in target.items()} for target in targets
        )
    tensors = [torch.as_tensor(np.asarray(target)) for target in targets]
    same = len({tensor.shape for tensor in tensors}) == 1
    return torch.stack(tensors) if same else tuple(tensors)


def _batch(count: int, size: tuple[int, int]) -> str:
    return f"a batch of {count} of {size[0]} x {size[1]} pixels"


class _Jobs:
    """Runs jobs in order, in this process or in workers that stay for the next run."""

    def __init__(self, dataset: Dataset, workers: int, pin_memory: bool) -> None:
        self.dataset = dataset
        self.queue = _Queue()
        self.loader = None
        if workers:
            self.loader = DataLoader(
                dataset,
                batch_size=None,  # a job is a whole batch
                sampler=self.queue,
                num_workers=workers,
                persistent_workers=True,
                pin_memory=pin_memory,
                worker_init_fn=partial(_leave_signals_to_the_run, _signals_are_the_runs()),
            )

    def run(self, jobs: Iterable) -> Iterator:
        try:
            with _workers_start():
                results = iter(self._results(jobs))  # the first time, this starts the workers
            for result in results:
                if isinstance(result, InputError):
                    raise result
                yield result
                del result  # it need not stay while the next is read
        except InputError:
            results = self.loader = None  # else the traceback would keep the workers alive
            raise
        except (RuntimeError, ConnectionError, EOFError) as error:
            # The last two: it was killed while this process fetched what it had read.
            if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
                raise
            results = self.loader = None
            raise InputError(
                "a process that reads pictures was killed from outside, perhaps because memory ran out (the "
                "system's log tells): take fewer of them (--workers), or smaller batches"
            ) from error

    def _results(self, jobs: Iterable) -> Iterable:
        if self.loader is None:
            return (self.dataset[job] for job in jobs)
        self.queue.jobs = jobs
        return self.loader


@cache
def _signals_are_the_runs() -> Tensor:
    """One byte that this process and its workers share: 1, and 0 once the interpreter ends."""
    flag = torch.ones(1, dtype=torch.uint8).share_memory_()
    # Python ends with SIGTERM and a join for workers that still live, such as those that a traceback holds.
    # Registered after multiprocessing's own, this comes before it.
    atexit.register(flag.zero_)
    return flag


@contextmanager
def _workers_start() -> Iterator[None]:
    """Hold back signals while workers start: they inherit this, until they can leave them to the run.

    torch would raise in the midst of an update when a worker dies; its next batch is early enough.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before, on_death = (
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS),
        signal.getsignal(signal.SIGCHLD),
    )
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, on_death)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave_signals_to_the_run(flag: Tensor, worker: int) -> None:
    """Ctrl-C and a batch system's SIGTERM reach every process of a run, but the run decides when it stops:
    it still needs its batch."""

    def on_terminate(number: int, frame: FrameType | None) -> None:
        if not flag.item():
            os._exit(128 + number)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_terminate)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


class _Queue:
    """What the loader's workers draw from. It knows nothing of the loader: in a cycle with it, workers
    would outlive their last use until some later collection of garbage, perhaps within another worker."""

    def __init__(self) -> None:
        self.jobs: Iterable = ()

    def __iter__(self) -> Iterator:
        return iter(self.jobs)


def _check_share(rank: int, world: int, workers: int) -> None:
    if not 0 <= rank < world:
        raise InputError(f"rank must lie in 0..{world - 1}, but is {rank}")
    if workers < 0:
        raise InputError(f"workers must not be negative, but is {workers}")
