"""Capsules: many tasks on one frozen backbone, in one pass of it (Sandler et al., "Fine-tuning Image
Transformers using Learnable Memory", CVPR 2022, https://arxiv.org/abs/2203.15243, section 3.3: attention
masking for computation reuse, concatenation).

A capsule is what a `memory/BACKBONE` model has beside its backbone: a class token, rows of memory for each
block and a classifier. Its token attends to the backbone's tokens, which see nothing of it. So the backbone
runs once and hands out keys and values, each task reads them through the same weights, and neither the
backbone's own answers nor those of other tasks change by a bit, whatever is attached beside them.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vitrail.backbones.vit import ViT
from vitrail.classifiers import Classifier
from vitrail.configuration import from_dict, to_dict
from vitrail.learnable_memory import (
    MemoryClassifier,
    MemoryConfig,
    MemoryHead,
    Readers,
    check_base,
)
from vitrail.models import (
    ModelInfo,
    assemble,
    class_names,
    describe,
    list_models,
    load,
    model_folder,
    read_parts,
    weights_hash,
)
from vitrail.modes import eval_mode
from vitrail.registry import unknown
from vitrail.weights import read_metadata, write_state
from vitrail.weights.files import DIGEST, read_safetensors
from vitrail_runtime.errors import InputError, NewerVersion, listed
from vitrail_runtime.preprocess import Preprocessing

SCHEMA_VERSION = 1
TEXT = "vitrail_capsule"  # where a file's header says what it is
OWN = "base"  # what the answers of the base itself are called
# Fields of a ViT's config that change nothing of the keys and values of its blocks.
ASIDE = frozenset({"drop_path_rate", "out_blocks", "pool", "head", "head_hidden_dim"})


@dataclass(frozen=True)
class Base:
    """The backbone that a capsule was trained on: its name, the config that it is built from, and sha256
    over its weights (`models.weights_hash`)."""

    name: str
    config: Any
    sha256: str


@dataclass(frozen=True)
class Capsule:
    """All that a task adds to a backbone. `save_capsule` and `read_capsule` write and read it.

    state: the tensors of its `MemoryHead`, in float32. metrics: scores of the model that it was taken from,
    where they are known.
    """

    name: str
    task: str
    classes: tuple[str, ...]
    head: MemoryConfig
    base: Base
    preprocessing: Preprocessing
    metrics: Mapping[str, float]
    state: Mapping[str, Tensor]

    def model(self, backbone: nn.Module) -> MemoryClassifier:
        """The whole model that this capsule and a backbone are together. Its head is in eval mode; the
        backbone, which is shared, in the mode that it has."""
        name = f"memory/{self.base.name}"
        parts = {"backbone": self.base.config, "head": self.head}
        with torch.device("meta"):
            model = assemble(name, parts, len(self.classes))
        model.head.load_state_dict({k: v.clone() for k, v in self.state.items()}, assign=True)
        model.eval()
        model.backbone = backbone
        model.head.to(next(backbone.parameters()))
        describe(model, ModelInfo(name, parts, self.classes, self.preprocessing))
        return model


def capsule_of(model: nn.Module, name: str, metrics: Mapping[str, Any] | None = None) -> Capsule:
    """The capsule of a trained `memory/BACKBONE` model. metrics: its scores, of which what is no
    finite number is left out.

    Raises InputError for another model, or a name that a capsule cannot have.
    """
    if not isinstance(model, MemoryClassifier):
        raise InputError(
            f"{type(model).__name__} has no memory to make a capsule of; train one on a backbone "
            "(vitrail adapt train BASE --data DIR --out FILE.capsule)"
        )
    info = _info(model)
    return Capsule(
        name=_checked_name(name),
        task=model.task,
        classes=info.classes,
        head=info.parts["head"],
        base=Base(info.name.partition("/")[2], info.config, _hash(model.backbone)),
        preprocessing=info.preprocessing,
        metrics={k: float(v) for k, v in (metrics or {}).items() if _is_number(v)},
        state={k: v.detach().float().cpu().clone() for k, v in model.head.state_dict().items()},
    )


def _info(model: nn.Module) -> ModelInfo:
    info = getattr(model, "info", None)
    if not isinstance(info, ModelInfo):
        raise InputError(
            f"this {type(model).__name__} does not tell its name and classes; take one of "
            "vitrail.create_model or vitrail.load, or tell them by vitrail.models.describe"
        )
    return info


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def save_capsule(
    model: nn.Module,
    path: str | Path,
    name: str | None = None,
    *,
    metrics: Mapping[str, Any] | None = None,
) -> Capsule:
    """Write the capsule of a trained `memory/BACKBONE` model: one safetensors file, whole or not at all.

    path: ends in .capsule (or .safetensors). name: of the task; None: the file's. metrics: its scores.
    Raises InputError where another file than a capsule is there.
    """
    path = Path(path)
    check_place(path)
    capsule = capsule_of(model, path.stem if name is None else name, metrics)
    about = to_dict(capsule)
    del about["state"]
    text = json.dumps({"schema_version": SCHEMA_VERSION, **about})
    write_state(capsule.state, path, metadata={TEXT: text})
    return capsule


def check_place(path: Path) -> None:
    """Raise InputError where a capsule written to `path` would take the place of something else."""
    if not path.exists():
        return
    texts: dict[str, str] = {}
    with suppress(InputError):
        texts = read_metadata(path)
    if TEXT not in texts:
        raise InputError(
            f"{path} is there already and is no capsule, so that none is written over it; name another file"
        )


def read_capsule(path: str | Path) -> Capsule:
    """The capsule in a file, after what can be wrong with it: InputError says what, and what to do."""
    path = Path(path)
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "is not there"
        raise InputError(
            f"{path} {what}; a capsule is a file that vitrail adapt train or save_capsule writes"
        )
    try:
        state = read_safetensors(
            path
        )  # with the digest of texts and tensors checked, where it has one
        texts = read_metadata(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if TEXT not in texts:
        whole = " (it holds a whole model)" if "vitrail" in texts else ""
        raise InputError(
            f"{path} is no capsule: its header says nothing of a task{whole}; vitrail adapt train and "
            "save_capsule write capsules"
        )
    if DIGEST not in texts:
        raise InputError(f"{path} is damaged: its digest is missing; copy it again")
    return _from_text(texts[TEXT], state, str(path))


def _from_text(text: str, state: dict[str, Tensor], where: str) -> Capsule:
    try:
        about = json.loads(text)
    except ValueError as error:
        raise InputError(f"{where} cannot be read: {error}") from error
    version = about.pop("schema_version", None) if isinstance(about, dict) else None
    if version != SCHEMA_VERSION:
        said = (
            f"{where} is a capsule of schema {version!r}, but this vitrail reads {SCHEMA_VERSION}"
        )
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise NewerVersion(f"{said}; a newer vitrail wrote it: update yours")
        raise InputError(f"{said}; train it again")
    found = from_dict(_Read, about | {"state": state}, where=where)
    base = found.base
    whole = {
        "name": f"memory/{base.name}",
        "parts": {"backbone": base.config, "head": found.head},
    }
    parts = read_parts(whole, where=where)
    with torch.device("meta"):
        own = assemble(whole["name"], parts, len(found.classes)).head.state_dict()
    shapes = {key: value.shape for key, value in own.items()}
    given = {key: value.shape for key, value in state.items()}
    if shapes != given:
        odd = [k for k in {**shapes, **given} if shapes.get(k) != given.get(k)]
        raise InputError(
            f"{where} does not hold what it says: {listed(sorted(odd))} differ; another version of vitrail "
            "wrote it: train it again"
        )
    return Capsule(
        name=_checked_name(found.name),
        task=found.task,
        classes=class_names(found.classes, None),
        head=parts["head"],
        base=Base(base.name, parts["backbone"], base.sha256),
        preprocessing=found.preprocessing,
        metrics=found.metrics,
        state=state,
    )


@dataclass(frozen=True)
class _ReadBase:
    name: str
    config: dict[str, Any]
    sha256: str


@dataclass(frozen=True)
class _Read:
    """A capsule as its file says it: configs are still plain data."""

    name: str
    task: str
    classes: tuple[str, ...]
    head: dict[str, Any]
    base: _ReadBase
    preprocessing: Preprocessing
    metrics: dict[str, float]
    state: dict[str, Any]


def _checked_name(name: str) -> str:
    if not isinstance(name, str) or not name or name == OWN or not name.isprintable():
        raise InputError(
            f"a capsule cannot be called {name!r} ({OWN!r} is what the base's own answers are called); give "
            "another name"
        )
    return name


class Capsules(nn.Module):
    """Many tasks over one pass of a frozen backbone: images (B, 3, H, W), preprocessed -> {name: logits}.

        tasks = Capsules("runs/base")
        tasks.attach("birds.capsule")
        tasks.attach("cars.capsule")
        tasks.predict(images)  # {"base": (B, K), "birds": (B, 200), "cars": (B, 196)}

    base: a plain ViT, a classifier on one, whose own answers are then given as "base", or the folder of a
        model or of a training run. It is not changed, and its weights must stay as they are.
    preprocessing: how images are prepared, for all tasks alike: the classifier's, or that of what was
        attached first to a bare backbone.

    Laws: the answers of the base are bit for bit those without any capsule, those of each capsule are the
    answers of its `memory/BACKBONE` model, and what is attached besides, or in which order, changes neither.
    """

    task = Classifier.task

    def __init__(self, base: nn.Module | str | Path) -> None:
        super().__init__()
        model: Any = _load_base(base) if isinstance(base, (str, Path)) else base
        self.backbone, self.head = _split(model)
        self.info = None if self.head is None else _info(model)  # of the classifier
        self.capsules: dict[str, Capsule] = {}
        self.heads = (
            nn.ModuleList()
        )  # in the order of the capsules: a module's name may hold no dot

    @property
    def names(self) -> tuple[str, ...]:
        """Of what is attached, in the order of attaching."""
        return tuple(self.capsules)

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Of each task, and of the base where it answers, in the order of `forward`."""
        own = {} if self.info is None else {OWN: self.info.classes}
        return own | {name: of.classes for name, of in self.capsules.items()}

    @property
    def preprocessing(self) -> Preprocessing | None:
        """None: of a bare backbone to which nothing is attached."""
        if self.info is not None:
            return self.info.preprocessing
        return next((of.preprocessing for of in self.capsules.values()), None)

    def attach(self, capsule: str | Path | Capsule, name: str | None = None) -> str:
        """Add a task; its name, which is the capsule's own unless another is given.

        Raises InputError, with nothing changed, where the name is taken, or the capsule was trained on
        another base, sees images in another way, or cannot share a pass.
        """
        if isinstance(capsule, (str, Path)):
            capsule = read_capsule(capsule)
        if not isinstance(capsule, Capsule):
            raise InputError(
                "attach takes the path of a capsule, or what read_capsule gives, not "
                f"{type(capsule).__name__}"
            )
        name = capsule.name if name is None else _checked_name(name)
        if name in self.capsules:
            raise InputError(
                f"a capsule called {name!r} is attached already; give this one another name, or detach "
                "that one"
            )
        self._check(capsule)
        self.heads.append(capsule.model(self.backbone).head)
        self.capsules[name] = capsule
        return name

    def detach(self, name: str) -> None:
        """Take a task away. Raises InputError where there is none of this name."""
        self._known(name)
        del self.heads[self.names.index(name)]
        del self.capsules[name]

    def model(self, name: str) -> MemoryClassifier:
        """A task alone: a whole `memory/BACKBONE` model that shares the backbone, in the mode that it has."""
        return self._known(name).model(self.backbone)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (B, K) of each task by its name, first of the base itself where it is a classifier."""
        readers = Readers(self.backbone, cast(Iterable[MemoryHead], self.heads))
        features = self.backbone(images, keys_values=readers)
        own = {} if self.head is None else {OWN: self.head(features)}
        return own | dict(zip(self.names, readers.answers(), strict=True))

    @torch.no_grad()
    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """`forward` in eval mode, without gradients, on the base's device."""
        if not isinstance(images, Tensor) or not images.is_floating_point():
            got = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise InputError(
                f"images must be a float tensor (B, 3, H, W), preprocessed, but got {got}; files are read by "
                "vitrail adapt predict"
            )
        weight = next(self.backbone.parameters())
        with eval_mode(self):
            return self(images.to(weight))

    def _known(self, name: str) -> Capsule:
        if name not in self.capsules:
            raise unknown("capsule", name, self.capsules)
        return self.capsules[name]

    def _check(self, capsule: Capsule) -> None:
        called = f"the capsule {capsule.name!r}"
        if capsule.head.form != "masked":
            raise InputError(
                f"{called} is of form={capsule.head.form!r}: all tokens of the backbone attend to its "
                "memory, so that it needs a pass of its own and would change all other answers; train it "
                "with form='masked', or use it as a model"
            )
        base, own = capsule.base, "attach it to its own base, or train one on this base"
        if self.info is not None and self.info.name != base.name:
            raise InputError(
                f"{called} was trained on {base.name}, but this base is {self.info.name}; {own}"
            )
        other = _differences(base.config, self.backbone.config, ASIDE)
        if other:
            raise InputError(
                f"{called} was trained on a {base.name} of another config than this base: {other}; {own}"
            )
        if base.sha256 != _hash(self.backbone):
            raise InputError(
                f"{called} was trained on other weights of {base.name} than this base has (sha256 differs); "
                f"{own}"
            )
        sees = self.preprocessing
        if sees is not None and sees != capsule.preprocessing:
            raise InputError(
                f"{called} sees images in another way than this base, and one pass sees them once: "
                f"{_differences(capsule.preprocessing, sees)}; train one with the base's preprocessing"
            )


def _hash(backbone: nn.Module) -> str:
    """Of its weights. Raises InputError where they were rounded, and would be taken for others."""
    rounded = {p.dtype for p in backbone.parameters()} & {torch.bfloat16, torch.float16}
    if rounded:
        names = listed(sorted(map(str, rounded)))
        raise InputError(
            f"the weights of this base are in {names}, and are told from others in torch.float32: make and "
            "attach capsules first, and convert then"
        )
    return weights_hash(backbone.state_dict())


def _load_base(base: str | Path) -> Any:
    """The model in a folder. Raises InputError that says how to make one of a file or a model's name."""
    train = "vitrail train --model {} --weights {} --train-only head --data DIR"
    where = "a base is a folder, that of a classifier or of the run that trained it;"
    if Path(base).is_file():
        raise InputError(
            f"{base} is a file, but {where} of weights with a classifier vitrail convert {base} FOLDER makes "
            f"one, of a backbone alone a run that leaves it as it is: {train.format('NAME', base)}"
        )
    if not Path(base).exists() and str(base) in list_models():
        raise InputError(
            f"{base} is a model's name, but {where} of its released weights a run makes one that leaves the "
            f"backbone as it is: {train.format(base, 'pretrained')}"
        )
    return load(model_folder(base))


def _split(base: Any) -> tuple[ViT, nn.Module | None]:
    """The plain ViT of a base, and the head of its own answers where it is a classifier."""
    if isinstance(base, ViT):
        return base, None
    if type(base) is not Classifier:
        raise InputError(
            f"capsules stand on a plain ViT, or a classifier on one, not on {type(base).__name__}; of a "
            "model with another head on a plain ViT give model.backbone"
        )
    check_base(base.backbone, MemoryConfig(start="zero", norm="own"))
    return base.backbone, base.head


def _differences(theirs: Any, ours: Any, aside: frozenset[str] = frozenset()) -> str:
    """ "size (64, 64) instead of (32, 32), ..." of two configs' fields, but those set aside."""
    theirs, ours = to_dict(theirs), to_dict(ours)
    return ", ".join(
        f"{name} {theirs.get(name)!r} instead of {ours.get(name)!r}"
        for name in dict.fromkeys((*theirs, *ours))
        if name not in aside and theirs.get(name) != ours.get(name)
    )
