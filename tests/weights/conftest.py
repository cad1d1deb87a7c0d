"""A family of two small variants with a foreign layout that fuses, renames and drops keys; a hub without a
network."""

from dataclasses import dataclass
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import save_file
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


COMMIT = "0123456789abcdef0123456789abcdef01234567"
STATE = {"a": torch.arange(3.0)}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A hub cache with one commit of one repository, as huggingface_hub lays it out."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    root = tmp_path / "models--owner--name"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    save_file(STATE, snapshot / "model.safetensors")
    return snapshot


@pytest.fixture
def online(cache, monkeypatch):
    """A hub that answers: its repository, what was asked of it, and the failure to raise, if any."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    names = ["README.md", "config.json", "model.safetensors", "modeling.py", "pytorch_model.bin"]
    fake = SimpleNamespace(files=names, fetched=[], asked=[], failure=None)
    (cache / "config.json").write_text("{}")

    def model_info(repo, *, revision=None):
        if fake.failure:
            raise fake.failure
        fake.asked.append((repo, revision))
        siblings = [SimpleNamespace(rfilename=n) for n in fake.files]
        return SimpleNamespace(sha=COMMIT, siblings=siblings)

    def hf_hub_download(repo, filename, *, revision):
        fake.fetched.append((repo, filename, revision))
        return str(cache / filename)

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return fake
