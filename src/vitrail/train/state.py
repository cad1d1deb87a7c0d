"""Run state: everything that a run needs to go on as if it had never stopped.

One safetensors file holds the weights, their average and the optimiser's memory, its header a JSON text with
the position in the batch plan, the scores and the configuration. It is written beside its place, flushed to
the disk and then renamed, so whatever happens, a complete state stands there: the new one or the one before.

There are no random states to keep: every random number of a run is drawn from a key (seed, position).
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from vitrail_runtime.errors import InputError

SCHEMA_VERSION = 1


@dataclass
class Position:
    """Where a run stands."""

    step: int = 0  # updates done
    epoch: int = 0
    batch: int = 0  # batches of this epoch done
    images: int = 0  # pictures seen
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
    tensors = {f"model.{key}": value for key, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for slot, value in (
            optimizer.state[parameter].items() if parameter in optimizer.state else ()
        ):
            tensors[f"optimizer.{slot}.{name}"] = value
    if ema is not None:
        tensors |= {f"ema.{key}": value for key, value in ema.shadow.items()}
    return {key: whole(value) for key, value in tensors.items()}


@torch.no_grad()
def restore(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema | None,
) -> None:
    """Put back what `gather` collected. Every rank gives all tensors and keeps its shard."""
    for key, value in model.state_dict().items():
        value.copy_(_sharded_like(value, tensors[f"model.{key}"]))
    for key, value in (ema.shadow if ema is not None else {}).items():
        value.copy_(_sharded_like(value, tensors[f"ema.{key}"]))
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            slot, _, name = rest.partition(".")
            parameter = parameters[name]
            # A fresh copy: the optimiser changes its memory in place, and the file's may be a mapping.
            own = _sharded_like(parameter, value) if value.ndim else value
            optimizer.state[parameter][slot] = own.to(parameter.device, copy=True)


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
    """Write FOLDER/step-N.safetensors and delete all but the `keep` newest.

    about: what must agree on resuming (configuration, classes, hash of the data), JSON-ready.
    Raises OSError when it cannot be written; the states from before are then untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    header = {"schema_version": SCHEMA_VERSION, "position": asdict(position), **about}
    path = folder / f"step-{position.step:08d}.safetensors"
    partial = path.with_suffix(".partial")
    try:
        save_file(dict(tensors), partial, metadata={"vitrail": json.dumps(header)})
        _flush(partial)
        os.replace(partial, path)
        _flush(folder)  # the rename itself
    except SafetensorError as error:  # how safetensors reports a full disk
        raise OSError(str(error)) from error
    finally:
        partial.unlink(missing_ok=True)
    for old in states(folder)[keep:]:
        old.unlink()
    return path


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a state file, as `gather` collected them. Raises InputError when it is damaged."""
    with _opened(path) as file:
        # An open file is no mapping: `in file` would fail.
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def read_header(path: Path) -> tuple[Position, dict[str, Any]]:
    """Where the run of a state file stood, and what must agree to go on; no tensor is read.

    Raises InputError when the file is none, is cut off, or was written by a newer version.
    """
    with _opened(path) as file:
        header = json.loads((file.metadata() or {})["vitrail"])
    version = header.pop("schema_version")
    if version > SCHEMA_VERSION:
        raise InputError(
            f"{path} was written by a newer vitrail (state schema {version}, this one reads "
            f"{SCHEMA_VERSION}); update vitrail to go on with this run"
        )
    return from_dict(Position, header.pop("position"), where=str(path)), header


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not a complete run state ({error})") from error


def states(folder: Path) -> list[Path]:
    """The complete states in a folder, newest first."""
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def _flush(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
