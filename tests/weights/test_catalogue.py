"""The catalogue's names are real: timm's own list of released weights has them."""

import re
from dataclasses import fields

import pytest
import torch

from vitrail.models import create_model, list_models
from vitrail.registry import backbone_entry
from vitrail.weights import hub
from vitrail.weights.catalogue import RELEASED, downloads, weight_sources
from vitrail.weights.layouts import best_fit


@pytest.fixture(scope="module")
def timm_configs():
    timm = pytest.importorskip("timm")
    from timm.models import get_pretrained_cfg

    names = timm.list_pretrained()
    return {cfg.hf_hub_id: cfg for cfg in map(get_pretrained_cfg, names) if cfg.hf_hub_id}


def test_every_name_is_a_model():
    assert set(RELEASED) <= set(list_models())


def test_every_timm_name_is_one_that_timm_has(timm_configs):
    for sources in RELEASED.values():
        for source in sources:
            if source.startswith("hf:timm/"):
                assert source.removeprefix("hf:") in timm_configs


@pytest.mark.parametrize("name", RELEASED)
def test_every_timm_weight_is_of_this_very_model(name):
    """The architecture is ours with a size, or with the width that timm counts in per cent."""
    for source in RELEASED[name]:
        if source.startswith("hf:timm/"):
            architecture = source.removeprefix("hf:timm/").split(".")[0]
            assert re.fullmatch(rf"{name}(_\d+)?", architecture)


WORDS = {  # how transformers' repositories call the sizes
    "xxs": "xx-small",
    "xs": "x-small",
    "s": "small",
    "distilled": "distilled",
    "reg4": "with-registers",
    "dinov2": "dinov2",
}


@pytest.mark.parametrize("name", RELEASED)
def test_every_repository_of_transformers_says_the_models_size(name):
    words = [WORDS.get(word, word) for word in name.split("_")]
    for source in RELEASED[name]:
        repo = source.removeprefix("hf:").partition("/")[2]
        if source.startswith("hf:") and not source.startswith("hf:timm/"):
            missing = [w for w in words if w not in repo and not w.startswith("patch14")]
            assert missing in ([], ["vit"]), (source, missing)
            assert not set(re.findall(r"tiny|small|base|large|giant|huge", repo)) - set(
                re.findall(r"tiny|small|base|large|giant|huge", " ".join(words))
            )


def test_every_file_of_dinov2_is_the_one_that_timm_converted(timm_configs):
    for name in list_models("*dinov2"):
        assert downloads(name) == [timm_configs[f"timm/{name}.lvd142m"].url]


def test_files_of_the_other_authors_are_called_as_the_models():
    for i in range(6):
        (address,) = downloads(f"efficientvit_m{i}")
        assert address.endswith(f"/efficientvit_m{i}.pth")
    for short, long in (("ti", "tiny"), ("xs", "xs"), ("s", "small"), ("b", "base")):
        (address,) = downloads(f"cmt_{short}")
        assert address.endswith(f"/cmt_{long}.pth")


def test_the_default_comes_first_and_what_is_not_listed_has_none():
    assert weight_sources("vit_base_patch16")[0] == (
        "hf:timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"
    )
    assert downloads("resnet18") == ["https://download.pytorch.org/models/resnet18-f37072fd.pth"]
    assert weight_sources("deepvit_16b") == downloads("deepvit_16b") == []


def test_every_source_is_a_hub_name_or_an_address():
    for sources in RELEASED.values():
        for source in sources:
            if source.startswith("hf:"):
                repo, file, revision = hub.parse(source)
                assert repo == source.removeprefix("hf:")
                assert file is None
                assert revision is None, "no invented revisions"
            else:
                assert source.startswith("https://")
                assert source.endswith((".pth", "dvit_repo"))


@pytest.mark.parametrize("name", list_models())
def test_what_is_listed_for_weights_can_be_given_as_weights(name):
    assert all(hub.parse(source) for source in weight_sources(name))
    assert set(weight_sources(name)).isdisjoint(downloads(name))
    assert [*weight_sources(name), *downloads(name)] == list(RELEASED.get(name, ()))


@pytest.mark.parametrize(
    "name", [n for n in RELEASED if any("download.pytorch.org" in d for d in downloads(n))]
)
def test_every_file_of_torchvisions_is_the_one_that_it_loads(name):
    models = pytest.importorskip("torchvision").models
    theirs = {
        "mobilenetv2_100": "mobilenet_v2",
        "mobilenetv3_large": "mobilenet_v3_large",
        "mobilenetv3_small": "mobilenet_v3_small",
    }.get(name, name)
    addresses = {w.url for w in models.get_model_weights(theirs)}
    assert set(downloads(name)) <= addresses


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_every_timm_release_has_the_keys_and_shapes_that_the_model_takes(name, timm_configs):
    """By shapes alone: timm's model and ours on `meta`, the keys carried over by the key map."""
    import timm

    entry = backbone_entry(name)
    for source in RELEASED[name]:
        if not source.startswith("hf:timm/"):
            continue
        released = source.removeprefix("hf:timm/")
        size = timm_configs[f"timm/{released}"].input_size[1]
        has_size = any(f.name == "image_size" for f in fields(entry.config))
        with torch.device("meta"):
            theirs = timm.create_model(released).state_dict()
            # NaFlexViT's table is of 16 x 16 patches, whatever size the images had.
            own = has_size and not name.startswith("naflexvit")
            options = {"image_size": size} if own else {}
            ours = create_model(
                name, num_classes=timm_configs[f"timm/{released}"].num_classes or 3, **options
            )
        fit = best_fit(theirs, ours.state_dict(), entry, ours.backbone.config)
        assert fit is not None
        assert (fit.missing, fit.extra, fit.shapes, fit.failure) == ([], [], [], ""), released
        assert fit.resampled == [], released
