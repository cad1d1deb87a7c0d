"""Feature pyramid network (Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017,
https://arxiv.org/abs/1612.03144).

Coarse maps know what is there, fine maps know where. A 1x1 convolution brings every map to one width, each is
added to the next finer one by nearest upsampling, and a 3x3 convolution smooths what came out.

Where papers differ: "p6" for the region proposals of Faster R-CNN is the coarsest map, strided (section 4.1);
RetinaNet's p6 and p7 are convolutions of their own. Maps need not halve exactly: the coarser one is brought
to the finer one's size, as torchvision does.
"""

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from vitrail.features import FeatureSpec


class FPN(nn.Module):
    """Maps of any widths -> maps of `dim` channels, "c2".. becoming "p2"...

    specs: what comes in, finest first. dim: channels of every map that goes out.
    pool: one more level, twice as coarse as the last, by taking every second value.
    norm: a BatchNorm in place of each convolution's bias, as in torchvision's detectors "v2".
    """

    def __init__(
        self,
        specs: Mapping[str, FeatureSpec],
        dim: int = 256,
        *,
        pool: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.pool = pool
        dims = [spec.channels for spec in specs.values()]
        self.lateral = nn.ModuleList(nn.Conv2d(d, dim, 1, bias=not norm) for d in dims)
        self.smooth = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1, bias=not norm) for _ in specs)
        norms = nn.BatchNorm2d if norm else nn.Identity
        self.lateral_norms = nn.ModuleList(norms(dim) for _ in specs)
        self.smooth_norms = nn.ModuleList(norms(dim) for _ in specs)
        self.feature_specs = {
            f"p{name[1:]}": FeatureSpec(dim, spec.stride) for name, spec in specs.items()
        }
        if pool:
            level, spec = list(self.feature_specs.items())[-1]
            self.feature_specs[f"p{int(level[1:]) + 1}"] = FeatureSpec(dim, 2 * spec.stride)
        for conv in (*self.lateral, *self.smooth):
            assert isinstance(conv, nn.Conv2d)
            nn.init.kaiming_uniform_(conv.weight, a=1)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)

    def forward(self, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """name -> (B, C, h, w), finest first -> "p2" ... -> (B, dim, h, w)."""
        laterals = [
            norm(conv(x))
            for conv, norm, x in zip(self.lateral, self.lateral_norms, maps.values(), strict=True)
        ]
        out = [top := laterals[-1]]
        for x in laterals[-2::-1]:
            out.insert(0, top := x + F.interpolate(top, x.shape[-2:], mode="nearest"))
        out = [
            norm(conv(x)) for conv, norm, x in zip(self.smooth, self.smooth_norms, out, strict=True)
        ]
        if self.pool:
            out.append(out[-1][..., ::2, ::2])
        return dict(zip(self.feature_specs, out, strict=True))
