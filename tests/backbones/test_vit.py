"""ViT, DeiT and DINOv2: equal to timm and transformers, their key maps, and what they do beyond them."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitrail.backbones  # noqa: F401  (registers them)
from tests.parity import assert_close_to_peer, randomise
from vitrail.backbones.vit import KeysValues, ViT, ViTConfig, ViTHead, pooled
from vitrail.classifiers import Classifier
from vitrail.layers.position import resample_positions, resize_patch_embedding
from vitrail.models import build_classifier, create_backbone, create_model
from vitrail.packing import Spans, pack, to_patches
from vitrail.registry import backbone_entry, config_class, list_backbones
from vitrail_runtime.errors import InputError

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

NAMES = [n for p in ("vit_*", "deit_*") for n in list_backbones(p)]
NAMES = [n for n in NAMES if backbone_entry(n).family in ("vit", "deit", "dinov2")]
# timm's convention for the position table; its DINOv2 models have no head of their own.
AS_TIMM = {"pos_antialias": True, "pos_offset": 0.0, "pool": "token"}


def timms_name(name: str) -> str:
    return name if "dinov2" in name else f"{name}_224"


def loaded(name: str, layout: str, state: dict[str, Tensor], **fields: Any) -> Classifier:
    """Our classifier in float64 with a foreign state, every key of it used."""
    entry = backbone_entry(name)
    config = replace(entry.config, **fields)
    state = {key: tensor.double() for key, tensor in state.items()}
    converted = entry.layouts[layout].convert(state, config)
    classes = [v.shape[0] for k, v in converted.items() if k == "head.fc.weight"]
    model = build_classifier(entry, config, classes[0] if classes else 1).double().eval()
    own = model.state_dict()
    spare = [k for k in converted if k not in own and not k.endswith("mask_token")]
    new = [k for k in own if k not in converted and (classes or k.startswith("backbone."))]
    assert not spare, f"in the file, not in the model: {spare}"
    assert not new, f"in the model, not in the file: {new}"
    model.load_state_dict({k: v for k, v in converted.items() if k in own}, strict=False)
    return model


@pytest.fixture
def wide_interpolation(monkeypatch):
    """Peers cast their position table to float32 before they resample it. Parameters are born in float32,
    so the cast loses nothing; this keeps the resampling itself from rounding."""
    narrow = F.interpolate
    monkeypatch.setattr(F, "interpolate", lambda x, *args, **kw: narrow(x.double(), *args, **kw))


def picture(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def tiny(seed: int = 0, **fields: Any) -> ViT:
    torch.manual_seed(seed)
    shape = {"embed_dim": 32, "depth": 3, "num_heads": 2, "patch_size": 4, "image_size": 16}
    config = config_class(ViTConfig, fields)  # with the fields of studies where they are given
    backbone = ViT(config(**{**shape, "mlp_ratio": 2.0, **fields}))
    randomise(backbone)
    return backbone.double().eval()


def check_against_timm(name: str, peer: nn.Module, size: tuple[int, int], **fields: Any) -> None:
    randomise(peer)
    model = loaded(name, "timm", peer.state_dict(), **AS_TIMM, **fields)
    peer = peer.double().eval()
    x = picture(1, 3, *size)
    with torch.no_grad():
        features, theirs = model.backbone(x), peer.forward_features(x)
        logits = (model.head(features), peer.forward_head(theirs))
    skip = peer.num_prefix_tokens
    assert_close_to_peer(features.prefix, theirs[:, :skip])
    (only,) = features.maps.values()
    assert_close_to_peer(only.flatten(2).transpose(1, 2), theirs[:, skip:])
    if peer.num_classes:
        assert_close_to_peer(*logits)


# Small widths and depths of the same classes.
SMALL = {"embed_dim": 48, "depth": 3, "num_heads": 3}
CASES = {
    "vit_tiny_patch16": {},
    "deit_tiny_distilled_patch16": {},
    "vit_small_patch14_dinov2": {},
    "vit_small_patch14_reg4_dinov2": {},
    "vit_giant_patch14_dinov2": {"mlp_ratio": 16 / 3},  # timm counts both halves of SwiGLU
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grid", [(8, 8), (6, 11)])
@pytest.mark.usefixtures("wide_interpolation")
def test_it_equals_timm_at_the_tables_size_and_at_another_shape(name, grid):
    patch_size = backbone_entry(name).config.patch_size
    own = {"img_size": 8 * patch_size, "dynamic_img_size": True, **SMALL, **CASES[name]}
    peer = timm.create_model(timms_name(name), **own)
    size = (grid[0] * patch_size, grid[1] * patch_size)
    check_against_timm(name, peer, size, image_size=8 * patch_size, **SMALL)


@pytest.mark.usefixtures("wide_interpolation")
def test_an_odd_size_is_filled_up_as_timm_fills_it():
    options = {"dynamic_img_size": True, "dynamic_img_pad": True}
    peer = timm.create_model("vit_tiny_patch16_224", img_size=64, **options, **SMALL)
    check_against_timm("vit_tiny_patch16", peer, (49, 81), image_size=64, **SMALL)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16",
        "vit_small_patch32",
        "vit_base_patch16",
        "deit_tiny_distilled_patch16",
        "vit_small_patch14_dinov2",
        "vit_small_patch14_reg4_dinov2",
    ],
)
@pytest.mark.usefixtures("wide_interpolation")
def test_it_equals_timm_at_full_size(name):
    own = backbone_entry(name).config
    peer = timm.create_model(timms_name(name), dynamic_img_size=True)
    for size in (own.image_size, own.image_size), (6 * own.patch_size, 9 * own.patch_size):
        check_against_timm(name, peer, size)


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_has_the_tensors_of_timms(name):
    with torch.device("meta"):
        classes = 0 if "dinov2" in name else 1000
        peer = timm.create_model(timms_name(name), num_classes=classes)
        state, entry = peer.state_dict(), backbone_entry(name)
        own = build_classifier(entry, entry.config, 1000).state_dict()
    theirs = {k: v.shape for k, v in entry.layouts["timm"].convert(state, entry.config).items()}
    if not classes:
        own = {k: v for k, v in own.items() if k.startswith("backbone.")}
    assert {k: v.shape for k, v in own.items()} == theirs
    # What no shape tells.
    assert entry.config.num_heads == peer.blocks[0].attn.num_heads
    assert entry.config.norm_eps == peer.norm.eps
    assert entry.config.patch_size == peer.patch_embed.patch_size[0]


def huggingface(cls: str, **fields: Any) -> nn.Module:
    """A small transformers model with random weights, in float64; its LayerNorms as ours."""
    kind = re.sub(r"For.*|Model$", "", cls)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=192,
        image_size=64,
        patch_size=16,
        layer_norm_eps=1e-6,
        num_labels=7,
        attn_implementation="sdpa",  # the eager one takes its softmax in float32
        **fields,
    )
    peer = getattr(transformers, cls)(config)
    randomise(peer)
    return peer.eval()


def older_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A transformers 5 state as files were released before."""
    old = {}
    for key, tensor in state.items():
        dino = "encoder.layer." in key
        key = re.sub(r"(^|\.)layers\.(\d+)\.", r"\1encoder.layer.\2.", key)
        key = key.replace("attention.o_proj", "attention.output.dense")
        key = re.sub("attention.([qkv])_proj", lambda m: f"attention.attention.{m[1]}", key)
        for letter, word in (("q", "query"), ("k", "key"), ("v", "value")):
            key = key.replace(f"attention.attention.{letter}.", f"attention.attention.{word}.")
        if not dino:
            key = key.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")
        old[key.replace("mlp.down_proj", "mlp.weights_out")] = tensor
    for key in [k for k in old if "mlp.gate_proj" in k]:
        both = (old.pop(key), old.pop(key.replace("gate", "up")))
        old[key.replace("gate_proj", "weights_in")] = torch.cat(both)
    return old


AS_HUGGINGFACE = {"image_size": 64, "patch_size": 16, **SMALL}
PLAINLY = {"pos_antialias": False, "pos_offset": 0.0}
HUGGINGFACE_CASES = {
    "ViTForImageClassification": ("vit_tiny_patch16", "huggingface", {}, PLAINLY),
    "DeiTForImageClassificationWithTeacher": (
        "deit_tiny_distilled_patch16",
        "huggingface",
        {},
        PLAINLY,
    ),
    "Dinov2ForImageClassification": (
        "vit_giant_patch14_dinov2",
        "huggingface",
        {"use_swiglu_ffn": True},
        PLAINLY,
    ),
    "Dinov2WithRegistersForImageClassification": (
        "vit_small_patch14_reg4_dinov2",
        "huggingface_registers",
        {},
        {},
    ),
}


@pytest.mark.parametrize("names", ["5.x", "older"])
@pytest.mark.parametrize("cls", HUGGINGFACE_CASES)
@pytest.mark.usefixtures("wide_interpolation")
def test_it_equals_transformers_from_both_generations_of_key_names(cls, names):
    name, layout, peer_fields, fields = HUGGINGFACE_CASES[cls]
    peer = huggingface(cls, **peer_fields)
    state = peer.state_dict() if names == "5.x" else older_names(peer.state_dict())
    marks = backbone_entry(name).layouts[layout].marks
    assert all(mark in state for mark in marks)
    model = loaded(name, layout, state, **AS_HUGGINGFACE, **fields)
    peer = peer.double()
    # DINOv2's always resample; the others on demand.
    options = {} if "Dinov2" in cls else {"interpolate_pos_encoding": True}
    for size in ((64, 64), (48, 112)):
        x = picture(2, 3, *size)
        with torch.no_grad():
            assert_close_to_peer(model(x), peer(x, **options).logits)


def test_the_pooler_of_transformers_is_the_pretraining_heads_hidden_layer():
    peer = huggingface("ViTModel")
    fields = {**AS_HUGGINGFACE, "head": "tanh"}
    entry = backbone_entry("vit_tiny_patch16")
    config = replace(entry.config, **fields)
    state = entry.layouts["huggingface_base"].convert(peer.state_dict(), config)
    backbone = ViT(config)
    model = Classifier(backbone, ViTHead(config, backbone.feature_specs, 7))
    left = model.load_state_dict(state, strict=False)
    assert left.missing_keys == ["head.fc.weight", "head.fc.bias"]
    assert not left.unexpected_keys
    model, peer, x = model.double().eval(), peer.double(), picture(2, 3, 64, 64)
    with torch.no_grad():
        ours = model.head.hidden(pooled(model.backbone(x), "token")).tanh()
        assert_close_to_peer(ours, peer(x).pooler_output)


@pytest.mark.parametrize("name", ["vit_giant_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_the_official_dinov2_files_are_read(name):
    config = backbone_entry(name).config
    own = {"img_size": 8 * 14, "num_classes": 0, **SMALL, **CASES.get(name, {})}
    peer = timm.create_model(timms_name(name), **own)
    randomise(peer)
    state = {
        key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        if config.mlp == "swiglu"
        else key: tensor
        for key, tensor in peer.double().state_dict().items()
    }
    state["mask_token"] = torch.zeros(1, SMALL["embed_dim"])
    if config.num_reg_tokens:
        # There the class token has a position of its own, which timm and we add to the token beforehand.
        row = picture(1, 1, SMALL["embed_dim"])
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - row
        state["pos_embed"] = torch.cat([row, state["pos_embed"]], dim=1)
    layout = backbone_entry(name).layouts["official"]
    assert all(mark in state for mark in layout.marks)
    model = loaded(name, "official", state, image_size=8 * 14, **SMALL)
    x = picture(1, 3, 112, 112)
    with torch.no_grad():
        assert_close_to_peer(model.backbone(x).prefix, peer.eval().forward_features(x)[:, :-64])


# Position tables


@pytest.mark.parametrize("old", [(6, 6), (1, 3), (4, 9)])
@pytest.mark.parametrize("new", [(6, 9), (3, 11), (1, 1)])
@pytest.mark.parametrize(("antialias", "offset"), [(True, 0.0), (False, 0.0), (False, 0.1)])
def test_tables_are_resampled_as_torch_does(old, new, antialias, offset):
    table = picture(1, old[0] * old[1], 5)
    grid = table.reshape(1, *old, 5).permute(0, 3, 1, 2)
    size: dict[str, Any] = {"size": new}
    if offset:
        size = {"scale_factor": tuple((n + offset) / o for n, o in zip(new, old, strict=True))}
    want = F.interpolate(grid, **size, mode="bicubic", antialias=antialias)
    got = resample_positions(table, old, new, antialias=antialias, offset=offset)
    torch.testing.assert_close(got, want.flatten(2).transpose(1, 2), atol=1e-13, rtol=0)


@pytest.mark.parametrize("offset", [0.0, 0.1])
def test_a_table_at_its_own_grid_is_left_alone_and_a_traced_graph_agrees(monkeypatch, offset):
    table = picture(1, 35, 6)
    options = {"antialias": False, "offset": offset}
    assert resample_positions(table, (5, 7), (5, 7), **options) is table
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    traced = resample_positions(table, (5, 7), (5, 7), **options)
    torch.testing.assert_close(traced, table, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("old", "new"), [(16, 8), (16, 14), (16, 32), (8, 12)])
def test_patch_kernels_are_resized_as_timm_does(old, new):
    weight = picture(6, 3, old, old)
    want = timm.layers.resample_patch_embed(weight, [new, new])
    got = resize_patch_embedding(weight, new)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)  # timm inverts in float32


def test_a_grown_patch_kernel_gives_the_grown_image_the_same_tokens():
    weight, x = picture(6, 3, 8, 8), picture(1, 3, 24, 40)
    tokens = F.conv2d(x, weight, stride=8)
    # Each patch is resized alone, as the paper has it.
    patches = to_patches(x[0], 8).reshape(-1, 3, 8, 8)
    grown = F.interpolate(patches, size=(12, 12), mode="bicubic", antialias=True)
    again = grown.flatten(1) @ resize_patch_embedding(weight, 12).flatten(1).T
    torch.testing.assert_close(again, tokens[0].flatten(1).T, atol=1e-10, rtol=0)


def test_a_checkpoint_loads_at_another_image_size_and_patch_size(tmp_path):
    source = create_model("vit_tiny_patch16", num_classes=4, depth=2, image_size=64)
    randomise(source)
    state = {k.removeprefix("backbone."): v for k, v in source.state_dict().items()}
    state = {k.replace("head.fc", "head"): v for k, v in state.items()}
    shape = {"depth": 2, "image_size": 96, "patch_size": 8}
    model = create_model("vit_tiny_patch16", num_classes=4, weights=state, **shape)
    table = source.backbone.pos_embed
    want = resample_positions(table[:, 1:], (4, 4), (12, 12), antialias=True)
    torch.testing.assert_close(model.backbone.pos_embed, torch.cat([table[:, :1], want], dim=1))
    kernel = source.backbone.patch_embed.proj.weight
    torch.testing.assert_close(
        model.backbone.patch_embed.proj.weight, resize_patch_embedding(kernel, 8)
    )


# Tokens, blocks and heads


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 1),
        ({"class_token": False, "pool": "avg"}, 0),
        ({"num_reg_tokens": 4, "prefix_positions": False}, 5),
        ({"distillation_token": True, "num_reg_tokens": 2}, 4),
    ],
)
def test_prefix_tokens_come_before_the_map(fields, count):
    backbone = tiny(**fields)
    with torch.no_grad():
        features = backbone(picture(2, 3, 13, 22))
    assert (features.prefix is None) if count == 0 else (features.prefix.shape == (2, count, 32))
    assert features.maps["c2"].shape == (2, 32, 4, 6)


def test_out_blocks_give_the_normed_maps_that_timm_gives():
    peer = timm.create_model("vit_tiny_patch16_224", img_size=64, **SMALL)
    randomise(peer)
    fields = {"image_size": 64, "out_blocks": (0, 2), **SMALL}
    model = loaded("vit_tiny_patch16", "timm", peer.state_dict(), **fields)
    x = picture(2, 3, 64, 64)
    with torch.no_grad():
        maps = model.backbone(x).maps
        _, theirs = peer.double().eval().forward_intermediates(x, indices=[0, 2], norm=True)
    assert list(maps) == ["b0", "b2"] == list(model.backbone.feature_specs)
    for ours, want in zip(maps.values(), theirs, strict=True):
        assert_close_to_peer(ours, want)


def test_out_blocks_before_the_last_leave_the_prefix_to_the_last():
    whole, early = tiny(), tiny(out_blocks=(1,))
    x = picture(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(whole(x).prefix, early(x).prefix)


def test_a_share_of_the_blocks_attends_and_the_others_keep_their_mlp():
    backbone = tiny(depth=5, attn_every=2)
    assert [block.attn is not None for block in backbone.blocks] == [True, False, True, False, True]
    assert not any("blocks.1.norm1" in key for key in backbone.state_dict())
    record: dict[str, Tensor] = {}
    backbone(picture(1, 3, 8, 12), record=record)
    attended = [key for key in record if key.endswith("attn.weights")]
    assert attended == [f"blocks.{i}.attn.weights" for i in (0, 2, 4)]
    assert record["blocks.0.attn.weights"].shape == (1, 2, 7, 7)


def test_what_leaves_each_block_is_recorded_before_the_norm():
    backbone, record = tiny(out_blocks=(0, 2)), {}
    with torch.no_grad():
        features = backbone(picture(2, 3, 8, 12), record=record)
        for i, name in ((0, "b0"), (2, "b2")):
            tokens = backbone.norm(record[f"blocks.{i}"])[:, 1:]
            torch.testing.assert_close(tokens, features.maps[name].flatten(2).mT)
        torch.testing.assert_close(backbone.norm(record["blocks.2"])[:, :1], features.prefix)
    blocks = [key for key in record if "attn" not in key]
    assert blocks == ["blocks.0", "blocks.1", "blocks.2"]


def test_narrow_queries_and_keys_leave_the_values_their_width():
    backbone = tiny(qk_dim=6)
    randomise(backbone)
    attn = backbone.blocks[0].attn
    assert attn.qkv.weight.shape == (2 * 6 + 2 * 6 + 32, 32)
    x = picture(2, 5, 32)
    q, k, v = F.linear(x, attn.qkv.weight, attn.qkv.bias).split([12, 12, 32], dim=-1)
    q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in (q, k, v))
    weights = (q @ k.transpose(2, 3) / 6**0.5).softmax(-1)
    want = attn.proj((weights @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attn(x), want)
    torch.testing.assert_close(
        attn.forward_packed(x.flatten(0, 1), Spans((5, 5))), want.flatten(0, 1)
    )
    given = attn.keys_values(x)
    torch.testing.assert_close(given.keys, k)
    torch.testing.assert_close(given.values, v)
    record: dict[str, Tensor] = {}
    attn(x, record=record, name="attn")
    torch.testing.assert_close(record["attn.weights"], weights)


def test_the_conv_stem_pads_as_convolutions_with_padding_one():
    embed = tiny(stem="conv").patch_embed
    x = picture(2, 3, 16, 24)
    with torch.no_grad():
        assert embed(x).shape == (2, 32, 4, 6)
        # Convolution, GELU, norm, three times; then patches of half the size.
        for i in (0, 3, 6):
            conv = embed.stem[i]
            x = F.conv2d(x, conv.weight, conv.bias, stride=1 if i else 2, padding=1)
            x = embed.stem[i + 2](F.gelu(x))
        torch.testing.assert_close(embed(picture(2, 3, 16, 24)), embed.proj(x))


@pytest.mark.parametrize("pool", ["token", "avg", "both"])
@pytest.mark.parametrize("head", ["linear", "tanh", "mlp"])
def test_heads_read_what_pool_says(pool, head):
    backbone = tiny(pool=pool, head=head)
    torch.manual_seed(0)
    tail = ViTHead(backbone.config, backbone.feature_specs, 5).double()
    features = backbone(picture(2, 3, 16, 12))
    logits = tail(features)
    assert logits.shape == (2, 5)
    assert bool((logits == 0).all()) == (head == "linear"), "fine-tuning starts from zero"
    other = features._replace(prefix=features.prefix + 1)
    randomise(tail)
    assert torch.equal(tail(features), tail(other)) == (pool == "avg")


@pytest.mark.parametrize(("head", "act"), [("tanh", torch.tanh), ("mlp", F.gelu)])
def test_a_hidden_layer_is_followed_by_its_activation(head, act):
    backbone = tiny(pool="both", head=head, head_hidden_dim=20)
    tail = ViTHead(backbone.config, backbone.feature_specs, 5).double()
    randomise(tail)
    with torch.no_grad():
        features = backbone(picture(2, 3, 16, 12))
        (last,) = features.maps.values()
        x = torch.cat([features.prefix[:, 0], last.flatten(2).mean(2)], dim=1)
        want = tail.fc(act(x @ tail.hidden.weight.T + tail.hidden.bias))
        torch.testing.assert_close(tail(features), want)


def test_the_distilled_head_averages_the_two_answers_that_timm_gives():
    peer = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, **SMALL)
    randomise(peer)
    fields = {"image_size": 64, **SMALL}
    model = loaded("deit_tiny_distilled_patch16", "timm", peer.state_dict(), **fields)
    peer = peer.double().train()
    peer.set_distilled_training(True)
    x = picture(2, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = model.head.both(model.backbone(x)), peer(x)
        for a, b in zip(ours, theirs, strict=True):
            assert_close_to_peer(a, b)
        torch.testing.assert_close(model(x), sum(ours) / 2)


# A second stream


def test_handing_out_keys_and_values_changes_no_bit():
    backbone = tiny(attn_every=2).float()
    x = picture(2, 3, 14, 21, dtype=torch.float32)
    with torch.no_grad():
        plain = backbone(x)
        keys_values = []
        features = backbone(x, keys_values=keys_values)
    assert torch.equal(plain.prefix, features.prefix)
    assert torch.equal(plain.maps["c2"], features.maps["c2"])
    assert [kv is None for kv in keys_values] == [False, True, False]
    assert keys_values[0].keys.shape == keys_values[0].values.shape == (2, 2, 1 + 4 * 6, 16)


def test_a_second_stream_of_the_class_token_repeats_the_first():
    """A token that reads the base stream's keys, without its own among them, is one more class token."""
    backbone = tiny(layer_scale_init=0.5)
    x = picture(2, 3, 16, 24)
    with torch.no_grad():
        stream, _ = backbone.embed(x)
        for block in backbone.blocks:
            keys_values: list[KeysValues | None] = []
            following = block(stream, keys_values=keys_values)
            (own,) = keys_values
            # The stream's own key of the class token is left out: the second stream brings it itself.
            others = KeysValues(own.keys[:, :, 1:], own.values[:, :, 1:])
            token = block.cross(stream[:, :1], others)
            torch.testing.assert_close(token, following[:, :1], atol=1e-12, rtol=0)
            stream = following


def test_memory_is_a_row_of_each_blocks_input_that_is_dropped_behind_it():
    backbone = tiny(layer_scale_init=0.5)
    memory = [picture(4, 32) * (i + 1) for i in range(3)]
    x = picture(2, 3, 8, 12)
    with torch.no_grad():
        stream, _ = backbone.embed(x)
        for block, rows in zip(backbone.blocks, memory, strict=True):
            length = stream.shape[1]
            stream = block(torch.cat([stream, rows.expand(2, -1, -1)], dim=1))[:, :length]
        want = backbone.norm(stream)
        features = backbone(x, memory=memory)
    torch.testing.assert_close(features.prefix, want[:, :1], atol=1e-12, rtol=0)
    (only,) = features.maps.values()
    torch.testing.assert_close(only.flatten(2).transpose(1, 2), want[:, 1:], atol=1e-12, rtol=0)


def test_checkpointing_hands_the_memory_on():
    gradients = []
    for checkpointing in (False, True):
        backbone = tiny(layer_scale_init=0.5).train()
        backbone.grad_checkpointing = checkpointing
        memory = [(picture(4, 32) * (i + 1)).requires_grad_() for i in range(3)]
        backbone(picture(2, 3, 8, 12), memory=memory).prefix.square().sum().backward()
        gradients.append([rows.grad for rows in memory])
    for plain, again in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, again, atol=1e-12, rtol=0)


# What a person can get wrong


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embed_dim": 50, "num_heads": 3}, "divisible"),
        ({"class_token": False}, "pool='avg'"),
        ({"out_blocks": (2, 14)}, "from 0 to 11"),
        ({"attn_every": 0}, "at least 1"),
        ({"stem": "conv", "patch_size": 7}, "odd"),
        ({"image_size": 0}, "image_size"),
        ({"qk_dim": 0}, "at least 1 channel"),
    ],
)
def test_a_config_that_cannot_be_built_says_what_fits(fields, message):
    with pytest.raises(InputError, match=message):
        create_backbone("vit_tiny_patch16", **fields)


def test_memory_for_another_depth_or_for_a_block_without_attention_is_named():
    backbone, x = tiny(attn_every=2), picture(1, 3, 8, 8)
    with pytest.raises(InputError, match="one per block"):
        backbone(x, memory=[None])
    with pytest.raises(InputError, match=r"blocks\.1 does not attend"):
        backbone(x, memory=[None, picture(2, 32), None])


def test_what_would_be_ignored_is_refused():
    with pytest.raises(InputError, match="one linear layer per token"):
        create_model("deit_tiny_distilled_patch16", depth=1, pool="avg")
    backbone = tiny(attn_every=2).double()
    tokens = picture(1, 2, 32)
    offered = backbone.blocks[0].keys_values(tokens)
    with pytest.raises(InputError, match="does not attend"):
        backbone.blocks[1].cross(tokens, None, offered)
    packed = pack([torch.zeros(3, 8, 8, dtype=torch.uint8)], patch_size=backbone.config.patch_size)[
        0
    ]
    with pytest.raises(InputError, match="normalised floats"):
        backbone.forward_packed(packed)
