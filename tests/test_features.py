"""What heads ask of a backbone: strides, not names."""

import pytest
import torch

from vitrail.features import (
    Features,
    FeatureSpec,
    adapt_levels,
    check_images,
    level_name,
    pad_to_multiple,
    pyramid_specs,
)
from vitrail_runtime.errors import InputError


@pytest.mark.parametrize(
    ("stride", "name"), [(4, "c2"), (8, "c3"), (14, "c4"), (16, "c4"), (32, "c5"), (64, "c6")]
)
def test_a_level_is_named_by_the_nearest_power_of_two(stride, name):
    assert level_name(stride) == name


def test_features_are_shown_by_names_and_shapes():
    features = Features({"c2": torch.zeros(2, 8, 16, 24), "c3": torch.zeros(2, 16, 8, 12).half()})
    assert (
        repr(features)
        == "Features(c2: 2 x 8 x 16 x 24 float32 cpu, c3: 2 x 16 x 8 x 12 float16 cpu)"
    )
    assert repr(features._replace(prefix=torch.zeros(2, 1, 8))).endswith(
        ", prefix: 2 x 1 x 8 float32 cpu)"
    )


def test_a_pyramid_passes_its_own_strides_through_untouched():
    specs = pyramid_specs((8, 16, 24, 32), first_stride=4)
    adapt = adapt_levels(specs)
    maps = {k: torch.randn(2, s.channels, 64 // s.stride, 96 // s.stride) for k, s in specs.items()}
    out = adapt(Features(maps))
    assert list(out) == ["c2", "c3", "c4", "c5"]
    assert all(out[k] is maps[k] for k in maps)
    assert adapt.feature_specs == specs


def test_a_plain_vit_of_stride_14_gives_half_strides_and_says_so():
    adapt = adapt_levels({"c4": FeatureSpec(6, 14)})
    assert [s.stride for s in adapt.feature_specs.values()] == [3.5, 7, 14, 28]
    out = adapt(Features({"c4": torch.randn(1, 6, 5, 7)}))
    assert [tuple(v.shape[2:]) for v in out.values()] == [(20, 28), (10, 14), (5, 7), (3, 4)]


def test_finer_levels_are_bilinear_and_coarser_ones_strided():
    x = torch.arange(24.0).reshape(1, 1, 4, 6)
    out = adapt_levels({"c4": FeatureSpec(1, 16)}, (8, 32))(Features({"c4": x}))
    finer = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
    torch.testing.assert_close(out["c3"], finer)
    torch.testing.assert_close(out["c5"], x[..., ::2, ::2])


def test_a_late_pyramid_serves_early_strides_from_its_finest_map():
    adapt = adapt_levels(pyramid_specs((4, 8, 16), first_stride=16))
    assert {k: v[0] for k, v in adapt.sources.items()} == {
        "c2": "c4",
        "c3": "c4",
        "c4": "c4",
        "c5": "c5",
    }
    assert [s.channels for s in adapt.feature_specs.values()] == [4, 4, 4, 8]


def test_of_several_maps_of_one_stride_the_deepest_serves():
    adapt = adapt_levels(dict.fromkeys(("b2", "b5", "b11"), FeatureSpec(4, 16)), (8, 16, 32))
    assert {source for source, _ in adapt.sources.values()} == {"b11"}


def test_of_two_equally_near_strides_the_finer_serves():
    adapt = adapt_levels({"c3": FeatureSpec(3, 8), "c5": FeatureSpec(5, 32)}, (16,))
    assert adapt.sources == {"c4": ("c3", 0.5)}
    assert adapt.feature_specs == {"c4": FeatureSpec(3, 16)}
    assert isinstance(adapt.feature_specs["c4"].stride, int)


def test_a_pyramid_halves_its_maps_from_the_first_stride_on():
    want = {"c3": FeatureSpec(5, 8), "c4": FeatureSpec(7, 16), "c5": FeatureSpec(9, 32)}
    assert pyramid_specs((5, 7, 9), first_stride=8) == want
    assert list(adapt_levels(want).feature_specs) == ["c2", "c3", "c4", "c5"]


def test_no_maps_is_an_error():
    with pytest.raises(InputError, match="at least one map"):
        adapt_levels({})


def test_padding_adds_zeros_right_and_below_and_copies_nothing_that_fits():
    x = torch.ones(1, 2, 5, 8)
    padded = pad_to_multiple(x, 4)
    assert padded.shape == (1, 2, 8, 8)
    assert padded[..., :5, :].eq(1).all()
    assert padded[..., 5:, :].eq(0).all()
    assert pad_to_multiple(x, (5, 4)) is x
    assert pad_to_multiple(x, (4, 5)).shape == (1, 2, 8, 10)  # (height, width)
    check_images(torch.zeros(2, 3, 1, 1), torch.nn.Identity())


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(3, 8, 8), "add a batch axis"),
        (torch.zeros(1, 4, 8, 8), "takes 3 channels, but got 4"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "normalised floats"),
        (torch.zeros(1, 3, 0, 8), "any size from 1 x 1 pixel"),
        (torch.zeros(1, 3, 8, 0), "any size from 1 x 1 pixel"),
    ],
)
def test_wrong_images_are_named_with_what_to_do(images, words):
    with pytest.raises(InputError, match=words):
        check_images(images, torch.nn.Identity())


@pytest.mark.parametrize("wanted", [(14, 16), (0, 8), (8, 8)])
def test_strides_of_one_level_are_refused(wanted):
    with pytest.raises(InputError, match="different levels"):
        adapt_levels({"c4": FeatureSpec(6, 16)}, wanted)
