"""Batches do not depend on who makes them."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from tests.data.conftest import picture
from vitrail.data import loader as loader_module
from vitrail.data import open_data
from vitrail.data.augment import Augmentation
from vitrail.data.loader import TrainLoader, batch_indices, eval_batches, train_batches
from vitrail.data.plan import BatchPlan, square_scales
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing, decode, prepare

EVERYTHING = Augmentation(
    color_jitter=0.3, three_augment=True, randaugment_ops=2, random_erasing=0.5, scale=(0.3, 1.0)
)


@pytest.fixture
def data(class_folders):
    return open_data(
        class_folders({"train": {"cat": 20, "dog": 17}, "val": {"cat": 1, "dog": 1}}), "train"
    )


def plan_of(data, **given):
    return BatchPlan(**{"length": len(data), "batch_size": 8, "size": (24, 32), "seed": 5, **given})


def shares(data, plan, world, workers, start=0):
    """The batches of one epoch, put together again from the shares of `world` processes."""
    loaders = [
        train_batches(
            data, plan, EVERYTHING, epoch=2, start=start, rank=r, world=world, workers=workers
        )
        for r in range(world)
    ]
    return [
        (parts[0].step, *(torch.cat([p[f] for p in parts]) for f in range(1, 5)))
        for parts in zip(*loaders, strict=True)
    ]


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_processes_and_workers_give_the_same_global_batches_bit_for_bit(data, world, workers):
    plan = plan_of(data, size=(16, 16), scales=square_scales(8, 16, 8))
    expected = shares(data, plan, 1, 0)
    got = shares(data, plan, world, workers)
    assert [b[0] for b in got] == [b[0] for b in expected]
    for a, b in zip(got, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[1:], b[1:], strict=True))


def test_a_run_goes_on_in_the_middle_of_an_epoch(data):
    plan = plan_of(data)
    whole, rest = shares(data, plan, 1, 0), shares(data, plan, 1, 0, start=2)
    assert [b[0] for b in rest] == [2, 3]
    for a, b in zip(whole[2:], rest, strict=True):
        assert torch.equal(a[1], b[1])


def test_workers_stay_over_epochs_and_epochs_differ(data):
    loader = TrainLoader(data, plan_of(data), EVERYTHING, workers=2)
    first, second, again = (list(loader.epoch(e)) for e in (0, 1, 0))
    assert not torch.equal(first[0].indices, second[0].indices)
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_worker_that_is_starting_is_left_to_the_run(data, number, monkeypatch):
    ready = loader_module._leave_signals_to_the_run

    def slowly(flag, worker):
        time.sleep(worker)  # the second is a second behind
        ready(flag, worker)

    monkeypatch.setattr(loader_module, "_leave_signals_to_the_run", slowly)
    batches = TrainLoader(data, plan_of(data), EVERYTHING, workers=2).epoch(0)
    next(batches)
    for worker in multiprocessing.active_children():
        os.kill(worker.pid, number)
    assert len(list(batches)) == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_workers_is_left_to_the_run(data, number):
    loader = TrainLoader(data, plan_of(data), EVERYTHING, workers=2)
    batches = loader.epoch(0)
    next(batches)
    workers = multiprocessing.active_children()
    for worker in workers:
        os.kill(worker.pid, number)
    assert len(list(batches)) == 3
    assert all(worker.is_alive() for worker in workers)


@pytest.mark.slow  # torch looks every five seconds whether its workers live
def test_a_killed_worker_is_one_message(data):
    batches = TrainLoader(data, plan_of(data, batch_size=1), EVERYTHING, workers=2).epoch(0)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(InputError, match="was killed from outside, perhaps because memory ran out"):
        list(batches)


@pytest.mark.slow
def test_a_program_ends_though_a_loader_with_workers_is_still_held(data):
    """As a name of the module holds it, or the traceback of an error."""
    lines = [
        "import sys",
        "from vitrail.data import open_data",
        "from vitrail.data.loader import *",
        "data = open_data(sys.argv[1], 'train')",
        "plan = BatchPlan(length=len(data), batch_size=8, size=(8, 8))",
        "batches = train_batches(data, plan, Augmentation(), epoch=0, workers=1)",
        "next(batches)",
    ]
    root = str(data.source.root)
    command = [sys.executable, "-c", "\n".join(lines), root]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def test_a_batch_is_contiguous_bytes_with_the_labels_of_its_pictures(data):
    for batch in train_batches(data, plan_of(data, drop_last=False), Augmentation(), epoch=0):
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous()
        assert batch.images.shape[1:] == (3, 24, 32)
        assert batch.labels.tolist() == data.labels[batch.indices].tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_that_does_not_fit_into_memory_is_one_message(data, workers):
    huge = (10**7, 10**7)  # 600 TB of bytes
    said = r"^not enough memory for a batch of 2 of 10000000 x 10000000 pixels \(.*--batch-size"
    plan = plan_of(data, batch_size=2, size=huge)
    with pytest.raises(InputError, match=said):
        next(train_batches(data, plan, Augmentation(), epoch=0, workers=workers))
    with pytest.raises(InputError, match=said):
        next(eval_batches(data, Preprocessing(size=huge), 2, workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_breaks_during_training_is_one_message(data, workers):
    with open(data.where(3), "wb") as file:
        file.write(b"gone")
    with pytest.raises(InputError, match=r"003\.jpg has changed since it was indexed; start again"):
        list(
            train_batches(
                data, plan_of(data, drop_last=False), Augmentation(), epoch=0, workers=workers
            )
        )
    assert multiprocessing.active_children() == [], (
        "a worker left to the collector takes 10 s to end"
    )


def test_a_world_that_does_not_divide_the_batch_is_refused(data):
    with pytest.raises(InputError, match="3 processes cannot share a batch of 8"):
        list(train_batches(data, plan_of(data), Augmentation(), epoch=0, rank=0, world=3))
    with pytest.raises(InputError, match="plan is for 10 samples, but the data has 37"):
        TrainLoader(data, plan_of(data, length=10), Augmentation())


def test_evaluation_sees_every_picture_once_as_prepare_makes_it(data):
    p = Preprocessing(size=(24, 24), mode="fit")
    seen = {}
    for rank in range(2):
        for batch in eval_batches(data, p, 5, rank=rank, world=2):
            assert len(batch.labels) <= 5
            for row, i in enumerate(batch.indices.tolist()):
                assert i not in seen
                seen[i] = batch.images[row]
                assert batch.labels[row] == data.labels[i]
    assert sorted(seen) == list(range(len(data)))
    for i, image in seen.items():
        expected, _ = prepare(decode(data.read_bytes(i)), p)
        np.testing.assert_array_equal(image.numpy(), expected)


def test_evaluation_never_mixes_sizes(class_folders):
    root = class_folders({"": {"cat": 4, "dog": 4}})
    picture(7, (40, 20)).save(root / "cat" / "tall.png")
    data = open_data(root, "all")
    batches = list(eval_batches(data, Preprocessing(mode="native"), 16))
    sizes = [b.images.shape[2:] for b in batches]
    assert len(set(sizes)) == len(sizes) == len(np.unique(data.sizes, axis=0))


def test_pictures_of_many_sizes_are_dealt_to_all_processes_evenly(data):
    native, world = Preprocessing(mode="native"), 2
    dealt = [batch_indices(data, native, 4, rank, world) for rank in range(world)]
    counts = [sum(map(len, batches)) for batches in dealt]
    assert max(counts) - min(counts) <= 1
    assert sorted(i for batches in dealt for b in batches for i in b) == list(range(len(data)))
