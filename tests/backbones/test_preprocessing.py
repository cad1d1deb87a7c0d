"""What each model is shown: the numbers that its authors, timm and torchvision evaluate with."""

from typing import Any

import pytest

from vitrail.models import list_models
from vitrail.registry import backbone_entry
from vitrail.weights.catalogue import RELEASED

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

# Names whose first timm weights were trained for another size than the paper's: what stands for them.
INSTEAD = {
    # The paper's sizes, which timm's own training left.
    **{f"efficientnet_b{i}": f"tf_efficientnet_b{i}.aa_in1k" for i in range(1, 8)},
    "vit_large_patch32": "vit_large_patch32_224.orig_in21k",
    "vit_base_r50_s16": "vit_base_r50_s16_224.orig_in21k",
    # Without weights, timm's entry for the architecture.
    "vit_large_patch14": "vit_large_patch14_224",
    "vit_giant_patch14": "vit_giant_patch14_224",
    "vit_gigantic_patch14": "vit_gigantic_patch14_224",
    "mobilenetv2_035": "mobilenetv2_035",
    "mobilenetv2_075": "mobilenetv2_075",
    "mobilenetv3_large_075": "mobilenetv3_large_100.ra_in1k",
    **{
        f"mobilenetv1_{width}": "mobilenetv1_100.ra4_e3600_r224_in1k"
        for width in ("025", "050", "075")
    },
}
TORCHVISIONS = {f"resnet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)}


def timms(name: str) -> str | None:
    released = [
        s.removeprefix("hf:timm/") for s in RELEASED.get(name, ()) if s.startswith("hf:timm/")
    ]
    return INSTEAD.get(name) or (released[0] if released else None)


def shown(name: str) -> dict[str, Any]:
    own = backbone_entry(name).preprocessing
    assert own.mode == "crop"
    return {k: getattr(own, k) for k in ("size", "crop_pct", "interpolation", "mean", "std")}


NATIVE = [n for n in list_models() if backbone_entry(n).family == "navit"]


@pytest.mark.parametrize(
    "name",
    [n for n in list_models() if timms(n) and n not in TORCHVISIONS and n not in NATIVE],
)
def test_images_are_prepared_as_timm_prepares_them(name):
    cfg = timm.models.get_pretrained_cfg(timms(name))
    assert cfg.crop_mode == "center"
    assert shown(name) == {
        "size": tuple(cfg.input_size[1:]),
        "crop_pct": cfg.crop_pct,
        "interpolation": cfg.interpolation,
        "mean": tuple(cfg.mean),
        "std": tuple(cfg.std),
    }


@pytest.mark.parametrize("name", TORCHVISIONS)
def test_resnets_are_shown_images_as_torchvision_shows_them(name):
    preset = torchvision.models.get_model_weights(name).IMAGENET1K_V1.transforms()
    assert shown(name) == {
        "size": (preset.crop_size[0],) * 2,
        "crop_pct": preset.crop_size[0] / preset.resize_size[0],
        "interpolation": preset.interpolation.value,
        "mean": tuple(preset.mean),
        "std": tuple(preset.std),
    }


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}


@pytest.mark.parametrize(
    ("name", "size", "crop_pct", "numbers"),
    [
        # DeiT's evaluation: the short side to 256 / 224 of the size.
        ("cmt_ti", 160, 224 / 256, IMAGENET),
        ("cmt_xs", 192, 224 / 256, IMAGENET),
        ("cmt_s", 224, 224 / 256, IMAGENET),
        ("cmt_b", 256, 224 / 256, IMAGENET),
        # The official scripts leave mean, std and crop to the models' own entries, which are ViT's.
        ("deepvit_s", 224, 0.9, HALF),
        ("deepvit_l", 224, 0.9, HALF),
        ("deepvit_16b", 224, 0.9, HALF),
        ("deepvit_24b", 224, 0.9, HALF),
        ("deepvit_32b", 224, 0.9, HALF),
        # Its code trains no classifier: the numbers are those of its dense configs.
        ("vit_comer_tiny", 224, 0.9, IMAGENET),
        ("vit_comer_small", 224, 0.9, IMAGENET),
        ("vit_comer_base", 224, 0.9, IMAGENET),
        ("vit_comer_large", 224, 0.9, IMAGENET),
    ],
)
def test_models_that_timm_has_not_are_shown_images_as_their_official_code_does(
    name, size, crop_pct, numbers
):
    want = {"size": (size, size), "crop_pct": crop_pct, "interpolation": "bicubic", **numbers}
    assert shown(name) == want


@pytest.mark.parametrize("name", NATIVE)
def test_navit_is_shown_images_at_their_own_shape(name):
    own = backbone_entry(name).preprocessing
    assert (own.mode, own.interpolation, own.mean, own.std) == (
        "native",
        "bicubic",
        HALF["mean"],
        HALF["std"],
    )
    if timms(name):
        cfg = timm.models.get_pretrained_cfg(timms(name))
        assert (own.mean, own.std) == (tuple(cfg.mean), tuple(cfg.std))


def test_every_model_is_compared_with_somebody():
    alone = [n for n in list_models() if not timms(n) and n not in TORCHVISIONS]
    families = {"cmt", "deepvit", "navit", "resnetdcn", "vitcomer"}
    assert {backbone_entry(n).family for n in alone} == families
    assert len(alone) == 21
