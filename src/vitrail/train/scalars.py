"""A run's numbers for TensorBoard, beside metrics.jsonl."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vitrail_runtime.errors import InputError


class Scalars:
    """Writes rows of metrics.jsonl to event files in `folder`: "train/loss", "eval/top1", ... by update.

    step: where the run stands; what an earlier start wrote of later updates is no longer shown, because
    they are computed again.
    """

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        self.writer = SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, kind: str, step: int, figures: Mapping[str, Any]) -> None:
        for name, value in figures.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(f"{kind}/{name}", value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def check_tensorboard() -> None:
    """Raises InputError where TensorBoard is not installed: before a run starts, not at its first row."""
    if find_spec("tensorboard") is None:
        raise InputError(
            "--tensorboard needs TensorBoard, which is not installed; "
            "pip install vitrail[track], or leave it out: metrics.jsonl has the same numbers"
        )
