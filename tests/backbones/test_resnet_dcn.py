"""ResNet with deformable convolutions against torchvision's, whose 3x3 convolutions are exchanged here for
what mmdetection computes."""

import pytest
import torch
from torch import nn

from tests.parity import assert_close_to_peer, randomise
from vitrail.models import create_backbone
from vitrail_runtime.errors import InputError

torchvision = pytest.importorskip("torchvision")
STAGES = {"layer1": "c2", "layer2": "c3", "layer3": "c4", "layer4": "c5"}


class Pack(nn.Module):
    """DeformConv2dPack and ModulatedDeformConv2dPack: keys and arithmetic."""

    def __init__(self, conv, modulated):
        super().__init__()
        self.weight, self.stride, self.modulated = conv.weight, conv.stride, modulated
        taps = 9 * (3 if modulated else 2)
        self.conv_offset = nn.Conv2d(conv.in_channels, taps, 3, conv.stride, 1)

    def forward(self, x):
        said = self.conv_offset(x)
        mask = None
        if self.modulated:
            first, second, mask = said.chunk(3, dim=1)
            said, mask = torch.cat((first, second), dim=1), mask.sigmoid()
        return torchvision.ops.deform_conv2d(
            x, said, self.weight, None, self.stride, (1, 1), mask=mask
        )


def peer_of(modulated, seed=0):
    """torchvision's ResNet-50 with Packs in its last three stages, in double precision."""
    torch.manual_seed(seed)
    peer = torchvision.models.resnet50()
    for name in ("layer2", "layer3", "layer4"):
        for block in getattr(peer, name):
            block.conv2 = Pack(block.conv2, modulated)
    randomise(peer)
    return peer.double().eval()


def maps_of(peer, x):
    body = torchvision.models._utils.IntermediateLayerGetter(peer, STAGES)
    with torch.no_grad():
        return body(x)


def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 3, 64, 96, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize(("name", "modulated"), [("resnet50_dcn", False), ("resnet50_dcnv2", True)])
def test_a_detector_of_mmdetection_gives_its_maps(name, modulated):
    peer = peer_of(modulated)
    file = {f"backbone.{k}": v for k, v in peer.state_dict().items() if not k.startswith("fc.")}
    file |= {
        "neck.lateral_convs.0.conv.weight": torch.zeros(1),
        "rpn_head.rpn_cls.weight": torch.zeros(1),
    }
    ours = create_backbone(name, weights=file)
    assert ours.weights_report.layout == "mmdetection"
    with torch.no_grad():
        got = ours.double().eval()(images()).maps
    for level, want in maps_of(peer, images()).items():
        assert_close_to_peer(got[level], want)


@pytest.mark.parametrize("layout", ["torchvision", "timm"])
def test_with_plain_weights_v1_starts_as_the_plain_network(layout):
    timm = pytest.importorskip("timm")
    make = timm.create_model if layout == "timm" else torchvision.models.get_model
    peer = make("resnet50")
    randomise(peer)
    ours = create_backbone("resnet50_dcn", weights=peer.state_dict()).double().eval()
    with torch.no_grad():
        got = ours(images()).maps
    for level, want in maps_of(peer.double().eval(), images()).items():
        assert_close_to_peer(got[level], want)


def test_with_plain_weights_v2_starts_with_halved_3x3_convolutions():
    peer = torchvision.models.resnet50()
    randomise(peer)
    ours = create_backbone("resnet50_dcnv2", weights=peer.state_dict()).double().eval()
    for name in ("layer2", "layer3", "layer4"):
        for block in getattr(peer, name):
            block.conv2.weight.data /= 2
    with torch.no_grad():
        got = ours(images()).maps
    for level, want in maps_of(peer.double().eval(), images()).items():
        assert_close_to_peer(got[level], want)


def test_the_stages_are_a_choice():
    backbone = create_backbone("resnet50_dcn", deformable=(False, False, False, True))
    moved = {k.split(".")[0] for k in backbone.state_dict() if "conv_offset" in k}
    assert moved == {"layer4"}


def test_two_convolution_blocks_are_refused():
    with pytest.raises(InputError, match="resnet50, resnet101 or resnet152"):
        create_backbone("resnet50_dcn", bottleneck=False)
