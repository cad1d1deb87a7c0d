import pytest
import torch

from tests.backbones.peers import assert_equals_peer, classifier
from tests.parity import assert_close_to_peer, randomise
from vitrail.bench.macs import count_macs, count_params
from vitrail.models import create_backbone
from vitrail.registry import backbone_entry
from vitrail.weights import load_weights
from vitrail_runtime.errors import InputError

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")


def peer_of(layout, name):
    make = timm.create_model if layout == "timm" else torchvision.models.get_model
    return make(name)


@pytest.mark.parametrize("layout", ["torchvision", "timm"])
def test_logits_equal_the_peers(layout):
    assert_equals_peer(peer_of(layout, "resnet18"), "resnet18", layout, [(75, 107)])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"),
    [("resnet18", "torchvision"), ("resnet50", "timm"), ("resnet101", "torchvision")],
)
def test_logits_equal_the_peers_at_the_papers_size(name, layout):
    assert_equals_peer(peer_of(layout, name), name, layout, [(224, 224), (192, 256)])


def test_the_dilated_last_stage_equals_torchvisions():
    peer = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    randomise(peer)
    peer = peer.double().eval()
    ours = create_backbone("resnet50", dilated_c5=True, weights=dict(peer.state_dict()))
    ours = ours.double().eval()
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    body = torchvision.models._utils.IntermediateLayerGetter(peer, {"layer3": "c4", "layer4": "c5"})
    with torch.no_grad():
        want, got = body(x), ours(x)
    assert ours.feature_specs["c5"].stride == 16
    assert want["c5"].shape[-2:] == (4, 6)
    for name, value in want.items():
        assert_close_to_peer(got.maps[name], value)


def test_frozen_norms_take_the_same_weights_and_learn_nothing():
    plain = create_backbone("resnet18")
    randomise(plain)
    frozen = create_backbone("resnet18", frozen_norm=True)
    load_weights(frozen, plain.state_dict(), backbone_entry("resnet18"), config=frozen.config)
    x = torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = plain.eval()(x).maps["c5"]
        got = frozen.train()(x).maps["c5"]  # training changes nothing
    torch.testing.assert_close(got, want, atol=1e-4 * float(want.abs().max()), rtol=0)
    assert not [n for n, _ in frozen.named_parameters() if "bn" in n or "downsample.1" in n]


def test_dilation_of_two_convolution_blocks_is_refused():
    with pytest.raises(InputError, match="resnet50"):
        create_backbone("resnet34", dilated_c5=True)


@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152"])
def test_size_and_cost_are_torchvisions(name):
    meta = torchvision.models.get_model_weights(name).IMAGENET1K_V1.meta
    with torch.device("meta"):
        model = classifier(name)
    assert count_params(model) == meta["num_params"]
    # torchvision's counter adds the classifier's bias and the like: three digits agree.
    assert count_macs(model, 224, 224) / 1e9 == pytest.approx(meta["_ops"], abs=2e-3)
