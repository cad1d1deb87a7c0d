"""A run folder is one run's, is never left half-written, and says what is wrong with it."""

import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import vitrail.train.folder as folder_module
import vitrail.train.state as state_module
from tests.train.children import CONTEXT, run
from tests.train.conftest import VIT, make_pictures, tiny_config
from vitrail.train.config import TrainConfig, read_config
from vitrail.train.folder import RunFolder
from vitrail.train.loop import train
from vitrail.train.state import read_state, states
from vitrail_runtime.errors import InputError


@pytest.fixture
def stopped(pictures, tmp_path) -> TrainConfig:
    """A run of 8 updates that died after some states, one after every update."""
    config = tiny_config(pictures, tmp_path / "run", **VIT, save_every=0.0)
    assert run(config, dies_at="rename:5") == -signal.SIGKILL
    assert states(tmp_path / "run" / "state")
    return config


def test_another_configuration_is_refused_with_what_differs(stopped):
    with pytest.raises(
        InputError, match=r"(?s)holds another run.*lr: 0\.001 there, 0\.5 now.*--weights"
    ):
        train(replace(stopped, lr=0.5))


def test_other_pictures_are_refused(stopped, tmp_path):
    other = make_pictures(tmp_path / "other", train=9)
    said = r"another run.*\n  training pictures: not the same \(24 there, 27 now\)\n"
    with pytest.raises(InputError, match=said):
        train(replace(stopped, data=str(other)))


def test_other_validation_pictures_are_refused(stopped, tmp_path):
    other = make_pictures(tmp_path / "other")
    name, another = (other / "val" / "left" / f"{i}.png" for i in range(2))
    name.write_bytes(another.read_bytes())
    said = r"another run.*\n  validation pictures: not the same \(12 as before, but a name, a label or a"
    with pytest.raises(InputError, match=said):
        train(replace(stopped, data=str(other)))


def test_what_does_not_change_the_result_may_differ(stopped):
    moved = replace(stopped, workers=1, log_every=3, keep=1)
    assert train(moved).steps == 8
    assert len(states(Path(stopped.out) / "state")) == 1


def test_models_without_a_state_are_not_written_over(pictures, tmp_path):
    config = tiny_config(pictures, tmp_path / "run", **VIT, epochs=1)
    train(config)
    shutil.rmtree(tmp_path / "run" / "state")
    best = (tmp_path / "run" / "best" / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=r"(?s)best, last.*other settings:\n  lr: .*--out"):
        train(replace(config, lr=0.5))
    assert (tmp_path / "run" / "best" / "model.safetensors").read_bytes() == best
    assert train(config).steps == 4, "a run that died before its first state starts over"
    shutil.rmtree(tmp_path / "run" / "state")
    (tmp_path / "run" / "report.html").write_text("done")
    with pytest.raises(InputError, match="a finished run whose state is gone; give another --out"):
        train(config)
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(InputError, match="it is no run folder"):
        train(config)


def test_a_state_of_a_newer_version_is_refused(stopped):
    newest = states(Path(stopped.out) / "state")[0]
    with safe_open(newest, framework="pt") as file:
        header = json.loads(file.metadata()["vitrail"])
    text = json.dumps(header | {"schema_version": 99, "what": "is new"})
    save_file(load_file(newest), newest, metadata={"vitrail": text})
    with pytest.raises(InputError, match=r"newer vitrail.*schema 99.*update"):
        train(stopped)


def test_a_damaged_state_is_passed_over_for_the_one_before(stopped):
    newest = states(Path(stopped.out) / "state")[0]
    os.truncate(newest, newest.stat().st_size // 2)
    with pytest.raises(InputError, match="not a complete run state"):
        read_state(newest)
    assert train(stopped).steps == 8


def test_two_runs_into_one_folder_are_kept_apart(pictures, tmp_path):
    config = tiny_config(pictures, tmp_path / "run", **VIT)
    child = CONTEXT.Process(target=_hold, args=(config.out, ready := CONTEXT.Event()))
    child.start()
    try:
        assert ready.wait(30)
        with pytest.raises(InputError, match=rf"in use by process {child.pid} on .*--out"):
            train(config)
    finally:
        child.kill()
        child.join()
    assert train(config).steps == 8, "the lock of a dead process holds nobody up"


def _hold(out: str, ready) -> None:
    with RunFolder(out).locked():
        ready.set()
        signal.pause()


def full_disk(*args, **kwargs) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_while_saving_leaves_the_last_state_and_says_so(stopped, monkeypatch):
    before = {p: p.read_bytes() for p in states(Path(stopped.out) / "state")}
    with monkeypatch.context() as patch:
        patch.setattr(state_module, "save_file", full_disk)
        with pytest.raises(
            InputError, match=r"No space left.*step-0+\d+\.safetensors is complete.*again"
        ):
            train(stopped)
    assert {p: p.read_bytes() for p in states(Path(stopped.out) / "state")} == before
    assert train(stopped).steps == 8


def test_a_full_disk_while_saving_a_model_leaves_the_old_one(stopped, monkeypatch):
    train(stopped)
    folder = RunFolder(stopped.out)
    best = (folder.path / "best" / "model.safetensors").read_bytes()

    def save() -> None:
        with folder.replacing("best") as new:
            (new / "model.safetensors").write_bytes(b"half")
            full_disk()

    with pytest.raises(OSError, match="space"):
        save()
    assert (folder.path / "best" / "model.safetensors").read_bytes() == best
    assert sorted(p.name for p in folder.path.iterdir() if p.name.startswith(".")) == []


def test_a_disk_that_is_full_from_the_start_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module.os, "write", full_disk)
    with (
        pytest.raises(InputError, match=r"cannot write to the run folder .*run: .*No space left"),
        RunFolder(tmp_path / "run").locked(),
    ):
        pass


def test_a_disk_that_fills_while_a_model_is_written_says_what_is_safe(
    pictures, tmp_path, monkeypatch
):
    monkeypatch.setattr("vitrail.weights.files.save_file", full_disk)
    config = tiny_config(pictures, tmp_path / "run", **VIT, epochs=1)
    with pytest.raises(InputError, match=r"No space left.*no state was saved yet; free some space"):
        train(config)


@pytest.mark.parametrize("moment", ["new written", "old moved away", "new in place"])
def test_a_crash_while_a_model_is_replaced_leaves_a_whole_one(tmp_path, moment):
    folder = RunFolder(tmp_path)
    place, old, new = tmp_path / "best", tmp_path / ".best.old", tmp_path / ".best.new"
    for path, text in ((place, "old"), (new, "new")):
        path.mkdir()
        (path / "model").write_text(text)
    if moment != "new written":
        place.rename(old)
    if moment == "new in place":
        new.rename(place)
    with folder.locked():
        pass
    assert (place / "model").read_text() == ("new" if moment == "new in place" else "old")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "lock"]


def test_a_run_among_the_class_folders_is_refused_before_it_stands_there(tmp_path, monkeypatch):
    data = make_pictures(tmp_path / "data")
    before = sorted(data.rglob("*"))
    with pytest.raises(InputError, match=r"run folder .*runs/x lies in the data .*--out elsewhere"):
        train(tiny_config(data, data / "runs" / "x", **VIT))
    monkeypatch.chdir(data)
    with pytest.raises(InputError, match="lies in the data"):
        train(TrainConfig(data="."))
    assert sorted(data.rglob("*")) == before


@pytest.mark.parametrize("wrong", [{"data": "nowhere"}, {"weights": "nowhere"}])
def test_a_start_that_is_refused_leaves_no_folder(pictures, tmp_path, wrong):
    config = tiny_config(pictures, tmp_path / "runs" / "x", **VIT)
    with pytest.raises(InputError, match="nowhere"):
        train(replace(config, **wrong))
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").mkdir()
    with pytest.raises(InputError, match="nowhere"):
        train(replace(config, **wrong))
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs"], "what was there stays"


def test_a_lock_that_was_cleared_away_while_it_was_opened_is_taken_anew(tmp_path, monkeypatch):
    """As when another start is refused, and leaves, between the open of this one and its lock."""
    folder, real, opened = RunFolder(tmp_path / "run"), folder_module.fcntl.flock, []

    def flock(lock, how) -> None:
        opened.append(os.fstat(lock.fileno()).st_ino)
        if len(opened) == 1:
            shutil.rmtree(folder.path)
        real(lock, how)

    monkeypatch.setattr(folder_module.fcntl, "flock", flock)
    with folder.locked():
        assert len(opened) == 2
        assert os.stat(folder.path / "lock").st_ino == opened[1]
        with (
            pytest.raises(InputError, match=f"in use by process {os.getpid()} "),
            RunFolder(folder.path).locked(),
        ):
            pass
    assert list(tmp_path.iterdir()) == []


def test_config_yaml_repeats_the_run(stopped):
    assert read_config(Path(stopped.out) / "config.yaml") == stopped


def test_a_row_cut_off_by_a_crash_is_left_out(tmp_path):
    folder = RunFolder(tmp_path)
    folder.add_row({"step": 1})
    with open(folder.metrics, "a") as file:
        file.write('{"step": 2, "lo')
    assert folder.rows() == [{"step": 1}]


def test_windows_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "fcntl", None)
    with (
        pytest.raises(InputError, match=r"Linux and macOS.*Subsystem"),
        RunFolder(tmp_path / "run").locked(),
    ):
        pass
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_an_input_error(pictures, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to the run folder"):
        train(tiny_config(pictures, tmp_path / "file" / "run", **VIT))
    with pytest.raises(
        InputError, match=r"file is a file; a run needs a folder, give another --out"
    ):
        train(tiny_config(pictures, tmp_path / "file", **VIT))
