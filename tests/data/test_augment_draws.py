"""What is drawn, as distributions: against torchvision's and timm's own draws, or what the papers say.

Seeds are fixed, so each of these tests gives the same p-value for ever.
"""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import timm.data.random_erasing as timm_erasing
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import ColorJitter, RandomCrop, RandomResizedCrop
from torchvision.transforms.v2 import CutMix

from vitrail.data.augment import RANDAUGMENT, Augmentation, draw, draw_mixing, generator

MANY = 2000
LIKELY = 1e-3  # p-value from which a distribution is taken for the one it should be


def drawn(count: int = MANY, image=(300, 400), size=(96, 64), seed: int = 0, **given) -> list:
    a = Augmentation(**given)
    return [draw(*image, size, a, (seed, i % 3, i)) for i in range(count)]


def mixings(
    count: int = MANY, size=(96, 64), mixup: float = 0.0, cutmix: float = 0.0, mix_prob: float = 1.0
) -> list:
    return [draw_mixing(*size, (0, i % 3, i), mixup, cutmix, mix_prob) for i in range(count)]


def assert_uniform(values, low: float, high: float) -> None:
    assert low <= min(values)
    assert max(values) <= high
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > LIKELY


def assert_as_often(outcomes, kinds: int) -> None:
    counts = Counter(outcomes)
    assert len(counts) == kinds
    assert stats.chisquare(list(counts.values())).pvalue > LIKELY


def assert_share(outcomes, share: float) -> None:
    outcomes = list(outcomes)
    assert stats.binomtest(sum(outcomes), len(outcomes), share).pvalue > LIKELY


def assert_unrelated(a, b) -> None:
    assert stats.pearsonr(np.asarray(a, float), np.asarray(b, float)).pvalue > LIKELY


def test_parts_have_areas_ratios_and_places_as_the_paper_says():
    """Szegedy et al. 2015: the area is uniform, the ratio in its logarithm, the place over all that fit."""
    crops = np.array(
        [d.view.crop for d in drawn(image=(3000, 3000), scale=(0.1, 0.6), ratio=(0.7, 1.6))]
    )
    top, left, height, width = crops.T
    assert_uniform(height * width / 3000**2, 0.0999, 0.6001)
    assert_uniform(np.log(width / height), math.log(0.6995), math.log(1.602))
    assert_uniform(top / (3000 - height), 0, 1)
    assert_uniform(left / (3000 - width), 0, 1)
    for a, b in itertools.combinations(
        (height * width, width / height, top / (3000 - height), left / (3000 - width)), 2
    ):
        assert_unrelated(a, b)


@pytest.mark.parametrize("size", [(300, 400), (90, 400)])
def test_parts_are_spread_as_torchvisions(size):
    """Also where some do not fit and are drawn again: that is most of the long image's."""
    ours = np.array([d.view.crop for d in drawn(image=size)])
    torch.manual_seed(0)
    image = torch.empty(3, *size, dtype=torch.uint8)
    rule = [0.08, 1.0], [3 / 4, 4 / 3]
    theirs = np.array([RandomResizedCrop.get_params(image, *rule) for _ in range(MANY)])
    for column in range(4):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > LIKELY
    areas = (ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert stats.ks_2samp(*areas).pvalue > LIKELY


def test_the_places_of_the_simple_crop_are_as_likely_as_torchvisions():
    """Every place as likely, the outermost too; torchvision's RandomCrop is the recipe's."""
    room = 9, 25
    ours = [
        tuple(int(u * n) for u, n in zip(d.view.cut, room, strict=True))
        for d in drawn(crop="simple", image=(40, 60))
    ]
    torch.manual_seed(0)
    image = torch.empty(3, 40 + 8, 40 + 24, dtype=torch.uint8)
    theirs = [RandomCrop.get_params(image, (40, 40))[:2] for _ in range(MANY)]
    for axis in (0, 1):
        assert_as_often([place[axis] for place in ours], room[axis])
        assert {p[axis] for p in theirs} == {p[axis] for p in ours}
    assert_unrelated(*zip(*ours, strict=True))


@pytest.mark.parametrize("name", ["flip", "random_erasing"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_flips_and_erasing_come_as_often_as_asked(name, share):
    a = drawn(size=(8, 8), **{"flip": 0.5, name: share})
    happened = [d.view.flip if name == "flip" else d.erasing is not None for d in a]
    if share in (0.0, 1.0):
        assert set(happened) == {bool(share)}
    else:
        assert_share(happened, share)


def test_three_augment_takes_each_change_as_often_and_a_sigma_of_deit_iii():
    three = [d.three for d in drawn(three_augment=True)]
    assert_as_often([name for name, _ in three], 3)
    assert_uniform([sigma for _, sigma in three], 0.1, 2.0)
    assert {d.three for d in drawn(20)} == {None}


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_jitter_has_torchvisions_factors_in_every_order(strength):
    jitters = [d.jitter for d in drawn(color_jitter=strength)]
    assert_as_often([tuple(name for name, _ in j) for j in jitters], 6)
    factors = {name: [dict(j)[name] for j in jitters] for name, _ in jitters[0]}
    theirs = ColorJitter(strength, strength, strength)
    for name, values in factors.items():
        assert_uniform(values, *getattr(theirs, name))
    for a, b in itertools.combinations(factors.values(), 2):
        assert_unrelated(a, b)
    assert {d.jitter for d in drawn(20)} == {()}


def test_randaugment_takes_every_operation_as_often_and_applies_half_of_them():
    """Each of `ops` is one of fifteen, and applied with probability one half, as timm's."""
    operations = [d.randaugment for d in drawn(randaugment_ops=3)]
    counts = Counter(len(ops) for ops in operations)
    expected = [MANY * math.comb(3, n) / 8 for n in range(4)]
    assert stats.chisquare([counts[n] for n in range(4)], expected).pvalue > LIKELY
    assert_as_often([name for ops in operations for name, _ in ops], len(RANDAUGMENT))
    # Independent of each other: the same operation twice is one of fifteen.
    pairs = [ops for ops in operations if len(ops) >= 2]
    assert_share([a[0] == b[0] for a, b, *_ in pairs], 1 / 15)
    assert {d.randaugment for d in drawn(20, randaugment_ops=0)} == {()}


def test_strengths_are_normal_around_the_magnitude_and_clipped():
    """timm's magnitude and mstd, tenths of the full strength."""
    given = {"randaugment_ops": 2, "randaugment_magnitude": 7.0, "randaugment_std": 2.0}
    strengths = [s for d in drawn(**given) for _, s in d.randaugment]
    levels = np.array([s.level for s in strengths])
    normal = stats.norm(0.7, 0.2)
    assert levels.min() >= 0
    assert levels.max() == 1
    assert_share(levels == 1, normal.sf(1))
    inside = levels[(levels > 0) & (levels < 1)]
    assert stats.kstest(inside, stats.truncnorm(-3.5, 1.5, 0.7, 0.2).cdf).pvalue > LIKELY
    assert_share([s.signed > 0 for s in strengths], 0.5)
    assert np.array_equal(np.abs([s.signed for s in strengths]), levels)
    assert_share([s.resampling == Image.Resampling.BICUBIC for s in strengths], 0.5)
    assert {s.resampling for s in strengths} == {
        Image.Resampling.BICUBIC,
        Image.Resampling.BILINEAR,
    }
    positive = [s.signed > 0 for s in strengths]
    assert_unrelated(positive, [s.resampling == Image.Resampling.BICUBIC for s in strengths])
    assert_unrelated(positive, levels)
    low = [
        s.level
        for d in drawn(500, **{**given, "randaugment_magnitude": 0.5})
        for _, s in d.randaugment
    ]
    assert min(low) == 0
    fixed = drawn(50, randaugment_ops=2, randaugment_magnitude=3.0, randaugment_std=0.0)
    assert {s.level for d in fixed for _, s in d.randaugment} == {0.3}
    fill = drawn(50, randaugment_ops=2, mean=(0.1, 0.5, 0.9))
    assert {s.fill for d in fill for _, s in d.randaugment} == {(26, 128, 230)}


def test_rectangles_are_spread_as_timms(monkeypatch):
    """Zhong et al. 2020: area uniform in 2 to 33 %, ratio log-uniform in 0.3 to 1 / 0.3, any place."""
    erasings = [d.erasing for d in drawn(size=(160, 120), count=1000, random_erasing=1.0)]
    boxes = np.array([e.box for e in erasings])
    top, left, height, width = boxes.T
    sizes = []

    def record(per_pixel, rand_color, patch_size, **_):
        sizes.append(patch_size[1:])
        return torch.zeros(patch_size)

    monkeypatch.setattr(timm_erasing, "_get_pixels", record)
    theirs = timm_erasing.RandomErasing(1.0, mode="pixel", device="cpu")
    timm_erasing.random.seed(0)
    for _ in range(1000):
        theirs(torch.empty(1, 160, 120))
    their_height, their_width = np.array(sizes).T
    assert stats.ks_2samp(height, their_height).pvalue > LIKELY
    assert stats.ks_2samp(width, their_width).pvalue > LIKELY
    assert_uniform(height * width / 19200, 0.0195, 0.335)
    assert_uniform(np.log(width / height), math.log(0.29), math.log(3.45))
    assert_uniform((top + 0.5) / (160 - height + 1), 0, 1)
    assert_uniform((left + 0.5) / (120 - width + 1), 0, 1)
    assert (top + height < 161).all()
    assert (left + width < 121).all()
    assert (top == 160 - height).any()
    assert (left == 120 - width).any()
    assert_unrelated(top / (161 - height), left / (121 - width))
    assert_unrelated(height * width, width / height)
    noise = np.concatenate([e.noise.ravel()[:50] for e in erasings])
    assert stats.kstest(noise, stats.norm.cdf).pvalue > LIKELY
    assert all(e.noise.shape == (3, *e.box[2:]) for e in erasings)


def test_a_rectangle_is_smaller_than_the_image_or_there_is_none():
    """As timm's: the image is not erased whole, nor a band across it."""
    erasings = [d.erasing for d in drawn(500, size=(3, 2), random_erasing=1.0)]
    assert {e.box[2:] for e in erasings if e is not None} == {(1, 1), (2, 1)}
    assert {d.erasing for d in drawn(50, size=(1, 9), random_erasing=1.0)} == {None}


def test_shares_of_mixup_come_from_its_beta_distribution():
    for alpha in (0.2, 0.8, 1.5):
        shares = [m.share for m in mixings(mixup=alpha)]
        assert stats.kstest(shares, stats.beta(alpha, alpha).cdf).pvalue > LIKELY


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_boxes_of_cutmix_are_spread_as_torchvisions(alpha):
    ours = mixings(cutmix=alpha, size=(220, 160))
    torch.manual_seed(0)
    theirs_of = CutMix(alpha=alpha, num_classes=2)
    image = torch.empty(1, 3, 220, 160)
    theirs = [theirs_of.make_params([image]) for _ in range(MANY)]
    left, top, right, bottom = np.array([p["box"] for p in theirs]).T
    our_top, our_left, our_height, our_width = np.array([m.box for m in ours]).T
    assert stats.ks_2samp(our_top, top).pvalue > LIKELY
    assert stats.ks_2samp(our_left, left).pvalue > LIKELY
    assert stats.ks_2samp(our_top + our_height, bottom).pvalue > LIKELY
    assert stats.ks_2samp(our_left + our_width, right).pvalue > LIKELY
    kept = [m.share for m in ours], [p["lam_adjusted"] for p in theirs]
    assert stats.ks_2samp(*kept).pvalue > LIKELY


def test_mixing_is_as_often_as_asked_and_half_of_each_kind():
    assert_share([m is not None for m in mixings(mixup=0.8, mix_prob=0.3)], 0.3)
    assert None not in mixings(mixup=0.8)
    assert set(mixings(50, mixup=0.8, mix_prob=0.0)) == {None}
    assert set(mixings(50)) == {None}
    both = mixings(mixup=0.3, cutmix=2.0)
    assert_share([m.box is not None for m in both], 0.5)
    # Each with its own alpha.
    shares = [m.share for m in both if m.box is None]
    assert stats.kstest(shares, stats.beta(0.3, 0.3).cdf).pvalue > LIKELY
    kept = [m.share for m in both if m.box is not None]
    alone = [m.share for m in mixings(cutmix=2.0)]
    assert stats.ks_2samp(kept, alone).pvalue > LIKELY


def test_what_is_drawn_for_one_purpose_says_nothing_about_another():
    all_drawn = drawn(
        three_augment=True, color_jitter=0.4, randaugment_ops=1, random_erasing=0.5, size=(9, 9)
    )
    mixed = mixings(mixup=1.0)
    columns = {
        "area": [d.view.crop[2] * d.view.crop[3] for d in all_drawn],
        "flip": [d.view.flip for d in all_drawn],
        "three": [d.three[0] == "grey" for d in all_drawn],
        "sigma": [d.three[1] for d in all_drawn],
        "applied": [len(d.randaugment) for d in all_drawn],
        "brightness": [dict(d.jitter)["brightness"] for d in all_drawn],
        "erasing": [d.erasing is not None for d in all_drawn],
        "mixed": [m.share for m in mixed],
    }
    for (_, a), (_, b) in itertools.combinations(columns.items(), 2):
        assert stats.pearsonr(np.asarray(a, float), np.asarray(b, float)).pvalue > LIKELY / 28


def test_the_next_sample_epoch_or_seed_says_nothing_about_this_one():
    a = Augmentation()

    def areas(seed: int, epoch: int, first: int = 0) -> list[int]:
        crops = [draw(300, 400, (8, 8), a, (seed, epoch, first + i)).view.crop for i in range(1000)]
        return [h * w for _, _, h, w in crops]

    here = areas(0, 0)
    for other in (areas(1, 0), areas(0, 1), areas(0, 0, first=1), areas(0, 0, first=2**32)):
        assert_unrelated(here, other)
        assert not set(zip(here[100:], other[100:], strict=True)) <= {(v, v) for v in here}


def test_no_two_keys_or_streams_share_their_numbers():
    positions = [0, 1, 2, 16, 256, 2**16, 2**20, 2**32, 2**39]
    keys = list(itertools.product((0, 1, 2, 2**32), (0, 1, 2, 16, 2**20), positions, (0, 1)))
    first = {generator((s, e, p), stream).random() for s, e, p, stream in keys}
    assert len(first) == len(keys)


def test_the_same_key_draws_the_same_whatever_was_drawn_before():
    given = {"three_augment": True, "color_jitter": 0.4, "randaugment_ops": 2, "crop": "simple"}
    once, again = drawn(20, **given), drawn(20, **given)
    assert once == again
    assert mixings(20, cutmix=1.0) == mixings(20, cutmix=1.0)
    # Part and flip do not depend on what comes after them, so views of other kinds may share them.
    for a, b in zip(drawn(50), drawn(50, randaugment_ops=2, random_erasing=1.0), strict=True):
        assert a.view == b.view
