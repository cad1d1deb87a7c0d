"""vitrail: vision transformers and their convolutional relatives, from checkpoint to deployment.

The public face is lazy: `import vitrail` does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vitrail import boxes as boxes
    from vitrail import packing as packing
    from vitrail.adapt.capsules import Capsules as Capsules
    from vitrail.features import Features as Features
    from vitrail.features import FeatureSpec as FeatureSpec
    from vitrail.features import adapt_levels as adapt_levels
    from vitrail.models import create_backbone as create_backbone
    from vitrail.models import create_model as create_model
    from vitrail.models import list_models as list_models
    from vitrail.models import load as load
    from vitrail.models import save as save
    from vitrail.predictor import Predictor as Predictor
    from vitrail.towers import zero_shot as zero_shot

_HOMES = {  # public name -> the module it lives in; "" is a module of its own name
    "Features": "features",
    "FeatureSpec": "features",
    "adapt_levels": "features",
    "create_backbone": "models",
    "create_model": "models",
    "list_models": "models",
    "save": "models",
    "load": "models",
    "Predictor": "predictor",
    "Capsules": "adapt.capsules",
    "zero_shot": "towers",
    "packing": "",
    "boxes": "",
}

__all__ = [  # noqa: RUF022  (in the order a reader meets them)
    "list_models",
    "create_backbone",
    "create_model",
    "save",
    "load",
    "Predictor",
    "Capsules",
    "zero_shot",
    "Features",
    "FeatureSpec",
    "adapt_levels",
    "packing",
    "boxes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vitrail' has no attribute {name!r}")
    home = importlib.import_module(f"vitrail.{_HOMES[name] or name}")
    return getattr(home, name) if _HOMES[name] else home


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
