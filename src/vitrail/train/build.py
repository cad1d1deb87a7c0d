"""The model of a run: name, paper's fields and picture size from the configuration or the weights it starts
from.
"""

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from vitrail import models
from vitrail.configuration import from_dict, to_dict
from vitrail.data.shards import is_shard
from vitrail.registry import backbone_entry, config_class
from vitrail.train.config import TrainConfig
from vitrail_runtime.errors import InputError

DEFAULT_MODEL = "efficientvit_m0"


def settled(config: TrainConfig) -> TrainConfig:
    """The configuration with model and run folder named.

    Without a model, a run that starts from a model folder of ours trains that model: its name, its paper's
        fields and how it sees pictures, except where the configuration says otherwise.
    """
    folder = models.model_folder(config.weights) if config.weights else None
    if not config.model and folder is not None and (folder / "config.json").is_file():
        saved = models.read_config(folder)
        default = to_dict(backbone_entry(saved["name"]).config)
        own = {
            k: v
            for k, v in saved["parts"]["backbone"].items()
            if k != "image_size" and v != default.get(k)
        }
        sees = saved["preprocessing"]
        config = replace(
            config,
            model=saved["name"],
            model_fields=own | config.model_fields,
            image_size=config.image_size or sees["size"][0],
            crop_pct=config.crop_pct or sees["crop_pct"],
            resize=config.resize or sees["mode"],
        )
    name = config.model or DEFAULT_MODEL
    if (head := models.parse_name(name)[0]) is not None:
        raise InputError(
            f"{name} does the task {head.task!r}, but vitrail train trains classifiers: give a name without "
            "a slash"
        )
    return replace(config, model=name, out=config.out or f"runs/{name}")


def check_place(config: TrainConfig) -> None:
    """Raise InputError where the run folder would stand among class folders, and be taken for one."""
    data, out = (Path(os.path.realpath(p)) for p in (config.data, config.out))
    if (
        config.data
        and data.is_dir()
        and out.is_relative_to(data)
        and not any(map(is_shard, data.iterdir()))
    ):
        raise InputError(
            f"the run folder {config.out} lies in the data {config.data}, where it would be taken for a "
            "class; give an --out elsewhere"
        )


def build_model(config: TrainConfig, classes: tuple[str, ...]) -> Any:
    """The model of a configuration, with its starting weights, for pictures of the configured size."""
    extra = model_fields(config)
    weights = config.weights and starting_weights(config.weights, classes)
    model: Any = models.create_model(config.model, classes=classes, weights=weights, **extra)
    changes: dict[str, Any] = {}
    if config.image_size is not None:
        changes["size"] = (config.image_size, config.image_size)
    if config.crop_pct is not None:
        changes["crop_pct"] = config.crop_pct
    if config.resize is not None:
        changes["mode"] = config.resize
    models.describe(
        model, replace(model.info, preprocessing=replace(model.preprocessing, **changes))
    )
    if config.grad_checkpointing:
        if not hasattr(model.backbone, "grad_checkpointing"):
            raise InputError(
                f"{config.model} has no blocks to recompute; drop --grad-checkpointing"
            )
        model.backbone.grad_checkpointing = True
    return model


def check_parts(
    config: TrainConfig,
    classes: tuple[str, ...],
    batches: Mapping[tuple[int, int], int],
    world: int,
) -> None:
    """Raise InputError where BatchNorm would have one value a channel, of which there is no variance.

    batches: pictures of an update by their (height, width). A part of one picture is tried without numbers.
    """
    for size, count in batches.items():
        share = count // world
        part = -(-share // config.accumulate)
        if share - part * (-(-share // part) - 1) > 1:  # the last part may have fewer
            continue
        with torch.device("meta"):
            model = build_model(replace(config, weights=None), classes)
            model.train()
            if config.train_only == "head":
                model.backbone.eval()
            try:
                model(torch.empty(1, 3, *size))
            except ValueError as error:
                parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
                raise InputError(
                    f"{config.model} has BatchNorm, which cannot learn from one picture of {size[0]} x "
                    f"{size[1]} at a time ({count} an update{parts}); give a larger --batch-size, such as "
                    f"{2 * config.batch_size}"
                ) from error


def model_fields(config: TrainConfig) -> dict[str, Any]:
    """Fields of the paper's config that the run sets, as that config's types: YAML knows lists only."""
    default = backbone_entry(config.model).config
    given = dict(config.model_fields)
    if config.image_size is not None and any(f.name == "image_size" for f in fields(default)):
        given["image_size"] = config.image_size
    where = f"model_fields of {config.model}"
    kind = config_class(type(default), given)
    full = from_dict(kind, to_dict(default) | given, where=where)
    return {name: getattr(full, name) for name in given}


def starting_weights(source: str, classes: tuple[str, ...]) -> Any:
    """What `create_model` gets: of a run its best model, of a model of ours for other classes the backbone
    alone.

    A head of as many classes with other names would load, and start out calling everything by a wrong name.
    """
    folder = models.model_folder(source)
    if not (folder / "config.json").is_file():
        return source
    there = models.read_config(folder).get("classes")
    if there is not None and tuple(there) != tuple(classes):
        return {"backbone": str(folder)}
    return str(folder)
