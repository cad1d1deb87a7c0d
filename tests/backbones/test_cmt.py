"""CMT against the fixtures of the official code."""

import pytest
import torch
import torch.nn.functional as F

from tests.golden.compare import check
from tests.golden.fill import image
from tests.parity import filled_officially, randomise
from vitrail.backbones.cmt import CMT, CMTBlock, CMTConfig, resample, resample_table
from vitrail.layers.attention import map_to_tokens, tokens_to_map
from vitrail.models import create_backbone
from vitrail.registry import tiny_entries
from vitrail_runtime.errors import InputError


def taps(model, images):
    """The outputs of our modules under the names of the official ones."""
    out = {}

    def keep(module, name, as_tokens=True):
        def hook(_, __, y):
            out[name] = map_to_tokens(y) if as_tokens and y.ndim == 4 else y

        module.register_forward_hook(hook)

    stages = model.backbone.stages
    keep(model.backbone.stem, "stem_norm3", as_tokens=False)
    keep(stages[0].patch_embed, "patch_embed_a#0")
    keep(stages[0].blocks[0].attn, "blocks_a.0.attn")
    keep(stages[0].blocks[0], "blocks_a.0")
    keep(stages[1].blocks[1], "blocks_b.1")
    keep(stages[2].blocks[1].mlp, "blocks_c.1.mlp")
    keep(stages[2].blocks[1], "blocks_c.1")
    last = len(stages[3].blocks) - 1
    keep(stages[3].blocks[last], f"blocks_d.{last}")
    keep(model.head.bn, "_bn", as_tokens=False)
    with torch.no_grad():
        out["output"] = model(images)
    return out


def test_cmt_xs_at_64_pixels_equals_the_official_code_in_every_tap():
    check("cmt_xs", taps(filled_officially("cmt_xs", image_size=64), image(2, 64, 64).double()))


@pytest.mark.slow
def test_cmt_ti_at_the_papers_size_equals_the_official_code_in_every_tap():
    check("cmt_ti", taps(filled_officially("cmt_ti"), image(1, 160, 160).double()))


def test_a_table_is_resampled_over_the_queries_and_over_the_keys():
    torch.manual_seed(0)
    old_q, old_k, new_q, new_k = (4, 4), (2, 2), (6, 3), (3, 2)
    table = torch.randn(3, 16, 4, dtype=torch.float64)
    got = resample_table(table, (old_q, new_q), (old_k, new_k))
    x = table.reshape(3, *old_q, 4).permute(0, 3, 1, 2)
    x = F.interpolate(x, new_q, mode="bicubic", antialias=True)  # (heads, keys, h, w)
    x = x.flatten(2).mT.reshape(3, 18, *old_k)
    x = F.interpolate(x, new_k, mode="bicubic", antialias=True).flatten(2)
    torch.testing.assert_close(got, x)


def test_tables_load_at_another_image_size_and_give_what_running_at_that_size_gives():
    entry = tiny_entries()["cmt"]
    native = CMT(entry.config).eval()
    randomise(native)
    state = {f"backbone.{k}": v for k, v in native.state_dict().items()}
    config = CMTConfig(**{**vars(entry.config), "image_size": (96, 40)})
    other = CMT(config).eval()
    converted = resample(state, config)
    other.load_state_dict({k.removeprefix("backbone."): v for k, v in converted.items()})
    images = image(1, 96, 40)
    with torch.no_grad():
        want, got = native(images).maps, other(images).maps
    for level in want:
        torch.testing.assert_close(got[level], want[level], rtol=1e-4, atol=1e-4)


def test_the_position_table_of_the_native_size_is_used_as_it_is():
    with torch.device("meta"):
        stage = create_backbone("cmt_s").stages[0]
    bias = stage.bias((56, 56))
    assert bias.shape == (1, 1, 3136, 49)
    assert bias._base is stage.relative_pos or bias.data_ptr() == stage.relative_pos.data_ptr()


@pytest.mark.parametrize("switch", ["stem", "lpu", "lmhsa", "irffn"])
def test_each_part_of_the_ablation_can_be_taken_out(switch):
    entry = tiny_entries()["cmt"]
    full, without = CMT(entry.config), CMT(CMTConfig(**{**vars(entry.config), switch: False}))
    gone = {k.split(".blocks.")[-1].split(".", 1)[-1] for k in full.state_dict()}
    gone -= {k.split(".blocks.")[-1].split(".", 1)[-1] for k in without.state_dict()}
    mark = {"stem": "2.weight", "lpu": "lpu.conv", "lmhsa": "attn.sr", "irffn": "mlp.proj"}[switch]
    assert any(key.startswith(mark) for key in gone)
    with torch.no_grad():
        maps = without.eval()(image(1, 50, 70)).maps
    assert [tuple(m.shape[2:]) for m in maps.values()] == [(13, 18), (7, 9), (4, 5), (2, 3)]


def test_norms_before_attention_and_mlp_have_an_eps_of_1e_6_and_all_others_1e_5():
    """In float64: the float32 fixtures do not tell the two apart where tokens vary much."""
    config = tiny_entries()["cmt"].config
    block = CMTBlock(config, 1, 0.0).double().eval()
    randomise(block)
    dim, grid = config.embed_dims[1], (4, 6)

    def norm(layer, tokens):
        return F.layer_norm(tokens, (dim,), layer.weight, layer.bias, 1e-6)

    x = torch.randn(2, dim, *grid, generator=torch.Generator().manual_seed(0)).double()
    with torch.no_grad():
        tokens = map_to_tokens(block.lpu(x))
        tokens = tokens + block.attn(norm(block.norm1, tokens), grid, None)
        after = norm(block.norm2, tokens)
        want = tokens_to_map(tokens, *grid) + block.mlp(tokens_to_map(after, *grid))
        torch.testing.assert_close(block(x, None), want, rtol=1e-12, atol=1e-12)
    for name, module in CMT(config).named_modules():
        if hasattr(module, "eps"):
            assert module.eps == (1e-6 if name.endswith(("norm1", "norm2")) else 1e-5), name


def test_keys_are_as_many_as_the_reduction_leaves():
    backbone = CMT(tiny_entries()["cmt"].config).eval()
    record = {}
    with torch.no_grad():
        backbone(image(1, 72, 100), record=record)
    # 18 x 25 queries of stage 0 read ceil(18 / 8) x ceil(25 / 8) keys.
    assert record["stages.0.blocks.0.attn.weights"].shape == (1, 1, 450, 12)
    assert record["stages.3.blocks.0.attn.weights"].shape == (1, 4, 12, 12)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": (1, 2, 4)}, "of one length"),
        ({"num_heads": (3, 2, 4, 8)}, "width 46 cannot be shared by 3 heads"),
        ({"mlp_rato": 3}, "did you mean 'mlp_ratio'"),
    ],
)
def test_a_config_that_cannot_be_built_says_why(fields, message):
    with torch.device("meta"), pytest.raises(InputError, match=message):
        create_backbone("cmt_ti", **fields)
