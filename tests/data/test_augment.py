"""Augmentation: a function of picture and key, in 8 bits, with the geometry it promises."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as oracle

from tests.data.conftest import picture
from vitrail.data.augment import (
    RANDAUGMENT,
    Augmentation,
    Strength,
    augment,
    draw,
    generator,
    mix,
)
from vitrail.data.view import crop_box
from vitrail_runtime.errors import InputError

WHOLE = Augmentation(crop="whole", flip=0.0)
STRONG = Augmentation(
    three_augment=True, color_jitter=0.4, randaugment_ops=2, random_erasing=1.0, randaugment_std=2.0
)
sides = st.integers(1, 300)
keys = st.tuples(st.integers(0, 2**32), st.integers(0, 2**20), st.integers(0, 2**39))


def pixels(number: int = 0, size: tuple[int, int] = (40, 60)) -> np.ndarray:
    return np.array(picture(number, size))


@pytest.mark.parametrize("crop", ["random_resized", "simple", "whole"])
@given(sides, sides, keys)
def test_every_picture_comes_out_at_the_size_asked_for(crop, height, width, key):
    image = np.zeros((height, width, 3), np.uint8)
    out = augment(image, (24, 17), Augmentation(crop=crop, color_jitter=0.1), key)
    assert out.shape == (3, 24, 17)
    assert out.dtype == torch.uint8
    assert out.is_contiguous()


def test_extreme_shapes_are_cropped_without_growing_first():
    for crop in ("random_resized", "simple", "whole"):
        for shape in ((1, 20000, 3), (20000, 1, 3), (1, 1, 3)):
            out = augment(np.full(shape, 7, np.uint8), (64, 64), Augmentation(crop=crop), (0, 0, 0))
            assert (out == 7).all()


def test_the_same_key_gives_the_same_bytes_and_other_keys_do_not():
    image = pixels()
    first = augment(image, (32, 24), STRONG, (1, 2, 3))
    np.random.default_rng(0)
    torch.manual_seed(5)
    assert torch.equal(first, augment(image, (32, 24), STRONG, (1, 2, 3)))
    others = [augment(image, (32, 24), STRONG, k) for k in ((0, 2, 3), (1, 0, 3), (1, 2, 0))]
    assert not any(torch.equal(first, o) for o in others)


def test_no_global_random_state_is_touched():
    # The old global generator is what must stay as it is.
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    augment(pixels(), (32, 24), STRONG, (1, 2, 3))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002


def test_the_picture_given_is_left_as_it_is():
    image = pixels(size=(32, 24))
    before = image.copy()
    for number in range(20):
        augment(image, (32, 24), Augmentation(crop="whole", random_erasing=1.0), (0, 0, number))
    assert (image == before).all()


@given(sides, sides, keys)
def test_a_random_part_lies_inside_and_keeps_area_and_shape(height, width, key):
    a = Augmentation(scale=(0.2, 0.9))
    top, left, h, w = crop_box(height, width, a, generator(key))
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert h >= 1
    assert w >= 1
    if min(height, width) >= 100 and max(height, width) / min(height, width) < 1.3:
        assert 0.2 * 0.97 <= h * w / (height * width) <= 0.9 * 1.03
        assert 3 / 4 * 0.96 <= w / h <= 4 / 3 * 1.04


def test_parts_are_spread_over_areas_as_torchvision_spreads_them():
    from torchvision.transforms.v2 import RandomResizedCrop

    a = Augmentation()
    ours = [crop_box(300, 400, a, generator((0, 0, i))) for i in range(2000)]
    torch.manual_seed(0)
    image = torch.empty(3, 300, 400, dtype=torch.uint8)
    theirs = [RandomResizedCrop.make_params(RandomResizedCrop(8), [image]) for _ in range(2000)]
    our_areas = np.array([h * w for _, _, h, w in ours]) / 120000
    their_areas = np.array([p["height"] * p["width"] for p in theirs]) / 120000
    quantiles = np.linspace(0.05, 0.95, 10)
    gap = np.quantile(our_areas, quantiles) - np.quantile(their_areas, quantiles)
    assert np.abs(gap).max() < 0.04


@given(st.integers(50, 2000), st.integers(50, 2000), keys)
def test_a_reduced_decode_never_enlarges_the_part(height, width, key):
    a = Augmentation()
    least_h, least_w = draw(height, width, (64, 48), a, key).view.needed()
    _, _, crop_h, crop_w = crop_box(height, width, a, generator(key))
    if crop_h >= 64 and crop_w >= 48:
        assert least_h <= height
        assert least_w <= width
    # At the size asked for, the part has at least the pixels of the result.
    assert crop_h * least_h / height >= 64 - 1e-6
    assert crop_w * least_w / width >= 48 - 1e-6


def test_a_reduced_picture_shows_the_same_place():
    y, x = np.mgrid[0:512, 0:768]
    image = np.stack([x / 3, y / 2, x * 0], 2).astype(np.uint8)
    half = np.array(Image.fromarray(image).reduce(2))
    for i in range(10):
        whole = augment(image, (32, 32), Augmentation(), (0, 0, i)).float()
        reduced = augment(half, (32, 32), Augmentation(), (0, 0, i), original=(512, 768)).float()
        assert (whole - reduced).abs().max() <= 3


def test_the_whole_picture_without_changes_is_what_torchvision_resizes():
    image = pixels(size=(90, 70))
    out = augment(image, (30, 40), WHOLE, (0, 0, 0))
    tensor = torch.from_numpy(image).permute(2, 0, 1)
    expected = oracle.resize(tensor, [30, 40], InterpolationMode.BICUBIC, antialias=True)
    assert torch.equal(out, expected)


def test_flips_come_as_often_as_asked():
    image = pixels(size=(16, 16))
    plain = augment(image, (16, 16), WHOLE, (0, 0, 0))
    a = Augmentation(crop="whole", flip=0.3)
    outs = [augment(image, (16, 16), a, (0, 0, i)) for i in range(1000)]
    flipped = sum(torch.equal(o, plain.flip(2)) for o in outs)
    assert flipped + sum(torch.equal(o, plain) for o in outs) == 1000
    assert 250 < flipped < 350


def test_erasing_changes_one_rectangle_of_noise_around_the_mean():
    image = np.full((64, 64, 3), 255, np.uint8)
    a = Augmentation(crop="whole", flip=0.0, random_erasing=1.0)
    for i in range(20):
        out = augment(image, (64, 64), a, (0, 0, i))
        changed = (out != 255).any(0)
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        area = int(rows.max() - rows.min() + 1) * int(columns.max() - columns.min() + 1)
        assert changed.sum() > 0.9 * area
        assert 0.01 < area / 64**2 < 0.4


def test_three_augment_takes_each_of_its_changes_a_third_of_the_time():
    image = pixels(size=(16, 16))
    a = Augmentation(crop="whole", flip=0.0, three_augment=True)
    outs = [augment(image, (16, 16), a, (0, 0, i)) for i in range(300)]
    grey = oracle.rgb_to_grayscale(Image.fromarray(image), num_output_channels=3)
    solarised = oracle.solarize(Image.fromarray(image), 128)
    for expected in (grey, solarised):
        expected = torch.from_numpy(np.array(expected)).permute(2, 0, 1)
        assert 75 < sum(torch.equal(o, expected) for o in outs) < 125


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("autocontrast", oracle.autocontrast),
        ("equalize", oracle.equalize),
        ("invert", oracle.invert),
        ("posterize", lambda im: oracle.posterize(im, 2)),
        ("solarize", lambda im: oracle.solarize(im, 128)),
        ("color", lambda im: oracle.adjust_saturation(im, 1.45)),
        ("contrast", lambda im: oracle.adjust_contrast(im, 1.45)),
        ("brightness", lambda im: oracle.adjust_brightness(im, 1.45)),
        ("sharpness", lambda im: oracle.adjust_sharpness(im, 1.45)),
        ("rotate", lambda im: oracle.rotate(im, 15.0, InterpolationMode.BILINEAR, fill=[9, 9, 9])),
    ],
)
def test_operations_are_those_of_torchvision_at_half_their_range(name, expected):
    image = picture(3, (31, 45))
    strength = Strength(0.5, 0.5, Image.Resampling.BILINEAR, (9, 9, 9))
    ours = np.array(RANDAUGMENT[name](image, strength))
    np.testing.assert_array_equal(ours, np.array(expected(image)))


@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y"])
def test_moving_operations_fill_what_they_uncover(name):
    image = Image.new("RGB", (40, 30), "white")
    strength = Strength(1.0, 1.0, Image.Resampling.BILINEAR, (9, 9, 9))
    out = np.array(RANDAUGMENT[name](image, strength))
    assert (out == 255).all(2).any()
    assert (out == 9).all(2).any()


def batch(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.arange(count).float()[:, None, None, None].expand(count, 3, 20, 24).contiguous()
    return images, torch.arange(count)


@pytest.mark.parametrize("given", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_targets_say_how_much_of_each_picture_there_is(given):
    images, labels = batch()
    for step in range(20):
        mixed, targets = mix(images, labels, (0, 0, step), num_classes=6, **given)
        # Picture i is constant i, so its mean tells the mixture.
        torch.testing.assert_close(mixed.mean((1, 2, 3)), targets @ torch.arange(6.0))
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        assert ((targets > 0).sum(1) <= 2).all()


@pytest.mark.parametrize("given", [{"mixup": 0.8}, {"cutmix": 1.0}])
@pytest.mark.parametrize("world", [2, 4])
def test_mixing_is_the_same_when_a_batch_is_shared_among_processes(given, world):
    images, labels = batch(16)
    for step in range(5):
        whole = mix(images, labels, (0, 3, step), num_classes=16, **given)
        shares = [
            mix(part, of, (0, 3, step), num_classes=16, **given)
            for part, of in zip(images.chunk(world), labels.chunk(world), strict=True)
        ]
        assert torch.equal(whole[0], torch.cat([s[0] for s in shares]))
        assert torch.equal(whole[1], torch.cat([s[1] for s in shares]))


def test_the_last_of_an_odd_batch_stays_and_no_mixing_gives_one_hot():
    images, labels = batch(5)
    mixed, targets = mix(images, labels, (0, 0, 1), num_classes=5, mixup=0.8)
    assert torch.equal(mixed[4], images[4])
    assert targets[4].tolist() == [0, 0, 0, 0, 1]
    plain = mix(images, labels, (0, 0, 1), num_classes=5)
    assert plain[0] is images
    assert torch.equal(plain[1], torch.eye(5))


def test_a_part_of_the_steps_mixes():
    images, labels = batch()
    given = {"num_classes": 6, "mixup": 0.8, "mix_prob": 0.4}
    mixed = [
        not torch.equal(mix(images, labels, (0, 0, s), **given)[0], images) for s in range(500)
    ]
    assert 150 < sum(mixed) < 250


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"crop": "centre"}, "crop must be"),
        ({"interpolation": "nearest"}, "interpolation must be"),
        ({"scale": (0.5, 0.2)}, "scale must be 0 < low <= high <= 1"),
        ({"ratio": (0.0, 1.0)}, "ratio must be"),
        ({"flip": 1.5}, r"flip is a probability in \[0, 1\], but is 1.5"),
        ({"randaugment_magnitude": 11}, "randaugment_magnitude must lie"),
        ({"color_jitter": 2.0}, "color_jitter must lie"),
        ({"scale": (0.0, 0.5)}, r"scale must be .* but is \(0\.0, 0\.5\)"),
        ({"scale": (0.5, 1.1)}, "scale must be"),
        ({"ratio": (2.0, 1.0)}, "ratio must be 0 < low <= high"),
        ({"flip": -0.1}, "flip is a probability"),
        ({"random_erasing": 1.1}, "random_erasing is a probability"),
        ({"randaugment_magnitude": -1}, r"must lie in \[0, 10\], but is -1"),
        ({"color_jitter": -0.1}, "color_jitter must lie"),
        ({"randaugment_std": float("nan")}, "randaugment_std must not be negative, but is nan"),
        ({"randaugment_std": float("inf")}, "randaugment_std must not be negative, but is inf"),
        ({"randaugment_std": -1.0}, "randaugment_std must not be"),
        ({"randaugment_ops": -1}, "randaugment_ops must not be"),
        ({"padding": -1}, "padding must not be"),
    ],
)
def test_a_setting_out_of_range_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        Augmentation(**given)


def test_a_negative_seed_is_refused():
    with pytest.raises(InputError, match="seed must not be negative"):
        augment(pixels(), (8, 8), WHOLE, (-1, 0, 0))


@pytest.mark.parametrize(
    "given",
    [
        {"scale": (1.0, 1.0)},
        {"ratio": (2.0, 2.0)},
        {"flip": 0.0, "random_erasing": 1.0},
        {"flip": 1.0, "random_erasing": 0.0},
        {"randaugment_magnitude": 0, "color_jitter": 0.0, "padding": 0},
        {"randaugment_magnitude": 10, "color_jitter": 1.0},
    ],
)
def test_a_setting_at_the_end_of_its_range_is_taken(given):
    assert Augmentation(**given) == Augmentation(**given)


def test_by_default_an_image_is_cropped_and_flipped_and_nothing_else():
    """torchvision's RandomResizedCrop and RandomHorizontalFlip, of the model's ImageNet values."""
    a = Augmentation()
    assert (a.crop, a.scale, a.ratio, a.flip) == (
        "random_resized",
        (0.08, 1.0),
        (3 / 4, 4 / 3),
        0.5,
    )
    assert (a.padding, a.interpolation) == (4, "bicubic")
    assert (a.color_jitter, a.three_augment, a.randaugment_ops, a.random_erasing) == (
        0,
        False,
        0,
        0,
    )
    assert (a.randaugment_magnitude, a.randaugment_std) == (9.0, 0.5)
    assert (a.mean, a.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
