import pytest
import torch

from tests.backbones.peers import assert_equals_peer
from tests.golden.compare import check
from tests.golden.fill import image
from tests.parity import filled_officially
from vitrail.models import create_backbone
from vitrail.registry import backbone_entry

timm = pytest.importorskip("timm")


def test_official_weights_give_the_stored_taps():
    model = filled_officially("mobilevitv2_050")
    taps = {
        "conv_1": "stem",
        "layer_2": "stages.1.1",
        "layer_3.1.local_rep": "stages.2.1.conv_1x1",
        "layer_3.1.global_rep": "stages.2.1.norm",
        "layer_3.1": "stages.2.1",
        "layer_5.1": "stages.4.1",
    }
    seen = {}
    for official, ours in taps.items():
        module = model.backbone.get_submodule(ours)
        module.register_forward_hook(lambda m, i, out, k=official: seen.__setitem__(k, out))
    with torch.no_grad():
        seen["output"] = model(2 * image(1, 256, 192).double())
    # Ours keeps the map; the fixture holds it unfolded, (B, C, place, patch).
    x = seen["layer_3.1.global_rep"]
    batch, dim, height, width = x.shape
    x = x.reshape(batch, dim, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
    seen["layer_3.1.global_rep"] = x.reshape(batch, dim, 4, -1)
    check("mobilevitv2_050", seen)


def test_logits_equal_timms():
    assert_equals_peer(timm.create_model("mobilevitv2_050"), "mobilevitv2_050", "timm", [(128, 64)])


def test_logits_equal_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileViTV2Config(num_labels=1000, width_multiplier=0.5)
    peer = transformers.MobileViTV2ForImageClassification(config)
    assert_equals_peer(peer, "mobilevitv2_050", "huggingface", [(128, 64)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilevitv2_050", "mobilevitv2_175"])
def test_logits_equal_timms_at_the_papers_size(name):
    assert_equals_peer(timm.create_model(name), name, "timm", [(256, 256), (320, 192)])


def test_the_first_odd_map_is_resized_as_in_timm_and_then_cropped():
    peer = timm.create_model("mobilevitv2_050", features_only=True, out_indices=(2,))
    ours = create_backbone("mobilevitv2_050")
    state = {
        k.replace("_", ".", 1) if k.startswith("stages_") else k: v
        for k, v in peer.state_dict().items()
    }
    entry = backbone_entry("mobilevitv2_050")
    mapped = entry.layouts["timm"].convert(state, entry.config)
    ours.load_state_dict({k.removeprefix("backbone."): v for k, v in mapped.items()}, strict=False)
    x = torch.randn(
        1, 3, 72, 56, generator=torch.Generator().manual_seed(0)
    )  # maps of 9 x 7 at stride 8
    with torch.no_grad():
        want = peer.eval()(x)[0]
        got = ours.eval()(x).maps["c3"]
    assert want.shape[-2:] == (10, 8)
    torch.testing.assert_close(got, want[..., :9, :7], atol=1e-5 * float(want.abs().max()), rtol=0)


def test_each_place_of_a_patch_has_its_own_scores():
    backbone = create_backbone("mobilevitv2_050").eval()
    record = {}
    with torch.no_grad():
        backbone(torch.randn(2, 3, 64, 96), record=record)
    scores = record["stages.2.1.transformer.1.attn.scores"]
    assert scores.shape == (2, 4, 8, 12)
    torch.testing.assert_close(scores.sum((2, 3)), torch.ones(2, 4))
    for place in range(4):
        own = scores[:, place, place // 2 :: 2, place % 2 :: 2]
        torch.testing.assert_close(own.sum((1, 2)), torch.ones(2))
