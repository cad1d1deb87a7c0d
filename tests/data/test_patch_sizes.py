"""Plans that draw the size of patches: the same everywhere, with the tokens known before any decoding."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.test_packed import drawn_sizes, everything, exact_best_fit
from vitrail.data import open_data
from vitrail.data.augmentation import Augmentation
from vitrail.data.batch import Dense
from vitrail.data.best_fit import best_fit_of_kinds, filled_steps
from vitrail.data.loader import train_batches
from vitrail.data.pack_plan import PackPlan
from vitrail.data.packing import Packing
from vitrail.data.plan import BatchPlan
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing, limited_sizes, num_patches

PATCHES = (4, 8, 16)


def plan(count: int, *, epochs: int = 2, seed: int = 0, patch_sizes=PATCHES, **packing) -> PackPlan:
    sizes = drawn_sizes(count)
    return PackPlan(
        samples=BatchPlan(length=count, batch_size=1, size=(1, 1), seed=seed),
        sizes=sizes,
        packing=Packing(**{"max_tokens": 60, **packing}),
        patch_size=8,
        num_prefix_tokens=1,
        epochs=epochs,
        patch_sizes=patch_sizes,
    )


@settings(max_examples=12)
@given(
    count=st.integers(4, 60),
    epochs=st.integers(1, 3),
    budget=st.integers(3, 90),
    packs=st.sampled_from([1, 2, 4]),
    window=st.integers(1, 70),
    drop=st.sampled_from([0.0, 0.4]),
    resolution=st.sampled_from(["own", "uniform"]),
    seed=st.integers(0, 5),
)
@example(  # a last step that is filled up
    count=26, epochs=1, budget=30, packs=4, window=20, drop=0.0, resolution="own", seed=1
)
@example(  # epochs in one stream
    count=60, epochs=3, budget=30, packs=1, window=20, drop=0.0, resolution="own", seed=0
)
def test_every_image_comes_once_an_epoch_at_the_size_of_its_steps_patches(
    count, epochs, budget, packs, window, drop, resolution, seed
):
    fields = {"max_tokens": budget, "packs": packs, "window": window, "drop": drop}
    fields |= {"resolution": resolution, "sides": (8, 40)}
    p = plan(count, epochs=epochs, seed=seed, **fields)
    seen = Counter()
    try:
        everything(p)
    except InputError:  # `filled_steps`: too few for one image a pack
        assume(packs == 1)
        raise
    for epoch in range(epochs):
        batches = list(p.batches(epoch))
        assert [b.step for b in batches] == list(range(p.steps(epoch)))
        for batch in batches:
            assert batch.patch_size in PATCHES
            assert len(batch.packs) == packs
            for members in batch.packs:
                needs = [image.kept + 1 for image in members]
                assert 0 < sum(needs) <= budget
                assert needs == sorted(needs, reverse=True)
                for image in members:
                    whole = num_patches(np.array([image.size]), batch.patch_size)[0]
                    assert 1 <= image.kept <= whole <= budget - 1
                    if not drop:
                        assert image.kept == whole
                    if resolution == "own":
                        own = p.sizes[[image.index]]
                        want = limited_sizes(own, budget - 1, batch.patch_size)[0]
                        assert image.size == tuple(want.tolist())
                    seen[image.epoch, image.index] += 1
    assert seen == {(epoch, i): 1 for epoch in range(epochs) for i in range(count)}


@given(count=st.integers(4, 60), start=st.integers(0, 50), seed=st.integers(0, 3))
def test_a_plan_read_from_any_step_draws_the_same_sizes(count, start, seed):
    p, again = (plan(count, epochs=3, seed=seed, packs=2) for _ in range(2))
    for epoch in (2, 0, 1):
        steps = list(p.batches(epoch))
        start = min(start, len(steps))
        assert list(again.batches(epoch, start)) == steps[start:]
        for batch in steps:  # every process computes as much
            parts = [batch.part(rank, 2) for rank in range(2)]
            assert {part.patch_size for part in parts} == {batch.patch_size}
            assert tuple(k for part in parts for k in part.packs) == batch.packs


def test_a_run_that_goes_on_in_the_middle_of_an_epoch_has_the_sizes_of_its_steps():
    p = BatchPlan(length=60, batch_size=3, size=(32, 32), patch_sizes=PATCHES)
    whole = list(p.batches(1))
    for start in (0, 1, 7, 20):
        assert list(p.batches(1, start)) == whole[start:]
    part = whole[3].part(1, 3)
    assert (part.patch_size, part.step) == (whole[3].patch_size, 3)
    assert part.indices == whole[3].indices[1:2]


def test_sizes_are_drawn_equally_often_anew_in_every_epoch_and_by_the_seed():
    for make in (
        lambda seed: plan(600, epochs=2, seed=seed, max_tokens=30),
        lambda seed: BatchPlan(
            length=1800, batch_size=4, size=(32, 32), seed=seed, patch_sizes=PATCHES
        ),
    ):
        drawn = [[b.patch_size for b in make(0).batches(epoch)] for epoch in (0, 1)]
        assert drawn[0] != drawn[1][: len(drawn[0])]
        other = [b.patch_size for b in make(1).batches(0)]
        assert other[:50] != drawn[0][:50]
        counts = Counter(drawn[0])
        assert counts.keys() == set(PATCHES)
        assert min(counts.values()) > 0.6 * max(counts.values())


def test_one_size_is_the_plan_without_a_choice():
    alone, chosen = plan(40, patch_sizes=()), plan(40, patch_sizes=(8,))
    assert everything(alone) == everything(chosen)
    assert {b.patch_size for b in alone.batches(0)} == {8}


def test_what_is_said_is_of_the_smallest_and_the_largest_patches():
    p = plan(30, max_tokens=31)
    long = num_patches(p.sizes, 4) > 30
    said = " ".join(p.notes)
    assert f"{long.sum()} of 30 images have more than 30 patches of 4 pixels" in said
    small = (p.sizes < 16).any(1).sum()
    assert f"{small} of 30 images have a side of less than a patch of 16 pixels" in said
    with pytest.raises(InputError, match="patches of 4 pixels"):
        plan(30, max_tokens=31, too_long="error")


@given(
    rows=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 6)), min_size=1, max_size=30),
    extra=st.integers(0, 20),
    window=st.integers(1, 12),
    seed=st.integers(0, 9),
)
def test_best_fit_of_kinds_is_the_same_rule(rows, extra, window, seed):
    needs = np.array(rows).T
    budget = int(needs.max()) + extra
    kinds = np.random.default_rng(seed).integers(0, 2, len(rows)).tolist()
    packs = best_fit_of_kinds(needs, kinds, budget, window)
    assert sorted(i for pack in packs for i in pack) == list(range(len(rows)))
    waiting, rest = [], list(range(len(rows)))
    for pack, kind in zip(packs, kinds, strict=False):  # word by word
        room, got = budget, []
        while True:
            while rest and len(waiting) < window:
                waiting.append(rest.pop(0))
            fits = [i for i in waiting if needs[kind][i] <= room]
            if not fits:
                break
            i = min(waiting) if not got else max(fits, key=lambda i: (needs[kind][i], -i))
            waiting.remove(i)
            got.append(i)
            room -= needs[kind][i]
        assert pack == got
    same = best_fit_of_kinds(needs[:1], [0] * len(rows), budget, window)
    assert same == exact_best_fit(needs[0].tolist(), budget, window)


def test_what_the_last_step_lacks_are_packs_of_one_image():
    assert filled_steps([[0, 1, 2], [3, 4], [5]], 2) == [[0, 1], [3, 4], [5], [2]]
    assert filled_steps([[0], [1]], 2) == [[0], [1]]
    with pytest.raises(InputError, match="3 images cannot fill 4 packs"):
        filled_steps([[0, 1], [2]], 4)


def test_batches_carry_their_size_whatever_the_number_of_workers(tmp_path):
    for i in range(8):
        folder = tmp_path / "train" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    data = open_data(tmp_path, "train", val_fraction=0.0)
    dense = BatchPlan(length=8, batch_size=2, size=(16, 24), patch_sizes=PATCHES)
    packed = PackPlan(
        samples=BatchPlan(length=8, batch_size=1, size=(1, 1)),
        sizes=data.images.sizes,
        packing=Packing(max_tokens=30, packs=1),
        patch_size=8,
        num_prefix_tokens=1,
        epochs=2,
        patch_sizes=PATCHES,
    )
    shown = Augmentation(crop="whole")
    for p in (dense, packed):
        found = list(train_batches(data, p, shown, epoch=1))
        assert len({batch.patch_size for batch in found}) > 1
        for batch, planned in zip(found, p.batches(1), strict=True):
            assert batch.patch_size == planned.patch_size
            if isinstance(batch, Dense):
                assert batch.padding == batch.layout == {"patch_size": planned.patch_size}
                assert [part.patch_size for part in batch.split(2)] == [planned.patch_size] * 2
                assert batch.to(torch.device("cpu"), Preprocessing()).padding == batch.padding
            else:
                assert batch.images.shape[1] == 3 * planned.patch_size**2
                assert batch.layout["packing"]["patch_size"] == planned.patch_size
                assert sum(batch.lengths) == len(batch.images)
    plain = BatchPlan(length=8, batch_size=2, size=(16, 24))
    assert next(train_batches(data, plain, shown, epoch=0)).padding == {}
