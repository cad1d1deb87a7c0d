"""From upright pixels to a model's input: equal to what torchvision and timm do, for any shape."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval
from torchvision import transforms

from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import (
    Preprocessing,
    decode_size,
    normalise,
    prepare,
    preprocessed_size,
    resize,
)

SHAPES = [(480, 641), (333, 200), (256, 256), (224, 224), (37, 50), (1, 1), (3, 7), (255, 257)]


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def by_timm(image, p):
    transform = transforms_imagenet_eval(
        p.size, crop_pct=p.crop_pct, interpolation=p.interpolation, mean=p.mean, std=p.std
    )
    return transform(Image.fromarray(image)).numpy()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [(224, 224), (64, 96), (33, 33)])
@pytest.mark.parametrize(
    ("pct", "interpolation"), [(0.875, "bicubic"), (0.9, "bilinear"), (1.0, "bicubic")]
)
def test_crop_equals_timms_evaluation_transform_to_the_bit(shape, size, pct, interpolation):
    p = Preprocessing(size=size, crop_pct=pct, interpolation=interpolation)
    image = picture(*shape)
    ours, _ = prepare(image, p)
    np.testing.assert_array_equal(ours, by_timm(image, p))
    assert ours.dtype == np.float32
    assert ours.flags.c_contiguous
    assert ours.shape == (3, *preprocessed_size(*shape, p))


def test_crop_equals_torchvisions_resize_and_centre_crop_to_the_bit():
    p = Preprocessing(size=(97, 97), crop_pct=0.8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    image = picture(301, 177)
    by_torchvision = transforms.Compose([
        transforms.Resize(121, transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(97),
        transforms.ToTensor(),
        transforms.Normalize(p.mean, p.std),
    ])  # fmt: skip
    np.testing.assert_array_equal(
        prepare(image, p)[0], by_torchvision(Image.fromarray(image)).numpy()
    )


@pytest.mark.parametrize("shape", [(1, 5000), (5000, 1), (2, 300), (40, 1000), (1000, 30)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
def test_a_thin_picture_is_cut_before_it_is_resized(shape, interpolation):
    p = Preprocessing(size=(32, 32), interpolation=interpolation)
    # Pillow picks which axis it resizes first by the sizes, and clips in between: no clipping here.
    image = picture(*shape) // 4 + 96
    ours, geometry = resize(image, p)
    assert ours.shape == (32, 32, 3)
    # The plain way, still affordable at this size.
    whole_h, whole_w = (round(n * s) for n, s in zip(shape, geometry.scale, strict=True))
    pil = Image.fromarray(image).resize(
        (whole_w, whole_h), getattr(Image.Resampling, interpolation.upper())
    )
    top, left = geometry.offset
    plain = np.asarray(pil)[top : top + 32, left : left + 32]
    difference = np.abs(ours.astype(int) - plain)
    assert difference.max() <= 2
    assert (difference > 1).mean() < 0.01


def test_squash_ignores_the_aspect_ratio_and_shows_everything():
    p = Preprocessing(size=(20, 30), mode="squash", interpolation="bilinear")
    image = picture(51, 40)
    ours, geometry = resize(image, p)
    plain = transforms.Resize((20, 30))(Image.fromarray(image))
    np.testing.assert_array_equal(ours, np.asarray(plain))
    assert geometry.scale == (20 / 51, 30 / 40)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((50, 100), (20, 40)),
        ((100, 50), (40, 20)),
        ((1, 5000), (1, 40)),
        ((7, 7), (40, 40)),
        ((10, 20), (20, 40)),
    ],
)
def test_fit_touches_the_size_and_keeps_the_aspect_ratio(shape, expected):
    p = Preprocessing(size=(40, 40), mode="fit")
    ours, _ = prepare(picture(*shape), p)
    assert ours.shape[1:] == expected == preprocessed_size(*shape, p)


def test_native_resizes_nothing():
    p = Preprocessing(mode="native")
    image = picture(13, 29)
    ours, geometry = prepare(image, p)
    np.testing.assert_array_equal(ours, normalise(image, p))
    assert geometry.scale == (1, 1)
    assert decode_size(p) is None


def test_normalise_equals_torchvision_to_the_bit():
    p = Preprocessing()
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    expected = transforms.functional.normalize(
        torch.from_numpy(image).permute(2, 0, 1).float() / 255, p.mean, p.std
    )
    np.testing.assert_array_equal(normalise(image, p), expected.numpy())


@pytest.mark.parametrize("mode", ["crop", "squash", "fit", "native"])
def test_the_geometry_finds_the_way_back(mode):
    # A white rectangle on black: where it is seen in the input, mapped back, is where it was.
    image = np.zeros((300, 400, 3), np.uint8)
    image[100:180, 150:260] = 255
    pixels, geometry = resize(
        image, Preprocessing(size=(200, 150), mode=mode, interpolation="bilinear")
    )
    rows, columns = np.nonzero(pixels[:, :, 0] >= 128)
    seen = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]])
    back = geometry.boxes_to_original(seen)
    np.testing.assert_allclose(back, [[150, 100, 260, 180]], atol=1.5)
    np.testing.assert_allclose(geometry.boxes_to_input(back), seen, atol=1e-3)


def test_boxes_that_leave_the_picture_are_clipped_to_it():
    _, geometry = resize(picture(30, 60), Preprocessing(size=(20, 20)))
    back = geometry.boxes_to_original(np.array([[-100, -100, 900, 900]]))
    np.testing.assert_array_equal(back, [[0, 0, 60, 30]])


def test_a_reduced_picture_is_prepared_to_the_original_s_size():
    p = Preprocessing(size=(100, 100), mode="fit")
    _, geometry = prepare(picture(63, 126), p, original=(501, 1003))
    assert prepare(picture(63, 126), p, original=(501, 1003))[0].shape == (
        3,
        *preprocessed_size(501, 1003, p),
    )
    assert geometry.original == (501, 1003)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": (0, 10)}, "size must be"),
        ({"mode": "stretch"}, "mode must be"),
        ({"interpolation": "cubic"}, "interpolation must be"),
        ({"crop_pct": 1.5}, "crop_pct"),
        ({"std": (1.0, 0.0, 1.0)}, "std"),
    ],
)
def test_a_preprocessing_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Preprocessing(**fields)


def test_prepare_refuses_what_decode_would_not_give():
    with pytest.raises(InputError, match="float64"):
        prepare(np.zeros((4, 4, 3)), Preprocessing())
