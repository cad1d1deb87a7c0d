"""Full-model names -> backbone + neck + head + weights. The only place that assembles; save and load."""

import hashlib
import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import vitrail.backbones  # noqa: F401  (registers every backbone)
from vitrail import weights as weights_room
from vitrail.classifiers import Classifier, PooledHead
from vitrail.configuration import check_choices, from_dict, to_dict
from vitrail.registry import BackboneEntry, backbone_entry, list_backbones, with_fields
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

SCHEMA_VERSION = 1
Weights = str | Path | Mapping[str, Any] | None


@dataclass(frozen=True)
class ModelInfo:
    """What a saved model says of itself: enough to build it again and to feed it."""

    name: str
    config: Any
    classes: tuple[str, ...]
    preprocessing: Preprocessing


def list_models(pattern: str = "*", *, task: str | None = None) -> list[str]:
    """Names that `create_model` takes, by shell pattern and task ("classify")."""
    if task not in (None, "classify"):
        raise InputError(f"unknown task {task!r}; known: 'classify'")
    return list_backbones(pattern)


def create_backbone(name: str, *, weights: Weights = None, **config_fields: Any) -> Any:
    """A backbone by name: images (B, 3, H, W) -> Features.

    weights: a file, a folder, "hf:owner/name@revision", a state dict, or {"backbone": one of these}; a
        classifier's head in it is left. What became of every key stands in `weights_report` of the result.
    config_fields: fields of the paper's config, such as image_size or drop_path_rate.
    Raises InputError for an unknown name or field (with the closest), or weights that do not fit.
    """
    entry = backbone_entry(name)
    backbone = build_backbone(entry, config_fields)
    if weights is not None:
        part = _backbone_part(name, weights)
        source = weights if part is None else part
        weights_room.load_weights(backbone, source, entry, config=backbone.config)
    return backbone


def create_model(
    name: str,
    *,
    classes: Sequence[str] | None = None,
    num_classes: int | None = None,
    weights: Weights = None,
    **config_fields: Any,
) -> Classifier:
    """A full model by name; a bare backbone name is a classifier.

    classes: the class names, in the order of the labels; or num_classes, for names "0", "1", ...
    weights: as for `create_backbone`, or {"backbone": ...} for that part alone. A head in the file is
        dropped only where its number of classes differs, and that is said.
    """
    entry = backbone_entry(name)
    names = class_names(classes, num_classes)
    config = _configured(entry, config_fields)
    model = build_classifier(entry, config, len(names))
    preprocessing = entry.preprocessing
    if "image_size" in config_fields:
        size = config_fields["image_size"]
        size = (size, size) if isinstance(size, int) else tuple(size)
        preprocessing = replace(preprocessing, size=size)
    describe(model, ModelInfo(name, config, names, preprocessing))
    part = _backbone_part(name, weights)
    if part is not None:
        model.weights_report = weights_room.load_weights(model.backbone, part, entry, config=config)
    elif weights is not None:
        weights_room.load_weights(model, weights, entry, config=config)
    return model


def build_backbone(entry: BackboneEntry, config_fields: Mapping[str, Any]) -> Any:
    """The entry's backbone with some config fields replaced, freshly initialised."""
    return entry.cls(_configured(entry, config_fields))


def build_classifier(entry: BackboneEntry, config: Any, num_classes: int) -> Classifier:
    """The entry's backbone of this config and its paper's tail, or the pooled head; freshly initialised."""
    backbone = entry.cls(config)
    tail = entry.tail or PooledHead
    return Classifier(backbone, tail(config, backbone.feature_specs, num_classes))


def _configured(entry: BackboneEntry, config_fields: Mapping[str, Any]) -> Any:
    config = with_fields(entry.name, entry.config, config_fields)
    check_choices(config, where=entry.name)
    return config


def class_names(classes: Sequence[str] | None, num_classes: int | None) -> tuple[str, ...]:
    """The class names of a model: given, counted, or ImageNet's thousand numbers."""
    if classes is None:
        count = 1000 if num_classes is None else num_classes
        if count < 1:
            raise InputError(f"num_classes is {count}, but a model needs at least one class")
        return tuple(str(i) for i in range(count))
    names = tuple(classes)
    if isinstance(classes, str) or not names or not all(isinstance(c, str) for c in names):
        raise InputError(f"classes must be a list of names, but got {classes!r}")
    if len(set(names)) != len(names):
        twice = sorted({c for c in names if names.count(c) > 1})
        raise InputError(f"class names must differ, but {twice} stand more than once")
    if num_classes not in (None, len(names)):
        raise InputError(
            f"num_classes={num_classes}, but {len(names)} classes are named; drop num_classes"
        )
    return names


def describe(model: Any, info: ModelInfo) -> None:
    """Attach what a saved model says of itself."""
    model.info = info
    model.classes = info.classes
    model.preprocessing = info.preprocessing


def save(model: Any, folder: str | Path, *, metrics: Mapping[str, Any] | None = None) -> Path:
    """Write a model folder: config.json, model.safetensors (fp32), metrics.json (where given),
    README.md."""
    folder = Path(folder)
    info: ModelInfo = model.info
    state = {k: v.detach().float().cpu().contiguous() for k, v in model.state_dict().items()}
    config = {
        "schema_version": SCHEMA_VERSION,
        "name": info.name,
        "task": model.task,
        "config": to_dict(info.config),
        "classes": list(info.classes),
        "preprocessing": to_dict(info.preprocessing),
        "weights_sha256": weights_hash(state),
    }
    config["config_sha256"] = config_hash(config)
    text = json.dumps(config, indent=2) + "\n"
    # The file of weights carries the text too: a save over an older one, stopped between the two
    # files, loses neither model.
    weights_room.write_state(state, folder / "model.safetensors", metadata={"vitrail": text})
    weights_room.write_text(folder / "config.json", text)
    if metrics is not None:
        text = json.dumps(dict(metrics), indent=2) + "\n"
        weights_room.write_text(folder / "metrics.json", text)
    weights_room.write_text(folder / "README.md", model_card(model, metrics))
    return folder


def load(folder: str | Path) -> Classifier:
    """The model that `save` wrote, in eval mode, on the CPU.

    Raises InputError when the folder is not a model, was written by a newer version, its weights are not
    those that config.json was written for, or one of the two files is not as it was written.
    """
    folder = Path(folder)
    path = folder / "config.json"
    config = read_config(folder)
    state = weights_room.read_state(folder / "model.safetensors")
    found = weights_hash(state)
    if found != config["weights_sha256"]:
        # The text beside the weights is older than they are when a save was stopped half-way.
        text = weights_room.read_metadata(folder / "model.safetensors").get("vitrail", "{}")
        path = folder / "model.safetensors"
        config = _checked(text, path) if found in text else config
    if found != config["weights_sha256"]:
        raise InputError(
            f"the weights in {folder} are not those that config.json was written for "
            "(sha256 differs); copy the whole folder again"
        )
    entry = backbone_entry(config["name"])
    cfg = from_dict(type(entry.config), config["config"], where=str(path))
    with torch.device("meta"):
        model = build_classifier(entry, cfg, len(config["classes"]))
    own = model.state_dict()
    odd = [k for k in {**own, **state} if k not in own or k not in state]
    odd += [k for k in own if k in state and own[k].shape != state[k].shape]
    if odd:
        raise InputError(
            f"model.safetensors in {folder} does not fit the {config['name']} that config.json "
            f"describes: {len(odd)} keys differ, such as {', '.join(sorted(odd)[:5])}; it was written by "
            "another version of this model"
        )
    # Counters of batches are integers in the model and were written as floats.
    model.load_state_dict({k: v.to(own[k].dtype) for k, v in state.items()}, assign=True)
    pre = from_dict(Preprocessing, config["preprocessing"], where=str(path))
    describe(model, ModelInfo(config["name"], cfg, tuple(config["classes"]), pre))
    return model.eval()


def model_folder(folder: str | Path) -> Path:
    """The folder itself, or `best` in it where it is the folder of a training run."""
    folder = Path(folder)
    best = folder / "best"
    is_run = (best / "config.json").is_file() and not (folder / "model.safetensors").is_file()
    return best if is_run else folder


def read_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder, checked: its schema is ours and nothing is missing."""
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        best = folder / "best"
        hint = f"; did you mean {best}?" if (best / "config.json").is_file() else ""
        what = "no such folder" if not folder.is_dir() else "has no config.json"
        if (folder / "config.yaml").is_file() and not hint:
            what = _run_without_best(folder)
        elif what == "no such folder" and (folder.parent / "config.yaml").is_file():
            what += ", " + _run_without_best(folder.parent, folder.name)
        raise InputError(f"{folder} is not a saved model ({what}){hint}")
    try:
        return _checked(path.read_text(encoding="utf-8"), path)
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error


def _run_without_best(run: Path, gone: str = "best") -> str:
    there = sorted(p.parent for p in run.glob("[!.]*/config.json"))
    if there:
        names = ", ".join(p.name for p in there)
        return (
            f"a training run without its {gone}/; what is there: {names}; give {there[-1]} instead"
        )
    again = f"vitrail train --config {run / 'config.yaml'}"
    if (run / "report.html").is_file():
        return f"a finished training run whose models are gone; train again: {again} --out ANOTHER"
    return f"a training run that has saved no model yet; go on with it: {again}"


CONFIG_KEYS = {  # what config.json of a model folder holds beside schema_version
    "name": str,
    "config": dict,
    "classes": list,
    "preprocessing": dict,
    "weights_sha256": str,
}


def _checked(text: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or "schema_version" not in config:
        raise InputError(
            f"{path} is not the config.json of a vitrail model (it has no schema_version); weights of "
            "other libraries are read by `vitrail convert`"
        )
    version = config["schema_version"]
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        hint = "it was written by a newer vitrail: update yours" if newer else "it is not readable"
        raise InputError(
            f"{path} has schema version {version!r}, but this vitrail reads {SCHEMA_VERSION}; {hint}"
        )
    for key, kind in CONFIG_KEYS.items():
        if not isinstance(config.get(key), kind):
            raise InputError(
                f"{path} lacks {key!r} (expected {kind.__name__}); copy the folder again"
            )
    class_names(config["classes"], None)
    # The first model folders had none.
    if "config_sha256" in config and config["config_sha256"] != config_hash(config):
        raise InputError(
            f"{path} is not as it was written (its config_sha256 is of another text): copy the folder "
            'again; if you changed it on purpose, take its line "config_sha256" out'
        )
    return config


def config_hash(config: Mapping[str, Any]) -> str:
    """sha256 over what config.json says, without this hash itself."""
    said = {key: value for key, value in config.items() if key != "config_sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and fp32 values, independent of the file's layout."""
    digest = hashlib.sha256()
    for key in sorted(state):
        value = state[key].detach().float().cpu().contiguous()
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def model_card(model: Any, metrics: Mapping[str, Any] | None) -> str:
    """A filled-in model card in Markdown."""
    info: ModelInfo = model.info
    params = sum(p.numel() for p in model.parameters()) / 1e6
    pre = info.preprocessing
    shown = ", ".join(info.classes[:20]) + (", ..." if len(info.classes) > 20 else "")
    lines = [
        f"# {info.name}",
        "",
        f"- task: {model.task}",
        f"- parameters: {params:.2f} M",
        f"- classes ({len(info.classes)}): {shown}",
        f"- input: {pre.size[0]} x {pre.size[1]} pixels, {pre.mode}, {pre.interpolation}, "
        f"mean {pre.mean}, std {pre.std}",
    ]
    if metrics:
        lines += ["", "## Scores", "", "| metric | value |", "|---|---|"]
        rows = ((k, v) for k, v in metrics.items() if isinstance(v, (int, float)))
        lines += [f"| {k} | {v:.4g} |" for k, v in rows]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "import vitrail",
        "",
        'predict = vitrail.Predictor(vitrail.load("THIS FOLDER"))',
        'for p in predict(["picture.jpg"]):',
        "    print(p.names, p.scores)",
        "```",
        "",
    ]
    return "\n".join(lines)


def _backbone_part(name: str, weights: Weights) -> Any:
    """What `weights` gives under "backbone" where it goes by part, else None: a checkpoint.

    Parts are named by files and folders, or by "backbone" alone; other mappings hold tensors.
    """
    if not isinstance(weights, Mapping):
        return None
    if set(weights) == {"backbone"}:
        return weights["backbone"]
    if any(isinstance(v, (str, Path)) for v in weights.values()):
        raise InputError(
            f"weights by part for the classifier {name!r} take the key 'backbone', "
            f"but got {sorted(map(str, weights))}"
        )
    return None


def departures(names: Collection[str]) -> list[tuple[str, str]]:
    """(paper, what its file says of official code and paper) for the files behind `names`.

    A backbone file's docstring opens with the paper and ends with the paragraphs that begin
    "Unlike", "Where" or "Paper and code": those are what a reader of the table must know.
    """
    found = {}
    for name in names:
        module = inspect.getmodule(backbone_entry(name).cls)
        doc = inspect.cleandoc(module.__doc__ or "") if module else ""
        paragraphs = doc.split("\n\n")
        marks = ("Unlike", "Where", "Paper and code")
        said = [p for p in paragraphs[1:] if p.startswith(marks)]
        if module and said:
            title = " ".join(paragraphs[0].split()).removesuffix(".")
            found[module.__name__] = (title, "\n\n".join(said))
    return [found[key] for key in sorted(found)]
