"""Plans of packs as laws, and packs as batches: nothing is lost, no budget broken, no order depended on."""

import itertools
import json
import math
import re
import tracemalloc
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity import randomise
from vitrail.backbones.vit import ViT, ViTConfig, ViTHead
from vitrail.classifiers import Classifier
from vitrail.data import open_data, pack_plan
from vitrail.data.augment import DROPPING, Augmentation, draw, generator, render
from vitrail.data.best_fit import best_fit, whole_steps
from vitrail.data.loader import TrainLoader, train_batches
from vitrail.data.pack_plan import PackPlan, dropped_shares, resampled
from vitrail.data.packed import Packed
from vitrail.data.packing import Packing
from vitrail.data.plan import BatchPlan
from vitrail.packing import as_packed, pack, unpack
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import (
    Preprocessing,
    limited_sizes,
    normalise,
    num_patches,
    preprocessed_size,
)

PATCH = 8


def plan(sizes, *, epochs=2, prefix=1, seed=0, **packing) -> PackPlan:
    sizes = np.asarray(sizes)
    return PackPlan(
        samples=BatchPlan(length=len(sizes), batch_size=1, size=(1, 1), seed=seed),
        sizes=sizes,
        packing=Packing(**{"max_tokens": 40, **packing}),
        patch_size=PATCH,
        num_prefix_tokens=prefix,
        epochs=epochs,
    )


def drawn_sizes(count: int, low: int = 1, high: int = 50) -> np.ndarray:
    return np.random.default_rng(count).integers(low, high, (count, 2))


def everything(p: PackPlan):
    return [image for e in range(p.epochs) for b in p.batches(e) for k in b.packs for image in k]


@settings(max_examples=25)
@given(
    count=st.integers(1, 60),
    epochs=st.integers(1, 3),
    budget=st.integers(3, 90),
    prefix=st.integers(0, 2),
    packs=st.sampled_from([1, 2, 4]),
    window=st.integers(1, 70),
    drop=st.sampled_from([0.0, 0.4]),
    resolution=st.sampled_from(["own", "uniform", "normal"]),
    seed=st.integers(0, 5),
)
def test_every_image_comes_once_for_each_epoch_in_packs_that_keep_the_budget(
    count, epochs, budget, prefix, packs, window, drop, resolution, seed
):
    fields = {"max_tokens": budget, "packs": packs, "window": window, "drop": drop}
    fields |= {"resolution": resolution, "sides": (8, 40)}
    p = plan(drawn_sizes(count), epochs=epochs, prefix=prefix, seed=seed, **fields)
    try:
        seen = everything(p)
    except InputError as error:  # only where the last update has too few for one image a pack
        images, wanted = map(
            int, re.findall(r"(\d+) images cannot fill (\d+) packs", str(error))[0]
        )
        assert images % count == wanted % packs == 0
        assert images < wanted < images + packs
        return
    assert count * epochs >= packs
    for epoch in range(epochs):
        own = [image for image in seen if image.epoch == epoch]
        assert sorted(image.index for image in own) == list(range(count))
        assert sorted(image.position for image in own) == list(range(count))
        order = p.samples.order(epoch)
        assert all(order[image.position] == image.index for image in own)
        batches = list(p.batches(epoch))
        assert [b.step for b in batches] == list(range(p.steps(epoch)))
        for batch in batches:
            assert len(batch.packs) == packs
            for members in batch.packs:
                needs = [image.kept + prefix for image in members]
                assert 0 < sum(needs) <= budget
                assert needs == sorted(needs, reverse=True)
    for image in seen:
        whole = num_patches(np.array([image.size]), PATCH)[0]
        assert 1 <= image.kept <= whole
        if not drop:
            assert image.kept == whole


@given(count=st.integers(1, 60), start=st.integers(0, 50), seed=st.integers(0, 3))
def test_a_plan_read_from_any_step_is_the_same_plan(count, start, seed):
    p = plan(drawn_sizes(count), epochs=3, seed=seed, drop=0.2)
    again = plan(drawn_sizes(count), epochs=3, seed=seed, drop=0.2)
    for epoch in (2, 0, 1):  # in any order
        steps = list(p.batches(epoch))
        start = min(start, len(steps))
        assert list(again.batches(epoch, start)) == steps[start:]
    other = plan(drawn_sizes(count), epochs=3, seed=seed + 1, drop=0.2)
    if count > 5:
        assert everything(other) != everything(p)


def test_shares_of_processes_are_whole_packs_as_many_each():
    p = plan(drawn_sizes(60), packs=4)
    for batch in p.batches(1):
        for world in (1, 2, 4):
            parts = [batch.part(rank, world) for rank in range(world)]
            assert {len(part.packs) for part in parts} == {4 // world}
            assert {part.step for part in parts} == {batch.step}
            assert tuple(k for part in parts for k in part.packs) == batch.packs
    with pytest.raises(InputError, match=r"3 processes cannot share 4 packs.*--packing.packs"):
        batch.part(0, 3)


def exact_best_fit(needs: list[int], budget: int, window: int) -> list[list[int]]:
    """The rule of the docstring, word by word."""
    waiting, rest, packs = [], list(range(len(needs))), []
    while waiting or rest:
        pack, room = [], budget
        while True:
            while rest and len(waiting) < window:
                waiting.append(rest.pop(0))
            fits = [i for i in waiting if needs[i] <= room]
            if not fits:
                break
            i = min(waiting) if not pack else max(fits, key=lambda i: (needs[i], -i))
            waiting.remove(i)
            pack.append(i)
            room -= needs[i]
        packs.append(pack)
    return packs


@given(
    needs=st.lists(st.integers(1, 12), min_size=1, max_size=40),
    extra=st.integers(0, 20),
    window=st.integers(1, 12),
)
def test_best_fit_is_its_rule(needs, extra, window):
    budget = max(needs) + extra
    assert best_fit(needs, budget, window) == exact_best_fit(needs, budget, window)


def test_no_image_waits_longer_than_the_window():
    """Small ones pass large ones by, but the one that waited longest begins the next pack."""
    needs = [10 if i % 3 else 1 for i in range(300)]
    packs = best_fit(needs, 10, window=9)
    begun = [pack[0] for pack in packs]
    assert begun == sorted(begun)


@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=8), multiple=st.sampled_from([1, 2, 4])
)
def test_packs_are_split_until_they_fill_whole_steps(lengths, multiple):
    ends = np.cumsum([0, *lengths])
    packs = [list(range(a, b)) for a, b in itertools.pairwise(ends)]
    wanted = -(-len(packs) // multiple) * multiple
    if sum(lengths) < wanted:
        with pytest.raises(InputError, match="cannot fill"):
            whole_steps(packs, multiple)
        return
    got = whole_steps(packs, multiple)
    assert len(got) == wanted
    assert all(got)
    assert sorted(i for k in got for i in k) == list(range(sum(lengths)))
    if len(packs) % multiple == 0:
        assert got == packs


def test_small_epochs_are_one_stream_and_waste_little_where_each_alone_could_not():
    """Five images fill a pack; of 41 one is left, for which an epoch by itself would need a ninth."""
    p = plan([(8, 56)] * 41, epochs=20, max_tokens=40)
    assert sum(p.steps(e) for e in range(20)) == 41 * 20 // 5
    assert {p.steps(e) for e in range(20)} == {8, 9}
    assert all(p.padding(e) == 0 for e in range(20))
    assert p.batch_size == 5
    alone = plan([(8, 56)] * 39, epochs=20, max_tokens=40)  # fewer than eight packs: no streams
    assert {alone.steps(e) for e in range(20)} == {8}
    assert all(image.epoch == 1 for b in alone.batches(1) for k in b.packs for image in k)


def test_steps_to_come_are_counted_where_all_epochs_are_cheap_to_plan():
    """Two hundred images in 1 to 6 steps an epoch, by the sizes of patches that are drawn: each by itself
    says nothing of the others."""

    def fresh() -> PackPlan:
        p = plan(drawn_sizes(200, 100, 400), epochs=12, max_tokens=4096, packs=4)
        return replace(p, patch_size=16, patch_sizes=(8, 16, 32))

    p = fresh()
    steps = [p.steps(e) for e in range(12)]
    assert p._cycle == 1
    assert min(steps) < 0.5 * max(steps)
    assert not p.estimates
    for first in range(13):
        assert p.steps_between(first, 12) == sum(steps[first:]), "whatever was planned before"
        assert fresh().steps_between(first, 12) == sum(steps[first:])


def test_steps_to_come_of_a_large_plan_are_estimated_from_what_its_start_plans(monkeypatch):
    monkeypatch.setattr(pack_plan, "CYCLE", 150)

    def fresh(epochs: int = 10) -> PackPlan:  # streams of three epochs, the last of what is left
        return plan(drawn_sizes(60), epochs=epochs, drop=0.2)

    steps = [fresh().steps(e) for e in range(10)]
    assert len(set(steps)) > 1
    for cheap, ahead in ((0, 3), (180, 3), (239, 3), (240, 6), (420, 9), (599, 9), (600, 10)):
        monkeypatch.setattr(pack_plan, "AHEAD", cheap)
        assert fresh().estimates == (ahead < 10)
        for first in range(11):
            known = min(10, max(ahead, first // 3 * 3 + 3))
            wanted = sum(steps[first:known])
            wanted += math.ceil((10 - known) * sum(steps[:ahead]) / ahead)
            assert fresh().steps_between(first, 10) == wanted
            assert fresh().steps_between(first, known) == sum(steps[first:known])
    monkeypatch.setattr(pack_plan, "AHEAD", 599)
    assert not fresh(9).estimates
    monkeypatch.setattr(pack_plan, "AHEAD", 10 * 60 * 2 - 1)
    assert replace(fresh(), patch_sizes=(8, 16)).estimates
    monkeypatch.setattr(pack_plan, "AHEAD", 10 * 60 * 2)
    assert not replace(fresh(), patch_sizes=(8, 16)).estimates


@pytest.mark.parametrize("cheap", [0, pack_plan.AHEAD])
@pytest.mark.parametrize(
    ("seed", "epoch"), [(25, 23), (34, 10), (81, 15), (92, 29), (156, 1), (182, 14)]
)
def test_an_epoch_to_come_that_cannot_fill_its_last_step_is_found_at_the_start(
    seed, epoch, cheap, monkeypatch
):
    """Nine images, four packs an update: eight packs do, and an epoch of nine needs a twelfth. The first one
    does not say so."""
    monkeypatch.setattr(pack_plan, "AHEAD", cheap)
    fields = {"prefix": 0, "seed": seed, "resolution": "uniform", "sides": (8, 52), "packs": 4}
    p = plan([(40, 40)] * 9, epochs=30, **fields)
    assert p.estimates == (not cheap)
    assert all(p.steps(before) in (1, 2) for before in range(epoch))
    assert p.steps(0) == 1
    with pytest.raises(InputError, match="9 images cannot fill 12 packs, 4 an update"):
        plan([(40, 40)] * 9, epochs=30, **fields).check()
    plan([(40, 40)] * 9, epochs=epoch, **fields).check()


def mixed(small: int, large: int, side=(8, 8), **fields) -> PackPlan:
    return plan([side] * small + [(56, 56)] * large, **fields)


@pytest.mark.parametrize(
    ("p", "fills"),
    [  # more than 2 * 4 packs + 101 images / window of 10
        (mixed(19, 82, packs=4, window=10), True),
        (mixed(18, 83, packs=4, window=10), False),
        (mixed(18, 83, packs=3, window=10), True),
        (mixed(18, 83, packs=4, window=11), True),
        (mixed(18, 82, packs=4, window=10), True),  # a multiple of the packs
        (mixed(19, 82, (8, 152), packs=4, window=10), True),  # 20 tokens of 40
        (mixed(19, 82, (8, 160), packs=4, window=10), False),
        (mixed(0, 101, packs=4, window=10, tokens_per_image=19), True),
        (mixed(0, 101, packs=4, window=10, tokens_per_image=20), False),
        (mixed(0, 101, packs=4, window=10, resolution="uniform", sides=(8, 32)), True),
        (mixed(0, 101, packs=4, window=10, resolution="uniform", sides=(8, 33)), False),
        (mixed(0, 101, packs=4, window=10, drop=0.9, drop_std=0), False),  # it counts with all
        (replace(mixed(19, 82, packs=4, window=10), patch_sizes=(1, 8)), False),
        (mixed(6, 3, packs=2, window=10), False),  # of a window that is half an epoch
        (mixed(7, 2, packs=2, window=10), True),
    ],
)
def test_whether_images_always_fill_the_last_step_is_told_by_small_ones(p, fills):
    assert p._always_fills == fills


def test_which_images_come_is_not_known_where_weights_draw_them():
    p = mixed(100, 1, packs=4)
    drawn = replace(p, samples=replace(p.samples, weights=[0.0] * 100 + [1.0]))
    assert p._always_fills
    assert not drawn._always_fills
    assert replace(drawn, packing=replace(p.packing, max_tokens=400))._always_fills


@settings(max_examples=100)
@given(
    count=st.integers(1, 60),
    low=st.integers(1, 50),
    packs=st.integers(2, 6),
    window=st.integers(1, 30),
    kinds=st.sampled_from([(), (8, 16)]),
    resolution=st.sampled_from(["own", "uniform"]),
    seed=st.integers(0, 100),
)
def test_images_that_always_fill_the_last_step_do_in_every_epoch(
    count, low, packs, window, kinds, resolution, seed
):
    sizes = np.random.default_rng(seed).integers(low, 57, (count, 2))
    fields = {"packs": packs, "window": window, "resolution": resolution, "sides": (low, 56)}
    p = replace(plan(sizes, epochs=4, prefix=0, seed=seed, **fields), patch_sizes=kinds)
    if p._always_fills:
        assert all(p.steps(epoch) for epoch in range(4))


def test_a_large_plan_whose_steps_are_always_filled_is_not_planned_to_check_it(monkeypatch):
    monkeypatch.setattr(pack_plan, "CYCLE", 8)
    monkeypatch.setattr(pack_plan, "AHEAD", 2001)
    p = plan(drawn_sizes(2001, 20, 50), epochs=3, packs=4)
    p.check()
    assert not p._known_ends
    per_pack = 2001 / (4 * p.steps(0))
    assert per_pack < 1.5, "though packs have few images"
    p.steps_between(0, 3)
    assert p._known_ends.keys() == {0}
    replace(p, sizes=np.full((2001, 2), 24)).check()
    with pytest.raises(InputError, match="2001 images cannot fill 2004 packs"):
        replace(p, sizes=np.full((2001, 2), 48)).check()


def test_padding_is_the_share_of_the_budget_without_tokens():
    p = plan([(8, 16)] * 7, epochs=1, max_tokens=10, prefix=1)
    assert p.steps(0) == 3  # three, three and one of three tokens
    assert p.padding(0) == pytest.approx(1 - 21 / 30)


@pytest.mark.parametrize("side_of", ["area", "long"])
def test_drawn_sides_keep_the_ratio(side_of):
    sizes = np.array([[300, 400], [50, 100], [77, 77], [1, 600]])
    packing = Packing(resolution="uniform", sides=(100, 300), side_of=side_of)
    got = resampled(sizes, packing, np.array([0.0, 0.5, 1.0, 0.25]))
    sides = [100, 200, 300, 150]
    for (h, w), (old_h, old_w), side in zip(got, sizes, sides, strict=True):
        own = (old_h * old_w) ** 0.5 if side_of == "area" else max(old_h, old_w)
        assert abs(h - max(1, old_h * side / own)) <= 0.5
        assert abs(w - old_w * side / own) <= 0.5


def test_the_normal_of_sides_is_the_papers_and_prefers_low_ones():
    """N(-0.5, 1) cut at -1 and 1, brought to low and high: against scipy's truncated normal."""
    uniform = (np.arange(2000) + 0.5) / 2000
    packing = Packing(resolution="normal", sides=(1000, 3000), side_of="long")
    sides = resampled(np.full((2000, 2), 500), packing, uniform)[:, 0]
    truth = scipy.stats.truncnorm(-0.5, 1.5, loc=-0.5).ppf(uniform)
    assert np.abs(sides - (2000 + 1000 * truth)).max() <= 0.5
    assert sides.mean() < 2000


def test_shares_that_are_dropped_have_the_distribution_that_is_asked_for():
    uniform = (np.arange(4000) + 0.5) / 4000
    patches = np.full(4000, 64)
    shares = dropped_shares(patches, Packing(drop=0.3, drop_std=0.2), uniform)
    assert shares.mean() == pytest.approx(0.3, abs=1e-3)
    assert shares.std() == pytest.approx(0.2, abs=2e-3)
    spread = 0.3 * 0.7 / 0.2**2 - 1
    truth = scipy.stats.beta(0.3 * spread, 0.7 * spread).ppf(uniform)
    np.testing.assert_allclose(shares, truth, atol=1e-9)
    assert (dropped_shares(patches, Packing(drop=0.3, drop_std=0), uniform) == 0.3).all()


def test_more_is_dropped_of_larger_images_where_that_is_asked_for():
    patches = np.array([10, 20, 30])
    packing = Packing(drop=0.1, drop_largest=0.5, drop_std=0)
    shares = dropped_shares(patches, packing, np.full(3, 0.5))
    np.testing.assert_allclose(shares, [0.1, 0.3, 0.5])
    packing = Packing(drop=0.0, drop_largest=0.5, drop_std=0.1)
    assert dropped_shares(patches, packing, np.full(3, 0.9))[0] == 0
    p = plan([(8, 80)] * 50, drop=0.3, drop_std=0, max_tokens=60)
    assert {image.kept for image in everything(p)} == {7}  # floor of 10 * 0.7


def test_sizes_and_shares_are_drawn_anew_in_every_epoch():
    p = plan([(64, 32)] * 30, epochs=2, drop=0.3, resolution="uniform", sides=(16, 48))
    first, second = ({i.index: i for i in everything(p) if i.epoch == e} for e in (0, 1))
    assert {i.size for i in first.values()} != {first[0].size}
    assert [first[i].size for i in range(30)] != [second[i].size for i in range(30)]
    same = [i.kept / num_patches(np.array([i.size]), PATCH)[0] for i in first.values()]
    assert len(set(same)) > 5


@given(
    sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(1, 400)), min_size=1, max_size=5),
    most=st.integers(1, 300),
    patch=st.integers(1, 20),
)
def test_limited_sizes_hold_the_limit_nearly_and_keep_the_ratio(sizes, most, patch):
    sizes = np.array(sizes)
    got = limited_sizes(sizes, most, patch)
    fits = num_patches(sizes, patch) <= most
    assert np.array_equal(got[fits], sizes[fits])
    assert (num_patches(got, patch) <= most).all()
    for (h, w), (old_h, old_w) in zip(got[~fits], sizes[~fits], strict=True):
        assert h < old_h or w < old_w
        # Told from the longer side, up to a pixel of it.
        longer = max(old_h, old_w)
        factor = (h if old_h == longer else w) / longer
        assert abs(h - max(1, factor * old_h)) <= 1.01
        assert abs(w - max(1, factor * old_w)) <= 1.01
        # The next larger size of this ratio does not fit.
        more = factor + 1.5 / longer
        larger = np.array([[max(1, int(old_h * more)), max(1, int(old_w * more))]])
        assert num_patches(larger, patch)[0] > most or more >= 1
    p = Preprocessing(mode="native", patches=(most, patch))
    assert [preprocessed_size(*size, p) for size in sizes.tolist()] == [
        tuple(s) for s in got.tolist()
    ]


def test_a_strip_becomes_one_row_of_patches():
    assert limited_sizes(np.array([[1, 5000], [5000, 3]]), 256, 16).tolist() == [
        [1, 4096],
        [4096, 2],
    ]
    p = plan([(1, 5000), (8, 8)], epochs=1)
    assert {i.size for i in everything(p)} == {(1, 39 * PATCH), (8, 8)}


def test_what_becomes_of_images_too_large_or_too_small_is_told():
    sizes = [(100, 90), (16, 16), (1, 700), (5, 60)]
    p = plan(sizes)
    assert p.notes == (
        "2 of 4 images have more than 39 patches of 8 pixels, such as image 0 (100 x 90): shown smaller, "
        "their ratio kept",
        "2 of 4 images have a side of less than a patch of 8 pixels, such as image 2 (1 x 700): zeros fill "
        "it up",
    )
    assert plan([(16, 16)]).notes == ()
    assert "more than" not in "".join(plan(sizes, resolution="uniform", sides=(8, 16)).notes)
    assert plan(sizes, tokens_per_image=4).limit == 4
    assert plan(sizes, tokens_per_image=400).limit == 39
    with pytest.raises(
        InputError, match=r"2 of 4 images have more than 39 .*--packing.too-long resize"
    ):
        plan(sizes, too_long="error")
    with pytest.raises(InputError, match=r"adds 3 tokens.*--packing.max-tokens"):
        plan(sizes, max_tokens=3, prefix=3)
    with pytest.raises(InputError, match="sizes of 4 images"):
        replace(plan(sizes), sizes=np.ones((3, 2)))
    with pytest.raises(InputError, match="epochs 0 to 1, but got 2"):
        plan(sizes).steps(2)
    with pytest.raises(InputError, match="cannot start at 99"):
        list(plan(sizes).batches(0, 99))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"drop": 1.0}, "below 1"),
        ({"drop": 0.1, "drop_std": 0.31}, r"below 0.300 for a mean share of 0.1"),
        ({"drop_largest": 0.1, "drop_std": 0.31}, r"below 0.300 for a mean share of 0.1"),
        ({"sides": (9, 8)}, "low <= high"),
        ({"resolution": "own_size"}, "must be one of"),
    ],
)
def test_packings_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Packing(**fields)


@pytest.fixture
def data(class_folders):
    return open_data(class_folders({"train": {"cat": 12, "dog": 9}, "val": {"cat": 1}}), "train")


WHOLE = Augmentation(crop="whole", color_jitter=0.3)


def plan_of(data, **fields) -> PackPlan:
    return replace(plan(data.images.sizes, packs=4, **fields), where=data.images.where)


def shares(data, p: PackPlan, world: int = 1, workers: int = 0, start: int = 0):
    """One epoch's batches, put together again from the shares of `world` processes."""
    loaders = [
        train_batches(data, p, WHOLE, epoch=1, start=start, rank=r, world=world, workers=workers)
        for r in range(world)
    ]
    out = []
    for parts in zip(*loaders, strict=True):
        tensors = [
            torch.cat([getattr(part, name) for part in parts])
            for name in ("images", "targets", "indices")
        ]
        plain = [sum((tuple(getattr(q, f)) for q in parts), ()) for f in ("sizes", "packs", "kept")]
        out.append((parts[0].step, tensors, plain))
    return out


def assert_same(got, want):
    assert [b[0] for b in got] == [b[0] for b in want]
    for (_, tensors, plain), (_, others, theirs) in zip(got, want, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tensors, others, strict=True))
        assert plain == theirs


@pytest.mark.parametrize(("world", "workers"), [(1, 2), (2, 0), (4, 2)])
def test_processes_and_workers_give_the_same_packs_bit_for_bit(data, world, workers):
    p = plan_of(data, drop=0.3)
    assert_same(shares(data, p, world, workers), shares(data, p))


def test_packs_go_on_in_the_middle_of_an_epoch(data):
    p = plan_of(data, drop=0.3)
    whole = shares(data, p)
    assert_same(shares(data, plan_of(data, drop=0.3), start=1), whole[1:])
    seen = Counter(i for _, tensors, _ in whole for i in tensors[2].tolist())
    assert seen == Counter(range(21))


def test_a_pack_holds_the_images_and_labels_that_were_planned(data):
    """Patches are those of the image, resized and normalised as evaluation does; padding is zero after it."""
    p = plan_of(data, tokens_per_image=9)
    plain = Augmentation(crop="whole", flip=0.0)
    pre = Preprocessing(
        mode="native", patches=(9, PATCH), mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7)
    )
    for batch, planned in zip(train_batches(data, p, plain, epoch=0), p.batches(0), strict=True):
        members = [image for k in planned.packs for image in k]
        assert batch.packs == tuple(map(len, planned.packs))
        assert batch.num_images == len(members)
        assert batch.indices.tolist() == [image.index for image in members]
        assert batch.targets.tolist() == [int(data.truth.labels[i.index]) for i in members]
        assert batch.sizes == tuple(image.size for image in members)
        assert batch.kept is None
        assert batch.images.dtype == torch.uint8
        tokens = sum(image.kept + 1 for image in members)
        assert batch.padded == pytest.approx(1 - tokens / (4 * 40))
        ready = batch.to(torch.device("cpu"), pre)
        whole = as_packed(ready.images, ready.layout["packing"])
        start = 0
        for image, grid in zip(members, whole.grids, strict=True):
            pixels = data.images.read(image.index)
            drawn = draw(*pixels.shape[:2], image.size, plain, (0, 0, image.position))
            shown = normalise(render(pixels, drawn, plain).permute(1, 2, 0).numpy(), pre)
            (want,) = pack([torch.from_numpy(shown)], PATCH)
            assert want.grids == (grid,)
            got = ready.images[start : start + len(want.patches)]
            torch.testing.assert_close(got, want.patches, atol=1e-5, rtol=0)
            start += len(want.patches)
        assert start == len(ready.images)


def test_the_patches_that_stay_are_drawn_by_the_images_key(data):
    p = plan_of(data, drop=0.5, drop_std=0.1)
    whole = plan_of(data, drop=0.0)
    pre = Preprocessing(mode="native")
    full = {}
    for batch in train_batches(data, whole, WHOLE, epoch=0):
        for i, patches in zip(
            batch.indices.tolist(), batch.images.split(batch.lengths), strict=True
        ):
            full[i] = patches
    dropped = 0
    for batch, planned in zip(train_batches(data, p, WHOLE, epoch=0), p.batches(0), strict=True):
        members = [image for k in planned.packs for image in k]
        cleared = batch.to(torch.device("cpu"), pre)
        pieces = zip(members, batch.kept, batch.images.split(batch.lengths), strict=True)
        for n, (image, kept, patches) in enumerate(pieces):
            assert len(kept) == image.kept
            grid = num_patches(np.array([image.size]), PATCH)[0]
            order = generator((0, image.epoch, image.position), DROPPING).permutation(grid)
            if image.kept < grid:
                assert kept == tuple(sorted(order[: image.kept].tolist()))
                dropped += 1
            assert torch.equal(patches, full[image.index][list(kept)])
            # Its edges are cleared as those of the whole image are.
            one = replace(whole_of(image, full[image.index]), indices=torch.zeros(1))
            edges = one.to(torch.device("cpu"), pre).images[list(kept)]
            assert torch.equal(cleared.images.split(batch.lengths)[n], edges)
    assert dropped > 10


def whole_of(image, patches) -> Packed:
    return Packed(patches, torch.zeros(1), torch.zeros(1), (image.size,), PATCH, (1,))


def made(packs=((3, 2), (4,), (1, 1)), **fields) -> Packed:
    """Packs of images of one row of so many patches of 2 x 2."""
    sizes = tuple((2, 2 * n) for k in packs for n in k)
    total = sum(n for k in packs for n in k)
    images = torch.arange(total * 12).view(total, 12).to(torch.uint8)
    count = len(sizes)
    counts = tuple(map(len, packs))
    given = {"targets": torch.arange(count), "indices": torch.arange(count) + 10}
    return Packed(
        images, **given, sizes=sizes, patch_size=2, packs=counts, max_tokens=8, step=3, **fields
    )


def test_parts_are_whole_packs_with_all_that_is_theirs():
    batch = made(geometries=tuple("abcde"))
    first, second = batch.split(2)
    assert first.packs == (2, 1)
    assert second.packs == (2,)
    assert torch.equal(torch.cat([first.images, second.images]), batch.images)
    assert second.images.tolist() == batch.images[9:].tolist()
    assert second.indices.tolist() == [13, 14]
    assert second.targets.tolist() == [3, 4]
    assert first.sizes == ((2, 6), (2, 4), (2, 8))
    assert second.geometries == ("d", "e")
    assert {part.step for part in (first, second)} == {3}
    assert [p.packs for p in batch.split(5)] == [(2,), (1,), (2,)]
    (whole,) = batch.split(1)
    assert torch.equal(whole.images, batch.images)
    kept = made(packs=((1, 1), (1,)), kept=((0,), (0,), (0,)))
    assert [p.kept for p in kept.split(2)] == [((0,), (0,)), ((0,),)]
    assert batch.padded == pytest.approx(1 - 11 / 24)
    assert replace(batch, num_prefix_tokens=1).padded == pytest.approx(1 - 16 / 24)


def test_losses_of_packs_are_those_of_the_images_alone():
    torch.manual_seed(0)
    backbone = ViT(ViTConfig(embed_dim=16, depth=1, num_heads=2, patch_size=2, image_size=8))
    model = Classifier(backbone, ViTHead(backbone.config, backbone.feature_specs, 3))
    randomise(model)
    batch = made().to(torch.device("cpu"), Preprocessing())
    targets = torch.tensor([0, 1, 2, 0, 1])
    for how in ("softmax", "sigmoid"):
        options = {"loss": how, "label_smoothing": 0.1}
        got = model.losses(batch.images, targets, **batch.padding, **options)["classify"]
        images = unpack(as_packed(batch.images, batch.layout["packing"]))
        alone = [
            model.losses(images[i][None], targets[i : i + 1], **options)["classify"]
            for i in range(5)
        ]
        torch.testing.assert_close(got, sum(alone))
    plain = json.loads(json.dumps(batch.layout))  # as it is kept in a file
    torch.testing.assert_close(
        model.forward_tensors(batch.images, **plain)["logits"],
        model.forward_tensors(batch.images, **batch.layout)["logits"],
    )


def test_an_image_of_another_size_than_indexed_is_named(data):
    odd = replace(data.images, sizes=data.images.sizes + 3)
    changed = replace(data, images=odd)
    with pytest.raises(
        InputError, match=r"has 2\d x 3\d pixels, but was indexed as .* index it anew"
    ):
        list(train_batches(changed, plan_of(changed), WHOLE, epoch=0))


def test_parts_of_images_are_refused_in_packs(data):
    with pytest.raises(InputError, match=r"shown whole, but crop is 'random_resized'"):
        TrainLoader(data, plan_of(data), Augmentation())


def test_a_plan_takes_less_than_300_bytes_of_memory_an_image():
    sizes = np.random.default_rng(0).integers(30, 600, (9_000, 2)).astype(np.int32)
    tracemalloc.start()
    try:
        p = plan(sizes, epochs=1, max_tokens=4096)
        assert p.steps(0) > 1000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 300 * 9_000
    assert p.padding(0) < 0.01
