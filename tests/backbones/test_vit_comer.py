"""ViT-CoMer against the fixtures of the official code, both forms, and what its config says."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from tests.golden.compare import check, load
from tests.golden.fill import array, image, value
from tests.parity import fill_by_key_map, randomise
from vitrail.backbones.vit_comer import (
    CTI,
    MRFP,
    ConvBranch,
    ToC,
    ToV,
    ViTCoMer,
    ViTCoMerConfig,
    from_official,
    pixel_centres,
    to_maps,
    to_tokens,
)
from vitrail.layers.attention import map_to_tokens
from vitrail.models import create_backbone, create_model
from vitrail.registry import backbone_entry, tiny_entries
from vitrail.weights import layouts
from vitrail.weights.layouts import Uninitialised
from vitrail_runtime.errors import InputError

TINY = tiny_entries()["vitcomer"].config
SHAPES = ((8, 12), (4, 6), (2, 3))  # of the maps of an image of 64 x 96


def filled(fixture, name, **fields):
    """Our backbone in float64 with a fixture's weights: filled by the OFFICIAL keys, carried over by the key
    map, none left over."""
    facts, _ = load(fixture)
    with Uninitialised():
        backbone = create_backbone(name, **fields)
    keys = {key: tuple(shape) for key, shape, kind in facts["state_dict"] if kind == "float32"}
    entry = replace(backbone_entry(name), config=backbone.config)
    state = fill_by_key_map(entry, "official", keys, facts["fill"]["gain"])
    state = {key.removeprefix("backbone."): x for key, x in state.items()}
    missing, unexpected = backbone.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return backbone.double().eval()


def taps_of(backbone, images):
    """What it computes, under the names of the fixture."""
    taps, record = {}, {}

    def keep(name):
        return lambda _, __, y: taps.setdefault(name, y)

    first = backbone.interactions[0]
    hooks = {"interactions.0.mrfp": first.mrfp, "interactions.0.cti_tov": first.to_v}
    hooks |= {"interactions.0.cti_toc": first.to_c, "up": backbone.up, "spm": backbone.cnn}
    for name, module in hooks.items():
        module.register_forward_hook(keep(name))
    with torch.no_grad():
        plain = backbone(images).maps
        maps = backbone(images, record=record).maps
    torch.testing.assert_close(maps, plain)
    finest, *levels = taps.pop("spm")
    taps["spm#0"] = finest
    taps |= {f"spm#{i + 1}": map_to_tokens(x) for i, x in enumerate(levels)}
    taps["blocks.2"] = record["blocks.2"]
    taps["interactions.3#0"] = record["blocks.11"]
    taps["interactions.3#1"] = record["interactions.3.c"]
    return taps | {f"output#{i}": x for i, x in enumerate(maps.values())}


def check_closely(fixture, taps):
    """The fixture's own tolerance, and 3e-6 of the largest value: float32's rounding of the official run."""
    check(fixture, taps)
    facts, arrays = load(fixture)
    assert taps.keys() <= facts["arrays"].keys()
    for key, tensor in taps.items():
        info = facts["arrays"][key]
        got = tensor.detach().reshape(-1)[:: info.get("step", 1)]
        want = torch.from_numpy(arrays[key]).reshape(-1).double()
        gap = (got - want).abs().max().item()
        size = max(abs(info["min"]), abs(info["max"]))
        assert gap <= 3e-6 * size, f"{key}: {gap / size:.2g} of the largest value"


@pytest.mark.parametrize(
    ("form", "fixture", "size"),
    [
        ("detection", "vitcomer_det_tiny", (2, 64, 64)),
        ("segmentation", "vitcomer_seg_tiny", (1, 64, 96)),
    ],
)
def test_both_forms_equal_the_official_codes_in_every_tap(form, fixture, size):
    taps = taps_of(filled(fixture, "vit_comer_tiny", form=form), image(*size).double())
    assert taps.keys() == load(fixture)[0]["arrays"].keys()
    check_closely(fixture, taps)


@pytest.mark.slow
def test_base_with_its_windows_equals_the_official_code_in_every_tap():
    backbone = filled("vitcomer_det_base", "vit_comer_base", window_size=14)
    check_closely("vitcomer_det_base", taps_of(backbone, image(1, 64, 96).double()))


def test_modules_equal_the_official_codes_one_by_one():
    config = ViTCoMerConfig(embed_dim=48, depth=1, num_heads=2, num_interactions=1, stem_dim=16)
    facts, _ = load("vitcomer_modules")
    assert facts["config"]["mrfp_hidden"] == config.mrfp_dim
    modules = {
        "cnn": ConvBranch(16, 48),
        "mrfp": MRFP(48, 24, (3, 5)),
        "to_v": ToV(config),
        "to_c": ToC(config),
        "extra.0": ToC(config, ffn=True),
    }
    theirs = {
        key: torch.from_numpy(value(key, tuple(shape)))
        for key, shape, kind in facts["state_dict"]
        if kind == "float32"
    }
    # Names as they stand in a whole network, which the key map knows.
    placed = {
        ("" if key.startswith("spm.") else "interactions.0.")
        + key.replace("extra_cti.", "extra_CTIs.0."): x
        for key, x in theirs.items()
    }
    state = from_official(placed, config)
    for name, module in modules.items():
        prefix = f"backbone.{'' if name == 'cnn' else 'interactions.0.'}{name}."
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        missing, unexpected = module.load_state_dict(own, strict=False)
        assert own
        assert not unexpected
        assert all(key.endswith("num_batches_tracked") for key in missing)
        module.double().eval()
    c = array("vitcomer_modules.c", 2, 126, 48).double()
    x = array("vitcomer_modules.x", 2, 24, 48).double()
    with torch.no_grad():
        finest, *levels = modules["cnn"](image(2, 64, 96).double())
        taps = {"spm#0": finest}
        taps |= {f"spm#{i + 1}": map_to_tokens(level) for i, level in enumerate(levels)}
        taps["mrfp"] = modules["mrfp"](c, SHAPES)
        taps["cti_tov"] = modules["to_v"](x, c, SHAPES)
        taps["cti_toc"] = modules["to_c"](x, c, SHAPES)
        taps["extra_cti"] = modules["extra.0"](x, c, SHAPES)
    check_closely("vitcomer_modules", taps)
    centres = pixel_centres(SHAPES, torch.device("cpu"))
    check("vitcomer_modules", {"reference_points": centres})


def small(**fields):
    """A shallow one with random weights, in float64."""
    backbone = ViTCoMer(replace(TINY, **fields))
    randomise(backbone)
    return backbone.double().eval()


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, 32, generator=generator, dtype=torch.float64)


X, C = tokens(24, 0), tokens(126, 1)


def test_plain_addition_sums_the_maps_into_the_tokens_and_the_tokens_into_their_map():
    interaction = small(to_v="add", to_c="add").interactions[0]
    with torch.no_grad():
        made = interaction.mrfp(C, SHAPES)
        x, c = interaction.before(X, C, SHAPES)
        again = interaction.after(X, C, SHAPES)
    torch.testing.assert_close(c[:, :96], made[:, :96])
    torch.testing.assert_close(c[:, 96:120], made[:, 96:120] + X)
    torch.testing.assert_close(c[:, 120:], made[:, 120:])
    fine, middle, coarse = to_maps(c, SHAPES)
    total = F.avg_pool2d(fine, 2) + middle
    total += F.interpolate(coarse, scale_factor=2.0, mode="bilinear", align_corners=False)
    torch.testing.assert_close(x, X + interaction.to_v.gamma * to_tokens([total]))
    torch.testing.assert_close(again[:, 96:120], C[:, 96:120] + X)
    assert not [m for m in interaction.modules() if isinstance(m, CTI)]


def test_a_way_that_is_left_out_changes_nothing_and_has_no_weights():
    interaction = small(to_v="none", to_c="none").interactions[0]
    assert not list(interaction.parameters())
    x, c = interaction.before(X, C, SHAPES)
    assert torch.equal(x, X)
    assert torch.equal(interaction.after(x, c, SHAPES), C)
    one_way = small(to_c="none").interactions[0]
    assert one_way.mrfp is not None
    assert one_way.to_c is None
    other = small(to_v="none").interactions[0]
    assert (other.mrfp, other.to_v, len(other.extra)) == (None, None, 1)


def test_kernels_share_the_channels_of_mrfp():
    module = small(kernels=(1, 3, 5, 7)).interactions[0].mrfp
    sizes = [[conv.kernel_size[0] for conv in convs] for convs in module.convs]
    assert sizes == [[1, 3, 5, 7]] * 3
    assert all(conv.groups == conv.in_channels == 8 for convs in module.convs for conv in convs)


def test_interactions_share_the_blocks_and_the_last_has_the_extra_ones():
    backbone = ViTCoMer(replace(TINY, depth=6, num_interactions=3, num_extra=2))
    assert [len(i.extra) for i in backbone.interactions] == [0, 0, 2]
    assert [block.window for block in backbone.blocks] == [2, None] * 3
    assert [backbone._tokens_for(level, [0, 1, 2]) for level in range(4)] == [0, 1, 2, 2]
    detection = ViTCoMer(replace(TINY, depth=6, num_interactions=3, form="detection"))
    assert [detection._tokens_for(level, [0, 1, 2]) for level in range(4)] == [2] * 4


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_interactions": 5}, "num_interactions 5 must divide the 2 blocks"),
        ({"kernels": (3, 4)}, r"kernels \(3, 4\) must be one or more odd sizes"),
        ({"kernels": (3, 5, 7)}, "MRFP is 32 wide, which its 3 kernels do not share"),
        ({"window_size": 0}, "window_size is 0"),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_reason(fields, words):
    with pytest.raises(InputError, match=words):
        replace(TINY, **fields)


SHAPE = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
OVER = {**SHAPE, "num_interactions": 1, "stem_dim": 8, "deform_heads": 2, "num_extra": 1}


def test_it_starts_as_the_plain_vit_whose_weights_it_loads():
    """Without a class token, which no one here attends to."""
    vit = create_backbone(
        "vit_tiny_patch16", **SHAPE, image_size=64, class_token=False, pool="avg"
    ).eval()
    randomise(vit)
    ours = create_backbone("vit_comer_tiny", **OVER, image_size=64, weights=vit.state_dict()).eval()
    images = image(1, 64, 64)
    mine, theirs = {}, {}
    with torch.no_grad():
        vit(images, record=theirs)
        ours(images, record=mine)
    torch.testing.assert_close(mine["blocks.1"], theirs["blocks.1"])
    assert "backbone.norm.weight" not in ours.weights_report.used
    assert "norm.weight" in ours.weights_report.left


def test_weights_of_dinov2_come_with_their_scale_patches_of_16_and_the_tables_patches():
    theirs = create_backbone("vit_small_patch14_dinov2", **SHAPE, image_size=42)
    randomise(theirs)
    state = theirs.state_dict()
    ours = create_backbone("vit_comer_small", **OVER, image_size=48, weights=state)
    assert torch.equal(ours.blocks[1].ls2.gamma, state["blocks.1.ls2.gamma"])
    assert torch.equal(ours.pos_embed, state["pos_embed"][:, 1:])
    assert ours.patch_embed.proj.weight.shape[-2:] == (16, 16)


def test_a_classifier_trained_here_gives_its_backbone():
    vit = create_model("deit_tiny_distilled_patch16", num_classes=3, **SHAPE, image_size=64)
    ours = create_backbone("vit_comer_tiny", **OVER, image_size=64, weights=vit.state_dict())
    assert torch.equal(ours.pos_embed, vit.backbone.pos_embed[:, 2:])
    assert torch.equal(ours.blocks[0].attn.qkv.weight, vit.backbone.blocks[0].attn.qkv.weight)


def test_attention_stays_within_windows_whose_empty_places_are_zero_keys():
    """Written out token by token: 3 x 5 tokens in windows of 2, the last of each row and column filled up."""
    block = small().blocks[0]
    height, width, size, heads = 3, 5, 2, 2
    x = tokens(height * width, 2)
    qkv = block.attn.qkv(x).unflatten(-1, (3, heads, 16))  # (2, 15, 3, heads, 16)
    want = torch.zeros(2, height * width, heads, 16, dtype=torch.float64)
    for y0, x0 in [(y, x) for y in range(0, height, size) for x in range(0, width, size)]:
        inside = [
            y * width + x
            for y in range(y0, min(y0 + size, height))
            for x in range(x0, min(x0 + size, width))
        ]
        q, k, v = qkv[:, inside].unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 16**0.5
        empty = scores.new_zeros(*scores.shape[:-1], size * size - len(inside))
        weights = torch.cat([scores, empty], -1).softmax(-1)[..., : len(inside)]
        want[:, inside] = torch.einsum("bhqk,bkhd->bqhd", weights, v)
    got = block.attend_within(size, x, (height, width), None, "")
    torch.testing.assert_close(got, block.attn.proj(want.flatten(2)))


def test_a_plain_vits_file_is_not_taken_for_one_that_may_start_from_it(monkeypatch):
    names = ["vit_comer_tiny", "vit_tiny_patch16"]
    monkeypatch.setattr(layouts, "list_backbones", lambda: names)
    with torch.device("meta"), Uninitialised():
        state = create_backbone("vit_tiny_patch16").state_dict()
    assert layouts.look_alikes(state) == [("vit_tiny_patch16", "timm")]


def test_fresh_weights_leave_the_vit_alone_and_are_drawn_as_the_official_codes():
    torch.manual_seed(0)
    backbone = create_backbone("vit_comer_tiny", depth=2, num_interactions=1, num_extra=1)
    assert not backbone.interactions[0].to_v.gamma.any()
    assert (backbone.blocks[0].ls1.gamma == 1).all()
    assert backbone.level_embed.std().item() == pytest.approx(1, rel=0.15)
    assert backbone.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    for conv in (backbone.cnn.stem[1].conv, backbone.interactions[0].mrfp.convs[0][1], backbone.up):
        fan_out = conv.kernel_size[0] ** 2 * conv.out_channels / conv.groups
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)
    linear = backbone.interactions[0].mrfp.fc1
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not linear.bias.any()
    attn = backbone.interactions[0].to_v.cti.attn
    assert not attn.sampling_offsets.weight.any()
    assert attn.sampling_offsets.bias.any()
