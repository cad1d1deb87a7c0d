"""transformers' UPerNet on a small Swin, which several tests hold ours against."""

from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

from tests.parity import randomise


def upernet_on_swin(num_labels: int) -> UperNetForSemanticSegmentation:
    """In eval mode, with random weights and statistics."""
    backbone = SwinConfig(
        embed_dim=12,
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 3, 4],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    peer = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=backbone, hidden_size=12, auxiliary_channels=10, num_labels=num_labels
        )
    )
    randomise(peer)
    return peer.eval()
