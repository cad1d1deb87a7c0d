import pytest
import torch

from tests.backbones.peers import assert_equals_peer
from tests.golden.compare import check
from tests.golden.fill import image
from tests.parity import filled_officially
from vitrail.models import create_backbone

timm = pytest.importorskip("timm")


def test_official_weights_give_the_stored_taps():
    model = filled_officially("mobilevit_xxs")
    taps = {
        "conv_1": "stem",
        "layer_2": "stages.1.2",
        "layer_3.1.global_rep.0": "stages.2.1.transformer.0",
        "layer_3.1": "stages.2.1",
        "layer_5.1": "stages.4.1",
    }
    seen = {}
    for official, ours in taps.items():
        module = model.backbone.get_submodule(ours)
        module.register_forward_hook(lambda m, i, out, k=official: seen.__setitem__(k, out))
    model.head.conv.register_forward_hook(lambda m, i, o: seen.__setitem__("conv_1x1_exp", o))
    with torch.no_grad():
        # The official network takes BGR and our key map turned its stem round.
        seen["output"] = model((2 * image(1, 256, 192)).flip(1).double())
    check("mobilevit_xxs", seen)


@pytest.mark.parametrize("size", [(96, 64), (75, 107)])
def test_logits_equal_timms_at_even_and_odd_maps(size):
    assert_equals_peer(timm.create_model("mobilevit_xxs"), "mobilevit_xxs", "timm", [size])


@pytest.mark.parametrize(
    "size", [(64, 75), pytest.param((96, 64), marks=pytest.mark.slow)], ids=["odd", "even"]
)
def test_logits_equal_transformers(size):
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileViTConfig(
        num_labels=1000,
        expand_ratio=2.0,
        hidden_sizes=[64, 80, 96],
        neck_hidden_sizes=[16, 16, 24, 48, 64, 80, 320],
    )
    peer = transformers.MobileViTForImageClassification(config)
    assert_equals_peer(peer, "mobilevit_xxs", "huggingface", [size], reverse_channels=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevit_s"])
def test_logits_equal_timms_at_the_papers_size(name):
    assert_equals_peer(timm.create_model(name), name, "timm", [(256, 256), (320, 224)])


def test_every_pixel_attends_to_the_pixels_at_its_place():
    backbone = create_backbone("mobilevit_xxs").eval()
    record = {}
    with torch.no_grad():
        backbone(torch.randn(2, 3, 64, 96), record=record)
    weights = record["stages.2.1.transformer.1.attn.weights"]
    # 4 places of 2 images; a map of 8 x 12 has 4 x 6 patches.
    assert weights.shape == (2 * 4, 4, 24, 24)
    torch.testing.assert_close(weights.sum(-1), torch.ones(8, 4, 24))


def test_folding_undoes_unfolding():
    block = create_backbone("mobilevit_xxs").stages[2][1]
    x = torch.randn(2, 5, 6, 8)
    assert torch.equal(block.fold(block.unfold(x), x), x)
