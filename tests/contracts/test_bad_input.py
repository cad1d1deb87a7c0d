"""What a caller can get wrong with any registered model: one message that names the model, what was given
and what fits."""

import re
from dataclasses import fields

import pytest
import torch

from vitrail.classifiers import Classifier
from vitrail.models import build_classifier, create_backbone
from vitrail.registry import backbone_entry, list_backbones, tiny_entries
from vitrail.weights.layouts import Uninitialised, load_weights
from vitrail_runtime.errors import InputError

TINY = tiny_entries()
FAMILIES: dict[str, list[str]] = {}
for known in list_backbones():
    FAMILIES.setdefault(backbone_entry(known).family, []).append(known)
SISTERS = [names for names in FAMILIES.values() if len(names) > 1]
PAIRS = [(a, b) for names in SISTERS for a, b in zip(names, [*names[1:], names[0]], strict=True)]
FIRST = [(names[0], names[1]) for names in SISTERS]


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((2, 1, 32, 48), "3 channels, but got 1 in (2, 1, 32, 48); convert grey"),
        ((2, 4, 32, 48), "3 channels, but got 4 in (2, 4, 32, 48); convert grey"),
        ((3, 32, 48), "(batch, 3, height, width), but got 3 axes (3, 32, 48); add a batch axis"),
        ((1, 3, 0, 48), "any size from 1 x 1 pixel, but got (1, 3, 0, 48)"),
    ],
)
def test_a_batch_of_the_wrong_shape_is_named_with_what_fits(family, shape, words):
    with torch.device("meta"):
        backbone = TINY[family].cls(TINY[family].config)
        with pytest.raises(InputError, match=re.escape(words)) as caught:
            backbone(torch.zeros(shape))
    assert str(caught.value).startswith(f"{type(backbone).__name__} takes ")


def test_whole_numbers_are_no_pictures():
    with torch.device("meta"):
        backbone = TINY["cmt"].cls(TINY["cmt"].config)
        with pytest.raises(InputError, match=r"CMT takes normalised floats, but got torch.uint8"):
            backbone(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


@pytest.mark.parametrize("name", list_backbones())
def test_a_misspelt_field_names_the_model_and_the_closest(name):
    for field in fields(backbone_entry(name).config):
        if len(field.name) < 4:
            continue
        typo = field.name[:-2] + field.name[-1]
        with pytest.raises(InputError) as caught:
            create_backbone(name, **{typo: 1})
        assert f"unknown config field of {name} '{typo}'; did you mean " in str(caught.value)
        assert repr(field.name) in str(caught.value)


@pytest.mark.parametrize("name", [names[0] for names in FAMILIES.values()])
def test_a_field_that_is_like_none_lists_those_that_there_are(name):
    with pytest.raises(InputError, match=f"config field of {name} 'qqq'; known: "):
        create_backbone(name, qqq=1)


def test_a_model_for_any_size_says_so_when_it_is_given_one():
    with pytest.raises(
        InputError, match=r"swin_tiny_patch4_window7 has no image_size: .* any size"
    ):
        create_backbone("swin_tiny_patch4_window7", image_size=384)


def on_meta(name: str) -> Classifier:
    entry = backbone_entry(name)
    with torch.device("meta"), Uninitialised():
        return build_classifier(entry, entry.config, 7)


def check_weights_of_another_variant(asked: str, given: str) -> None:
    model, state = on_meta(asked), on_meta(given).state_dict()
    with pytest.raises(InputError) as caught:
        load_weights(model, state, backbone_entry(asked), config=model.backbone.config)
    message = str(caught.value)
    if "stands on the meta device" in message:
        # It fits: a twin of equal shapes, or patches and tables that are resampled to this variant
        # ("par_": with their aspect kept).
        twins = {asked.removeprefix("tf_"), given.removeprefix("tf_")}
        patches = {re.sub(r"(patch|window)\d+|par_", "", n) for n in (asked, given)}
        assert len(twins) == 1 or len(patches) == 1
        return
    assert f"does not fit {asked}" in message
    assert "in the model" in message
    assert re.search(rf"these weights look like .*\b{given}\b", message), message


@pytest.mark.parametrize(("asked", "given"), FIRST)
def test_weights_of_another_variant_of_the_family_name_it(asked, given):
    check_weights_of_another_variant(asked, given)


@pytest.mark.slow
@pytest.mark.parametrize(("asked", "given"), sorted(set(PAIRS) - set(FIRST)))
def test_weights_of_another_variant_name_it_for_every_variant(asked, given):
    check_weights_of_another_variant(asked, given)
