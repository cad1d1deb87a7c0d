"""What the parity tests of convolutional families share: a timm or torchvision model with random weights,
ours filled from it by the key map, and the comparison."""

import torch
from torch import nn

import vitrail.backbones  # noqa: F401  (registers every backbone)
from tests.parity import assert_close_to_peer, randomise
from vitrail.classifiers import Classifier
from vitrail.models import build_classifier
from vitrail.registry import backbone_entry


def classifier(name: str, num_classes: int = 1000) -> Classifier:
    """Our classifier of a registered name, on the current default device."""
    entry = backbone_entry(name)
    return build_classifier(entry, entry.config, num_classes)


def ours_from(peer: nn.Module, name: str, layout: str, num_classes: int = 1000) -> Classifier:
    """Our classifier with the peer's weights, carried over by the key map; in float64, eval mode."""
    entry = backbone_entry(name)
    with torch.device("meta"):
        model = classifier(name, num_classes)
    state = entry.layouts[layout].convert(peer.state_dict(), entry.config)
    model.load_state_dict(state, assign=True)
    return model.double().eval()


def assert_equals_peer(
    peer: nn.Module,
    name: str,
    layout: str,
    sizes: list[tuple[int, int]],
    gain: float = 1.3,
    reverse_channels: bool = False,
) -> None:
    """Equal logits in float64 at every (height, width), with random weights.

    reverse_channels: the peer takes BGR, and the key map turned it round.
    """
    randomise(peer, gain)
    peer = peer.double().eval()
    model = ours_from(peer, name, layout)
    for height, width in sizes:
        generator = torch.Generator().manual_seed(height * 1000 + width)
        x = torch.randn(1, 3, height, width, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            want = peer(x.flip(1) if reverse_channels else x)
            got = model(x)
        assert_close_to_peer(got, getattr(want, "logits", want))
