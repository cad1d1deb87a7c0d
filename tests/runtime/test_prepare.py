"""From upright pixels to a model's input: equal to what torchvision and timm do, for any shape."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval
from torchvision import transforms
from torchvision.models import ViT_B_16_Weights
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import (
    Geometry,
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


@pytest.mark.parametrize(
    ("width", "asked"), [(620, (32, 198)), (800, (32, 256)), (804, (32, 32)), (99999, (32, 32))]
)
def test_up_to_eight_times_the_cut_the_whole_is_resized_and_beyond_the_cut_alone(
    width, asked, monkeypatch
):
    found = []
    whole = Image.Image.resize

    def resized(self, size, *args, **more):
        found.append(size[::-1])
        return whole(self, size, *args, **more)

    monkeypatch.setattr(Image.Image, "resize", resized)
    p = Preprocessing(size=(32, 32), crop_pct=1.0)
    assert resize(np.zeros((100, width, 3), np.uint8), p)[0].shape == (32, 32, 3)
    assert found == [asked]


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


EDGES = Preprocessing(size=(800, 1333), mode="edges", interpolation="bilinear")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((480, 640), (800, 1066)),  # 640 x 800 / 480 is 1066.7
        ((640, 480), (1066, 800)),
        ((1600, 2000), (800, 1000)),
        ((500, 1000), (666, 1333)),  # the long edge binds: 500 x 1.333 is 666.5
        ((1000, 500), (1333, 666)),
        ((800, 1333), (800, 1333)),
        ((7, 7), (800, 800)),
        ((1, 5000), (1, 1333)),
        ((5000, 2), (1333, 1)),
    ],
)
def test_edges_brings_the_short_edge_to_its_size_while_the_long_one_stays_below_its_own(
    shape, expected
):
    assert preprocessed_size(*shape, EDGES) == expected
    # Either way round, of the image and of `size`.
    assert preprocessed_size(*shape[::-1], EDGES) == expected[::-1]
    turned = Preprocessing(size=(1333, 800), mode="edges")
    assert preprocessed_size(*shape, turned) == expected


def test_edges_makes_the_sizes_of_torchvisions_detectors():
    theirs = GeneralizedRCNNTransform(24, 40, [0.0] * 3, [1.0] * 3).eval()
    ours = Preprocessing(size=(24, 40), mode="edges")
    for height, width in np.random.default_rng(0).integers(5, 90, (300, 2)).tolist():
        image, _ = theirs.resize(torch.zeros(3, height, width))
        assert preprocessed_size(height, width, ours) == tuple(image.shape[1:])


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


def test_native_makes_smaller_what_has_too_many_patches():
    """96 x 160 is 6 x 10 patches of 16; at most 15 are 3 x 5: half."""
    p = Preprocessing(mode="native", patches=(15, 16))
    image = np.random.default_rng(0).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    pixels, geometry = prepare(image, p)
    assert pixels.shape == (3, 48, 80)
    assert geometry.scale == (0.5, 0.5)
    assert preprocessed_size(96, 160, p) == (48, 80)
    assert preprocessed_size(48, 81, replace(p, patches=(18, 16))) == (48, 81)
    for fields in ({"mode": "crop"}, {"mode": "native", "patches": (0, 16)}):
        with pytest.raises(InputError, match="goes with mode 'native'"):
            Preprocessing(**{"patches": (15, 16), **fields})


@pytest.mark.parametrize("mode", ["crop", "squash", "fit", "letterbox", "edges", "native"])
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


# 228 x 171 is what 200 x 150 is the 0.875 of; the picture covers it at 228 / 300. 56 / 37 is odd on one side.
PLACES = [
    ((300, 400), (200, 150), "crop", (228, 304), (14, 77)),
    ((400, 300), (200, 150), "crop", (228, 171), (14, 10)),
    ((90, 67), (33, 33), "crop", (49, 37), (8, 2)),
    ((300, 400), (200, 150), "squash", (200, 150), (0, 0)),
    ((300, 280), (200, 150), "fit", (161, 150), (0, 0)),  # 160.7
    ((401, 152), (200, 150), "fit", (200, 76), (0, 0)),  # 75.8
    ((300, 280), (200, 150), "letterbox", (160, 150), (0, 0)),  # 160.7
    ((401, 152), (200, 150), "letterbox", (200, 75), (0, 0)),
    ((30, 41), (200, 150), "native", (30, 41), (0, 0)),
    ((41, 30), (20, 31), "edges", (27, 20), (0, 0)),
    ((30, 90), (20, 31), "edges", (10, 31), (0, 0)),
]


# (height, width) -> sha256 of effdet 0.4's validation image at 48 x 64, bilinear, of `letter(height, width)`.
LETTERBOXES = {
    (50, 61): "1117680dab5eb711",
    (100, 37): "384e46a0673d41a8",
    (30, 97): "5802f02a050b112d",
    (96, 128): "c68bccb328d63ea4",
    (20, 21): "74404284b8ae155e",
}


def letter(height, width):
    y, x = np.mgrid[:height, :width]
    return np.stack([(7 * x + y) % 256, (x + 5 * y) % 256, x * y % 256], 2).astype(np.uint8)


@pytest.mark.parametrize("shape", LETTERBOXES)
def test_a_letterbox_is_effdets(shape):
    p = Preprocessing(size=(48, 64), mode="letterbox", interpolation="bilinear")
    pixels, geometry = resize(letter(*shape), p)
    assert preprocessed_size(*shape, p) == pixels.shape[:2] == (48, 64)
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == LETTERBOXES[shape]
    filled = pixels[-1, -1].tolist() == [124, 116, 104]  # ImageNet's mean
    assert filled == (shape != (96, 128))
    assert geometry.offset == (0, 0)


@pytest.mark.parametrize(("shape", "size", "mode", "whole", "offset"), PLACES)
def test_the_geometry_is_that_of_the_resize_and_the_cut(shape, size, mode, whole, offset):
    p = Preprocessing(size=size, mode=mode)
    _, geometry = resize(picture(*shape), p)
    assert geometry == Geometry(shape, (whole[0] / shape[0], whole[1] / shape[1]), offset)
    # A JPEG that was decoded at a fraction lies where the whole picture would.
    _, reduced = prepare(picture(-(-shape[0] // 2), -(-shape[1] // 2)), p, original=shape)
    assert mode == "native" or reduced == geometry


def test_boxes_go_to_the_input_and_back_by_scale_and_offset():
    geometry = Geometry(original=(300, 400), scale=(0.76, 0.5), offset=(14, 77))
    boxes = np.array([[200, 50, 360, 290], [0, 0, 400, 300]], np.float64)
    there = np.array([[23, 24, 103, 206.4], [-77, -14, 123, 214]])
    np.testing.assert_allclose(geometry.boxes_to_input(boxes), there, rtol=1e-6)
    np.testing.assert_allclose(geometry.boxes_to_original(there), boxes, rtol=1e-6, atol=1e-4)
    outside = geometry.boxes_to_original(np.array([[-78, -15, 124, 215]]))
    np.testing.assert_array_equal(outside, [[0, 0, 400, 300]])
    for moved in (geometry.boxes_to_input(boxes), geometry.boxes_to_original(there)):
        assert moved.dtype == np.float32
    assert geometry.boxes_to_original(np.zeros((0, 4))).shape == (0, 4)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"size": (64, 32)}, (110, 54)),  # 1.5 times 73 x 36, up
        ({"size": (64, 32), "crop_pct": 1.0}, (96, 48)),
        ({"size": (65, 32), "mode": "squash"}, (98, 48)),
        ({"size": (65, 32), "mode": "fit"}, (98, 48)),
        ({"size": (65, 32), "mode": "letterbox"}, (98, 48)),
        ({"mode": "native"}, None),
        ({"size": (65, 101), "mode": "edges"}, (98, 98)),
    ],
)
def test_a_jpeg_is_decoded_at_one_and_a_half_times_what_the_resize_makes(fields, expected):
    assert decode_size(Preprocessing(**fields)) == expected


def test_preprocessing_is_torchvisions_for_imagenet_without_a_word():
    theirs = ViT_B_16_Weights.IMAGENET1K_V1.transforms()
    p = Preprocessing()
    assert (list(p.mean), list(p.std)) == (theirs.mean, theirs.std)
    assert [p.size[0] / p.crop_pct] == theirs.resize_size
    assert [*p.size] == theirs.crop_size * 2
    assert (p.mode, p.interpolation) == ("crop", "bicubic")


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
