"""The model of a run: what it is, from the configuration or from the weights it starts from."""

import os
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from vitrail import models
from vitrail.adapt.freeze import freeze, train_mode
from vitrail.configuration import from_dict, to_dict
from vitrail.data.packing import Packing
from vitrail.data.shards import is_shard
from vitrail.registry import config_class
from vitrail.tasks.task import Task, task_of_model
from vitrail.train.config import TrainConfig, model_name
from vitrail.weights import RELEASED_WEIGHTS
from vitrail_runtime.errors import InputError


def resolve(config: TrainConfig) -> TrainConfig:
    """The configuration with model, run folder and all settings of the model's task named.

    Without a model, a run that starts from a model folder of ours trains that model: its name, its paper's
        fields and how it sees images, except where the configuration says otherwise. A capsule takes all but
        the name and the head of its base over: it is of no use beside another.
    """
    released = config.weights in RELEASED_WEIGHTS
    folder = models.model_folder(config.weights) if config.weights and not released else None
    if folder is not None and (folder / "config.json").is_file():
        config = _taken_over(config, models.read_config(folder))
    config = replace(config, model=model_name(config))
    config = replace(config, out=config.out or f"runs/{config.model.replace('/', '-')}")
    if config.packing != Packing() and not config.native:
        raise InputError("--packing is for images at their own shape; give --native as well")
    if config.native:  # a part of an image is none of its own shape
        config = replace(config, augmentation=replace(config.augmentation, crop="whole"))
    _, settings = task_and_settings(config)
    return replace(config, task=to_dict(settings))


def _taken_over(config: TrainConfig, saved: Mapping[str, Any]) -> TrainConfig:
    """The configuration with what a saved model settles of it."""
    head, entry = models.parse_name(saved["name"])
    name = config.model or saved["name"]
    beside = config.train_only == "capsule" and models.parse_name(name)[1].name == entry.name
    if config.model and not beside:
        return config
    own = _own(saved["parts"]["backbone"], to_dict(entry.config))
    heads = {}
    if head is not None and name == saved["name"]:
        heads = _own(saved["parts"]["head"], to_dict(head.config))
    sees = saved["preprocessing"]
    taken: dict[str, Any] = {}
    if config.native or (sees["mode"] == "native" and config.resize is None):
        if beside:
            raise InputError(
                f"{config.weights} sees images at their own shape, as it was trained (--native), but a task "
                "beside it learns from images of one size; take a base that was trained on such"
            )
        taken["native"] = True
        most = (sees["patches"] or (None,))[0]
        if config.packing.tokens_per_image is None:
            taken["packing"] = replace(config.packing, tokens_per_image=most)
    else:
        own.pop("image_size", None)
        height, width = sees["size"]
        taken["image_size"] = config.image_size or (height if height == width else (height, width))
        taken["crop_pct"] = config.crop_pct or sees["crop_pct"]
        taken["resize"] = config.resize or sees["mode"]
    return replace(
        config,
        model=name,
        model_fields=own | config.model_fields,
        head_fields=heads | config.head_fields,
        **taken,
    )


def _own(fields: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value != default.get(key)}


def task_and_settings(config: TrainConfig) -> tuple[Task, Any]:
    """The task of a configuration's model, and its settings. Raises InputError for one that it has not."""
    task = task_of_model(model_name(config))
    return task, from_dict(task.settings, config.task, where=f"settings of the task {task.name!r}")


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
    """The model of a configuration, with its starting weights, for images of the configured size."""
    extra = model_fields(config)
    weights = config.weights and starting_weights(config.weights, classes, config.model)
    head = config.head_fields or None
    model: Any = models.create_model(
        config.model, classes=classes, weights=weights, head=head, **extra
    )
    changes: dict[str, Any] = {}
    if config.size is not None:
        changes["size"] = config.size
    if config.crop_pct is not None:
        changes["crop_pct"] = config.crop_pct
    if config.resize is not None:
        changes["mode"] = config.resize
    if config.patch_sizes:  # the first: what is measured and asked at unless a call names another
        own = model.backbone.config.patch_size if hasattr(model.backbone, "patch_sizes") else 1
        models.use_patch_sizes(model, own, *config.patch_sizes)
    if config.native:
        changes |= native_view(model, config)
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


def native_view(model: Any, config: TrainConfig) -> dict[str, Any]:
    """How a model that is trained on packs sees images: at their own shape, no larger than in training.

    Raises InputError for a model that takes no packs.
    """
    models.check_takes_packs(model, drops=config.packing.drops)
    held = config.packing.max_tokens - model.backbone.num_prefix_tokens
    most = max(1, min(held, config.packing.tokens_per_image or held))
    return {"mode": "native", "patches": models.at_own_shape(model, most).patches}


def check_parts(
    config: TrainConfig,
    classes: tuple[str, ...],
    batches: Mapping[tuple[int, int], int],
    world: int,
) -> None:
    """Raise InputError where BatchNorm would have one value a channel, of which there is no variance.

    batches: images of an update by their (height, width). A part of one image is tried without numbers.
    """
    for size, count in batches.items():
        share = count // world
        part = -(-share // config.accumulate)
        if share - part * (-(-share // part) - 1) > 1:  # the last part may have fewer
            continue
        with torch.device("meta"):
            model = build_model(replace(config, weights=None), classes)
            freeze(model, config.train_only)
            train_mode(model)
            try:
                model(torch.empty(1, 3, *size))
            except ValueError as error:
                parts = f" in {config.accumulate} parts" if config.accumulate > 1 else ""
                raise InputError(
                    f"{config.model} has BatchNorm, which cannot learn from one image of {size[0]} x "
                    f"{size[1]} at a time ({count} an update{parts}); give a larger --batch-size, such as "
                    f"{2 * config.batch_size}"
                ) from error
            except NotImplementedError:
                continue  # a detector chooses boxes by their numbers; what comes before was tried


def model_fields(config: TrainConfig) -> dict[str, Any]:
    """Fields of the paper's config that the run sets, as that config's types: YAML knows lists only."""
    default = models.parse_name(config.model)[1].config
    given = dict(config.model_fields)
    takes = {f.name: f.type for f in fields(default)}
    if config.size is not None and "image_size" in takes:
        # Where it is one number, it tells what the network is meant for, and any size works.
        one = takes["image_size"] is int
        given["image_size"] = max(config.size) if one else config.image_size
    where = f"model_fields of {config.model}"
    kind = config_class(type(default), given)
    full = from_dict(kind, to_dict(default) | given, where=where)
    return {name: getattr(full, name) for name in given}


def starting_weights(source: str, classes: tuple[str, ...], model: str) -> Any:
    """What `create_model` gets: of a run its best model; the backbone alone of a model of ours for other
    classes, and of a plain classifier for a model with a head by its name, or the other way round.

    A head of as many classes with other names would load, and start out calling everything by a wrong name.
    """
    if source in RELEASED_WEIGHTS:
        return source
    folder = models.model_folder(source)
    if not (folder / "config.json").is_file():
        return source
    there = models.read_config(folder)
    heads = [models.parse_name(name)[0] for name in (there["name"], model)]
    if tuple(there["classes"]) != tuple(classes) or heads.count(None) == 1:
        return {"backbone": str(folder)}
    return str(folder)
