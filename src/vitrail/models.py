"""Full models by name (`assembly` says what stands behind one), saved as folders and loaded from them."""

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitrail import weights as weights_room
from vitrail.assembly import HEADS as HEADS
from vitrail.assembly import NAMED as NAMED
from vitrail.assembly import TASKS as TASKS
from vitrail.assembly import Head as Head
from vitrail.assembly import ModelInfo as ModelInfo
from vitrail.assembly import assemble as assemble
from vitrail.assembly import at_own_shape as at_own_shape
from vitrail.assembly import at_patch_size as at_patch_size
from vitrail.assembly import build_backbone as build_backbone
from vitrail.assembly import build_classifier as build_classifier
from vitrail.assembly import check_takes_packs as check_takes_packs
from vitrail.assembly import class_names as class_names
from vitrail.assembly import create_backbone as create_backbone
from vitrail.assembly import create_model as create_model
from vitrail.assembly import describe as describe
from vitrail.assembly import list_models as list_models
from vitrail.assembly import load_dense as load_dense
from vitrail.assembly import parse_name as parse_name
from vitrail.assembly import part_names as part_names
from vitrail.assembly import use_patch_sizes as use_patch_sizes
from vitrail.configuration import from_dict, to_dict
from vitrail.registry import config_class
from vitrail_runtime.errors import InputError, NewerVersion, listed
from vitrail_runtime.preprocess import Preprocessing

SCHEMA_VERSION = 2  # 1 had one "config", the backbone's, where 2 has "parts"


def save(model: Any, folder: str | Path, *, metrics: Mapping[str, Any] | None = None) -> Path:
    """Write config.json, model.safetensors (fp32), metrics.json (where given) and README.md."""
    folder = Path(folder)
    info: ModelInfo = model.info
    state = {k: v.detach().float().cpu().contiguous() for k, v in model.state_dict().items()}
    config = {
        "schema_version": SCHEMA_VERSION,
        "name": info.name,
        "task": model.task,
        "parts": {part: to_dict(config) for part, config in info.parts.items()},
        "classes": list(info.classes),
        "preprocessing": to_dict(info.preprocessing),
        "weights_sha256": weights_hash(state),
    }
    if info.pretrained is not None:
        config["pretrained"] = dict(info.pretrained)
    if model.category_ids is not None:  # those of the data, where it was trained since
        config["category_ids"] = list(model.category_ids)
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


def load(folder: str | Path) -> Any:
    """The model that `save` wrote, in eval mode, on the CPU.

    Folders of schema 1 are converted, with a warning. Raises InputError when the folder is not a model, was
    written by a newer version, its weights are not those that config.json was written for, or one of the two
    files is not as it was written.
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
    parts = read_parts(config, where=str(path))
    with torch.device("meta"):
        model = assemble(config["name"], parts, len(config["classes"]))
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
    origin, ids = config.get("pretrained"), config.get("category_ids")
    ids = None if ids is None else tuple(ids)
    describe(model, ModelInfo(config["name"], parts, tuple(config["classes"]), pre, origin, ids))
    return model.eval()


def read_parts(config: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The configs of a model's parts from its config.json. Raises InputError where one does not fit."""
    known, entry = parse_name(config["name"])
    kinds = {"backbone": type(entry.config)}
    if known is not None:
        kinds["head"] = type(known.config)
    if set(config["parts"]) != set(kinds):
        raise InputError(
            f"{where}: {config['name']} has the parts {', '.join(kinds)}, but {', '.join(config['parts'])} "
            "are given; copy the folder again"
        )
    parts = {}
    for part, kind in kinds.items():
        given = config["parts"][part]
        kind = config_class(kind, given if isinstance(given, dict) else ())
        parts[part] = from_dict(kind, given, where=where)
    return parts


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
    "parts": dict,
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
    if version == 1:  # checked as it was written, then brought to today's form
        config = dict(_checked_hash(config, path))
        warnings.warn(
            f"{path} is of schema 1 and is converted as it is read; vitrail convert {path.parent} writes it "
            f"in schema {SCHEMA_VERSION}",
            stacklevel=4,
        )
        config["parts"] = {"backbone": config.pop("config", None)}
        config["schema_version"] = version = SCHEMA_VERSION
        config.pop("config_sha256", None)
    if version != SCHEMA_VERSION:
        said = f"{path} has schema version {version!r}, but this vitrail reads {SCHEMA_VERSION}"
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise NewerVersion(f"{said}; it was written by a newer vitrail: update yours")
        raise InputError(f"{said}; it is not readable")
    for key, kind in CONFIG_KEYS.items():
        if not isinstance(config.get(key), kind):
            raise InputError(
                f"{path} lacks {key!r} (expected {kind.__name__}); copy the folder again"
            )
    ids = config.get("category_ids")
    if ids is not None and not (
        isinstance(ids, list)
        and all(type(i) is int for i in ids)
        and len(set(ids)) == len(ids) == len(config["classes"])
    ):
        raise InputError(
            f"{path}: category_ids are different whole numbers, one of each of the {len(config['classes'])} "
            f"classes, but are {ids}; copy the folder again"
        )
    _checked_hash(config, path)  # before a damaged name is looked up
    known, _ = parse_name(config["name"])
    if config["classes"] or known is None or not known.embeds:
        class_names(config["classes"], None)
    return config


def _checked_hash(config: Any, path: Path) -> Any:
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
    lines = [
        f"# {info.name}",
        "",
        f"- task: {model.task}",
        f"- parameters: {params:.2f} M",
        f"- classes ({len(info.classes)}): {listed(info.classes, limit=20)}",
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
