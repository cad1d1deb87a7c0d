"""What a hub repository says beside its weights: class names, image size and preprocessing, as timm and
transformers write them into config.json and preprocessor_config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vitrail_runtime.preprocess import Preprocessing

# Pillow's numbers for resampling filters, which transformers writes.
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Described:
    """classes: names in the order of the labels, None where there are none. architecture: timm's name.
    preprocessing: what the files say, over the defaults given."""

    classes: tuple[str, ...] | None
    architecture: str
    preprocessing: Preprocessing


def described(
    config: Mapping[str, Any], preprocessor: Mapping[str, Any], default: Preprocessing
) -> Described:
    """Read config.json and preprocessor_config.json ({} where absent). What cannot be read is left out."""
    timm = config.get("pretrained_cfg")
    if isinstance(timm, Mapping):
        preprocessing = _from_timm(timm, default)
    else:
        preprocessing = _from_transformers(preprocessor, default)
    architecture = config.get("architecture")
    return Described(
        classes=class_list(config),
        architecture=architecture if isinstance(architecture, str) else "",
        preprocessing=preprocessing,
    )


def _from_timm(cfg: Mapping[str, Any], default: Preprocessing) -> Preprocessing:
    size, mode = cfg.get("input_size"), cfg.get("crop_mode", "center")
    changes: dict[str, Any] = _numbers(cfg.get("mean"), cfg.get("std"))
    if isinstance(size, list) and len(size) == 3:
        changes["size"] = (int(size[1]), int(size[2]))
    if isinstance(cfg.get("crop_pct"), (int, float)):
        changes["crop_pct"] = float(cfg["crop_pct"])
    if cfg.get("interpolation") in _FILTERS.values():
        changes["interpolation"] = cfg["interpolation"]
    if mode in ("center", "squash"):
        changes["mode"] = "crop" if mode == "center" else "squash"
    return replace(default, **changes)


def _from_transformers(data: Mapping[str, Any], default: Preprocessing) -> Preprocessing:
    changes: dict[str, Any] = _numbers(data.get("image_mean"), data.get("image_std"))
    if data.get("resample") in _FILTERS:
        changes["interpolation"] = _FILTERS[data["resample"]]
    size, crop = _size(data.get("size")), _size(data.get("crop_size"))
    if data.get("do_center_crop") and size and crop:
        changes |= {"size": crop, "mode": "crop", "crop_pct": crop[0] / size[0]}
    elif size:
        changes |= {"size": size, "mode": "squash", "crop_pct": 1.0}
    return replace(default, **changes)


def _size(value: Any) -> tuple[int, int] | None:
    """(height, width) of 224, {"height", "width"} or {"shortest_edge"}."""
    if isinstance(value, int):
        return value, value
    if isinstance(value, Mapping):
        edge = value.get("shortest_edge")
        height, width = value.get("height", edge), value.get("width", edge)
        if isinstance(height, int) and isinstance(width, int):
            return height, width
    return None


def _numbers(mean: Any, std: Any) -> dict[str, Any]:
    given = {"mean": mean, "std": std}
    return {
        key: tuple(float(v) for v in value)
        for key, value in given.items()
        if isinstance(value, (list, tuple)) and len(value) == 3
    }


def class_list(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """Class names in the order of the labels from our own config.json, transformers' id2label or timm's
    label_names; None where there are none, or none that anybody gave."""
    names = config.get("classes") or config.get("label_names")
    labels = config.get("id2label")
    if isinstance(labels, Mapping) and all(str(i) in labels for i in range(len(labels))):
        names = [str(labels[str(i)]) for i in range(len(labels))]
        # transformers makes these up when nobody named the classes.
        if all(name == f"LABEL_{i}" for i, name in enumerate(names)):
            names = None
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        return None
    # ImageNet has two cranes and two maillots.
    return tuple(n if names.count(n) == 1 else f"{n} ({i})" for i, n in enumerate(names))
