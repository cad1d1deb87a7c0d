"""What was drawn is applied as torchvision and timm apply it, and in the order of the recipes."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import timm.data.auto_augment as timm_augment
import timm.data.mixup as timm_mixup
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import transforms as torchvision_transforms
from torchvision.transforms.v2 import functional as oracle

from tests.data.conftest import picture
from vitrail.data.augment import (
    COLOR_JITTER,
    RANDAUGMENT,
    THREE_AUGMENT,
    Augmentation,
    Strength,
    augment,
    draw,
    draw_mixing,
    generator,
    mix,
)
from vitrail.data.view import crop_box

TIMM = {  # our name -> timm's, of its "inc1" space
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
    "rotate": "Rotate",
    "posterize": "PosterizeIncreasing",
    "solarize": "SolarizeIncreasing",
    "solarize_add": "SolarizeAdd",
    "color": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}
MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
WHOLE = {"crop": "whole", "flip": 0.0}


def pixels(number: int = 0, size: tuple[int, int] = (40, 60)) -> np.ndarray:
    return np.array(picture(number, size))


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)


def keys(count: int) -> list[tuple[int, int, int]]:
    return [(i % 2, i % 3, i) for i in range(count)]


class _Torchs:
    """As much of torch as torchvision's crop draws with, giving rows of area, ratio, top and left instead."""

    def __init__(self, rows: list[list[float]]) -> None:
        self.rows, self.row = iter(rows), []
        self.tensor = list
        self.log = lambda values: [math.log(v) for v in values]
        self.exp = lambda value: SimpleNamespace(item=lambda: math.exp(value.item()))

    def empty(self, _: int) -> SimpleNamespace:
        return SimpleNamespace(uniform_=self._uniform)

    def _uniform(self, low: float, high: float) -> SimpleNamespace:
        if len(self.row) <= 2:  # the part before did not fit, so its place was not drawn
            self.row = list(next(self.rows))
        number = self.row.pop(0)
        return SimpleNamespace(item=lambda: low + number * (high - low))

    def randint(self, low: int, high: int, size: tuple[int]) -> SimpleNamespace:
        number = self.row.pop(0)
        return SimpleNamespace(item=lambda: low + int(number * (high - low)))


@pytest.mark.parametrize(
    "size", [(300, 400), (40, 400), (400, 30), (37, 23), (5, 7), (1, 1), (1, 90), (64, 64)]
)
@pytest.mark.parametrize(
    ("scale", "ratio"),
    [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.9, 1.0), (0.5, 0.8)), ((0.2, 0.3), (1.5, 3.0))],
)
def test_from_the_same_numbers_torchvision_takes_the_same_part(size, scale, ratio, monkeypatch):
    a = Augmentation(scale=scale, ratio=ratio)
    image = torch.empty(1, *size)
    for key in keys(40):
        numbers = generator(key).random((10, 4)).tolist()
        with monkeypatch.context() as patch:
            patch.setattr(torchvision_transforms, "torch", _Torchs(numbers))
            theirs = RandomResizedCrop.get_params(image, list(scale), list(ratio))
        assert crop_box(*size, a, generator(key)) == theirs


@pytest.mark.parametrize(
    ("size", "ratio", "box"),
    [
        ((9, 1), 3.0, (4, 0, 1, 1)),
        ((9, 1), 1 / 3, (3, 0, 3, 1)),
        ((1, 9), 3.0, (0, 3, 1, 3)),
        ((1, 9), 1 / 3, (0, 4, 1, 1)),
    ],
)
def test_a_part_has_a_pixel_where_torchvisions_rule_leaves_none(size, ratio, box):
    a = Augmentation(scale=(1.0, 1.0), ratio=(ratio, ratio))
    assert crop_box(*size, a, generator((0, 0, 0))) == box


@pytest.mark.parametrize("interpolation", MODES)
def test_a_part_is_cut_resized_and_flipped_as_torchvision_does(interpolation):
    image = pixels(1, (90, 70))
    a = Augmentation(interpolation=interpolation, scale=(0.2, 0.8))
    flips = set()
    for key in keys(20):
        drawn = draw(90, 70, (24, 32), a, key)
        expected = oracle.resized_crop(
            tensor(image), *drawn.view.crop, [24, 32], MODES[interpolation], antialias=True
        )
        if drawn.view.flip:
            expected = oracle.hflip(expected)
        flips.add(drawn.view.flip)
        assert torch.equal(augment(image, (24, 32), a, key), expected)
    assert flips == {False, True}


def test_the_part_of_a_reduced_image_is_the_same_share_of_it():
    image = pixels(1, (31, 45))
    a = Augmentation(flip=0.0)
    for key in keys(30):
        top, left, height, width = draw(90, 70, (24, 32), a, key).view.crop
        bottom, right = round((top + height) * 31 / 90), round((left + width) * 45 / 70)
        top, left = round(top * 31 / 90), round(left * 45 / 70)
        got = augment(image, (24, 32), a, key, original=(90, 70))
        expected = oracle.resized_crop(
            tensor(image), top, left, bottom - top, right - left, [24, 32], MODES["bicubic"]
        )
        assert torch.equal(got, expected)


@pytest.mark.parametrize("size", [(64, 48), (20, 90)])
def test_an_image_may_be_decoded_as_small_as_its_part_allows_and_no_smaller(size):
    a = Augmentation()
    for key in keys(20):
        _, _, height, width = draw(500, 700, size, a, key).view.crop
        scale = max(size[0] / height, size[1] / width)
        needed = math.ceil(500 * scale), math.ceil(700 * scale)
        assert draw(500, 700, size, a, key).view.needed() == needed
    for crop in ("simple", "whole"):
        scale = max(size[0] / 500, size[1] / 700)
        needed = math.ceil(500 * scale), math.ceil(700 * scale)
        drawn = draw(500, 700, size, Augmentation(crop=crop), (0, 0, 0))
        assert drawn.view.needed() == needed


@pytest.mark.parametrize("padding", [0, 3, 4])
@pytest.mark.parametrize(
    ("shape", "size"), [((40, 60), (20, 20)), ((60, 40), (20, 16)), ((24, 24), (24, 24))]
)
def test_the_simple_crop_resizes_the_short_side_reflects_and_cuts(shape, size, padding):
    image = pixels(2, shape)
    a = Augmentation(crop="simple", flip=0.0, padding=padding)
    scale = max(size[0] / shape[0], size[1] / shape[1])
    resized = [round(shape[0] * scale), round(shape[1] * scale)]
    whole = oracle.resize(tensor(image), resized, MODES["bicubic"], antialias=True)
    whole = oracle.pad(whole, [padding] * 4, padding_mode="reflect")
    room = whole.shape[1] - size[0] + 1, whole.shape[2] - size[1] + 1
    places = set()
    for key in keys(25):
        top, left = (
            int(u * n) for u, n in zip(draw(*shape, size, a, key).view.cut, room, strict=True)
        )
        expected = oracle.crop(whole, top, left, *size)
        assert torch.equal(augment(image, size, a, key), expected)
        places.add((top, left))
    assert len(places) > 5 or padding == 0


def test_reflection_adds_no_more_pixels_than_there_are():
    image = pixels(2, (3, 3))
    a = Augmentation(crop="simple", flip=0.0, padding=4)
    whole = F.pad(tensor(image)[None].float(), (2, 2, 2, 2), mode="reflect")[0].byte()
    for key in keys(10):
        top, left = (int(5 * u) for u in draw(3, 3, (3, 3), a, key).view.cut)
        assert torch.equal(augment(image, (3, 3), a, key), whole[:, top : top + 3, left : left + 3])


def test_a_very_long_image_is_cut_before_it_is_resized():
    """Else 1 x 5000 would grow to 224 x 1,120,000."""
    image = pixels(2, (20, 162))
    a = Augmentation(crop="simple", flip=0.0)
    for key in keys(10):
        left = int(draw(20, 162, (10, 10), a, key).view.cut[1] * (162 - 20 + 1))
        part = tensor(image)[:, :, left : left + 20]
        expected = oracle.resize(part, [10, 10], MODES["bicubic"], antialias=True)
        assert torch.equal(augment(image, (10, 10), a, key), expected)
    # Up to eight times the pixels of the result it is resized whole, and padded.
    whole = oracle.resize(tensor(image[:, :160]), [10, 80], MODES["bicubic"], antialias=True)
    whole = oracle.pad(whole, [4] * 4, padding_mode="reflect")
    top, left = (
        int(u * n) for u, n in zip(draw(20, 160, (10, 10), a, key).view.cut, (9, 79), strict=True)
    )
    expected = whole[:, top : top + 10, left : left + 10]
    assert torch.equal(augment(image[:, :160], (10, 10), a, key), expected)


def timms(image: Image.Image, name: str, strength: Strength, monkeypatch) -> Image.Image:
    """The operation as timm carries it out at this strength."""
    hparams = {"img_mean": strength.fill, "interpolation": strength.resampling}
    operation = timm_augment.AugmentOp(TIMM[name], 1.0, 10 * strength.level, hparams)
    with monkeypatch.context() as patch:
        negative = strength.signed < 0
        patch.setattr(timm_augment.random, "random", lambda: 0.9 if negative else 0.1)
        return operation(image)


def test_the_operations_are_those_of_timms_increasing_space():
    assert sorted(TIMM[name] for name in RANDAUGMENT) == sorted(
        timm_augment._RAND_INCREASING_TRANSFORMS
    )


@pytest.mark.parametrize("name", RANDAUGMENT)
def test_every_operation_is_timms_at_every_strength_and_sign(name, monkeypatch):
    image = picture(3, (31, 45))
    levels = [0.0, 0.05, 0.13, 0.25, 0.5, 0.77, 0.9, 0.95, 0.999, 1.0]
    resamplings = itertools.cycle([Image.Resampling.BILINEAR, Image.Resampling.BICUBIC])
    for level, sign in itertools.product(levels, (1, -1)):
        if name == "posterize" and level == 1:
            continue  # see below
        strength = Strength(level, sign * level, next(resamplings), (12, 99, 200))
        ours = RANDAUGMENT[name](image, strength)
        expected = timms(image, name, strength, monkeypatch)
        np.testing.assert_array_equal(np.array(ours), np.array(expected), err_msg=str(strength))
    for resampling in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
        strength = Strength(0.6, -0.6, resampling, (12, 99, 200))
        expected = timms(image, name, strength, monkeypatch)
        np.testing.assert_array_equal(
            np.array(RANDAUGMENT[name](image, strength)), np.array(expected)
        )


def test_posterise_keeps_one_bit_at_the_full_level_where_timm_asks_for_none():
    image = picture(3, (31, 45))
    assert timm_augment._posterize_increasing_level_to_arg(10, {}) == (0,)
    strength = Strength(1.0, 1.0, Image.Resampling.BILINEAR, (0, 0, 0))
    ours = np.array(RANDAUGMENT["posterize"](image, strength))
    np.testing.assert_array_equal(ours, np.array(image) & 128)


def test_the_changes_of_three_augment_are_those_of_deit_iii():
    image = picture(3, (31, 45))
    grey = oracle.rgb_to_grayscale(image, num_output_channels=3)
    solarised = oracle.solarize(image, 128)
    for sigma in (0.1, 0.7, 2.0):
        expected = {
            "grey": grey,
            "solarize": solarised,
            "blur": timm_augment.gaussian_blur(image, sigma),
        }
        assert THREE_AUGMENT.keys() == expected.keys()
        for name, change in THREE_AUGMENT.items():
            np.testing.assert_array_equal(np.array(change(image, sigma)), np.array(expected[name]))


ADJUST = {
    "brightness": oracle.adjust_brightness,
    "contrast": oracle.adjust_contrast,
    "saturation": oracle.adjust_saturation,
}


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.9])
def test_brightness_contrast_and_saturation_are_torchvisions(factor):
    image = picture(3, (31, 45))
    assert COLOR_JITTER.keys() == ADJUST.keys()
    for name, enhance in COLOR_JITTER.items():
        np.testing.assert_array_equal(
            np.array(enhance(image).enhance(factor)), np.array(ADJUST[name](image, factor))
        )


@pytest.mark.parametrize(
    "given",
    [
        {"three_augment": True},
        {"color_jitter": 0.4},
        {"randaugment_ops": 2},
        {"random_erasing": 0.5, "flip": 1.0},
        {
            "three_augment": True, "color_jitter": 0.8, "randaugment_ops": 3,
            "randaugment_std": 3.0, "random_erasing": 1.0, "flip": 0.5,
        },
    ],
    ids=["three", "jitter", "randaugment", "erasing", "all"],
)  # fmt: skip
def test_everything_drawn_is_done_in_the_order_of_the_recipes(given, monkeypatch):
    """Crop, flip, three-augment, RandAugment, jitter, erasing."""
    image = pixels(4, (48, 36))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.1)
    a = Augmentation(**{**WHOLE, "mean": mean, "std": std, **given})
    changed = 0
    for key in keys(25):
        drawn = draw(48, 36, (24, 20), a, key)
        expected = oracle.resize(tensor(image), [24, 20], MODES["bicubic"], antialias=True)
        plain = expected
        if drawn.view.flip:
            expected = oracle.hflip(expected)
        seen = Image.fromarray(expected.permute(1, 2, 0).numpy())
        if drawn.three is not None:
            seen = THREE_AUGMENT[drawn.three[0]](seen, drawn.three[1])
        for name, strength in drawn.randaugment:
            assert strength.fill == (128, 102, 76)
            if (name, strength.level) != ("posterize", 1.0):
                seen = timms(seen, name, strength, monkeypatch)
            else:
                seen = Image.fromarray(np.array(seen) & 128)
        for name, factor in drawn.jitter:
            seen = ADJUST[name](seen, factor)
        expected = np.array(seen).transpose(2, 0, 1)
        if drawn.erasing is not None:
            top, left, height, width = drawn.erasing.box
            for c in range(3):
                fill = np.round(255 * (mean[c] + std[c] * drawn.erasing.noise[c]))
                expected[c, top : top + height, left : left + width] = fill.clip(0, 255)
        np.testing.assert_array_equal(augment(image, (24, 20), a, key).numpy(), expected)
        changed += not np.array_equal(expected, plain.numpy())
    assert changed >= 10


def test_a_rectangle_is_erased_to_what_is_standard_normal_once_normalised():
    a = Augmentation(**WHOLE, random_erasing=1.0, mean=(0.5, 0.4, 0.6), std=(0.1, 0.05, 0.08))
    mean, std = (torch.tensor(v)[:, None, None] for v in (a.mean, a.std))
    for key in keys(5):
        out = augment(np.full((64, 48, 3), 255, np.uint8), (64, 48), a, key)
        top, left, height, width = draw(64, 48, (64, 48), a, key).erasing.box
        rows, columns = slice(top, top + height), slice(left, left + width)
        inside = ((out.float() / 255 - mean) / std)[:, rows, columns]
        noise = draw(64, 48, (64, 48), a, key).erasing.noise
        # Half a step of 8 bits is 0.04 standard deviations here, and five of them fit on either side.
        assert np.abs(inside.numpy() - noise).max() < 0.05
        out[:, rows, columns] = 255
        assert (out == 255).all()


def batch(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 14, 22, generator=made), torch.tensor(
        [3, 1, 4, 1, 5, 0, 2][:count]
    )


@pytest.mark.parametrize("given", [{"mixup": 0.8}, {"cutmix": 1.0}])
def test_a_pair_is_mixed_as_timm_mixes_a_batch_of_two(given, monkeypatch):
    """timm mixes a batch with itself turned over: of two images, each with the other."""
    images, labels = batch(2)
    alphas = given.get("mixup", 0.0), given.get("cutmix", 0.0)
    theirs = timm_mixup.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.0, num_classes=7)
    monkeypatch.setattr(
        timm_mixup, "one_hot", lambda x, n, on_value, off_value: F.one_hot(x, n).float()
    )
    for step in range(20):
        drawn = draw_mixing(14, 22, (0, 0, step), *alphas, 1.0)
        assert (drawn.box is None) == ("mixup" in given)
        monkeypatch.setattr(
            theirs, "_params_per_batch", lambda d=drawn: (d.share, d.box is not None)
        )
        if drawn.box is not None:
            top, left, height, width = drawn.box
            box = top, top + height, left, left + width
            monkeypatch.setattr(timm_mixup, "rand_bbox", lambda *_, b=box, **__: b)
            # timm corrects the share by what the box covers; ours is corrected already.
        expected, soft = theirs(images.clone(), labels)
        mixed, targets = mix(images, labels, (0, 0, step), num_classes=7, **given)
        torch.testing.assert_close(mixed, expected)
        torch.testing.assert_close(targets, soft)


def test_neighbours_are_partners_and_the_last_of_an_odd_batch_stays():
    images, labels = batch(7)
    partner = [1, 0, 3, 2, 5, 4, 6]
    one_hot = torch.eye(7)
    for step in range(10):
        key = (1, 2, step)
        share = draw_mixing(14, 22, key, 0.8, 0.0, 1.0).share
        mixed, targets = mix(images, labels, key, num_classes=7, mixup=0.8)
        torch.testing.assert_close(mixed, share * images + (1 - share) * images[partner])
        soft = share * one_hot[labels] + (1 - share) * one_hot[labels[partner]]
        torch.testing.assert_close(targets, soft)
        drawn = draw_mixing(14, 22, key, 0.0, 1.0, 1.0)
        top, left, height, width = drawn.box
        expected = images.clone()
        for i, j in enumerate(partner):
            expected[i, :, top : top + height, left : left + width] = images[
                j, :, top : top + height, left : left + width
            ]
        mixed, targets = mix(images, labels, key, num_classes=7, cutmix=1.0)
        assert torch.equal(mixed, expected)
        kept = 1 - height * width / (14 * 22)
        torch.testing.assert_close(
            targets, kept * one_hot[labels] + (1 - kept) * one_hot[labels[partner]]
        )


def test_the_box_of_cutmix_has_the_images_shape_and_is_clipped_at_its_edge():
    """Yun et al. 2019, section 3.1: the sides are those of the image times sqrt(1 - share)."""
    clipped = 0
    for step in range(200):
        rng = generator((0, 0, step), 1)
        _, _, y, x = rng.random(4)
        size = math.sqrt(1 - rng.beta(1.0, 1.0))
        top, bottom = max(0, round(y * 40 - size * 20)), min(40, round(y * 40 + size * 20))
        left, right = max(0, round(x * 60 - size * 30)), min(60, round(x * 60 + size * 30))
        drawn = draw_mixing(40, 60, (0, 0, step), 0.0, 1.0, 1.0)
        assert drawn.box == (top, left, bottom - top, right - left)
        assert drawn.share == pytest.approx(1 - (bottom - top) * (right - left) / 2400, abs=1e-12)
        clipped += top == 0 or left == 0 or bottom == 40 or right == 60
    assert 20 < clipped < 190


def test_how_long_is_very_long_goes_by_the_pixels_of_a_result_that_is_not_square():
    a = Augmentation(crop="simple", flip=0.0)
    image, size = pixels(2, (60, 12)), (10, 16)  # 80 x 16, eight times the result: resized whole
    whole = oracle.resize(tensor(image), [80, 16], MODES["bicubic"], antialias=True)
    whole = oracle.pad(whole, [4] * 4, padding_mode="reflect")
    for key in keys(5):
        cut = draw(60, 12, size, a, key).view.cut
        top, left = (int(u * n) for u, n in zip(cut, (79, 9), strict=True))
        assert torch.equal(augment(image, size, a, key), whole[:, top : top + 10, left : left + 16])
    image, size = pixels(2, (20, 112)), (16, 10)  # 16 x 90, more than eight times
    for key in keys(5):
        left = int(draw(20, 112, size, a, key).view.cut[1] * (112 - 13 + 1))
        part = tensor(image)[:, :, left : left + 13]
        expected = oracle.resize(part, [*size], MODES["bicubic"], antialias=True)
        assert torch.equal(augment(image, size, a, key), expected)


def test_a_part_at_the_far_edge_of_a_much_reduced_image_is_its_last_pixel():
    """Of 1000 x 1000 decoded at 4 x 4: a part of one pixel has still one, and lies inside."""
    image = pixels(3, (4, 4))
    a = Augmentation(scale=(1e-6, 1e-6), ratio=(1.0, 1.0), flip=0.0)
    seen = set()
    for key in keys(300):
        top, left, height, width = draw(1000, 1000, (1, 1), a, key).view.crop
        assert (height, width) == (1, 1)
        at = min(3, round(top * 4 / 1000)), min(3, round(left * 4 / 1000))
        found = augment(image, (1, 1), a, key, original=(1000, 1000))
        assert found.flatten().tolist() == image[at].tolist()
        seen.add((round(top * 4 / 1000), round(left * 4 / 1000)))
    assert (4, 4) in seen, "past the last one, if it were not clipped"
