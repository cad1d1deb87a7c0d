"""Swin against the official fixture, torchvision, timm and transformers."""

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

from tests.golden.compare import check, load
from tests.golden.fill import image, value
from tests.parity import assert_close_to_peer, randomise
from vitrail.backbones.swin import (
    Swin,
    SwinConfig,
    SwinTail,
    from_hugging_face,
    from_official,
    from_timm,
    from_torchvision,
    resample,
    shift_masks,
    window_kinds,
)
from vitrail.classifiers import Classifier
from vitrail.models import create_model
from vitrail_runtime.errors import InputError

SMALL = SwinConfig(embed_dim=24, depths=(2, 2, 2), num_heads=(2, 3, 4), window_size=5)


def classifier(config, num_classes=10):
    backbone = Swin(config)
    return Classifier(backbone, SwinTail(config, backbone.feature_specs, num_classes)).eval()


def torchvision_peer(config, num_classes=10):
    return TorchvisionSwin(
        patch_size=[config.patch_size] * 2,
        embed_dim=config.embed_dim,
        depths=list(config.depths),
        num_heads=list(config.num_heads),
        window_size=[config.window_size] * 2,
        num_classes=num_classes,
    )


def carried_over(peer, config, convert, num_classes=10):
    """`peer` with random weights and our classifier with the same, both float64 and in eval mode."""
    randomise(peer)
    ours = classifier(config, num_classes)
    ours.load_state_dict(convert(peer.state_dict(), config))
    return ours.double().eval(), peer.double().eval()


def test_official_keys_give_the_stored_maps_and_logits():
    facts, _ = load("swin_cfg_a")
    config = SwinConfig(embed_dim=48, depths=(2, 2, 4), num_heads=(3, 6, 12))
    keys = {k: s for k, s, dtype in facts["state_dict"] if dtype == "float32"}
    state = {k: torch.from_numpy(value(k, shape)) for k, shape in keys.items()}
    model = classifier(config)
    model.load_state_dict(from_official(state, config))
    model, images = model.double(), image(2, 112, 112).double()
    with torch.no_grad():
        maps = model.backbone(images).maps
        normed = model.head.norm(maps["c4"].permute(0, 2, 3, 1))
        check(
            "swin_cfg_a",
            {
                "layers.2": maps["c4"].flatten(2).mT,
                "norm": normed.flatten(1, 2),
                "output": model(images),
            },
        )


@pytest.mark.parametrize("size", [(140, 200), (36, 4), (64, 132), (80, 80)])
def test_equals_torchvision_also_where_windows_and_merges_need_padding(size):
    ours, peer = carried_over(torchvision_peer(SMALL), SMALL, from_torchvision)
    images = image(2, *size).double()
    with torch.no_grad():
        assert_close_to_peer(ours(images), peer(images))


def test_equals_timm_where_windows_fit():
    peer = timm.models.swin_transformer.SwinTransformer(
        img_size=(80, 160), embed_dim=24, depths=(2, 2, 2), num_heads=(2, 3, 4), window_size=5,
        num_classes=10,
    )  # fmt: skip
    ours, peer = carried_over(peer, SMALL, from_timm)
    images = image(2, 80, 160).double()
    with torch.no_grad():
        assert_close_to_peer(ours(images), peer(images))


def test_equals_transformers_at_a_size_that_is_no_multiple_of_the_patch(monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = SwinConfig(embed_dim=24, depths=(2, 2), num_heads=(2, 3), window_size=5)
    peer = transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=160,
            embed_dim=24,
            depths=[2, 2],
            num_heads=[2, 3],
            window_size=5,
            num_labels=10,
            attn_implementation="sdpa",
        )
    )
    ours, peer = carried_over(peer, config, from_hugging_face)
    images = image(2, 141, 98).double()
    with torch.no_grad():
        assert_close_to_peer(ours(images), peer(images).logits)


def test_released_hugging_face_keys_are_understood():
    state = classifier(SMALL).state_dict()
    released = {}
    for key, tensor in state.items():
        part, key = key.split(".", 1)
        if part == "head":
            key = key.replace("norm.", "swin.layernorm.").replace("fc.", "classifier.")
        elif key.startswith("patch_embed"):
            key = key.replace("proj", "patch_embeddings.projection")
            key = "swin.embeddings." + key.removeprefix("patch_embed.")
        else:
            _, stage, rest = key.split(".", 2)
            if rest.startswith("downsample"):
                stage = int(stage) - 1
            for ours, theirs in {
                "attn.proj.": "attention.output.dense.",
                "mlp.fc1.": "intermediate.dense.",
                "mlp.fc2.": "output.dense.",
                "norm1.": "layernorm_before.",
                "norm2.": "layernorm_after.",
                "attn.": "attention.self.",
            }.items():
                if f".{ours}" in f".{rest}":
                    rest = rest.replace(ours, theirs)
                    break
            key = f"swin.encoder.layers.{stage}.{rest}"
        if "self.qkv." in key:
            for name, third in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                released[key.replace("qkv", name)] = third
        else:
            released[key] = tensor
    released["swin.encoder.layers.0.blocks.0.attention.self.relative_position_index"] = torch.ones(
        1
    )
    back = from_hugging_face(released, SMALL)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[k], state[k]) for k in state)


@pytest.mark.parametrize("size", [(5, 15), (10, 10), (5, 5)])
def test_shift_mask_equals_the_nine_slices_of_the_paper(size):
    height, width = size
    window, shift = 5, 2
    cpu = torch.device("cpu")
    masks = shift_masks(height, width, window, shift, torch.float64, cpu)
    got = masks[window_kinds(height, width, window, cpu)]
    region = torch.zeros(height, width)
    cuts = []
    for n in size:  # an axis of one window is not shifted
        cuts.append([0, n - window, n - (shift if n > window else 0), n])
    for i in range(3):
        for j in range(3):
            region[cuts[0][i] : cuts[0][i + 1], cuts[1][j] : cuts[1][j + 1]] = 3 * i + j
    windows = region.unfold(0, window, window).unfold(1, window, window).reshape(-1, window**2)
    want = (windows[:, None] != windows[:, :, None]).double() * -100
    assert torch.equal(got, want)


def test_a_table_of_another_window_is_resampled_over_its_offsets():
    key = "backbone.layers.0.blocks.0.attn.relative_position_bias_table"
    slope = torch.arange(9.0).repeat(9)[:, None]  # rises with dx
    config = SwinConfig(embed_dim=24, depths=(2, 2, 2), num_heads=(2, 3, 4), window_size=12)
    wide = resample({key: slope}, config)[key]
    assert wide.shape == (23**2, 1)
    wide = wide.reshape(23, 23)
    assert wide[11, 11].item() == pytest.approx(4.0)  # the offset (0, 0) stays in the middle
    assert (wide.diff(dim=1)[:, 3:-3] > 0).all()


@pytest.mark.parametrize(("old", "new"), [(7, 12), (12, 7), (5, 6)])
def test_a_table_is_resampled_bicubically_as_in_the_official_code(old, new):
    key = "backbone.layers.0.blocks.0.attn.relative_position_bias_table"
    table = torch.randn((2 * old - 1) ** 2, 3, generator=torch.Generator().manual_seed(0))
    config = SwinConfig(embed_dim=24, depths=(2,), num_heads=(3,), window_size=new)
    grid = table.T.reshape(1, 3, 2 * old - 1, 2 * old - 1)
    want = F.interpolate(grid, (2 * new - 1, 2 * new - 1), mode="bicubic").flatten(2)[0].T
    got = resample({key: table, "backbone.norm.weight": table}, config)
    torch.testing.assert_close(got[key], want)
    assert got["backbone.norm.weight"] is table
    assert resample({key: want}, config)[key] is want


def test_weights_of_window_7_load_into_window_12():
    with torch.device("meta"):
        old = create_model("swin_tiny_patch4_window7")
    state = {k: torch.randn(v.shape) * 0.02 for k, v in old.state_dict().items()}
    model = create_model("swin_tiny_patch4_window7", window_size=12, weights=state)
    table = model.backbone.layers[0].blocks[0].attn.relative_position_bias_table
    assert table.shape == (23**2, 3)


def test_recorded_attention_weights_explain_the_same_output():
    model = classifier(SMALL)
    images = image(1, 61, 90)
    record = {}
    with torch.no_grad():
        plain, explained = model(images), model(images, record=record)
    torch.testing.assert_close(plain, explained, rtol=1e-4, atol=1e-5)
    assert len(record) == 6
    weights = record["layers.0.blocks.1.attn.weights"]
    assert weights.shape == (4 * 5, 2, 25, 25)  # 16 x 23 patches, padded to 20 x 25
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


@pytest.mark.parametrize(("every", "share"), [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2)])
def test_attn_every_keeps_that_share_of_attention_blocks(every, share):
    with torch.device("meta"):
        model = create_model("swin_tiny_patch4_window7", attn_every=every)
        model(torch.empty(1, 3, 64, 96))
    assert sum(b.attn is not None for layer in model.backbone.layers for b in layer.blocks) == share


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": (3, 6)}, "one number of heads per stage"),
        ({"num_heads": (5, 6, 12, 24)}, "stage 0 is 96 wide, which 5 heads"),
        ({"window_size": 0}, "at least 1"),
    ],
)
def test_a_config_that_cannot_be_built_says_why(fields, message):
    with torch.device("meta"), pytest.raises(InputError, match=message):
        create_model("swin_tiny_patch4_window7", **fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("swin_tiny_patch4_window7", (224, 448)),
        ("swin_tiny_patch4_window7", (224, 224)),
        ("swin_base_patch4_window12", (384, 384)),
    ],
)
def test_full_size_equals_timm(name, size):
    peer = timm.create_model(f"{name}_{size[0]}", pretrained=False, img_size=size)
    ours = create_model(name)
    randomise(peer)
    ours.load_state_dict(from_timm(peer.state_dict(), ours.backbone.config))
    images = image(1, *size).double()
    with torch.no_grad():
        assert_close_to_peer(ours.double().eval()(images), peer.double().eval()(images))


@pytest.mark.slow
def test_full_size_equals_torchvision_at_a_size_that_fits_nothing():
    from torchvision.models import swin_t

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = swin_t(weights=None)
    ours = create_model("swin_tiny_patch4_window7")
    randomise(peer)
    ours.load_state_dict(from_torchvision(peer.state_dict(), ours.backbone.config))
    images = image(1, 236, 180).double()
    with torch.no_grad():
        assert_close_to_peer(ours.double().eval()(images), peer.double().eval()(images))


@pytest.mark.parametrize("every", [1, 2])
def test_windows_of_the_blocks_that_attend_take_turns_from_unshifted_on(every):
    """Section 3.2: W-MSA, then SW-MSA by half a window, in each stage anew."""
    with torch.device("meta"):
        model = create_model("swin_tiny_patch4_window7", depths=(4, 4, 6, 4), attn_every=every)
    for layer in model.backbone.layers:
        shifts = [block.attn.shift for block in layer.blocks if block.attn is not None]
        assert shifts == [0, 3, 0, 3, 0, 3][: len(shifts)]
        assert len(shifts) >= 2
