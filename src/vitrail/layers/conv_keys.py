"""How timm and torchvision name the parts of networks of inverted residuals, for key maps."""

import re
from collections.abc import Mapping, Sequence
from itertools import product

from vitrail.registry import Tensors

# timm counts the norms of a block, so a block that does not expand has other numbers.
_TIMM_EXPANDING = {
    "conv_pw": "expand.conv",
    "bn1": "expand.bn",
    "conv_dw": "depthwise.conv",
    "bn2": "depthwise.bn",
    "conv_pwl": "project.conv",
    "bn3": "project.bn",
}
_TIMM_PLAIN = {
    "conv_dw": "depthwise.conv",
    "bn1": "depthwise.bn",
    "conv_pw": "project.conv",
    "bn2": "project.bn",
}
_TIMM_CONV = {"conv": "conv", "bn1": "bn"}  # MobileNetV3's last stage
_TIMM_SE = {"se.conv_reduce": "se.fc1", "se.conv_expand": "se.fc2"}
TIMM_HEAD = (  # rules for the tail that is layers.conv.ConvPoolHead
    (r"^conv_head\.", "head.conv.conv."),
    (r"^bn2\.", "head.conv.bn."),
    (r"^classifier\.", "head.fc."),
)


def timm_stages(state: Tensors) -> Tensors:
    """`blocks.1.0.conv_pw.weight` -> `backbone.stages.1.0.expand.conv.weight`; the stem too."""
    out = {}
    for key, value in state.items():
        block = re.match(r"blocks\.\d+\.\d+\.", key)
        if block is None:
            key = re.sub(r"^conv_stem\.", "backbone.stem.conv.", key)
            key = re.sub(r"^bn1\.", "backbone.stem.bn.", key)
        else:
            start = block[0]
            if f"{start}conv_pwl.weight" in state:
                names = _TIMM_EXPANDING | _TIMM_SE
            elif f"{start}conv_dw.weight" in state:
                names = _TIMM_PLAIN | _TIMM_SE
            else:
                names = _TIMM_CONV
            part, _, leaf = key.removeprefix(start).rpartition(".")
            key = f"backbone.{start.replace('blocks', 'stages')}{names.get(part, part)}.{leaf}"
        out[key] = value
    return out


def torchvision_stages(state: Tensors, places: Mapping[str, str], inner: str) -> Tensors:
    """`features.3.block.1.0.weight` -> `backbone.stages.1.1.depthwise.conv.weight`; the stem too.

    places: a block's key -> ours, such as {"features.3": "stages.1.1"}. inner: the list in a block, "block"
    or (MobileNetV2) "conv", which holds convolutions and norms in order, and gates with "fc1" and "fc2".
    """
    renamed = {}
    for block, ours in places.items():
        prefix = f"{block}.{inner}."
        keys = [key for key in state if key.startswith(prefix)]
        paths = {key.removeprefix(prefix).rpartition(".")[0] for key in keys}
        layers = sorted(path for path in paths if "fc" not in path)
        parts = ("expand", "depthwise", "project")[-(len(layers) // 2) :]
        names = {
            p: ".".join(n) for p, n in zip(layers, product(parts, ("conv", "bn")), strict=False)
        }
        for key in keys:
            path, _, leaf = key.removeprefix(prefix).rpartition(".")
            part = names.get(path) or f"se.{path.rpartition('.')[2]}"
            renamed[key] = f"backbone.{ours}.{part}.{leaf}"
    stem = {"features.0.0": "backbone.stem.conv", "features.0.1": "backbone.stem.bn"}
    for key in state:
        path, _, leaf = key.rpartition(".")
        if path in stem:
            renamed[key] = f"{stem[path]}.{leaf}"
    return {renamed.get(key, key): value for key, value in state.items()}


def counted_through(depths: Sequence[int]) -> dict[str, str]:
    """`places` where torchvision counts the blocks of all stages through:
    {"features.1": "stages.0.0", "features.2": "stages.1.0", ...}."""
    blocks = [f"stages.{i}.{j}" for i, depth in enumerate(depths) for j in range(depth)]
    return {f"features.{n}": block for n, block in enumerate(blocks, 1)}


def torchvision_head(last: int) -> list[tuple[str, str]]:
    """Rules for the same tail; its convolution is `features.LAST`."""
    return [
        (rf"^features\.{last}\.0\.", "head.conv.conv."),
        (rf"^features\.{last}\.1\.", "head.conv.bn."),
        (r"^classifier\.1\.", "head.fc."),
    ]
