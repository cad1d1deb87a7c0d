"""What key maps of several papers do beside renaming."""

from collections.abc import Sequence

import torch

from vitrail.registry import Tensors


def join_rows(state: Tensors, whole: str, parts: Sequence[str]) -> Tensors:
    """Layers that a file keeps apart as the rows of one of ours, weights and biases alike.

    `join_rows(state, "attn.qkv", ("attn.q", "attn.k", "attn.v"))` makes "blocks.0.attn.qkv.weight" of
    "blocks.0.attn.q.weight" and so on. Where a part is missing the others keep their names, which the loader
    then reports.
    """
    out = dict(state)
    for key in state:
        before, found, leaf = key.rpartition(f"{parts[0]}.")
        keys = [f"{before}{part}.{leaf}" for part in parts]
        if found and all(k in out for k in keys):
            out[f"{before}{whole}.{leaf}"] = torch.cat([out.pop(k) for k in keys])
    return out
