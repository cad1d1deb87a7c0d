"""A family of two small variants with a foreign layout that fuses, renames and drops keys."""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vitrail import registry
from vitrail.features import FeatureSpec
from vitrail.registry import BackboneEntry, Layout


@dataclass(frozen=True, kw_only=True)
class ToyConfig:
    dim: int = 4
    image_size: int = 8


class Toy(nn.Module):
    """Two projections, a norm with running statistics and a position table of one row per 4 pixels."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.config = config
        self.pos_embed = nn.Parameter(torch.zeros(1, config.image_size // 4, config.dim))
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.norm = nn.BatchNorm1d(config.dim)
        self.feature_specs = {"c2": FeatureSpec(config.dim, 4)}


class ToyTail(nn.Module):
    """A hidden layer before the classes."""

    def __init__(self, config, specs, num_classes):
        super().__init__()
        self.pre = nn.Linear(config.dim, 6)
        self.fc = nn.Linear(6, num_classes)


def from_foreign(state, config):
    out = {}
    for key, value in state.items():
        part, _, leaf = key.partition(".")
        if key == "index":
            continue
        if part == "q":
            out[f"backbone.qkv.{leaf}"] = torch.cat([value, state[f"k.{leaf}"], state[f"v.{leaf}"]])
        elif part in ("fc", "pre"):
            out[f"head.{key}"] = value
        elif part not in ("k", "v"):
            out[f"backbone.{key}"] = value
    return out


def resample(state, config):
    key, rows = "backbone.pos_embed", config.image_size // 4
    if key in state and state[key].shape[1] != rows:
        table = F.interpolate(state[key].transpose(1, 2), rows, mode="linear").transpose(1, 2)
        state = {**state, key: table}
    return state


def toy_entry(name: str, config: ToyConfig) -> BackboneEntry:
    foreign = Layout(
        convert=from_foreign,
        marks=("q.weight", "k.*"),
        may_leave=("index",),
        may_be_new=("head.pre.*",),
        source="Toys 2026",
    )
    return BackboneEntry(
        name=name,
        family="toy",
        cls=Toy,
        config=config,
        tail=ToyTail,
        layouts={"foreign": foreign},
        resample=resample,
    )


@pytest.fixture
def toy(monkeypatch):
    """The small variant's entry; "toy_small" and "toy_large" are all that is registered meanwhile."""
    entries = {
        "toy_small": toy_entry("toy_small", ToyConfig()),
        "toy_large": toy_entry("toy_large", ToyConfig(dim=5)),
    }
    monkeypatch.setattr(registry, "_ENTRIES", entries)
    return entries["toy_small"]
