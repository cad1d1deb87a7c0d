"""Load a golden fixture and compare tensors with it (numpy only)."""

import json
import pathlib

import numpy as np


def load(name, folder=pathlib.Path(__file__).parent):
    """(facts, arrays) of fixture `name`."""
    facts = json.loads((pathlib.Path(folder) / f"{name}.json").read_text(encoding="utf-8"))
    with np.load(pathlib.Path(folder) / f"{name}.npz") as z:
        return facts, {k: z[k] for k in z.files}


# The official runs were in float32: the same in float64 is up to 1.8e-6 of the largest value away from them.
REL = 3e-6


def difference(facts, arrays, key, tensor, rel=REL):
    """(largest absolute difference, largest allowed one) of one tensor against the stored entry `key`."""
    info, want = facts["arrays"][key], arrays[key]
    got = np.asarray(tensor.detach().cpu() if hasattr(tensor, "detach") else tensor)
    assert list(got.shape) == info["shape"], (key, got.shape, info["shape"])
    if info["stored"] != "whole":
        got = got.reshape(-1)[:: info["step"]]
    big = max(abs(info.get("min", 0)), abs(info.get("max", 0)), 1e-3)
    allowed = rel * big
    gap = np.abs(got.astype(np.float64) - want.astype(np.float64))
    return (float(gap.max()) if gap.size else 0.0), (0.0 if want.dtype.kind in "ib" else allowed)


def check(name, tensors, folder=pathlib.Path(__file__).parent, rel=REL):
    """Assert that every given tensor (name -> tensor) agrees with fixture `name`."""
    facts, arrays = load(name, folder)
    for key, tensor in tensors.items():
        gap, allowed = difference(facts, arrays, key, tensor, rel)
        assert gap <= allowed, f"{name}: {key} differs by {gap:.3g}, allowed {allowed:.3g}"
