"""NaViT against the fixtures of vit-pytorch's and timm's, the forms of its positions, and packs of it."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.golden.compare import check, load
from tests.golden.fill import image
from tests.parity import assert_close_to_peer, fill_by_key_map, randomise
from vitrail.backbones.navit import AxisPositions, NaViTConfig
from vitrail.models import create_backbone, create_model
from vitrail.packing import pack
from vitrail.registry import backbone_entry
from vitrail_runtime.errors import InputError

VIT_PYTORCH = {
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 4,
    "patch_size": 8,
    "image_size": 64,
    "mlp_ratio": 1.5,
    "norm_eps": 1e-5,
    "coordinates": "absolute",
    "qk_norm": "rms",
    "patch_norm": True,
    "norm_bias": False,
    "attention_pool": "plain",
    "head_norm": True,
    "head_bias": False,
}
NAFLEX = {
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
    "patch_size": 8,
    "image_size": 48,
    "num_reg_tokens": 2,
}
SMALL = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4, "image_size": 32}


def filled(name: str, fixture: str, layout: str, classes: int, **fields):
    """Our classifier with the weights of a fixture, by the official keys and the key map, in float64."""
    facts, _ = load(fixture)
    model = create_model(name, num_classes=classes, **fields)
    keys = {key: tuple(shape) for key, shape, dtype in facts["state_dict"] if dtype == "float32"}
    entry = backbone_entry(name)
    entry = type(entry)(**{**vars(entry), "config": model.backbone.config})
    state = fill_by_key_map(entry, layout, keys, facts["fill"]["gain"])
    model.load_state_dict(state)
    return facts, model.double().eval()


def test_it_equals_vit_pytorchs_and_so_do_its_tokens_and_its_blocks():
    fields = {**VIT_PYTORCH, "bias": True}
    facts, model = filled("navit_tiny_patch16", "navit", "vit_pytorch", 9, **fields)
    # Attention's output there has no bias, the MLP's layers and the patches' projection have.
    outputs, tokens = [], []
    with torch.no_grad():
        for sizes in facts["packs"]:
            images = [image(1, *size)[0].double() for size in sizes]
            (packed,) = pack(images, 8, 64, 0)
            logits = dict(zip(packed.image_ids, model.forward_packed(packed), strict=True))
            outputs += [logits[i] for i in range(len(images))]
            for i, x in enumerate(images):
                torch.testing.assert_close(model(x[None])[0], logits[i], atol=1e-12, rtol=1e-12)
            found = model.backbone.forward_packed(packed).unpack()
            tokens.append([found[i].maps["c3"][0].flatten(1).T for i in range(len(images))])
    _, arrays = load("navit")
    check("navit", {"output": torch.stack(outputs)})
    for row, own in zip(arrays["transformer"], tokens, strict=True):
        ours = torch.cat(own)
        want = torch.from_numpy(row[: len(ours)]).double()
        assert (ours - want).abs().max() <= 3e-6 * want.abs().max()


def test_files_of_vit_pytorchs_keys_are_recognised():
    facts, _ = load("navit")
    state = {key: torch.randn(shape) for key, shape, _ in facts["state_dict"]}
    fields = {**VIT_PYTORCH, "bias": True}
    model = create_model("navit_tiny_patch16", num_classes=9, weights=state, **fields)
    assert torch.equal(model.head.fc.weight, state["mlp_head.1.weight"])
    assert "vit_pytorch" in str(model.weights_report)


def test_it_equals_timms_naflexvit_of_the_fixture():
    facts, model = filled("naflexvit_base_patch16_parfac_gap", "naflexvit", "timm", 7, **NAFLEX)
    images = [image(1, *size)[0].double() for size in facts["picture_sizes"]]
    (packed,) = pack(images, 8, 128, 2)
    with torch.no_grad():
        logits = dict(zip(packed.image_ids, model.forward_packed(packed), strict=True))
        check("naflexvit", {"output": torch.stack([logits[i] for i in range(3)])})
        for i, x in enumerate(images):
            torch.testing.assert_close(model(x[None])[0], logits[i], atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("kind", ["gap", "par_gap", "parfac_gap"])
def test_it_equals_timms_naflexvit_of_each_kind_at_other_sizes(kind):
    """Images as timm's own resizing leaves them, whose sides patches divide."""
    name = f"naflexvit_base_patch16_{kind}"
    shape = {"embed_dim": 48, "depth": 2, "num_heads": 3}
    theirs = timm.create_model(name, **shape, num_classes=5)
    randomise(theirs)
    theirs = theirs.double().eval()
    ours = create_model(name, num_classes=5, **shape, weights=dict(theirs.state_dict()))
    ours = ours.double().eval()
    with torch.no_grad():
        for size in [(256, 256), (64, 112), (320, 48)]:
            x = image(2, *size).double()
            rows = F.unfold(x, 16, stride=16).transpose(1, 2).unflatten(2, (3, 16, 16))
            patches = rows.permute(0, 1, 3, 4, 2).flatten(2)  # row, column, channel
            h, w = size[0] // 16, size[1] // 16
            grid = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"), -1)
            given = {"patches": patches, "patch_coord": grid.view(1, -1, 2).expand(2, -1, -1)}
            valid = torch.ones(2, h * w, dtype=torch.bool)
            # timm resamples tables in float32.
            rel = 1e-9 if size == (256, 256) else 1e-6
            assert_close_to_peer(ours(x), theirs({**given, "patch_valid": valid}), rel)


@pytest.mark.parametrize(
    ("kind", "coordinates"),
    [
        (kind, coordinates)
        for kind in ("learned", "sinusoidal", "fourier")
        for coordinates in ("absolute", "fractional", "fractional_long")
    ],
)
def test_an_axis_is_embedded_as_its_kind_and_coordinates_say(kind, coordinates):
    config = NaViTConfig(**{**SMALL, "embed_dim": 8}, positions=kind, coordinates=coordinates)
    axis = AxisPositions(config, 6).double()
    count, longest = 4, 7
    like = torch.zeros((), dtype=torch.float64)
    got = axis(count, longest, like).detach()
    side = {"absolute": 1, "fractional": count, "fractional_long": longest}[coordinates]
    for p, row in enumerate(got):
        if kind == "learned" and coordinates == "absolute":
            want = axis.table[p]
        elif kind == "learned":
            want = F.interpolate(axis.table.T[None], size=side, mode="linear")[0, :, p]
        elif kind == "fourier":
            angle = 2 * math.pi * (p / side) * axis.frequencies.float()
            want = torch.cat([angle.sin(), angle.cos()]).double()
        else:
            place = p if coordinates == "absolute" else 6 * p / side
            angle = torch.tensor([place / 10000 ** (2 * i / 8) for i in range(4)])
            want = torch.cat([angle.sin(), angle.cos()]).double()
        torch.testing.assert_close(row, want.detach(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("combine", ["sum", "stack", "product"])
def test_rows_and_columns_are_combined_as_asked(combine):
    backbone = create_backbone("navit_tiny_patch16", **SMALL, combine=combine)
    randomise(backbone)
    got = backbone.positions((3, 2))[0].unflatten(0, (3, 2))
    like = backbone.rows.table
    y, x = backbone.rows(3, 3, like), backbone.columns(2, 3, like)
    for row in range(3):
        for column in range(2):
            want = {
                "sum": lambda a, b: a + b,
                "stack": lambda a, b: torch.cat([a, b]),
                "product": lambda a, b: a * b,
            }[combine](y[row], x[column])
            torch.testing.assert_close(got[row, column], want)


def test_products_begin_at_one_and_sums_at_zero():
    for combine, middle in (("product", 1.0), ("sum", 0.0)):
        backbone = create_backbone("navit_tiny_patch16", **SMALL, combine=combine)
        assert backbone.rows.table.mean().item() == pytest.approx(middle, abs=0.01)
        assert backbone.rows.table.std().item() == pytest.approx(0.02, rel=0.3)


def test_the_papers_model_has_no_biases_normed_queries_and_pools_by_attention():
    model = create_model("navit_tiny_patch16", num_classes=3, **SMALL)
    biased = [n for n, m in model.named_modules() if getattr(m, "bias", None) is not None]
    norms = ("norm", "norm1", "norm2")
    assert all(n.rpartition(".")[2] in norms or n == "head.fc" for n in biased)
    randomise(model)
    model = model.double().eval()
    attn, x = model.backbone.blocks[0].attn, torch.randn(1, 5, 32, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = attn.qkv(x)[0].unflatten(1, (3, 2, 16)).unbind(1)  # (5, heads, 16)
        q = F.layer_norm(q, (16,), attn.q_norm.weight, None, 1e-6)
        k = F.layer_norm(k, (16,), attn.k_norm.weight, None, 1e-6)
        heads = [(q[:, h] @ k[:, h].T / 4).softmax(-1) @ v[:, h] for h in range(2)]
        torch.testing.assert_close(attn(x)[0], attn.proj(torch.cat(heads, 1)))
        keys = attn.keys_values(x).keys
        torch.testing.assert_close(keys[0], k.transpose(0, 1))

        pool, tokens = model.head.pool, torch.randn(2, 6, 32, dtype=torch.float64)
        q = pool.q_norm(pool.q(pool.norm(pool.query)).unflatten(0, (2, 16)))
        k, v = pool.kv(tokens).unflatten(2, (2, 2, 16)).unbind(2)
        weights = torch.einsum("hd,bnhd->bhn", q / 4, pool.k_norm(k)).softmax(-1)
        out = pool.proj(torch.einsum("bhn,bnhd->bhd", weights, v).flatten(1)) + pool.query
        want = out + pool.fc2(F.gelu(pool.fc1(pool.norm2(out))))
        torch.testing.assert_close(pool(tokens), want)


@settings(max_examples=8)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5),
    fields=st.sampled_from(
        [
            {},
            {"num_reg_tokens": 2, "qk_norm": "rms", "patch_norm": True, "combine": "stack"},
            {"positions": "fourier", "attention_pool": "plain", "combine": "product"},
            {"positions": "grid", "coordinates": "fractional_long", "attention_pool": "none"},
        ]
    ),
)
def test_packed_is_alone_in_logits_and_gradients(sizes, fields):
    model = create_model("navit_tiny_patch16", num_classes=3, **SMALL, **fields)
    randomise(model)
    model = model.double().eval()
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, *size, generator=generator).double() for size in sizes]
    weights = list(model.parameters())
    together = {}
    for packed in pack(images, 4, 80, model.backbone.num_prefix_tokens):
        together |= dict(zip(packed.image_ids, model.forward_packed(packed), strict=True))
    got = torch.stack([together[i] for i in range(len(images))])
    want = torch.cat([model(x[None]) for x in images])
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
    ours, theirs = (
        torch.autograd.grad(y.square().sum(), weights, materialize_grads=True) for y in (got, want)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11 * max(1.0, b.abs().max().item()), rtol=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"combine": "stack", "embed_dim": 33, "num_heads": 1}, "33 is odd"),
        ({"positions": "fourier", "combine": "stack", "embed_dim": 6}, "each axis has 3"),
        ({"positions": "grid", "coordinates": "absolute"}, "one table for both axes"),
        ({"positions": "grid", "combine": "product"}, "one table for both axes"),
    ],
)
def test_positions_that_cannot_be_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        create_backbone("navit_tiny_patch16", **{**SMALL, **fields})


def test_an_image_larger_than_absolute_tables_is_an_error_that_says_what_to_do():
    backbone = create_backbone("navit_tiny_patch16", **SMALL, coordinates="absolute").eval()
    backbone(torch.zeros(1, 3, 32, 32))
    with pytest.raises(InputError, match=r"has 9 rows or columns .* are for 8"):
        backbone(torch.zeros(1, 3, 33, 8))


def test_tables_are_brought_to_another_size_by_axis():
    small = create_model("navit_tiny_patch16", num_classes=3, **SMALL)
    randomise(small)
    larger = create_model(
        "navit_tiny_patch16",
        num_classes=3,
        **{**SMALL, "image_size": 48},
        weights=small.state_dict(),
    )
    for name in ("rows", "columns"):
        table = getattr(small.backbone, name).table
        want = F.interpolate(table.T[None], size=12, mode="linear")[0].T
        torch.testing.assert_close(getattr(larger.backbone, name).table, want)
