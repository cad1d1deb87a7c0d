"""A loss that stopped being finite: the batch and the weights are kept, and can be run again."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from vitrail.adapt.freeze import freeze, train_mode
from vitrail.data.batch import Batch, Dense, Padded
from vitrail.data.packed import Packed
from vitrail.train.config import TrainConfig, read_config
from vitrail.train.folder import RunFolder, explained
from vitrail.train.ranks import total_loss
from vitrail.train.state import newest_whole, whole
from vitrail.weights.files import read_metadata, read_safetensors, write_state
from vitrail_runtime.errors import InputError

if TYPE_CHECKING:
    from vitrail.train.run import Run

T = TypeVar("T")
NAME = "nonfinite.safetensors"
HELPS = (
    "what usually helps: a lower --lr, a longer --warmup-epochs, --clip-grad 1, --precision fp32; it is "
    "another run then, with another --out"
)


def keep_batch(run: "Run", batch: Batch) -> InputError:
    """Write the batch of every process, and the weights that met it; returns the error to raise."""
    at, accelerator = run.at, run.accelerator
    model = {f"model.{k}": whole(v) for k, v in run.model.state_dict().items()}
    met = {"images": batch.images, "targets": batch.targets, "indices": batch.indices}
    shares = gather_shares((flat(met), batch.padding))
    path = run.folder.path / NAME
    if accelerator.is_main_process:
        tensors = {f"{rank}.{k}": v for rank, (own, _) in enumerate(shares) for k, v in own.items()}
        keys = [run.train_data.where(i) for own, _ in shares for i in own["indices"].tolist()]
        about = {
            "step": at.step,
            "epoch": at.epoch,
            "padding": [padding for _, padding in shares],
            "classes": list(run.train_data.classes),
            "images": keys,
            "model_options": run.task.model_options(run.settings, run.train_data.truth),
        }
        with explained(run.folder):
            write_state(tensors | model, path, metadata={"vitrail": json.dumps(about)})
    saved = newest_whole(run.folder.state)
    state = f"the last state, from before it, is {saved}" if saved else "no state was saved before"
    return InputError(
        f"loss or gradient is not finite at step {at.step + 1} (epoch {at.epoch + 1}, batch "
        f"{batch.step + 1}); the batch and the weights are kept in {path}, {state}\n"
        f"look at it with: vitrail train --replay {run.folder.path}\n"
        f"{HELPS}"
    )


def gather_shares(own: T) -> list[T]:
    """What each process has, on all of them."""
    if not torch.distributed.is_initialized():
        return [own]
    shares: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(shares, own)
    return shares


def flat(value: Any, name: str = "") -> dict[str, Tensor]:
    """Tensors in dicts and tuples, by the way to them, on the CPU: {"targets.3.boxes": ...}."""
    if isinstance(value, Tensor):
        return {name: value.detach().cpu()}
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    prefix = f"{name}." if name else ""
    return {k: v for key, inner in items for k, v in flat(inner, f"{prefix}{key}").items()}


def nested(tensors: Mapping[str, Tensor]) -> Any:
    """What `flat` was given."""
    if "" in tensors:
        return tensors[""]
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        key, _, rest = name.partition(".")
        parts.setdefault(key, {})[rest] = value
    if all(key.isdecimal() for key in parts):
        return tuple(nested(parts[key]) for key in sorted(parts, key=int))
    return {key: nested(inner) for key, inner in parts.items()}


def not_finite(run: "Run") -> InputError:
    """What to say of a model whose answers are no numbers. It is not saved; what stands there stays."""
    weights = _broken({k: whole(v) for k, v in run.model.state_dict().items()})
    models = run.folder.models()
    before = f"{' and '.join(models)} in {run.folder.path} are from before it; " if models else ""
    return InputError(
        f"after step {run.at.step} (epoch {run.epochs_done:.1f}) the loss on the validation images is "
        f"not finite; weights that are not: {some(weights)}\n{before}{HELPS}"
    )


def _broken(state: Mapping[str, Tensor]) -> list[str]:
    return [key for key, value in state.items() if not value.isfinite().all()]


def some(names: Sequence[str], most: int = 5) -> str:
    """ "none", or how many there are, and a few of them."""
    if not names:
        return "none"
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return f"{len(names):,} ({', '.join(names[:most])}{more})"


def replay(path: str | Path) -> dict[str, Any]:
    """Run the kept batch of a stopped run again, on the CPU, share by share as it was trained.

    Returns the number of the update (`step`, from 1), the `loss` and `gradient_norm` as trained and the
    `loss_fp32` in full precision, names of `weights` that are not finite, and `images` of which the model's
    answer is not, of `num_images`. Raises InputError when the folder keeps no batch.
    """
    from vitrail.train.build import build_model, task_and_settings
    from vitrail.train.run import seed_update

    config, tensors, about = _kept(RunFolder(path))
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model = build_model(config, tuple(about["classes"]))
    freeze(model, config.train_only)
    task, settings = task_and_settings(config)
    for name, value in about["model_options"].items():
        setattr(model, name, value)
    kept = nested({k: v for k, v in tensors.items() if not k.startswith("model.")})
    shares = [batch_of(*share) for share in zip(kept, about["padding"], strict=True)]
    weight = torch.stack([model.weight(share.targets) for share in shares]).sum(0)

    def answers(bf16: bool, ask: Callable[[Any], Any]) -> list[Any]:
        """Of `ask`, part by part as it was trained."""
        model.load_state_dict(weights)  # a forward pass moves running statistics
        train_mode(model)
        out = []
        for rank, share in enumerate(shares):
            seed_update(config, about["step"], rank)
            for part in share.split(config.accumulate):
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    out.append(ask(part))
        return out

    def loss_of(part: Batch) -> Tensor:
        losses = model.losses(part.images, part.targets, **part.padding, **task.options(settings))
        return total_loss(losses, weight)

    def finite(part: Batch) -> Tensor:
        outputs = model.forward_tensors(part.images, **part.layout)
        # Of a pack's class maps there is one tensor an image, each of its own size.
        good = (torch.stack([own.isfinite().all() for own in o]) for o in outputs.values())
        return torch.stack(list(good)).all(0)

    bf16 = config.precision == "bf16"
    loss = torch.stack(answers(bf16, loss_of)).sum()
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        full = torch.stack(answers(False, loss_of)).sum() if bf16 else loss
        good = torch.cat(answers(bf16, finite))
    bad = (~good).nonzero().flatten().tolist()
    return {
        "step": about["step"] + 1,
        "loss": loss.item(),
        "gradient_norm": torch.cat(gradients).norm().item(),
        "loss_fp32": full.item(),
        "weights": _broken(weights),
        "images": [about["images"][i] for i in bad],
        "num_images": len(about["images"]),
    }


def batch_of(kept: Mapping[str, Any], padding: Mapping[str, Any]) -> Batch:
    """A process's share of the batch."""
    images, targets, indices = (kept[name] for name in ("images", "targets", "indices"))
    if not padding or "patch_size" in padding:
        return Dense(images, targets, indices, **padding)
    if "packing" in padding:
        fields = {name: _tuples(value) for name, value in padding["packing"].items()}
        return Packed(images, targets, indices, **fields)
    return Padded(images, targets, indices, _tuples(padding["sizes"]))


def _tuples(value: Any) -> Any:
    """What JSON made lists of."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _kept(folder: RunFolder) -> tuple[TrainConfig, dict[str, Tensor], dict[str, Any]]:
    """The configuration of a run, and what `keep_batch` wrote."""
    file = folder.path / NAME
    if not file.is_file():
        raise InputError(f"{folder.path} keeps no batch: there is no {NAME} in it")
    config = replace(read_config(folder.config), weights=None)
    try:
        return config, read_safetensors(file), json.loads(read_metadata(file)["vitrail"])
    except (OSError, KeyError, ValueError) as error:
        raise InputError(
            f"{file} is not whole ({error}); train again to keep the batch anew"
        ) from error


def verdict(found: Mapping[str, Any]) -> str:
    """What the numbers of `replay` say about the cause, and what to do."""
    if found["weights"]:
        return (
            "the weights were broken before this batch: an earlier update was too large, and the images "
            "are not to blame; a lower --lr, a longer --warmup-epochs or --clip-grad 1"
        )
    if math.isfinite(found["loss_fp32"]) and not math.isfinite(found["loss"]):
        return "full precision helps: --precision fp32"
    if 0 < len(found["images"]) < found["num_images"]:
        return "look at these images; if they are as they should be, a lower --lr or --clip-grad 1"
    return (
        "the numbers grew too large for this batch: a lower --lr, a longer --warmup-epochs or "
        "--clip-grad 1"
    )
