"""What a hub repository says of its model, word by word as timm and transformers write it."""

from dataclasses import replace

import pytest

from vitrail.weights.described import class_list, described
from vitrail_runtime.preprocess import Preprocessing

DEFAULT = Preprocessing(size=(96, 96), crop_pct=0.7, interpolation="nearest", mode="crop")


def of_timm(**cfg):
    return described({"architecture": "x_1", "pretrained_cfg": cfg}, {}, DEFAULT)


def of_transformers(**data):
    return described({}, data, DEFAULT).preprocessing


def test_everything_that_timm_says_is_taken():
    found = of_timm(
        input_size=[3, 224, 256],
        crop_pct=0.9,
        crop_mode="center",
        interpolation="bicubic",
        mean=[0.1, 0.2, 0.3],
        std=[0.4, 0.5, 0.6],
    )
    assert found.architecture == "x_1"
    assert found.preprocessing == Preprocessing(
        size=(224, 256),
        crop_pct=0.9,
        mode="crop",
        interpolation="bicubic",
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
    )
    assert of_timm(crop_pct=1).preprocessing == replace(DEFAULT, crop_pct=1.0)
    assert of_timm(crop_mode="squash").preprocessing == replace(DEFAULT, mode="squash")


@pytest.mark.parametrize(
    "cfg",
    [
        {"input_size": [224, 224]},
        {"interpolation": "random"},
        {"crop_pct": "0.9"},
        {"mean": [0.5]},
        {"std": 0.5},
        {"crop_mode": "border"},
    ],
)
def test_what_cannot_be_read_leaves_the_default(cfg):
    assert of_timm(**cfg).preprocessing == DEFAULT


def test_timms_word_comes_before_the_preprocessors():
    config = {"pretrained_cfg": {"crop_pct": 0.9}}
    found = described(config, {"image_mean": [0, 0, 0], "size": 32}, DEFAULT)
    assert found.preprocessing == replace(DEFAULT, crop_pct=0.9)
    assert found.architecture == ""
    assert described({"architecture": 3}, {}, DEFAULT).architecture == ""


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        # A size without a crop: both sides are pressed to it.
        ({"size": 64}, {"size": (64, 64), "mode": "squash", "crop_pct": 1.0}),
        (
            {"size": {"height": 64, "width": 80}},
            {"size": (64, 80), "mode": "squash", "crop_pct": 1.0},
        ),
        (
            {"size": 64, "crop_size": 32, "do_center_crop": False},
            {"size": (64, 64), "mode": "squash", "crop_pct": 1.0},
        ),
        # A crop: the short side goes to `size`, and the centre is cut.
        (
            {
                "size": {"shortest_edge": 64},
                "crop_size": {"height": 48, "width": 40},
                "do_center_crop": True,
            },
            {"size": (48, 40), "mode": "crop", "crop_pct": 0.75},
        ),
        ({"resample": 0}, {"interpolation": "nearest"}),
        ({"resample": 1}, {"interpolation": "lanczos"}),
        ({"resample": 2}, {"interpolation": "bilinear"}),
        ({"resample": 3}, {"interpolation": "bicubic"}),
        ({"resample": 9, "size": "large"}, {}),
        ({"image_mean": [1, 2, 3], "image_std": [4, 5, 6]}, {"mean": (1, 2, 3), "std": (4, 5, 6)}),
    ],
)
def test_everything_that_transformers_says_is_taken(data, changes):
    assert of_transformers(**data) == replace(DEFAULT, **changes)


def test_pillows_numbers_are_those_of_its_filters():
    from PIL import Image

    for name in ("nearest", "lanczos", "bilinear", "bicubic"):
        number = int(getattr(Image.Resampling, name.upper()))
        assert of_transformers(resample=number).interpolation == name


@pytest.mark.parametrize(
    ("config", "names"),
    [
        ({}, None),
        ({"classes": ["a", "b"]}, ("a", "b")),
        ({"label_names": ["a", "b"]}, ("a", "b")),
        ({"classes": ["a"], "label_names": ["b"]}, ("a",)),
        # Labels count in the order of their numbers, not of the file.
        ({"id2label": {"1": "b", "0": "a", "2": 3}}, ("a", "b", "3")),
        ({"id2label": {"0": "a", "2": "c"}}, None),
        ({"id2label": {"0": "LABEL_0", "1": "b"}}, ("LABEL_0", "b")),
        ({"classes": "ab"}, None),
        ({"classes": ["a", 1]}, None),
        ({"classes": ["x", "y", "x", "x"]}, ("x (0)", "y", "x (2)", "x (3)")),
    ],
)
def test_class_names_stand_in_the_order_of_the_labels(config, names):
    assert class_list(config) == names
