"""A run that is killed, whenever, ends with the weights of one that is not, bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.train.children import ask_to_stop, kill_workers, run, run_and_kill
from tests.train.conftest import DETECTOR, SEGMENTER, VIT, tiny_config
from vitrail.configuration import to_dict
from vitrail.train.folder import RunFolder
from vitrail.train.state import read_header, read_state, states
from vitrail.train.trainer import train


def config_for(data: Path, out: Path, **changes):
    """All that has a memory or draws at random; a state after every update."""
    settings = {"epochs": 2, "ema": 0.9, "save_every": 0.0, "eval_every": 2}
    return tiny_config(data, out, **(settings | changes))


DROPPING = VIT | {"model_fields": VIT["model_fields"] | {"drop_path_rate": 0.3}}
MIXING = {"task": {"mixup": 0.2, "cutmix": 1.0}}
SEGMENTING = SEGMENTER | {
    "model": "linear/vit_tiny_patch16",
    "model_fields": DROPPING["model_fields"],
    "head_fields": {"dropout": 0.3},
    "task": {"class_weights": "balanced"},
}
DETECTING = DETECTOR | {  # few of many proposals and anchors are drawn at random
    "model_fields": DROPPING["model_fields"],
    "head_fields": DETECTOR["head_fields"] | {"samples": 8, "proposal_samples": 8},
}


def same(ours: Path, theirs: Path) -> bool:
    """Models, averages and optimiser's memory equal in every bit, and the same rows logged but for clocks."""
    pairs = [
        (load_file(o / "last" / "model.safetensors"), read_state(states(o / "state")[0]))
        for o in (ours, theirs)
    ]
    (model, state), (other_model, other_state) = pairs
    assert model.keys() == other_model.keys()
    assert state.keys() == other_state.keys()
    return (
        all(torch.equal(model[k], other_model[k]) for k in model)
        and all(torch.equal(state[k], other_state[k]) for k in state)
        and rows(ours) == rows(theirs)
    )


def rows(out: Path) -> list[dict]:
    clocks = ("seconds", "images_per_second")
    return [{k: v for k, v in r.items() if k not in clocks} for r in RunFolder(out).rows()]


@pytest.fixture(
    scope="module",
    params=[DROPPING | MIXING, {}, SEGMENTING, DETECTING],
    ids=["vit", "efficientvit", "segmenter", "detector"],
)
def changes(request) -> dict:
    """A model that drops paths at random on mixed pictures; one with running statistics; one with both, of
    another task; one that draws what it learns from."""
    return request.param


@pytest.fixture(scope="module")
def data(changes, pictures, masks, scenes) -> Path:
    if changes is DETECTING:
        return scenes
    return masks if changes is SEGMENTING else pictures


@pytest.fixture(scope="module")
def uninterrupted(data, tmp_path_factory, changes) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert run(config_for(data, out, **changes)) == 0
    return out


def test_a_run_that_dies_before_any_rename_of_a_checkpoint_ends_the_same(
    data, tmp_path, changes, uninterrupted
):
    out = tmp_path / "run"
    died = 0
    for renames in (1, 2, 3, 5, 0):  # each start gets a little further and dies at another write
        died += (
            run(config_for(data, out, **changes), dies_at=f"rename:{renames}") == -signal.SIGKILL
        )
    assert died == 5
    assert run(config_for(data, out, **changes)) == 0
    assert same(out, uninterrupted)


@pytest.mark.slow
def test_a_run_that_dies_before_each_of_its_renames_ends_the_same(
    data, tmp_path, changes, uninterrupted
):
    for renames in range(100):
        out = tmp_path / str(renames)
        code = run(config_for(data, out, **changes), dies_at=f"rename:{renames}")
        if code == 0:
            break
        assert code == -signal.SIGKILL
        assert run(config_for(data, out, **changes)) == 0
        assert same(out, uninterrupted)
    assert 10 < renames < 99, "of all, each once"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_run_killed_at_random_moments_ends_the_same(data, tmp_path, changes, uninterrupted, seed):
    out, config = tmp_path / "run", config_for(data, tmp_path / "run", **changes)
    draw = random.Random(seed)
    # By its own progress, not by the clock: a busy machine would let the run end, or never begin.
    codes = [
        run_and_kill(config, growths=draw.randint(1, 3), delay=draw.uniform(0, 0.03))
        for _ in range(6)
    ]
    assert -signal.SIGKILL in codes
    assert run(config) == 0
    assert same(out, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_run_which_then_goes_on(data, tmp_path, changes, uninterrupted, number):
    out = tmp_path / "run"
    config = config_for(data, out, **changes)
    assert ask_to_stop(replace(config, save_every=60.0), number) == 128 + number
    assert len(states(out / "state")) == 1
    assert run(config) == 0
    assert same(out, uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_workers_too_saves_the_run(pictures, tmp_path, number):
    config = config_for(pictures, tmp_path / "run", **VIT, epochs=500, workers=2, save_every=60.0)
    assert ask_to_stop(config, number) == 128 + number
    assert len(states(tmp_path / "run" / "state")) == 1
    assert "worker" not in Path(f"{config.out}.stderr").read_text().replace("2 workers", "")


@pytest.mark.slow
def test_killed_workers_cost_no_update(pictures, tmp_path):
    config = config_for(pictures, tmp_path / "run", **VIT, epochs=500, workers=2, save_every=60.0)
    assert kill_workers(config) == 2
    said = Path(f"{config.out}.stderr").read_text()
    assert "was killed from outside" in said
    assert "the run is saved at update" in said
    assert "Traceback" not in said
    assert len(states(tmp_path / "run" / "state")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_stops_by_a_signal_to_its_group(pictures, tmp_path, number):
    config = config_for(pictures, tmp_path / "run", **VIT, epochs=5000, workers=2, save_every=60.0)
    (file := tmp_path / "run.yaml").write_text(yaml.safe_dump(to_dict(config)))
    command = [sys.executable, "-m", "vitrail", "train", "--config", str(file)]
    child = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while child.poll() is None and not RunFolder(config.out).rows():
        time.sleep(0.1)
    os.killpg(child.pid, number)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 128 + number, said
    assert f"{signal.Signals(number).name}: stopped at update" in said
    assert "Traceback" not in said
    step = read_header(states(tmp_path / "run" / "state")[0])[0].step
    assert step > 0
    assert f"at update {step}, all saved; go on with: vitrail train" in said


@pytest.mark.parametrize("unreadable", ["train:5", "val:7"])
def test_a_picture_that_cannot_be_read_leaves_the_run_saved(
    data, tmp_path, changes, uninterrupted, unreadable
):
    out = tmp_path / "run"
    config = config_for(data, out, **changes)
    assert run(replace(config, save_every=60.0), unreadable=unreadable) == 2
    said = Path(f"{out}.stderr").read_text()
    saved = 5 if unreadable == "train:5" else 8
    assert "png cannot be read\nthe run is saved at update " + f"{saved}; put this right" in said
    assert [p.name for p in states(out / "state")] == [f"step-{saved:08d}.safetensors"]
    assert run(config) == 0
    assert same(out, uninterrupted)


def test_a_finished_run_is_left_as_it_is(data, changes, uninterrupted):
    before = {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*.safetensors")}
    result = train(config_for(data, uninterrupted, **changes))
    assert result.reason == "all epochs"
    assert {p: p.stat().st_mtime_ns for p in uninterrupted.rglob("*.safetensors")} == before
