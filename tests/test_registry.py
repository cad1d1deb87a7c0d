"""Names: a duplicate raises, an unknown one lists the closest; fields of a config likewise."""

import pytest

import vitrail
from vitrail.backbones.efficientvit import EfficientViT, EfficientViTConfig, StudiedViTConfig
from vitrail.registry import (
    backbone_entry,
    config_class,
    list_backbones,
    register_backbone,
    rename_keys,
    tiny_entries,
    unknown,
    with_fields,
)
from vitrail_runtime.errors import InputError


def test_a_duplicate_family_or_name_raises():
    tiny = EfficientViTConfig(
        dims=(32, 32, 32), depths=(1, 1, 1), num_heads=(1, 1, 1), kernels=(3,)
    )
    with pytest.raises(ValueError, match="family 'efficientvit' is registered already"):
        register_backbone(EfficientViT, {}, tiny=tiny)

    class Other(EfficientViT):
        pass

    with pytest.raises(ValueError, match="'efficientvit_m0' is registered already"):
        register_backbone(Other, {"efficientvit_m0": tiny}, tiny=tiny)


@pytest.mark.parametrize(
    ("given", "close"),
    [("efficientvit-m0", "efficientvit_m0"), ("ViT_Small_Patch16", "vit_small_patch16")],
)
def test_an_unknown_model_lists_the_closest(given, close):
    with pytest.raises(InputError, match=close):
        vitrail.create_model(given)


def test_an_unknown_config_field_lists_the_closest():
    with pytest.raises(InputError, match=r"unknown config field of efficientvit_m0 .*'image_size'"):
        vitrail.create_backbone("efficientvit_m0", imagesize=64)


def test_without_a_close_name_the_known_ones_are_shown():
    assert (
        str(unknown("verb", "zzz", ["train", "eval"])) == "unknown verb 'zzz'; known: eval, train"
    )


def test_fields_are_replaced_in_a_copy():
    config = vitrail.create_backbone("efficientvit_m0").config
    assert with_fields("efficientvit_m0", config, {"window_size": 5}).window_size == 5
    assert config.window_size == 7


def test_a_study_adds_its_fields_to_the_names_of_a_family_and_of_those_that_inherit_from_it():
    plain = backbone_entry("deit_tiny_patch16").config
    narrow = with_fields("deit_tiny_patch16", plain, {"qk_dim": 8, "depth": 2})
    assert type(narrow) is StudiedViTConfig
    assert (narrow.qk_dim, narrow.attn_every, narrow.depth, narrow.embed_dim) == (8, 1, 2, 192)
    deep = backbone_entry("deepvit_s").config
    both = with_fields("deepvit_s", deep, {"attn_every": 2})
    assert isinstance(both, StudiedViTConfig)
    assert isinstance(both, type(deep))
    assert (both.attn_every, both.mix_from, both.stem) == (2, 11, "conv")
    assert both == with_fields("deepvit_s", deep, {"attn_every": 2}), "one class for equal fields"
    assert type(with_fields("deit_tiny_patch16", plain, {"depth": 2})) is type(plain)
    of_two = with_fields("deit_tiny_patch16", narrow, {"stem": "conv"})
    assert (of_two.qk_dim, of_two.stem) == (8, "conv")
    others = backbone_entry("efficientvit_m0").config
    assert config_class(type(others), {"qk_dim", "stem"}) is type(others)
    with pytest.raises(InputError, match="did you mean 'attn_every'"):
        with_fields("deit_tiny_patch16", plain, {"attn_evry": 2})


def test_names_are_listed_by_pattern_and_sorted():
    names = list_backbones("efficientvit_*")
    assert names == [f"efficientvit_m{i}" for i in range(6)]
    assert vitrail.list_models("efficientvit_*", task="classify") == names
    with pytest.raises(InputError, match="unknown task 'fly'"):
        vitrail.list_models(task="fly")


def test_a_variant_has_its_own_preprocessing_or_the_familys():
    small, large = (backbone_entry(f"swin_base_patch4_window{w}") for w in (7, 12))
    assert (small.preprocessing.size, large.preprocessing.size) == ((224, 224), (384, 384))
    assert {small.family, large.family} == {"swin"}
    assert tiny_entries()["swin"].name == "tiny_swin"
    tiny_entries().clear()
    assert tiny_entries()


def test_a_backbone_without_tables_says_that_it_has_no_image_size():
    with pytest.raises(InputError, match="resnet18 has no image_size: it takes images of any size"):
        vitrail.create_backbone("resnet18", image_size=64)


def test_many_known_names_are_cut_after_twelve():
    names = [f"{letter}{letter}" for letter in "abcdefghijklmn"]
    assert str(unknown("verb", "0", names)) == (
        "unknown verb '0'; known: aa, bb, cc, dd, ee, ff, gg, hh, ii, jj, kk, ll, ..."
    )
    assert (
        str(unknown("verb", "evl", ["Eval", "train"])) == "unknown verb 'evl'; did you mean 'Eval'?"
    )


def test_keys_are_renamed_by_rules_in_order():
    state = {"a.0.x": 1, "b": 2}
    assert rename_keys(state, [(r"^a\.", "c."), (r"\.0\.", ".first.")]) == {"c.first.x": 1, "b": 2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"classes": ["a", "a"]}, "more than once"),
        ({"classes": "cat"}, "list of names"),
        ({"classes": ["a", "b"], "num_classes": 3}, "drop num_classes"),
        ({"num_classes": 0}, "at least one class"),
        ({"num_classes": 2, "weights": {"neck": "x.pth"}}, "take the keys 'backbone', 'head'"),
    ],
)
def test_wrong_classes_and_parts_are_said(arguments, words):
    with pytest.raises(InputError, match=words):
        vitrail.create_model("efficientvit_m0", **arguments)
