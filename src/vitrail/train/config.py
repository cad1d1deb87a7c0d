"""What a training run is: one frozen dataclass, torch-free, every field a flag of `vitrail train`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from vitrail.configuration import Range, check_ranges, from_dict, to_dict
from vitrail.data.augmentation import Augmentation
from vitrail.data.packing import Packing
from vitrail_runtime.errors import InputError

DEFAULT_MODEL = "efficientvit_m0"

# Fields that change how a run is carried out, not what it computes: a resumed run may differ in them.
EXECUTION = frozenset(
    {
        "data",
        "out",
        "device",
        "workers",
        "threads",
        "log_every",
        "save_every",
        "keep",
        "keep_every",
        "tensorboard",
    }
)


RANGES = {
    "val_fraction": Range(0, 1, below=True, hint="0 holds nothing out"),
    "crop_pct": Range(0, 1, above=True),
    "epochs": Range(1),
    "max_steps": Range(1),
    "max_minutes": Range(0.001),  # the share of it that is over divides by it
    "batch_size": Range(1),
    "accumulate": Range(1),
    "repeats": Range(1),
    "lr": Range(0),
    "momentum": Range(0, 1, below=True),
    "eps": Range(0),
    "weight_decay": Range(0),
    "backbone_lr": Range(0, 1, above=True, hint="1 is off; --train-only head freezes it"),
    "layer_decay": Range(0, 1, above=True, hint="1 is off"),  # 0 would train the last layer alone
    "warmup_epochs": Range(0),
    "warmup_lr": Range(0),
    "min_lr": Range(0),
    "clip_grad": Range(0, above=True, hint="None is off"),  # to a norm of 0 nothing would be learnt
    "ema": Range(0, 1, below=True, hint="0 is off, 0.9999 is usual"),  # 1 would keep the start
    "seed": Range(0, 2**63 - 1),  # what torch's generators take
    "eval_every": Range(1),
    "early_stopping": Range(1),
    "keep_every": Range(1),
    "save_every": Range(0),
    "keep": Range(1),  # 0 would delete the state that was just written
    "log_every": Range(1),
    "workers": Range(0),
    "threads": Range(1),
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run. `vitrail train --help` shows the fields; a run folder's config.yaml repeats it."""

    data: str = ""
    """Where the images are: class folders, tar shards or a CSV file."""
    val_fraction: float = 0.2
    """Share of the training images held out for validation, where the data has no val split; 0: none, and
    scores are those of the training images."""
    model: str = ""
    """A name from `vitrail models`; empty: the model of --weights, else efficientvit_m0."""
    out: str = ""
    """The run folder; empty: runs/MODEL. A run that stands there is continued."""
    weights: str | None = None
    """Start from "pretrained" (the released weights of the model's name; "auto": where they can be had), a
    file, a model folder, a run folder (its best model) or hf:owner/name@revision.
    """
    train_only: Literal["full", "head", "masks", "capsule"] = "full"
    """"head" freezes the backbone, its BatchNorm statistics included; "masks" all of a DETR but what draws
    masks, as the second of its two steps; "capsule" all but what a task with memory (memory/...) owns."""
    model_fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the paper's config, such as drop_path_rate."""
    head_fields: dict[str, Any] = field(default_factory=dict)
    """Fields of the head's config, where the model's name has one."""
    task: dict[str, Any] = field(default_factory=dict)
    """Settings of what the model does, such as label_smoothing."""
    image_size: int | tuple[int, int] | None = None
    """Side in pixels, or height and width, of training and evaluation; none: the model's own."""
    crop_pct: float | None = None
    """Evaluation: the share of the resized image that the centre crop keeps; none: the model's own."""
    resize: Literal["crop", "squash", "fit", "letterbox", "edges", "native"] | None = None
    """Evaluation: "crop" cuts the centre, "squash" and "fit" keep all of the image; "edges" does so in
    training, too, as for detectors; none: the model's own.
    """
    skip_broken: bool = False
    """Train without the images that cannot be read, instead of stopping."""
    drop_bad: bool = False
    """Train without the annotations that cannot be used, and with boxes cut at their image's edge, instead of
    stopping."""

    epochs: int = 30
    """Passes over the data."""
    max_steps: int | None = None
    """Stop after so many updates; the schedule ends there."""
    max_minutes: float | None = None
    """Stop after so much training time; the schedule ends there."""
    batch_size: int = 128
    """Pictures per update, over all processes and accumulated parts together."""
    accumulate: int = 1
    """Parts that a batch is computed in, one after another, for less memory."""
    repeats: int = 1
    """Repeated augmentation: differently augmented copies of a image in one batch."""
    patch_sizes: tuple[int, ...] = ()
    """A patch size is drawn per update from these, for classifiers on plain ViTs that are then used at any of
    them (eval and predict: --patch-size; Beyer et al. 2023, arXiv 2212.08013); none: the model's own.
    """
    sizes: tuple[int, ...] = ()
    """Multi-scale batches: a size is drawn per update, pixels per update stay about constant."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: float = 1e-3
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging of gradient and square."""
    eps: float = 1e-8
    """AdamW's term against division by zero."""
    momentum: float = 0.9
    """SGD's momentum (Nesterov)."""
    weight_decay: float = 0.05
    """Not on biases, norms, tokens and position tables."""
    backbone_lr: float = 1.0
    """The backbone's learning rate, as a share of --lr: 0.1 for DETRs on pretrained weights."""
    layer_decay: float = 1.0
    """Each earlier block learns slower by this factor; 1 is off."""
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_epochs: float = 1.0
    """Epochs of linear warm-up; at most half of the run."""
    warmup_lr: float = 1e-6
    """Learning rate at the start of warm-up."""
    min_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    clip_grad: float | None = 1.0
    """Largest norm of the gradient; none: no clipping."""
    clip_mode: Literal["norm", "agc"] = "norm"
    """"norm" limits that of the whole gradient; "agc" (adaptive) that of each row or filter to --clip-grad
    times the norm of its weights, the classifier's aside: 0.02 is usual.
    """
    ema: float = 0.0
    """Decay of the weights' moving average, which is then evaluated and saved; 0 is off."""
    augmentation: Augmentation = field(default_factory=Augmentation)
    native: bool = False
    """Images at their own shape, packed (--packing...), in training and evaluation; for plain ViTs. Then
    --packing.packs, not --batch-size, says what an update is made on."""
    packing: Packing = field(default_factory=Packing)
    seed: int = 0

    eval_every: int = 1
    """Epochs between evaluations."""
    early_stopping: int | None = None
    """Stop after so many evaluations without a better score."""
    keep_every: int | None = None
    """Also keep the model of every so many epochs."""
    save_every: float = 5.0
    """Minutes between saved run states, from which a run resumes."""
    keep: int = 2
    """Run states to keep."""
    log_every: int = 20
    """Updates between rows of metrics.jsonl."""
    tensorboard: bool = False
    """Also write the rows for TensorBoard, to OUT/tensorboard; needs vitrail[track]."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: matrix work in bfloat16 (autocast), weights and loss in float32."""
    grad_checkpointing: bool = False
    """Recompute blocks in the backward pass instead of storing them."""
    parallel: Literal["data", "fsdp"] = "data"
    """Several processes: a copy each, or shards of the weights (FSDP) for models that do not fit."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int | None = None
    """Processes that read and augment; none: chosen by the machine."""
    threads: int | None = None
    """Math threads of each process; none: OMP_NUM_THREADS, else the cores that the workers leave, or as many
    of them as a trial at the start of a run finds fastest.
    """

    @property
    def size(self) -> tuple[int, int] | None:
        """image_size as (height, width)."""
        side = self.image_size
        return side if side is None or isinstance(side, tuple) else (side, side)

    def __post_init__(self) -> None:
        if self.clip_mode == "agc" and self.parallel == "fsdp":
            raise InputError(
                "clip_mode 'agc' needs whole weights, but parallel 'fsdp' shards them; take --parallel data, "
                "or --clip-mode norm"
            )
        check_ranges(self, RANGES)
        self._check_native()
        if self.size is not None and not all(map(Range(1).holds, self.size)):
            raise InputError(f"image_size must be at least 1, but is {self.image_size}")
        if not all(side >= 1 for side in self.sizes):
            raise InputError(f"sizes must be at least 1 pixel, but are {self.sizes}")
        if not all(size >= 1 for size in self.patch_sizes):
            raise InputError(f"patch_sizes must be at least 1 pixel, but are {self.patch_sizes}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas must be from 0 to below 1, but are {self.betas}")

    def _check_native(self) -> None:
        if not self.native:
            return
        for name, off in {"sizes": (), "repeats": 1, "resize": None, "crop_pct": None}.items():
            if getattr(self, name) not in (off, "native"):
                raise InputError(
                    f"native and {name} do not go together: images are packed at their own shape; leave "
                    f"--{name.replace('_', '-')} away"
                )
        if self.augmentation.crop == "simple" or self.augmentation.jitters:
            raise InputError(
                "native shows images whole: give --augmentation.crop whole and no "
                "--augmentation.scale-jitter; --packing.resolution draws their sizes"
            )


def model_name(config: TrainConfig) -> str:
    """The model of a configuration: as named, else that of the folder it starts from, else the default."""
    if config.model:
        return config.model
    if config.weights:
        from vitrail import models  # and with it torch
        from vitrail.weights import RELEASED_WEIGHTS

        if config.weights in RELEASED_WEIGHTS:
            return DEFAULT_MODEL
        folder = models.model_folder(config.weights)
        if (folder / "config.json").is_file():
            return models.read_config(folder)["name"]
    return DEFAULT_MODEL


def differences(ours: TrainConfig, theirs: TrainConfig) -> list[str]:
    """What makes two configurations different runs: "lr: 0.001 here, 0.002 there" lines."""
    a, b = to_dict(ours), to_dict(theirs)
    return _differences({k: v for k, v in a.items() if k not in EXECUTION}, b)


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], inside: str = "") -> list[str]:
    lines = []
    for name in dict.fromkeys((*ours, *theirs)):
        a, b = ours.get(name), theirs.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += _differences(a, b, f"{inside}{name}.")
        elif a != b and (inside or name in ours):
            lines.append(f"{inside}{name}: {b!r} there, {a!r} now")
    return lines


def read_config(path: str | Path, base: TrainConfig | None = None) -> TrainConfig:
    """`base` (or the defaults) with what a YAML file says in its place.

    Raises InputError for a file that cannot be read, an unknown key (with the closest) or a wrong value.
    """
    path = Path(path)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {error}") from error
    if not isinstance(given, dict):
        raise InputError(f"{path} must hold keys and values, but holds {type(given).__name__}")
    return from_dict(TrainConfig, _merged(to_dict(base or TrainConfig()), given), where=str(path))


def _merged(base: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `given` in its place, nested mappings key by key."""
    out = dict(base)
    for key, value in given.items():
        nested = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = _merged(out[key], value) if nested else value
    return out
