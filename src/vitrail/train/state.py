"""Run state: everything that a run needs to go on as if it had never stopped.

One safetensors file holds the weights, their average and the optimiser's memory, its header a JSON text with
the position in the batch plan, the scores and the configuration. It is written beside its place, flushed to
the disk and then renamed, so whatever happens, a complete state stands there: the new one or the one before.

The header carries a digest of the tensors, and a digest of its own stands beside it: a state that is no
longer as it was written is found out when it is read, before anything of it is used.

There are no random states to keep: every random number of a run is drawn from a key (seed, position).
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vitrail.configuration import from_dict
from vitrail.train.ema import Ema
from vitrail.weights import digest_of
from vitrail.weights.files import DIGEST, flush
from vitrail_runtime.errors import InputError, NewerVersion

SCHEMA_VERSION = 2  # 1 had no digests
ABOUT = {"config": dict, "data": str, "classes": list}  # beside the position
NAME = re.compile(r"step-(\d{8,})\.safetensors")


@dataclass
class Position:
    """Where a run stands."""

    step: int = 0  # updates done
    epoch: int = 0
    batch: int = 0  # batches of this epoch done
    images: int = 0  # images seen
    seconds: float = 0.0  # spent training, over all starts
    rows: int = 0  # of metrics.jsonl
    losses: tuple[float, ...] = ()  # since the last row
    best: float | None = None  # best score of an evaluation
    best_step: int = 0
    stale: int = 0  # evaluations since the best one
    finished: str = ""  # why the run is over, or ""


def gather(
    model: nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None
) -> dict[str, Tensor]:
    """All tensors of a run by name, whole and on the CPU. Every rank must call it: shards are collected."""
    tensors = _named(model, ema)
    for name, parameter in model.named_parameters():
        for slot, value in (
            optimizer.state[parameter].items() if parameter in optimizer.state else ()
        ):
            tensors[f"optimizer.{slot}.{name}"] = value
    return {key: whole(value) for key, value in tensors.items()}


def _named(model: nn.Module, ema: Ema | None) -> dict[str, Tensor]:
    """The tensors of the model and of its average, as a state names them."""
    shadow = {} if ema is None else ema.shadow
    named = {f"model.{key}": value for key, value in model.state_dict().items()}
    return named | {f"ema.{key}": value for key, value in shadow.items()}


@torch.no_grad()
def restore(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
) -> None:
    """Put back what `gather` collected. Every rank gives all tensors and keeps its shard.

    Raises InputError, before anything is changed, when they are not those of this model.
    """
    _check_fit(tensors, model, ema)
    for key, value in _named(model, ema).items():
        value.copy_(_sharded_like(value, tensors[key]))
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            slot, _, name = rest.partition(".")
            parameter = parameters[name]
            # A fresh copy: the optimiser changes its memory in place, and the file's may be a mapping.
            own = _sharded_like(parameter, value) if value.ndim else value
            optimizer.state[parameter][slot] = own.to(parameter.device, copy=True)


def _check_fit(tensors: Mapping[str, Tensor], model: nn.Module, ema: Ema | None) -> None:
    wanted = _named(model, ema)
    there = {key: value for key, value in tensors.items() if not key.startswith("optimizer.")}
    odd = [f"{key} is missing" for key in wanted if key not in there]
    odd += [f"{key} is not of this run" for key in there if key not in wanted]
    odd += [
        f"{key} is {_form(there[key])} instead of {_form(value)}"
        for key, value in wanted.items()
        if key in there and _form(there[key]) != _form(value)
    ]
    odd += _odd_memory(tensors, dict(model.named_parameters()))
    if odd:
        raise InputError(
            f"the state is not of this model: {len(odd)} tensors differ, such as {'; '.join(odd[:3])}; "
            "another version of vitrail wrote it, or somebody changed it"
        )


def _odd_memory(tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the optimiser's tensors: a parameter has all the slots that others have, or none."""
    odd, slots = [], {}
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind != "optimizer":
            continue
        slot, _, name = rest.partition(".")
        if name not in parameters:
            odd.append(f"{key} is not of this run")
            continue
        slots.setdefault(name, set()).add(slot)
        if value.ndim and value.shape != parameters[name].shape:
            wanted = tuple(parameters[name].shape)
            odd.append(f"{key} is {tuple(value.shape)} instead of {wanted}")
    every = set().union(*slots.values())
    for name, there in slots.items():
        odd += [f"optimizer.{slot}.{name} is missing" for slot in sorted(every - there)]
    return odd


def _form(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"


def whole(value: Tensor) -> Tensor:
    """A tensor of its own storage's worth on the CPU, collected from all ranks where it is sharded."""
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().cpu().contiguous()


def _sharded_like(example: Tensor, value: Tensor) -> Tensor:
    if not isinstance(example, DTensor):
        return value
    return distribute_tensor(
        value.to(example.device), example.device_mesh, example.placements, src_data_rank=None
    )


def write_state(
    folder: Path,
    tensors: Mapping[str, Tensor],
    position: Position,
    about: Mapping[str, Any],
    *,
    keep: int,
) -> Path:
    """Write FOLDER/step-N.safetensors and delete all but the `keep` newest up to it.

    about: what must agree on resuming (configuration, classes, hash of the data), JSON-ready.
    Raises OSError when it cannot be written; the states from before are then untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header = {"schema_version": SCHEMA_VERSION, "position": asdict(position), **about}
    texts = {"vitrail": json.dumps(header | {"tensors": digest_of(tensors)})}
    texts[DIGEST] = digest_of({}, texts)
    path = folder / f"step-{position.step:08d}.safetensors"
    partial = path.with_suffix(".partial")
    try:
        save_file(dict(tensors), partial, metadata=texts)
        flush(partial)
        os.replace(partial, path)
        flush(folder)  # the rename itself
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    finally:
        partial.unlink(missing_ok=True)
    # A later one was passed over when the run resumed: it counts for none of those that are kept.
    earlier = [p for p in states(folder) if _step(p) <= position.step and not p.is_dir()]
    for old in earlier[keep:]:
        old.unlink()
    return path


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a state file, as `gather` collected them. Raises InputError when it is damaged."""
    with _opened(path) as file:
        _, header = _header(file, path)
        # An open file is no mapping: `in file` would fail.
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if header["schema_version"] > 1 and header.get("tensors") != digest_of(tensors):
            raise _Damage("its tensors are not those that were written")
        return tensors


def read_header(path: Path) -> tuple[Position, dict[str, Any]]:
    """Where the run of a state file stood, and what must agree to go on; no tensor is read.

    The second holds schema_version too. Raises InputError when the file is none, is damaged, or was written
    by a newer version (NewerVersion).
    """
    with _opened(path) as file:
        return _header(file, path)


def _header(file: Any, path: Path) -> tuple[Position, dict[str, Any]]:
    texts = dict(file.metadata() or {})
    written = texts.pop(DIGEST, None)
    if "vitrail" not in texts:
        raise _Damage("a safetensors file of something else")
    header = json.loads(texts["vitrail"])
    if not isinstance(header, dict):
        raise _Damage("its header is not as it was written")
    version = header.get("schema_version")
    if written != digest_of({}, texts) and not (written is None and version == 1):
        raise _Damage("its header is not as it was written")
    if not isinstance(version, int):
        raise _Damage("its header lacks 'schema_version'")
    if version > SCHEMA_VERSION:
        raise NewerVersion(
            f"{path} was written by a newer vitrail (state schema {version}, this one reads "
            f"{SCHEMA_VERSION}); update vitrail to go on with this run"
        )
    for key, kind in {"position": dict, **ABOUT}.items():
        if not isinstance(header.get(key), kind):
            raise _Damage(f"its header lacks {key!r}")
    position = from_dict(Position, header.pop("position"), where=str(path))
    if NAME.fullmatch(path.name) and _step(path) != position.step:
        raise _Damage(f"it holds update {position.step} under the name of another")
    return position, header


class _Damage(Exception):
    """What is wrong with a state file, for the message that names it."""


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        if not path.is_file():  # a pipe would keep us waiting
            raise _Damage("a folder" if path.is_dir() else "no file, or a link to none")
        with safe_open(path, framework="pt") as file:
            yield file
    except (_Damage, SafetensorError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is not a complete run state ({error})") from error


def states(folder: Path) -> list[Path]:
    """What is named as a state in a folder, newest first. Raises InputError when it cannot be listed."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        if folder.is_symlink():
            raise InputError(
                f"{folder} is a link to nothing; move it away, or put it right"
            ) from None
        return []
    except OSError as error:
        raise InputError(
            f"{folder} is not a folder of run states that can be read ({error.strerror}); move it away, "
            "or put it right"
        ) from error
    return sorted((folder / n for n in names if NAME.fullmatch(n)), key=_step, reverse=True)


def newest_whole(folder: Path) -> Path | None:
    """The state from which a run would go on, for messages; reads every byte of it."""
    with suppress(InputError):
        for path in states(folder):
            with suppress(InputError):
                read_state(path)
                return path
    return None


def _step(path: Path) -> int:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
