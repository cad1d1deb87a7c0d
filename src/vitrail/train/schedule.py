"""The learning rate as a pure function of where the run stands: linear warm-up, then a cosine."""

import math

from vitrail.train.config import TrainConfig


def learning_rate(
    config: TrainConfig, step: int, *, done: float, warmup_steps: int, total_steps: int
) -> float:
    """The rate of update `step` (from 0), when the share `done` in [0, 1] of the run is over.

    Linear from `warmup_lr` to `lr`, then half a cosine down to `min_lr` (Loshchilov & Hutter, ICLR 2017,
    arXiv 1608.03983, without restarts), or constant. `done` is step / total_steps, or more where a time limit
    is nearer than the last step. Being a function of position alone, it needs no state.
    """
    if step < warmup_steps:
        return config.warmup_lr + (config.lr - config.warmup_lr) * step / warmup_steps
    if config.schedule == "constant":
        return config.lr
    warmed = warmup_steps / total_steps
    share = min(max((done - warmed) / (1.0 - warmed), 0.0), 1.0)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1.0 + math.cos(math.pi * share))
