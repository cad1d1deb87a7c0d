"""The hybrid equals timm's, at the paper's size and others."""

import pytest
import torch
from torch import nn

from tests.backbones.peers import ours_from
from tests.parity import assert_close_to_peer, randomise
from vitrail import create_backbone, create_model
from vitrail.backbones.vit_hybrid import ViTHybridConfig, pad_same
from vitrail.registry import backbone_entry
from vitrail_runtime.errors import InputError

timm = pytest.importorskip("timm")


@pytest.fixture(autouse=True)
def wide_interpolation(monkeypatch):
    """timm casts its position table to float32 before it resamples it. Parameters are born in float32, so
    the cast loses nothing; this keeps the resampling itself from rounding."""
    narrow = nn.functional.interpolate

    def wide(x, *args, **options):
        return narrow(x.double(), *args, **options)

    monkeypatch.setattr(nn.functional, "interpolate", wide)


def image(height, width, batch=1):
    generator = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


def peer_of(name, **options):
    """timm's model with random weights in float64, taking any image size as ours does."""
    options = {"dynamic_img_size": True, "dynamic_img_pad": True} | options
    peer = timm.create_model(f"{name}_224", **options)
    randomise(peer)
    return peer.double().eval()


def assert_equal_at(peer, ours, sizes):
    for height, width in sizes:
        x = image(height, width)
        with torch.no_grad():
            assert_close_to_peer(ours(x), peer(x))


def test_the_tiny_hybrid_equals_timm_at_any_size():
    """A stem of stride 4 and patches of 8 x 8, on sizes that neither divides."""
    peer = peer_of("vit_tiny_r_s16_p8", depth=2)
    ours = create_model("vit_tiny_r_s16_p8", depth=2, weights=peer.state_dict()).double().eval()
    assert ours.weights_report.layout == "timm"
    assert_equal_at(peer, ours, [(224, 224), (160, 96), (75, 131), (33, 64)])


def test_a_shallow_hybrid_with_stages_equals_timm_at_any_size():
    """Two stages, so that strided bottlenecks and projections stand at odd and even sizes."""
    from timm.models.vision_transformer_hybrid import HybridEmbed, VisionTransformer, _resnetv2

    layers, sizes = (1, 2), [(64, 64), (96, 33), (37, 70), (1, 5)]
    shape = {"embed_dim": 48, "depth": 2, "num_heads": 3}

    def embed(**options):
        return HybridEmbed(_resnetv2(layers), **options)

    peer = VisionTransformer(
        img_size=64,
        patch_size=1,
        embed_layer=embed,
        dynamic_img_size=True,
        dynamic_img_pad=True,
        num_classes=7,
        **shape,
    )
    randomise(peer)
    fields = {**shape, "layers": layers, "patch_size": 8, "image_size": 64}
    ours = create_model("vit_base_r50_s16", num_classes=7, weights=peer.state_dict(), **fields)
    assert_equal_at(peer.double().eval(), ours.double().eval(), sizes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("vit_tiny_r_s16_p8", [(224, 224), (160, 96)]),
        ("vit_small_r26_s32", [(224, 224), (160, 96)]),
        ("vit_base_r50_s16", [(224, 224), (100, 60)]),
    ],
)
def test_each_variant_equals_timm(name, sizes):
    peer = peer_of(name, num_classes=1000)
    assert_equal_at(peer, ours_from(peer, name, "timm"), sizes)


def test_weights_for_384_pixels_fit_a_model_of_384_as_they_are():
    with torch.device("meta"):
        shapes = timm.create_model("vit_tiny_r_s16_p8_384", depth=1).state_dict()
    state = {key: torch.ones(value.shape) for key, value in shapes.items()}
    ours = create_model("vit_tiny_r_s16_p8", depth=1, image_size=384, weights=state)
    assert ours.weights_report.resampled == ()
    assert len(ours.weights_report.used) == len(state)


def test_a_table_of_another_image_size_is_resampled_as_timm_does():
    peer = peer_of("vit_tiny_r_s16_p8", depth=1)
    ours = create_model(
        "vit_tiny_r_s16_p8", depth=1, image_size=(128, 320), weights=peer.state_dict()
    )
    assert "backbone.pos_embed from (1, 50, 192) to (1, 41, 192)" in str(ours.weights_report)
    at_size = timm.create_model("vit_tiny_r_s16_p8_224", depth=1, img_size=(128, 320))
    from timm.models.vision_transformer_hybrid import checkpoint_filter_fn

    at_size.load_state_dict(checkpoint_filter_fn(peer.float().state_dict(), at_size))
    table = ours.backbone.pos_embed
    torch.testing.assert_close(table, at_size.pos_embed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (6, 7), (8, 8)])
@pytest.mark.parametrize("kernel", [3, 7])
def test_same_padding_gives_the_ceiling(size, kernel):
    x = pad_same(torch.ones(1, 1, *size), kernel)
    out = nn.functional.conv2d(x, torch.ones(1, 1, kernel, kernel), stride=2)
    assert out.shape[-2:] == ((size[0] + 1) // 2, (size[1] + 1) // 2)


def test_scaling_a_kernel_changes_nothing():
    """That is what weight standardisation is for."""
    backbone = create_backbone("vit_tiny_r_s16_p8", depth=1).eval()
    x = image(64, 32).float()
    with torch.no_grad():
        before = backbone(x).maps["c5"]
        backbone.patch_embed.resnet.stem.conv.weight *= 7
        after = backbone(x).maps["c5"]
    torch.testing.assert_close(before, after)


def test_packed_images_are_refused_with_the_reason():
    from vitrail import packing

    backbone = create_backbone("vit_tiny_r_s16_p8", depth=1)
    packs = packing.pack([torch.zeros(3, 64, 64)], patch_size=32, max_tokens=64)
    with pytest.raises(InputError, match="cannot take packed images"):
        backbone.forward_packed(packs[0])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"patch_size": 24}, "multiple of the ResNet's stride 16"),
        ({"stem_width": 40}, "multiple of 32"),
    ],
)
def test_a_config_that_cannot_be_built_is_refused(fields, message):
    config = backbone_entry("vit_base_r50_s16").config
    with pytest.raises(InputError, match=message):
        ViTHybridConfig(**{**vars(config), **fields})


def test_a_second_stem_is_refused():
    with pytest.raises(InputError, match="stem is 'conv', but ViTHybrid has a stem of its own"):
        create_backbone("vit_tiny_r_s16_p8", stem="conv")


def test_weights_of_a_plain_vit_are_told_from_a_hybrids():
    peer = timm.create_model("vit_tiny_patch16_224")
    with pytest.raises(InputError, match=r"these weights look like .*vit_tiny_patch16"):
        create_model("vit_tiny_r_s16_p8", weights=peer.state_dict())
