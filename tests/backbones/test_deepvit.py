"""DeepViT against the fixtures of the official code, and against the plain ViT that it grew from."""

import pytest
import torch

from tests.golden.compare import check
from tests.golden.fill import image
from tests.parity import filled_officially, randomise
from vitrail import packing
from vitrail.backbones.deepvit import DeepViT, DeepViTConfig
from vitrail.backbones.vit import ViT, ViTConfig
from vitrail.layers.attention import map_to_tokens
from vitrail.models import create_backbone
from vitrail.registry import backbone_entry, list_backbones
from vitrail_runtime.errors import InputError

SHAPE = {"embed_dim": 48, "depth": 3, "num_heads": 4, "patch_size": 8, "mlp_ratio": 3.0}


def official_taps(name, images, blocks, attn, **fields):
    """Our classifier filled by official keys, and what it computes under the names of the fixture."""
    model = filled_officially(name, **fields)
    taps, record, backbone = {}, {}, model.backbone
    backbone.patch_embed.register_forward_hook(
        lambda _, __, y: taps.update({"patch_embed": map_to_tokens(y)})
    )
    backbone.norm.register_forward_hook(lambda _, __, y: taps.update({"norm": y}))
    backbone.blocks[attn].attn.register_forward_hook(
        lambda _, __, y: taps.update({f"blocks.{attn}.attn#0": y})
    )
    with torch.no_grad():
        taps["output"] = model.head(backbone(images, record=record))
        recorded = model(images)
    torch.testing.assert_close(recorded, taps["output"], rtol=1e-9, atol=1e-9)
    taps[f"blocks.{attn}.attn#1"] = record[f"blocks.{attn}.attn.weights"]
    for i in blocks:
        taps[f"blocks.{i}#0"] = record[f"blocks.{i}"]
        taps[f"blocks.{i}#1"] = record[f"blocks.{i}.attn.weights"]
    return taps


def test_deepvit_16b_at_64_pixels_equals_the_official_code_in_every_tap():
    taps = official_taps("deepvit_16b", image(2, 64, 64).double(), (0, 15), attn=0, image_size=64)
    check("deepvit_16b", taps)


def test_the_convolutional_stem_and_first_block_of_deepvit_s_equal_the_official_codes():
    """At the paper's size, and no further: the rest takes seconds."""
    model, taps, record = filled_officially("deepvit_s"), {}, {}
    backbone = model.backbone
    with torch.no_grad():
        taps["patch_embed"] = map_to_tokens(backbone.patch_embed(image(1, 224, 224).double()))
        tokens, _ = backbone.embed(image(1, 224, 224).double())
        taps["blocks.0#0"] = backbone.blocks[0](tokens, record=record, name="x")
        taps["blocks.0#1"] = record["x.attn.weights"]
    check("deepvit_s", taps)


@pytest.mark.parametrize("scale_maps", [True, False])
def test_re_attention_mixes_heads_norms_the_maps_and_scales_them_where_the_variant_says(scale_maps):
    """Equation 3 as the official code has it: mixing with a bias, then BatchNorm over heads."""
    config = DeepViTConfig(**SHAPE, image_size=40, mix_from=1, scale_maps=scale_maps)
    attn = DeepViT(config).double().eval().blocks[1].attn
    randomise(attn)
    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        q, k, v = attn.qkv(x).reshape(2, 7, 3, 4, 12).permute(2, 0, 3, 1, 4)
        maps = (q @ k.mT / 12**0.5).softmax(-1)
        mixing, norm = attn.reatten_matrix, attn.var_norm
        mixed = torch.einsum("gh,bhqk->bgqk", mixing.weight[..., 0, 0], maps)
        mixed = mixed + mixing.bias[:, None, None] - norm.running_mean[:, None, None]
        mixed = mixed * (norm.weight / (norm.running_var + 1e-5).sqrt())[:, None, None]
        mixed = (mixed + norm.bias[:, None, None]) * (12**-0.5 if scale_maps else 1)
        want = attn.proj((mixed @ v).transpose(1, 2).flatten(2))
        record = {}
        torch.testing.assert_close(attn(x, record=record, name="attn"), want)
    torch.testing.assert_close(record["attn.weights"], mixed)
    torch.testing.assert_close(record["attn.softmax"], maps)


def test_the_official_variants_scale_mix_and_halve_as_their_code():
    """(blocks without mixing, blocks, scaled maps, halved branches, convolutional stem), width."""
    found = {
        name: (c.mix_from, c.depth, c.scale_maps, c.branch_scale, c.stem, c.embed_dim)
        for name in list_backbones("deepvit_*")
        for c in [backbone_entry(name).config]
    }
    assert found == {
        "deepvit_s": (11, 16, True, 0.5, "conv", 396),
        "deepvit_l": (20, 32, False, 0.5, "conv", 420),
        "deepvit_16b": (0, 16, False, 1.0, "patch", 384),
        "deepvit_24b": (0, 24, False, 1.0, "patch", 384),
        "deepvit_32b": (0, 32, False, 1.0, "patch", 384),
    }
    for name in found:
        config = backbone_entry(name).config
        assert (config.num_heads, config.mlp_ratio, config.norm_eps) == (12, 3.0, 1e-6)


@pytest.mark.slow
def test_deepvit_s_equals_the_official_code_in_every_tap():
    check(
        "deepvit_s", official_taps("deepvit_s", image(1, 224, 224).double(), (0, 11, 15), attn=11)
    )


def test_with_self_attention_it_is_the_plain_vit_of_the_same_shape():
    deep = DeepViT(DeepViTConfig(**SHAPE, image_size=40, attention="self"))
    plain = ViT(ViTConfig(**SHAPE, image_size=40))
    assert deep.state_dict().keys() == plain.state_dict().keys()
    randomise(deep)
    plain.load_state_dict(deep.state_dict())
    images = image(2, 40, 56)
    with torch.no_grad():
        for got, want in zip(deep.eval()(images), plain.eval()(images), strict=True):
            torch.testing.assert_close(got, want)


def test_branch_scale_equals_scaling_what_the_norm_reads_and_dividing_what_comes_back():
    torch.manual_seed(0)
    config = DeepViTConfig(**SHAPE, image_size=40, branch_scale=0.5, norm_eps=1e-2)
    backbone = DeepViT(config).double().eval()
    randomise(backbone)
    x = torch.randn(2, 26, 48, dtype=torch.float64)
    block = backbone.blocks[1]
    with torch.no_grad():
        got = block(x)

        def norm(norm, y):
            return torch.nn.functional.layer_norm(y, (48,), norm.weight, norm.bias, 1e-2)

        want = x + block.attn(norm(block.norm1, 0.5 * x)) / 0.5
        want = want + block.mlp(norm(block.norm2, 0.5 * want)) / 0.5
    torch.testing.assert_close(got, want)


def test_packed_images_give_what_each_gives_alone():
    torch.manual_seed(0)
    backbone = DeepViT(DeepViTConfig(**SHAPE, image_size=40, mix_from=1, scale_maps=True)).eval()
    randomise(backbone)
    pictures = [torch.randn(3, *size) for size in [(40, 56), (17, 9), (40, 56), (64, 24)]]
    (packed,) = packing.pack(pictures, patch_size=8, max_tokens=4096)
    with torch.no_grad():
        together = backbone.forward_packed(packed).unpack()
        for i, picture in enumerate(pictures):
            alone = backbone(picture[None])
            torch.testing.assert_close(
                together[i].maps["c3"], alone.maps["c3"], rtol=1e-4, atol=1e-4
            )
            torch.testing.assert_close(together[i].prefix, alone.prefix, rtol=1e-4, atol=1e-4)


def test_the_convolutional_stem_cannot_take_packed_images_and_says_so():
    backbone = DeepViT(DeepViTConfig(**SHAPE, image_size=40, stem="conv"))
    packed = packing.pack([torch.randn(3, 16, 16)], patch_size=8)[0]
    with pytest.raises(InputError, match="ConvStem cannot take packed images"):
        backbone.forward_packed(packed)


def test_running_statistics_move_once_a_step_with_checkpointing():
    images = image(4, 40, 40)
    steps = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        backbone = DeepViT(DeepViTConfig(**SHAPE, image_size=40)).train()
        backbone.grad_checkpointing = checkpointing
        backbone(images).maps["c3"].sum().backward()
        steps.append(backbone.blocks[0].attn.var_norm)
    assert steps[0].num_batches_tracked == steps[1].num_batches_tracked == 1
    torch.testing.assert_close(steps[0].running_mean, steps[1].running_mean)


def test_width_is_free_and_mixing_starts_where_the_variant_says():
    with torch.device("meta"):
        wide = create_backbone("deepvit_24b", embed_dim=512 + 64)
        released = {name: create_backbone(name) for name in ("deepvit_s", "deepvit_l")}
    assert wide.feature_specs["c4"].channels == 576
    mixing = {
        name: [i for i, block in enumerate(b.blocks) if hasattr(block.attn, "reatten_matrix")]
        for name, b in released.items()
    }
    assert mixing == {"deepvit_s": list(range(11, 16)), "deepvit_l": list(range(20, 32))}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embed_dim": 400}, "divisible by num_heads"),
        ({"mix_from": 16}, "the blocks are 0 to 15"),
        ({"branch_scale": 0.0}, "must be above 0"),
        ({"stem": "conv", "patch_size": 7}, "patch_size 7 is odd"),
    ],
)
def test_a_config_that_cannot_be_built_says_why(fields, message):
    with torch.device("meta"), pytest.raises(InputError, match=message):
        create_backbone("deepvit_16b", **fields)
