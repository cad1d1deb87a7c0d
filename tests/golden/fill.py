"""Deterministic parameters and inputs for the golden fixtures (numpy only; see README.md)."""

import zlib

import numpy as np
import torch

KEEP = (
    "num_batches_tracked",
    "attn_mask",
    "relative_position_index",
    "beta",
)  # never filled, nor any integer tensor


def normal(name, shape):  # float64 standard normal numbers that depend on a text and a shape only
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape))


def value(key, shape, gain=1.0):  # the float32 array for the state_dict entry called `key`
    z, leaf = normal(key, shape), key.split(".")[-1]
    if leaf == "running_var":
        z = 1.0 + 0.1 * np.abs(z)
    elif leaf == "running_mean" or leaf.endswith("bias"):
        z = 0.1 * z
    elif leaf.endswith("weight") and len(shape) >= 2:  # gain: convolutions only
        z = z / np.sqrt(np.prod(shape[1:])) * (gain if len(shape) >= 3 else 1.0)
    elif len(shape) <= 1:  # norm weights, layer scales, gammas, single scalars
        z = 1.0 + 0.1 * z
    else:  # position embeddings, tokens, bias tables
        z = 0.2 * z
    return z.astype(np.float32)


def fill(state_dict, gain=1.0):  # a new state_dict, to be given to load_state_dict(strict=True)
    def one(key, t):
        keep = not t.is_floating_point() or key.split(".")[-1] in KEEP
        return t.clone() if keep else torch.from_numpy(value(key, t.shape, gain)).to(t.dtype)

    return {key: one(key, t) for key, t in state_dict.items()}


def image(
    batch, height, width, channels=3
):  # float32 picture: fine noise plus noise constant on 8x8 tiles
    shape, tiles = (
        (batch, channels, height, width),
        (batch, channels, -(-height // 8), -(-width // 8)),
    )
    coarse = (
        normal(f"coarse{shape}", tiles).repeat(8, axis=2).repeat(8, axis=3)[:, :, :height, :width]
    )
    return torch.from_numpy((0.7 * (normal(f"image{shape}", shape) + coarse)).astype(np.float32))


def array(name, *shape):  # a named float32 standard normal tensor, for module-level inputs
    return torch.from_numpy(normal(name, shape).astype(np.float32))
