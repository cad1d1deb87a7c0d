import pytest

from tests.backbones.peers import assert_equals_peer

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

PEERS = [
    ("mobilenetv1_100", "timm", "mobilenetv1_100"),
    ("mobilenetv2_035", "timm", "mobilenetv2_035"),
    ("mobilenetv2_100", "torchvision", "mobilenet_v2"),
    ("mobilenetv3_small_050", "timm", "mobilenetv3_small_050"),
    ("mobilenetv3_large", "timm", "mobilenetv3_large_100"),
    ("mobilenetv3_small", "torchvision", "mobilenet_v3_small"),
    ("mobilenetv3_large", "torchvision", "mobilenet_v3_large"),
]
LARGER = [
    ("mobilenetv1_125", "timm", "mobilenetv1_125"),
    ("mobilenetv2_140", "timm", "mobilenetv2_140"),
    ("mobilenetv3_large_075", "timm", "mobilenetv3_large_075"),
]


def peer_of(layout, name):
    make = timm.create_model if layout == "timm" else torchvision.models.get_model
    return make(name)


@pytest.mark.parametrize(("name", "layout", "peer"), PEERS)
def test_logits_equal_the_peers(name, layout, peer):
    assert_equals_peer(peer_of(layout, peer), name, layout, [(75, 107)])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout", "peer"), PEERS + LARGER)
def test_logits_equal_the_peers_at_the_papers_size(name, layout, peer):
    assert_equals_peer(peer_of(layout, peer), name, layout, [(224, 224), (256, 192)])
