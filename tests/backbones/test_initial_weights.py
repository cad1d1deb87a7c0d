"""Initial weights beside a peer's: a training comparison is of two recipes only where both start alike."""

import timm
import torch

from vitrail.models import create_model
from vitrail.registry import backbone_entry


def test_efficientvit_begins_with_weights_drawn_as_timms():
    convert = backbone_entry("efficientvit_m0").layouts["timm"].convert
    ours: dict[str, list[torch.Tensor]] = {}
    theirs: dict[str, list[torch.Tensor]] = {}
    for seed in range(2):
        torch.manual_seed(seed)
        model = create_model("efficientvit_m0", num_classes=10, image_size=64)
        peer = timm.create_model("efficientvit_m0", num_classes=10, img_size=64)
        foreign = convert(peer.state_dict(), model.backbone.config)
        for name, parameter in model.named_parameters():
            ours.setdefault(name, []).append(parameter.detach().flatten())
            theirs.setdefault(name, []).append(foreign[name].flatten())
    assert len(ours) == 354
    for name in ours:
        a, b = torch.cat(ours[name]), torch.cat(theirs[name])
        scale = (a.std() + b.std()) / 2
        # Five standard errors of a mean's difference, and of a spread's, which is no larger for these draws.
        chance = 5 * scale * (2 / len(a)) ** 0.5
        assert abs(a.mean() - b.mean()) <= chance, f"{name}: another mean"
        assert abs(a.std() - b.std()) <= chance, f"{name}: another spread"
