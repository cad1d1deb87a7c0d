"""TensorBoard sees the numbers of metrics.jsonl."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.train.conftest import VIT, tiny_config
from vitrail.train.folder import RunFolder
from vitrail.train.scalars import Scalars
from vitrail.train.trainer import train
from vitrail_runtime.errors import InputError


def shown(folder: Path) -> dict[str, dict[int, float]]:
    """Tag -> update -> value, as TensorBoard reads the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_a_run_writes_its_rows_for_tensorboard(pictures, tmp_path):
    config = tiny_config(pictures, tmp_path / "run", **VIT, tensorboard=True)
    train(config)
    tags = shown(tmp_path / "run" / "tensorboard")
    for row in RunFolder(config.out).rows():
        name = {"train": "loss", "eval": "top1"}[row["kind"]]
        assert tags[f"{row['kind']}/{name}"][row["step"]] == pytest.approx(row[name])
    assert {"train/lr", "train/grad_norm", "train/images_per_second", "eval/loss"} <= tags.keys()
    assert train(replace(config, tensorboard=False)).steps == 8, "it is no other run"


def test_what_is_computed_again_is_shown_once(tmp_path):
    first = Scalars(tmp_path, 0)
    for step in (2, 4, 6, 8):
        first.add("train", step, {"loss": 1.0})
    first.close()
    again = Scalars(tmp_path, 4)
    again.add("train", 6, {"loss": 3.0})
    again.close()
    assert shown(tmp_path)["train/loss"] == {2: 1.0, 4: 1.0, 6: 3.0}


def test_without_tensorboard_the_run_does_not_start(pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    config = tiny_config(pictures, tmp_path / "run", **VIT, tensorboard=True)
    with pytest.raises(InputError, match=r"pip install vitrail\[track\]"):
        train(config)
