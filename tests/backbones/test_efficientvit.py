import json
from dataclasses import replace

import pytest
import timm
import torch

from tests.golden import compare
from tests.golden.fill import image
from tests.parity import assert_close_to_peer, fill_by_key_map, randomise
from vitrail.backbones.efficientvit import (
    EfficientViT,
    EfficientViTConfig,
    offset_index,
)
from vitrail.configuration import from_dict, to_dict
from vitrail.models import create_backbone, create_model
from vitrail.registry import backbone_entry, list_backbones, tiny_entries
from vitrail_runtime.errors import InputError


def from_peer(name, peer, **config_fields):
    """Our classifier with the weights of timm's model, by the key map."""
    ours = create_model(name, **config_fields)
    entry = backbone_entry(name)
    state = entry.layouts["timm"].convert(peer.state_dict(), ours.backbone.config)
    state = entry.resample(state, ours.backbone.config)
    ours.load_state_dict(state, strict=True)
    return ours.double().eval()


def timm_model(name, **kwargs):
    peer = timm.create_model(name, pretrained=False, **kwargs)
    randomise(peer, gain=0.75)
    return peer.double().eval()


def assert_equals_timm(name, height, width, **config_fields):
    size = config_fields.get("image_size", 224)
    peer = timm_model(name, img_size=size)
    ours = from_peer(name, peer, **config_fields)
    images = image(2, height, width).double() * 20
    with torch.no_grad():
        maps = peer.forward_intermediates(images, intermediates_only=True)
        features = ours.backbone(images)
        for got, want in zip(features.maps.values(), maps, strict=True):
            assert_close_to_peer(got, want)
        assert_close_to_peer(ours.head(features), peer(images))


def test_m0_equals_timm_in_maps_and_logits_at_a_size_of_unequal_sides():
    assert_equals_timm("efficientvit_m0", 224, 160)


@pytest.mark.slow
@pytest.mark.parametrize("name", list_backbones("efficientvit_m*"))
def test_each_variant_equals_timm_at_the_papers_size_and_another(name):
    assert_equals_timm(name, 224, 224)
    assert_equals_timm(name, 320, 416)


def test_windows_of_another_image_size_equal_timms_with_its_resampled_biases():
    at_224 = timm_model("efficientvit_m0")
    images = image(2, 96, 128).double() * 20
    ours = from_peer("efficientvit_m0", at_224, image_size=(96, 128))
    at_224.set_input_size((96, 128))
    with torch.no_grad():
        # Both resample the table in float32.
        assert_close_to_peer(ours(images), at_224(images), rel=1e-6)


@pytest.mark.parametrize("name", ["efficientvit_m0", "efficientvit_m2"])
def test_official_weights_give_the_stored_activations(name):
    facts, _ = compare.load(name)
    config, entry = facts["config"], backbone_entry(name)
    model = create_model(name, image_size=config["img_size"])
    keys = {k: tuple(shape) for k, shape, dtype in facts["state_dict"] if dtype == "float32"}
    entry = type(entry)(**{**vars(entry), "config": model.backbone.config})
    state = fill_by_key_map(entry, "official", keys, facts["fill"]["gain"])
    distilled = [k for k in state if k.startswith("head_dist.")]
    second_head = {k[10:].replace("l.", "linear."): state.pop(k) for k in distilled}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(k.endswith("num_batches_tracked") for k in missing)
    model.double().eval()

    taps: dict[str, torch.Tensor] = {}
    block, stage2 = model.backbone.stages[0].blocks[0], model.backbone.stages[1]
    for tap, module in {
        "patch_embed": model.backbone.patch_embed,
        "blocks1.0": block,
        "blocks2.1": stage2.downsample.merge,
        "blocks2.3": stage2.blocks[0],
        "head.bn": model.head.bn,
    }.items():
        module.register_forward_hook(lambda m, args, out, tap=tap: taps.__setitem__(tap, out))
    images = 20 * image(*facts["input"]["shape"][:1], *facts["input"]["shape"][2:]).double()
    with torch.no_grad():
        features = model.backbone(images)
        taps["blocks3"] = features.maps["c6"]
        taps["output"] = model.head(features)
        if second_head:  # the distilled fixture answers with the mean of two heads
            model.head.load_state_dict(second_head, strict=False)
            first_bn = taps["head.bn"]
            taps["output"] = (taps["output"] + model.head(features)) / 2
            taps["head.bn"] = first_bn
    compare.check(name, taps)


def test_offsets_are_numbered_in_order_of_first_appearance():
    points = [(y, x) for y in range(3) for x in range(3)]
    number: dict[tuple[int, int], int] = {}
    want = [
        number.setdefault((abs(a - c), abs(b - d)), len(number))
        for a, b in points
        for c, d in points
    ]
    assert offset_index(3, torch.device("cpu")).tolist() == want


def tiny(**fields):
    entry = tiny_entries()["efficientvit"]
    model = entry.cls(EfficientViTConfig(**{**vars(entry.config), **fields}))
    randomise(model)
    return model.eval()


def test_recording_gives_the_weights_of_every_block_and_changes_nothing():
    model, record = tiny(), {}
    images = image(2, 130, 200)  # map 9 x 13: two windows each way
    with torch.no_grad():
        plain, recorded = model(images), model(images, record=record)
    for name, want in plain.maps.items():
        assert torch.equal(recorded.maps[name], want)
    weights = record["stages.0.blocks.0.attn.weights"]
    assert weights.shape == (2 * 4, 4, 49, 49)
    torch.testing.assert_close(weights.sum(-1), torch.ones(8, 4, 49))
    assert sorted(record) == [f"stages.{i}.blocks.0.attn.weights" for i in range(3)]


def test_a_fresh_block_is_the_identity():
    block = create_backbone("efficientvit_m0").stages[0].blocks[0]
    x = torch.randn(2, 64, 9, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x)


def test_the_windows_follow_the_image_size():
    config = tiny_entries()["efficientvit"].config

    def at(size):
        return EfficientViTConfig(**{**vars(config), "image_size": size}).windows()

    assert at(224) == [7, 7, 4]
    assert at((448, 640)) == [7, 7, 7]
    assert at(64) == [4, 2, 1]


def test_widths_that_the_heads_cannot_share_are_refused():
    with pytest.raises(InputError, match="dims must be multiples"):
        EfficientViTConfig(dims=(64, 100), depths=(1, 1), num_heads=(4, 3), kernels=(5, 5, 5, 5))
    with pytest.raises(InputError, match="kernels"):
        EfficientViTConfig(dims=(64,), depths=(1,), num_heads=(4,), kernels=(5,))


def test_widths_inside_the_blocks_can_differ_from_stage_to_stage():
    config = tiny_entries()["efficientvit"].config
    slim = replace(config, key_dim=(4, 8, 12), ffn_ratio=(1.0, 0.5, 2.0))
    assert from_dict(EfficientViTConfig, json.loads(json.dumps(to_dict(slim)))) == slim
    backbone = EfficientViT(slim).eval()
    shapes = {k: tuple(v.shape[:2]) for k, v in backbone.state_dict().items() if "conv.weight" in k}
    assert shapes["stages.1.blocks.0.attn.qkvs.0.conv.weight"] == (2 * 8 + 16, 16)
    assert shapes["stages.1.downsample.ffn0.pw1.conv.weight"] == (32, 32)
    assert shapes["stages.1.downsample.ffn1.pw1.conv.weight"] == (24, 48)
    assert shapes["stages.2.blocks.0.ffn1.pw2.conv.weight"] == (64, 128)
    assert backbone(image(1, 64, 96)).maps["c6"].isfinite().all()
    for wrong in ({"key_dim": (4, 8)}, {"key_dim": 0}, {"ffn_ratio": (1.0, 0.0, 1.0)}):
        with pytest.raises(InputError, match="one for each of the 3 stages"):
            replace(config, **wrong)


def test_channels_last_memory_changes_nothing():
    model, images = tiny(), image(2, 120, 250)
    last = tiny().to(memory_format=torch.channels_last)
    with torch.no_grad():
        want = model(images).maps["c6"]
        got = last(images.to(memory_format=torch.channels_last)).maps["c6"]
    torch.testing.assert_close(got, want, atol=1e-5 * float(want.abs().max()), rtol=0)
