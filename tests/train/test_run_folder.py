"""A run folder is one run's, is never left half-written, and says what is wrong with it."""

import errno
import json
import os
import shutil
import signal
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors import SafetensorError

import vitrail.train.folder as folder_module
import vitrail.train.state as state_module
from tests.train.children import CONTEXT, run
from tests.train.conftest import CLASSES, VIT, make_pictures, tiny_config
from vitrail import models
from vitrail.cli import main
from vitrail.cli.train import model_to_show
from vitrail.train import loop
from vitrail.train.build import resolve
from vitrail.train.config import TrainConfig, read_config
from vitrail.train.evaluate import evaluate as real_evaluate
from vitrail.train.folder import RunFolder
from vitrail.train.state import read_header, read_state, states
from vitrail.train.trainer import train
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
    said = r"another run.*\n  training images: not the same \(24 there, 27 now\)\n"
    with pytest.raises(InputError, match=said):
        train(replace(stopped, data=str(other)))


def test_other_validation_pictures_are_refused(stopped, tmp_path):
    other = make_pictures(tmp_path / "other")
    name, another = (other / "val" / "left" / f"{i}.png" for i in range(2))
    name.write_bytes(another.read_bytes())
    said = (
        r"another run.*\n  validation images: not the same \(12 as before, but a name, a label or a"
    )
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


def test_a_damaged_state_is_passed_over_for_the_one_before(stopped, capsys):
    newest = states(Path(stopped.out) / "state")[0]
    os.truncate(newest, newest.stat().st_size // 2)
    with pytest.raises(InputError, match="not a complete run state"):
        read_state(newest)
    capsys.readouterr()
    assert train(stopped).steps == 8
    said = capsys.readouterr().err.splitlines()
    assert f"{newest} is not a complete run state" in said[-5]
    assert said[-4].startswith("going on from the state before, ")
    assert said[-3].startswith("going on at update ")


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


def test_a_lock_stays_where_it_is_and_names_its_holder_alone(tmp_path):
    """Taken away, it would let two others in: one that has opened it, one that makes it anew."""
    folder = RunFolder(tmp_path / "run")
    lock = folder.path / "lock"
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    folder.path.mkdir()
    lock.write_text(
        "a long time ago it was held by another process, whose name was longer than ours"
    )
    for _ in range(2):
        with folder.locked():
            assert lock.read_text() == holder
        assert lock.exists(), "in a folder that was there before"
    new = RunFolder(tmp_path / "new")
    with new.locked():
        new.add_row({"step": 1})
    assert (new.path / "lock").exists(), "where a run has begun"


def test_half_written_states_are_cleared_away(tmp_path):
    folder = RunFolder(tmp_path)
    folder.state.mkdir()
    (folder.state / "step-00000002.partial").write_text("half")
    (folder.state / "step-00000001.safetensors").write_text("whole")
    with folder.locked():
        assert [p.name for p in folder.state.iterdir()] == ["step-00000001.safetensors"]


@pytest.mark.parametrize(
    ("error", "todo"),
    [
        (OSError(errno.ENOSPC, "the disk is full"), "free some space"),
        (SafetensorError("No Space left on device"), "free some space"),
        (PermissionError(errno.EACCES, "not allowed"), "put it right"),
    ],
)
def test_a_write_that_fails_says_what_to_do(tmp_path, error, todo):
    folder = RunFolder(tmp_path)
    with pytest.raises(InputError) as told, folder_module.explained(folder):
        raise error
    rest = f"; no state was saved yet; {todo} and give the same command again"
    assert str(told.value) == f"cannot write to {tmp_path}: {error}{rest}"
    with pytest.raises(InputError) as told, folder_module.explained(folder):
        raise InputError("it cannot be written") from error
    assert str(told.value).startswith(f"cannot write to {tmp_path}: it cannot be written; no state")


def test_a_mistake_that_is_not_of_writing_passes_as_it_is(tmp_path):
    mistake = InputError("another one")
    with pytest.raises(InputError) as told, folder_module.explained(RunFolder(tmp_path)):
        raise mistake from ValueError()
    assert told.value is mistake


def test_models_are_those_that_are_there(tmp_path):
    for name in ("last", "best", "epoch-0002", "empty"):
        (tmp_path / name).mkdir()
        if name != "empty":
            (tmp_path / name / "model.safetensors").write_text("")
    folder = RunFolder(tmp_path)
    assert folder.models() == ["best", "epoch-0002", "last"]
    assert folder.has("best")
    assert not folder.has("empty")


def test_config_yaml_repeats_the_run(stopped):
    assert read_config(Path(stopped.out) / "config.yaml") == resolve(stopped)


def test_a_row_cut_off_by_a_crash_is_left_out(tmp_path):
    folder = RunFolder(tmp_path)
    folder.add_row({"step": 1})
    with open(folder.metrics, "a") as file:
        file.write('{"step": 2, "lo')
    assert folder.rows() == [{"step": 1}]


def test_rows_after_the_state_are_forgotten_and_damaged_ones_are_told(tmp_path):
    folder = RunFolder(tmp_path)
    assert folder.keep_rows(0) == (0, [])
    for step in range(5):
        folder.add_row({"step": step})
    assert folder.keep_rows(4) == (4, [])
    assert folder.rows() == [{"step": step} for step in range(4)]
    lines = folder.metrics.read_bytes().splitlines()
    for damage in (bytes(len(lines[1])), b"\xff" + lines[1], b"[1]"):
        folder.metrics.write_bytes(b"\n".join([lines[0], damage, *lines[2:]]) + b"\n")
        assert [row["step"] for row in folder.rows()] == [0, 2, 3]
    kept, (said,) = folder.keep_rows(3)
    assert kept == 2
    assert "metrics.jsonl has 2 of the 3 rows that it had" in said
    assert folder.rows() == [{"step": 0}, {"step": 2}]
    folder.metrics.unlink()
    kept, (said,) = folder.keep_rows(2)
    assert kept == 0
    assert "has 0 of the 2 rows" in said
    folder.metrics.unlink()
    folder.metrics.mkdir()
    with pytest.raises(InputError, match=r"metrics\.jsonl cannot be read: Is a directory"):
        folder.keep_rows(1)


def damaged_place(path: Path, how: str) -> None:
    if how == "gone":
        path.unlink() if path.is_file() else shutil.rmtree(path)
    elif how == "zeroed":
        path.write_bytes(bytes(100))
    elif how == "a file":
        shutil.rmtree(path)
        path.write_text("hello")
    elif how == "a link":
        shutil.move(path, path.with_name("elsewhere"))
        path.symlink_to("elsewhere")
    elif how == "a link to nothing":
        shutil.rmtree(path)
        path.symlink_to("nowhere")


def test_a_config_that_is_gone_or_damaged_is_written_anew(stopped, capsys):
    place = Path(stopped.out) / "config.yaml"
    damaged_place(place, "zeroed")
    capsys.readouterr()
    assert train(replace(stopped, workers=0)).steps == 8
    assert "config.yaml was not that of this run any more" in capsys.readouterr().err
    assert read_config(place) == resolve(replace(stopped, workers=0))
    train(stopped)
    assert "config.yaml" not in capsys.readouterr().err
    assert read_config(place).workers == 0, "one that is whole stays"


def during(monkeypatch, step: int, act) -> None:
    """Do something to the run folder after so many updates."""
    real = loop.update

    def update(run, *args) -> int:
        asked = real(run, *args)
        if run.at.step == step:
            act(run)
        return asked

    monkeypatch.setattr(loop, "update", update)


def test_files_deleted_while_a_run_goes_are_written_anew(pictures, tmp_path, monkeypatch, capsys):
    config = tiny_config(pictures, tmp_path / "run", **VIT, save_every=0.0, log_every=1)

    def delete(run) -> None:
        for place in (run.folder.metrics, run.folder.config, run.folder.path / "last"):
            damaged_place(place, "gone")

    during(monkeypatch, 5, delete)
    assert train(config).steps == 8
    assert "metrics.jsonl is gone; a new one begins here" in capsys.readouterr().err
    folder = RunFolder(config.out)
    assert [row["step"] for row in folder.rows()] == [5, 6, 7, 8, 8]
    assert folder.config_is(resolve(config))
    assert models.load(folder.path / "last").classes == CLASSES
    with monkeypatch.context() as patch:  # a finished run: nothing is left to do
        patch.setattr(loop, "update", None)
        train(config)
    said = capsys.readouterr().err
    assert "metrics.jsonl has 5 of the 10 rows that it had" in said


class Scores:
    """Evaluations that give these scores, one after another."""

    def __init__(self, monkeypatch, *top1: float) -> None:
        self.left = list(top1)

        def evaluate(*args, **kwargs):
            scores = real_evaluate(*args, **kwargs)
            return replace(scores, values=scores.values | {"top1": self.left.pop(0)})

        monkeypatch.setattr(loop, "evaluate", evaluate)


@pytest.mark.parametrize("how", ["gone", "a file", "a link to nothing"])
def test_a_best_model_deleted_while_a_run_goes_is_the_best_of_those_to_come(
    pictures, tmp_path, monkeypatch, capsys, how
):
    config = tiny_config(pictures, tmp_path / "run", **VIT, epochs=5, early_stopping=3)
    best = tmp_path / "run" / "best"
    Scores(monkeypatch, 0.9, 0.2, 0.5, 0.6, 0.4)
    during(monkeypatch, 6, lambda run: damaged_place(best, how))  # of 4 an epoch
    result = train(config)
    said = capsys.readouterr().err
    assert said.count(f"{best}, of top-1 0.9000, is gone: the best model from here on") == 1
    assert (result.steps, result.best) == (20, 0.6)
    assert json.loads((best / "metrics.json").read_text())["top1"] == 0.6
    rows = [(row["top1"], row["best"]) for row in RunFolder(config.out).rows() if "top1" in row]
    assert rows == [(0.9, 0.9), (0.2, 0.2), (0.5, 0.5), (0.6, 0.6), (0.4, 0.6)]
    assert sorted(p.name for p in best.parent.iterdir() if p.name.startswith(".")) == []


def test_the_best_score_and_what_came_since_outlive_a_stop(pictures, tmp_path, monkeypatch):
    config = tiny_config(pictures, tmp_path / "run", **VIT, epochs=5, early_stopping=2, keep=9)
    config = replace(config, save_every=0.0)
    Scores(monkeypatch, 0.5, 0.7, 0.6, 0.65)
    assert train(config).reason == "no better score in 2 evaluations"
    for path in states(tmp_path / "run" / "state"):
        if read_header(path)[0].step > 13:
            path.unlink()  # as if stopped after the third evaluation
    Scores(monkeypatch, 0.7)
    result = train(config)
    assert result.reason == "no better score in 2 evaluations"
    assert (result.steps, result.best) == (16, 0.7)
    position = read_header(states(tmp_path / "run" / "state")[0])[0]
    assert (position.best, position.best_step, position.stale) == (0.7, 8, 2)


@pytest.mark.parametrize("how", ["a file", "a link", "a link to nothing"])
def test_what_stands_in_a_models_place_is_replaced_and_leaves_nothing_behind(tmp_path, how):
    folder, place = RunFolder(tmp_path), tmp_path / "best"
    place.mkdir()
    damaged_place(place, how)
    (tmp_path / ".best.new").write_text("in the way")
    (tmp_path / ".best.old").symlink_to("nowhere")
    with folder.replacing("best") as new:
        (new / "model").write_text("new")
    assert (place / "model").read_text() == "new"
    assert not place.is_symlink()
    elsewhere = ["elsewhere"] * (how == "a link")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best", *elsewhere]


def test_leftovers_that_are_no_folders_are_cleared_away(tmp_path):
    (tmp_path / "best").mkdir()
    (tmp_path / ".best.old").write_text("x")
    (tmp_path / ".last.new").symlink_to("nowhere")
    (tmp_path / ".last.old").symlink_to("best")
    with RunFolder(tmp_path).locked():
        assert sorted(p.name for p in tmp_path.iterdir()) == ["best", "last", "lock"]


def test_a_file_in_place_of_the_states_is_told_before_the_run_begins(pictures, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state").write_text("")
    with pytest.raises(InputError, match=r"state is not a folder .*move it away"):
        train(tiny_config(pictures, tmp_path / "run", **VIT))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_the_command_shows_the_last_model_where_the_best_is_gone(pictures, tmp_path, capsys):
    config = tiny_config(pictures, tmp_path / "run", **VIT, epochs=1)
    train(config)
    command = ["train", "--config", str(tmp_path / "run" / "config.yaml")]
    best, last = tmp_path / "run" / "best", tmp_path / "run" / "last"
    content = bytearray((best / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (best / "model.safetensors").write_bytes(content)
    assert main(command) == 0
    said = capsys.readouterr()
    assert (
        "model.safetensors is damaged: its digest is not that of what was written; copy it again; the report "
        f"is about {last}\n" in said.err
    )
    assert said.out == f"the last model, instead of the best one: {last}\n"
    shutil.rmtree(best)
    assert model_to_show(best.parent) == "last"
    said = capsys.readouterr().err
    assert "a training run without its best/; what is there: last; give" in said
    shutil.rmtree(last)
    gone = (
        r"best is not a saved model \(no such folder, a finished training run whose models are gone"
    )
    with pytest.raises(InputError, match=gone):
        model_to_show(best.parent)


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
