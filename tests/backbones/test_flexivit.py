"""One network for all patch sizes, against timm's models of each."""

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed
from timm.models.vision_transformer import checkpoint_filter_fn

import vitrail
from tests.backbones.peers import assert_equals_peer
from tests.parity import randomise
from vitrail.backbones.flexivit import SIZES
from vitrail.backbones.vit import PatchEmbed
from vitrail.models import at_own_shape, at_patch_size, use_patch_sizes
from vitrail.packing import pack
from vitrail_runtime.errors import InputError

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}


@pytest.fixture(autouse=True)
def in_float64(monkeypatch):
    """timm takes the pseudo-inverse in float32, 3e-6 off; its code is the same."""
    monkeypatch.setattr("timm.layers.patch_embed.DTYPE_INTERMEDIATE", torch.float64)


OTHER_SIZES = [p for p in SIZES if p not in (12, 16)]


def peer(patch_size: int = 16) -> Any:
    torch.manual_seed(0)
    made = timm.create_model(
        "flexivit_small", img_size=240, patch_size=patch_size, num_classes=7, **SMALL
    )
    randomise(made)
    return made.double().eval()


def ours(name: str = "flexivit_small", **fields: Any) -> Any:
    made = vitrail.create_model(name, num_classes=7, **{**SMALL, **fields})
    randomise(made)
    return made.double().eval()


@pytest.mark.parametrize("size", [3, 8, 13, 24, 48])
def test_the_projection_is_resized_as_timm_resizes_it(size):
    torch.manual_seed(0)
    embed = PatchEmbed(16, 10).double()
    images = torch.randn(2, 3, 50, 70, dtype=torch.float64)
    weight = resample_patch_embed(embed.proj.weight.detach(), [size, size])
    pad = (0, -70 % size, 0, -50 % size)
    want = F.conv2d(F.pad(images, pad), weight, embed.proj.bias, size)
    got = embed(images, size)
    assert (got - want).abs().max() <= 1e-9 * want.abs().max()
    (packed,) = pack(list(images[:1]), size)
    tokens = embed.project(packed.patches, size)
    torch.testing.assert_close(tokens, got[0].flatten(1).T, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", [8, 24])
def test_gradients_reach_the_base_projection_through_the_pseudo_inverse(size):
    embed = PatchEmbed(16, 4).double()
    images = torch.randn(1, 3, 48, 48, dtype=torch.float64)
    weights = torch.randn(4, 48 // size, 48 // size, dtype=torch.float64)
    (embed(images, size)[0] * weights).sum().backward()
    # The resize as a matrix, from torch's own resizing of every single pixel.
    single = torch.eye(256, dtype=torch.float64).reshape(256, 1, 16, 16)
    resized = F.interpolate(single, (size, size), mode="bicubic", antialias=True)
    inverse = torch.linalg.pinv(resized.reshape(256, -1))  # (size * size, 256)
    base = embed.proj.weight.detach().clone().requires_grad_()
    kernel = (base.flatten(2) @ inverse.T).unflatten(2, (size, size))
    (F.conv2d(images, kernel, embed.proj.bias, size)[0] * weights).sum().backward()
    assert embed.proj.weight.grad is not None
    torch.testing.assert_close(embed.proj.weight.grad, base.grad, atol=1e-8, rtol=1e-8)


def test_a_patch_that_grows_keeps_its_token():
    embed = PatchEmbed(8, 5).double()
    patch = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    grown = F.interpolate(patch, (20, 20), mode="bicubic", antialias=True)
    torch.testing.assert_close(embed(grown, 20), embed(patch), atol=1e-10, rtol=0)


@pytest.mark.parametrize("size", OTHER_SIZES)
def test_logits_at_another_patch_size_are_those_of_timms_model_of_that_size(size):
    base, other = peer(), peer(size)
    state = {k: v.float() for k, v in base.state_dict().items()}
    other.load_state_dict(checkpoint_filter_fn(dict(state), other))
    model = vitrail.create_model("flexivit_small", num_classes=7, weights=state, **SMALL)
    model = model.double().eval()
    images = torch.randn(2, 3, 240, 240, dtype=torch.float64)
    at_patch_size(model, size)
    with torch.no_grad():
        got, want = model(images), other(images)
        assert (got - want).abs().max() <= 1e-6 * want.abs().max()
        use_patch_sizes(model, 16, size)
        want = base(images)
        assert (model(images) - want).abs().max() <= 1e-6 * want.abs().max()
        again = model.forward_tensors(images, patch_size=size)["logits"]
        torch.testing.assert_close(again, got, atol=1e-12, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flexivit_small", "flexivit_base"])
def test_the_released_forms_equal_timm(name):
    assert_equals_peer(timm.create_model(name), name, "timm", [(240, 240)])


def test_a_file_of_another_base_size_is_fitted():
    """As the official projections of 32 x 32 and tables of 7 x 7."""
    base = peer(32)
    state = {k: v.float() for k, v in base.state_dict().items()}
    assert state["pos_embed"].shape[1] == 49
    model = (
        vitrail.create_model("flexivit_small", num_classes=7, weights=state, **SMALL)
        .double()
        .eval()
    )
    other = peer(16)
    other.load_state_dict(checkpoint_filter_fn(dict(state), other))
    images = torch.randn(1, 3, 240, 240, dtype=torch.float64)
    with torch.no_grad():
        want = other(images)
        assert (model(images) - want).abs().max() <= 1e-6 * want.abs().max()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("flexivit_small", {}),
        ("vit_tiny_patch16", {}),
        ("deit_tiny_distilled_patch16", {}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("navit_tiny_patch16", {}),
    ],
)
def test_packed_images_equal_the_images_alone_at_every_patch_size(name, fields):
    model = ours(name, **fields)
    own = model.backbone.config.patch_size
    use_patch_sizes(model, own, 8, 24)
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randn(3, h, w, generator=generator, dtype=torch.float64)
        for h, w in ((40, 61), (16, 90), (48, 48))
    ]
    seen = []
    for size in (8, own, 24):
        (packed,) = pack(images, size, num_prefix_tokens=model.backbone.num_prefix_tokens)
        packing = {"sizes": packed.sizes, "patch_size": size}
        with torch.no_grad():
            together = model.forward_tensors(packed.patches, packing)["logits"]
            for row, i in zip(together, packed.image_ids, strict=True):
                alone = model.forward_tensors(images[i][None], patch_size=size)["logits"][0]
                largest = max(1.0, float(alone.abs().max()))
                torch.testing.assert_close(row, alone, atol=1e-12 * largest, rtol=0)
        seen.append(together[packed.image_ids.index(0)])
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)


def test_a_size_that_a_model_was_not_given_is_refused():
    model = ours()
    with pytest.raises(InputError, match=r"takes patches of 16 pixels, but was asked for 8"):
        model.forward_tensors(torch.zeros(1, 3, 32, 32), patch_size=8)
    (packed,) = pack([torch.zeros(3, 32, 32, dtype=torch.float64)], 8)
    with pytest.raises(InputError, match="packed in patches of 8, but this model's are of 16"):
        model.forward_packed(packed)
    for name, message in (
        ("linear/vit_tiny_patch16", "for which its head was made.*--model-fields patch_size=8"),
        ("efficientvit_m0", "its tokens are no plain patches; models that can are plain ViTs"),
        ("vit_tiny_r_s16_p8", "its tokens are no plain patches"),
    ):
        with torch.device("meta"):
            other = vitrail.create_model(name, num_classes=2)
        with pytest.raises(InputError, match=message):
            use_patch_sizes(other, 8)
    normed = ours("navit_tiny_patch16", patch_norm=True)
    with pytest.raises(InputError, match="its tokens are no plain patches"):
        use_patch_sizes(normed, 8)
    with pytest.raises(InputError, match="at least 1 pixel"):
        use_patch_sizes(model, 0)
    with pytest.raises(InputError, match="at least 1 pixel"):
        use_patch_sizes(model)


def test_images_at_their_own_shape_keep_their_pixels_at_another_patch_size():
    model = ours()
    vitrail.models.describe(model, replace(model.info, preprocessing=at_own_shape(model, 90)))
    at_patch_size(model, 8)
    assert model.preprocessing.patches == (360, 8)
    assert at_own_shape(model, 50).patches == (50, 8)
    assert model.backbone.config.patch_size == 16
    before = ours()
    at_patch_size(before, 8)
    assert before.preprocessing == ours().preprocessing
