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
from tests.data.scenes import coco_set
from vitrail.data import loader as loader_module
from vitrail.data import open_data
from vitrail.data.augment import Augmentation, augment, draw
from vitrail.data.batch import Dense, Padded
from vitrail.data.loader import TrainLoader, batch_indices, eval_batches, train_batches
from vitrail.data.plan import BatchPlan, square_scales
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import (
    Preprocessing,
    decode,
    decode_size,
    prepare,
    preprocessed_size,
)

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
        (
            parts[0].step,
            *(
                torch.cat([getattr(p, name) for p in parts])
                for name in ("images", "targets", "indices")
            ),
        )
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
    first = list(loader.epoch(0))
    workers = [worker.pid for worker in loader._source.loader._iterator._workers]
    second, again = (list(loader.epoch(e)) for e in (1, 0))
    assert [worker.pid for worker in loader._source.loader._iterator._workers] == workers
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
    root = str(data.images.source.root)
    command = [sys.executable, "-c", "\n".join(lines), root]
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


def test_a_batch_is_contiguous_bytes_with_the_labels_of_its_pictures(data):
    for batch in train_batches(data, plan_of(data, drop_last=False), Augmentation(), epoch=0):
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous()
        assert batch.images.shape[1:] == (3, 24, 32)
        assert batch.targets.tolist() == data.truth.labels[batch.indices].tolist()


@pytest.fixture
def large(tmp_path):
    """Large enough to be decoded reduced, of two sizes, and unbalanced."""
    for name, count in (("owl", 1), ("cat", 2), ("dog", 4)):
        (tmp_path / "large" / name).mkdir(parents=True)
        for i in range(count):
            size = (240, 320) if i % 2 else (200, 181)
            picture(10 * count + i, size).save(tmp_path / "large" / name / f"{i}.jpg")
    return open_data(tmp_path / "large", "all")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_image_is_augmented_by_the_key_of_its_seed_epoch_and_position(large, rank):
    plan = BatchPlan(length=7, batch_size=4, size=(24, 32), seed=11, weights=[1.0] * 6 + [2.0])
    (batch,) = train_batches(large, plan, EVERYTHING, epoch=3, rank=rank, world=2)
    (whole,) = plan.batches(3)
    assert batch.step == 0
    assert batch.indices.tolist() == list(whole.indices[2 * rank : 2 * rank + 2])
    positions = whole.positions[2 * rank : 2 * rank + 2]
    assert positions == (2 * rank, 2 * rank + 1)
    for row, (i, position) in enumerate(zip(batch.indices.tolist(), positions, strict=True)):
        original = tuple(large.images.sizes[i].tolist())
        least = draw(*original, (24, 32), EVERYTHING, (11, 3, position)).view.needed()
        pixels = decode(large.images.read_bytes(i), at_least=least)
        expected = augment(pixels, (24, 32), EVERYTHING, (11, 3, position), original=original)
        assert torch.equal(batch.images[row], expected)
        name = large.keys[i].split("/")[0]
        assert large.classes[batch.targets[row]] == name


def test_evaluation_decodes_reduced_and_prepares_as_for_the_original(large):
    p = Preprocessing(size=(40, 48), mode="crop", crop_pct=0.9)
    (first, second) = eval_batches(large, p, 4)
    assert first.indices.tolist() == [0, 1, 2, 3]
    assert second.indices.tolist() == [4, 5, 6]
    assert large.classes == ("cat", "dog", "owl")
    assert first.targets + second.targets == (0, 0, 1, 1, 1, 1, 2)
    images = torch.cat([first.images, second.images])
    assert images.dtype == torch.float32
    reduced = 0
    for i, image in enumerate(images):
        pixels = decode(large.images.read_bytes(i), at_least=decode_size(p))
        expected, _ = prepare(pixels, p, original=tuple(large.images.sizes[i].tolist()))
        np.testing.assert_array_equal(image.numpy(), expected)
        reduced += pixels.shape[:2] != tuple(large.images.sizes[i].tolist())
    assert reduced > 0


def test_evaluation_goes_by_size_in_the_order_of_the_data(large):
    native = Preprocessing(mode="native")
    assert large.images.sizes[:, 0].tolist() == [200, 240, 200, 240, 200, 240, 200]
    assert batch_indices(large, native, 3) == [[0, 2, 4], [6], [1, 3, 5]]
    assert batch_indices(large, native, 3, 0, 2) == [[0, 4], [1, 5]]
    # Of 4 + 3, the second group is dealt on from where the first ended.
    dealt = [batch_indices(large, native, 3, rank, 3) for rank in range(3)]
    assert dealt == [[[0, 6], [5]], [[2], [1]], [[4], [3]]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank": 2, "world": 2}, r"rank must lie in 0\.\.1, but is 2"),
        ({"rank": -1, "world": 2}, r"rank must lie in 0\.\.1, but is -1"),
        ({"workers": -1}, "workers must not be negative, but is -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, but is 0"),
    ],
)
def test_a_share_that_cannot_be_is_refused(data, given, message):
    with pytest.raises(InputError, match=message):
        list(eval_batches(data, Preprocessing(), **{"batch_size": 4, **given}))
    if "batch_size" not in given:
        with pytest.raises(InputError, match=message):
            TrainLoader(data, plan_of(data), EVERYTHING, **given)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_that_does_not_fit_into_memory_is_one_message(data, workers):
    huge = (10**7, 2 * 10**7)  # 1,200 TB of bytes
    said = r"^not enough memory for a batch of 2 of 10000000 x 20000000 pixels \(.*--batch-size"
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
            assert batch.num_images == len(batch.targets) <= 5
            for row, i in enumerate(batch.indices.tolist()):
                assert i not in seen
                seen[i] = batch.images[row]
                assert batch.targets[row] == data.truth.labels[i]
    assert sorted(seen) == list(range(len(data)))
    for i, image in seen.items():
        expected, _ = prepare(decode(data.images.read_bytes(i)), p)
        np.testing.assert_array_equal(image.numpy(), expected)


def test_evaluation_never_mixes_sizes(class_folders):
    root = class_folders({"": {"cat": 4, "dog": 4}})
    picture(7, (40, 20)).save(root / "cat" / "tall.png")
    data = open_data(root, "all")
    batches = list(eval_batches(data, Preprocessing(mode="native"), 16))
    sizes = [b.images.shape[2:] for b in batches]
    assert len(set(sizes)) == len(sizes) == len(np.unique(data.images.sizes, axis=0))


def test_pictures_of_many_sizes_are_dealt_to_all_processes_evenly(data):
    native, world = Preprocessing(mode="native"), 2
    dealt = [batch_indices(data, native, 4, rank, world) for rank in range(world)]
    counts = [sum(map(len, batches)) for batches in dealt]
    assert max(counts) - min(counts) <= 1
    assert sorted(i for batches in dealt for b in batches for i in b) == list(range(len(data)))


class Failing:
    """A loader of torch's that gives one batch and fails as it would."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __iter__(self):
        yield "batch"
        raise self.error


KILLED = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")


@pytest.mark.parametrize("error", [KILLED, ConnectionResetError("reset"), EOFError()])
def test_however_a_worker_dies_it_is_one_message(error):
    jobs = loader_module._Jobs([], 0, False)
    jobs.loader = Failing(error)
    batches = jobs.run([])
    assert next(batches) == "batch"
    with pytest.raises(
        InputError, match=r"was killed from outside, .*--workers\), or smaller"
    ) as said:
        next(batches)
    assert said.value.__cause__ is error
    assert jobs.loader is None, "the traceback must not keep the workers"


@pytest.mark.parametrize("error", [RuntimeError("a bug"), ValueError("DataLoader worker (pid 7)")])
def test_an_error_of_ours_is_not_taken_for_a_killed_worker(error):
    jobs = loader_module._Jobs([], 0, False)
    jobs.loader = Failing(error)
    batches = jobs.run([])
    next(batches)
    with pytest.raises(type(error)) as raised:
        next(batches)
    assert raised.value is error


def test_an_error_given_as_a_batch_is_raised_and_lets_the_workers_go():
    error = InputError("a.jpg is broken")
    jobs = loader_module._Jobs(["one", error, "three"], 0, False)
    jobs.loader = [jobs.dataset[i] for i in range(3)]
    batches = jobs.run([])
    assert next(batches) == "one"
    with pytest.raises(InputError) as raised:
        next(batches)
    assert raised.value is error
    assert jobs.loader is None


@pytest.mark.parametrize("pin", [False, True])
def test_workers_and_pinned_memory_are_as_asked(data, pin, monkeypatch):
    """Pinned memory is for a GPU, so only that it is asked for is seen here."""
    given = {"workers": 2, "pin_memory": pin}
    loader = TrainLoader(data, plan_of(data), EVERYTHING, **given)._source.loader
    assert (loader.num_workers, loader.pin_memory, loader.persistent_workers) == (2, pin, True)
    assert loader.batch_size is None
    assert TrainLoader(data, plan_of(data), EVERYTHING)._source.loader is None
    asked = []

    class Jobs:
        def __init__(self, dataset, workers, pin_memory) -> None:
            asked.append((workers, pin_memory))

        def run(self, jobs):
            return jobs

    monkeypatch.setattr(loader_module, "_Jobs", Jobs)
    list(eval_batches(data, Preprocessing(), 4, **given))
    list(eval_batches(data, Preprocessing(), 4))
    assert asked == [(2, pin), (0, False)]
    TrainLoader(data, plan_of(data), EVERYTHING)
    train_batches(data, plan_of(data), EVERYTHING, epoch=0, workers=1)
    assert asked[2:] == [(0, False), (1, False)]


def test_a_worker_leaves_signals_to_the_run_until_the_run_has_ended(monkeypatch):
    handlers, masks, ended = {}, [], []
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(signal, "pthread_sigmask", lambda *a: masks.append(a))
    monkeypatch.setattr(os, "_exit", ended.append)
    alive = torch.ones(1, dtype=torch.uint8)
    loader_module._leave_signals_to_the_run(alive, 0)
    assert handlers.keys() == {signal.SIGINT, signal.SIGTERM}
    assert handlers[signal.SIGINT] == signal.SIG_IGN
    assert masks == [(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))]
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert ended == []
    alive.zero_()
    handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert ended == [128 + 15]


def test_one_byte_that_all_workers_share_says_that_the_run_is_alive(monkeypatch):
    at_exit = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    loader_module._signals_are_the_runs.cache_clear()
    flag = loader_module._signals_are_the_runs()
    assert flag.is_shared()
    assert flag.tolist() == [1]
    assert loader_module._signals_are_the_runs() is flag
    (end,) = at_exit
    end()
    assert flag.tolist() == [0]
    loader_module._signals_are_the_runs.cache_clear()


def test_signals_wait_while_workers_start_and_their_handlers_stay():
    def mask() -> set:
        return signal.pthread_sigmask(signal.SIG_BLOCK, ())

    def on_death(*_) -> None: ...

    before, kept = mask(), signal.signal(signal.SIGCHLD, on_death)
    try:
        with loader_module._workers_start():
            assert {signal.SIGINT, signal.SIGTERM} <= mask()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # as torch's loader puts its own there
        assert mask() == before
        assert signal.getsignal(signal.SIGCHLD) is on_death
        with pytest.raises(ZeroDivisionError), loader_module._workers_start():
            1 / 0  # noqa: B018
        assert mask() == before
    finally:
        signal.signal(signal.SIGCHLD, kept)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_at_their_own_sizes_come_padded_and_one_size_dense(class_folders, workers):
    """Each is as `augment` makes it at the size that the preprocessing gives it, with zeros beside it."""
    data = open_data(class_folders({"": {"a": 3, "b": 3}}), "all")
    edges = Preprocessing(mode="edges", size=(24, 40))
    whole = Augmentation(crop="whole", flip=0.5)
    plan = BatchPlan(length=6, batch_size=3, size=(24, 24), seed=2)
    batches = list(train_batches(data, plan, whole, epoch=1, workers=workers, own_sizes=edges))
    planned = list(plan.batches(1))
    assert [batch.step for batch in batches] == [0, 1]
    for batch, of in zip(batches, planned, strict=True):
        assert batch.indices.tolist() == list(of.indices)
        assert batch.targets.tolist() == data.truth.labels[list(of.indices)].tolist()
        sizes = [preprocessed_size(*data.images.sizes[i].tolist(), edges) for i in of.indices]
        assert isinstance(batch, Padded if len(set(sizes)) > 1 else Dense)
        assert batch.images.shape[2:] == tuple(max(s[axis] for s in sizes) for axis in (0, 1))
        for row, i, at, (h, w) in zip(batch.images, of.indices, of.positions, sizes, strict=True):
            alone = augment(data.images.read(i), (h, w), whole, (2, 1, at))
            assert torch.equal(row[:, :h, :w], alone)
            assert not row[:, h:].any()
            assert not row[:, :, w:].any()


def test_jittered_images_come_padded_with_their_boxes(tmp_path):
    data = open_data(coco_set(tmp_path), "all")
    edges = Preprocessing(mode="edges", size=(24, 40))
    how = Augmentation(crop="whole", scale_jitter=(0.5, 1.5), random_erasing=1.0)
    plan = BatchPlan(length=3, batch_size=3, size=(24, 40), seed=2)
    (batch,) = train_batches(data, plan, how, epoch=1, own_sizes=edges)
    (of,) = plan.batches(1)
    assert isinstance(batch, Padded)
    assert isinstance(batch.targets, tuple)
    for row, size, target, i, at in zip(
        batch.images, batch.sizes, batch.targets, of.indices, of.positions, strict=True
    ):
        own = preprocessed_size(*data.images.sizes[i].tolist(), edges)
        view = draw(*data.images.sizes[i].tolist(), own, how, (2, 1, at)).view
        assert size == view.size
        assert torch.equal(
            row[:, : size[0], : size[1]], augment(data.images.read(i), own, how, (2, 1, at))
        )
        expected = data.truth.target(i, view)
        assert target["boxes"].tolist() == expected["boxes"].tolist()
        assert target["labels"].tolist() == expected["labels"].tolist()
    assert len(set(batch.sizes)) > 1


def test_jitter_where_all_images_have_one_size_is_refused(data):
    how = Augmentation(crop="whole", scale_jitter=(0.5, 1.5))
    with pytest.raises(InputError, match="scale_jitter is for images at their own sizes"):
        train_batches(data, plan_of(data), how, epoch=0)


def test_evaluation_gives_the_objects_as_they_stand(tmp_path):
    data = open_data(coco_set(tmp_path), "all")
    edges = Preprocessing(mode="edges", size=(24, 40))
    batches = list(eval_batches(data, edges, 2))
    told = {i: t for b in batches for i, t in zip(b.indices.tolist(), b.targets, strict=True)}
    assert [len(told[i]) for i in range(3)] == [3, 0, 1]
    assert told[0].boxes.tolist() == [[2, 3, 12, 11], [20.5, 1, 24.5, 7], [1, 10, 21, 19]]
