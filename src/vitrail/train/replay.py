"""A loss that stopped being finite: the batch and the weights are kept, and can be run again."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitrail.data.loader import TrainBatch
from vitrail.train.config import read_config
from vitrail.train.folder import RunFolder, explained
from vitrail.train.losses import loss_of
from vitrail.train.state import states, whole
from vitrail_runtime.errors import InputError

if TYPE_CHECKING:
    from vitrail.train.setup import Run

NAME = "nonfinite.safetensors"


def keep_batch(run: "Run", batch: TrainBatch, images: Tensor, targets: Tensor) -> InputError:
    """Write the batch of every process, and the weights that met it; returns the error to raise."""
    at, accelerator = run.at, run.accelerator
    model = {f"model.{k}": whole(v) for k, v in run.model.state_dict().items()}
    indices = torch.as_tensor(batch.indices).to(images.device)
    met = {"images": images, "targets": targets, "indices": indices}
    gathered: Any = accelerator.gather(met)
    tensors = {key: value.cpu() for key, value in gathered.items()}
    path = run.folder.path / NAME
    if accelerator.is_main_process:
        keys = [run.train_data.where(i) for i in tensors["indices"].tolist()]
        about = {
            "step": at.step,
            "epoch": at.epoch,
            "world": run.world,
            "classes": list(run.train_data.classes),
            "pictures": keys,
        }
        with explained(run.folder):
            save_file(tensors | model, path, metadata={"vitrail": json.dumps(about)})
    saved = states(run.folder.state)
    state = (
        f"the last state, from before it, is {saved[0]}" if saved else "no state was saved before"
    )
    return InputError(
        f"loss or gradient is not finite at step {at.step} (epoch {at.epoch}, batch {batch.step}); "
        f"the batch and the weights are kept in {path}, {state}\n"
        f"look at it with: vitrail train --replay {run.folder.path}\n"
        "what usually helps: a lower --lr, a longer --warmup-epochs, --clip-grad 1, --precision fp32"
    )


def replay(path: str | Path) -> dict[str, Any]:
    """Run the kept batch of a stopped run again, on the CPU, share by share as it was trained.

    Returns `step`, the `loss` and `gradient_norm` as trained and the `loss_fp32` in full precision, names of
    `weights` that are not finite, and `pictures` whose own loss is not. Raises InputError when the folder
    keeps no batch.
    """
    from vitrail.train.build import build_model
    from vitrail.train.setup import seed_update

    folder = RunFolder(path)
    file = folder.path / NAME
    if not file.is_file():
        raise InputError(f"{folder.path} keeps no batch: there is no {NAME} in it")
    config = replace(read_config(folder.config), weights=None)
    with safe_open(file, framework="pt") as kept:
        about = json.loads(kept.metadata()["vitrail"])
        # An open file is no mapping: `in kept` would fail.
        tensors = {key: kept.get_tensor(key) for key in kept.keys()}  # noqa: SIM118
    weights = {k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")}
    model = build_model(config, tuple(about["classes"]))
    count = about["world"]

    def losses(bf16: bool) -> Tensor:
        model.load_state_dict(weights)  # a forward pass moves running statistics
        model.train()
        if config.train_only == "head":
            model.backbone.eval()
        out = []
        shares = zip(tensors["images"].chunk(count), tensors["targets"].chunk(count), strict=True)
        for rank, (images, targets) in enumerate(shares):
            seed_update(config, about["step"], rank)
            parts = zip(
                images.chunk(config.accumulate), targets.chunk(config.accumulate), strict=True
            )
            for x, y in parts:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    logits = model(x)
                out.append(loss_of(logits, y, config, reduction="none"))
        return torch.cat(out)

    each = losses(config.precision == "bf16")
    each.mean().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    with torch.no_grad():
        full = losses(False).mean().item() if config.precision == "bf16" else each.mean().item()
    bad = (~each.isfinite()).nonzero().flatten().tolist()
    return {
        "step": about["step"],
        "loss": each.mean().item(),
        "gradient_norm": torch.cat(gradients).norm().item(),
        "loss_fp32": full,
        "weights": [k for k, v in weights.items() if not v.isfinite().all()],
        "pictures": [about["pictures"][i] for i in bad],
    }
