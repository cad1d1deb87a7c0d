"""Run states: what goes in comes out, and what is damaged is found out before anything of it is used."""

import hashlib
import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tests.damage import flipped, outcomes, zeroed
from tests.train.conftest import VIT, tiny_config
from vitrail.data.opening import open_data
from vitrail.train.build import build_model, resolve
from vitrail.train.config import TrainConfig
from vitrail.train.ema import Ema
from vitrail.train.folder import RunFolder
from vitrail.train.optim import create_optimizer
from vitrail.train.setup import find_state, restored
from vitrail.train.state import (
    Position,
    gather,
    newest_whole,
    read_header,
    read_state,
    restore,
    states,
    write_state,
)
from vitrail.train.trainer import train
from vitrail.weights import digest_of
from vitrail.weights.files import DIGEST
from vitrail_runtime.errors import InputError, NewerVersion

# Every field a value of its own, none of them the default.
AT = Position(7, 2, 3, 420, 12.5, 9, (0.5, 0.25), 0.75, 5, 4, "time limit")
ABOUT = {
    "config": {"lr": 0.1},
    "data": "d" * 64,
    "val": "v" * 64,
    "counts": [24, 12],
    "classes": ["a"],
}


class Parts:
    """A model with running statistics, its optimiser and average after two updates."""

    def __init__(
        self, seed: int, *, width: int = 3, optimizer: str = "adamw", steps: int = 2
    ) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
        self.optimizer = create_optimizer(self.model, TrainConfig(optimizer=optimizer, lr=0.1))
        self.ema = Ema(self.model, 0.5)
        for step in range(steps):
            self.model(torch.randn(5, 2)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.ema.update(self.model, step)

    def everything(self) -> dict[str, torch.Tensor]:
        return gather(self.model, self.optimizer, self.ema)

    def take(self, tensors: dict[str, torch.Tensor]) -> None:
        restore(tensors, self.model, self.optimizer, self.ema)


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.fixture
def state(tmp_path) -> Path:
    return write_state(tmp_path / "state", Parts(0).everything(), AT, ABOUT, keep=2)


def test_all_that_goes_into_a_state_comes_out(state):
    assert state.name == "step-00000007.safetensors"
    position, about = read_header(state)
    assert position == AT
    assert {key: about[key] for key in ABOUT} == ABOUT
    assert equal(read_state(state), Parts(0).everything())
    assert sorted(os.listdir(state.parent)) == [state.name]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_restored_run_makes_the_next_update_of_the_old_one(optimizer):
    old, new = Parts(0, optimizer=optimizer), Parts(1, optimizer=optimizer, steps=0)
    new.take(old.everything())
    assert equal(new.everything(), old.everything())
    slots = {"adamw": {"step", "exp_avg", "exp_avg_sq"}, "sgd": {"momentum_buffer"}}[optimizer]
    for ours, theirs in zip(new.model.parameters(), old.model.parameters(), strict=True):
        assert set(new.optimizer.state[ours]) == slots
        for slot in slots:
            assert torch.equal(new.optimizer.state[ours][slot], old.optimizer.state[theirs][slot])
    for parts in (old, new):
        parts.model(torch.ones(5, 2) * torch.arange(5.0)[:, None]).square().sum().backward()
        parts.optimizer.step()
        parts.ema.update(parts.model, 2)
    assert equal(new.everything(), old.everything())


def test_a_restored_run_shares_no_memory_with_what_it_came_from():
    old, new = Parts(0), Parts(1)
    tensors = {key: value.clone() for key, value in old.everything().items()}
    new.take(tensors)
    new.model(torch.randn(5, 2)).sum().backward()
    new.optimizer.step()
    new.ema.update(new.model, 2)
    assert equal(tensors, old.everything())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("model.0.weight"), "model.0.weight is missing"),
        (lambda t: t.pop("model.1.running_var"), "model.1.running_var is missing"),
        (lambda t: t.pop("ema.2.bias"), "ema.2.bias is missing"),
        (lambda t: t.pop("optimizer.exp_avg_sq.0.bias"), "optimizer.exp_avg_sq.0.bias is missing"),
        (lambda t: t.update({"model.new": torch.ones(1)}), "model.new is not of this run"),
        (lambda t: t.update({"ema.new": torch.ones(1)}), "ema.new is not of this run"),
        (lambda t: t.update({"odd": torch.ones(1)}), "odd is not of this run"),
        (
            lambda t: t.update({"optimizer.exp_avg.new": torch.ones(1)}),
            "optimizer.exp_avg.new is not of this run",
        ),
        (
            lambda t: t.update({"model.0.bias": torch.ones(1)}),  # would be broadcast
            r"model.0.bias is float32 \(1,\) instead of float32 \(3,\)",
        ),
        (
            lambda t: t.update({"ema.0.bias": torch.ones(3, dtype=torch.int64)}),
            r"ema.0.bias is int64 \(3,\) instead of float32 \(3,\)",
        ),
        (
            lambda t: t.update({"optimizer.exp_avg.0.weight": torch.ones(2, 3)}),
            r"optimizer.exp_avg.0.weight is \(2, 3\) instead of \(3, 2\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_anything_is_changed(change, said):
    tensors, other = Parts(0).everything(), Parts(1)
    change(tensors)
    with pytest.raises(InputError, match=rf"not of this model: 1 tensors differ, such as {said}; "):
        other.take(tensors)
    assert equal(other.everything(), Parts(1).everything())


def test_a_run_without_an_average_refuses_one():
    parts = Parts(0)
    with pytest.raises(InputError, match=r"ema\.0\.weight is not of this run"):
        restore(parts.everything(), parts.model, parts.optimizer, None)


def test_the_digest_is_blake2b_over_names_dtypes_shapes_bytes_and_texts():
    state = {
        "b": torch.tensor([[1.5, -2.0]]),
        "a": torch.tensor(7),
        "c": torch.empty(0, 2, dtype=torch.bfloat16),
    }
    whole = hashlib.blake2b(json.dumps({"t": "x", "u": "y"}).encode(), digest_size=16)
    for name, dtype, shape, value in (
        ("a", "torch.int64", [], (7).to_bytes(8, "little")),
        ("b", "torch.float32", [1, 2], bytes.fromhex("0000c03f000000c0")),
        ("c", "torch.bfloat16", [0, 2], b""),
    ):
        about = json.dumps([name, dtype, shape]).encode()
        whole.update(hashlib.blake2b(about + value, digest_size=16).digest())
    assert digest_of(state, {"u": "y", "t": "x"}) == whole.hexdigest()


def rewrite(path: Path, *, signed: bool = True, tensors=None, **changes) -> None:
    """The state with other fields in its header; None takes one out. Signed: with a digest that fits."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["vitrail"]) | changes
    tensors = load_file(path) if tensors is None else tensors
    if signed:
        header["tensors"] = digest_of(tensors)
    texts = {"vitrail": json.dumps({k: v for k, v in header.items() if v is not None})}
    texts[DIGEST] = digest_of({}, texts) if signed else "0" * 32
    save_file(tensors, path, metadata=texts)


def as_of_schema_1(path: Path, **changes) -> None:
    """The state as the first version wrote it, without any digest."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["vitrail"]) | {"schema_version": 1} | changes
    del header["tensors"]
    text = json.dumps({k: v for k, v in header.items() if v is not None})
    save_file(load_file(path), path, metadata={"vitrail": text})


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parent / "nowhere")


def link_loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def folder_in_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def renamed_tensor(path: Path) -> None:
    tensors = load_file(path)
    tensors["model.0.weigth"] = tensors.pop("model.0.weight")
    rewrite(path, signed=False, tensors=tensors)


def one_step_on(path: Path) -> None:
    rewrite(path, signed=False, position=asdict(replace(AT, step=8)))


DAMAGES = {
    "empty": (lambda p: p.write_bytes(b""), "not a complete run state"),
    "text": (lambda p: p.write_text("hello"), "not a complete run state"),
    "half": (lambda p: os.truncate(p, p.stat().st_size // 2), "not a complete run state"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"0"), "not a complete run state"),
    "link to nothing": (link_to_nothing, "no file, or a link to none"),
    "link loop": (link_loop, "not a complete run state"),
    "folder": (folder_in_place, "a folder"),
    "pipe": (pipe, "no file"),
    "other": (lambda p: save_file({"a": torch.ones(1)}, p), "safetensors file of something else"),
    "step": (one_step_on, "header is not as it was written"),
    "renamed tensor": (renamed_tensor, "header is not as it was written"),
    "no schema": (lambda p: rewrite(p, schema_version=None), "lacks 'schema_version'"),
    "no position": (lambda p: rewrite(p, position=None), "lacks 'position'"),
    "no config": (lambda p: rewrite(p, config=None), "lacks 'config'"),
    "no data": (lambda p: rewrite(p, data=None), "lacks 'data'"),
    "no classes": (lambda p: rewrite(p, classes=None), "lacks 'classes'"),
    "old, no position": (lambda p: as_of_schema_1(p, position=None), "lacks 'position'"),
    "old, no config": (lambda p: as_of_schema_1(p, config=None), "lacks 'config'"),
    "newer, unsigned": (lambda p: rewrite(p, signed=False, schema_version=3), "not as it was"),
}


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_state_is_a_message_that_names_it(state, damage, said):
    damage(state)
    for read in (read_header, read_state):
        with pytest.raises(InputError, match=said) as caught:
            read(state)
        assert str(state) in str(caught.value)


def test_a_header_that_is_right_does_not_vouch_for_the_tensors(state):
    tensors = load_file(state)
    tensors["optimizer.exp_avg.0.bias"][1] += 1e-7
    with safe_open(state, framework="pt") as file:
        texts = file.metadata()
    save_file(tensors, state, metadata=texts)
    assert read_header(state)[0] == AT
    with pytest.raises(InputError, match="its tensors are not those that were written"):
        read_state(state)


def test_a_state_of_a_newer_version_says_so(state):
    rewrite(state, schema_version=3)
    with pytest.raises(NewerVersion, match=r"newer vitrail \(state schema 3, this one reads 2\)"):
        read_header(state)


def test_a_state_under_another_ones_name_is_refused(state):
    state.rename(state.with_name("step-00000008.safetensors"))
    with pytest.raises(InputError, match="holds update 7 under the name of another"):
        read_header(state.with_name("step-00000008.safetensors"))


def test_a_state_that_may_not_be_read_is_named(state, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("vitrail.train.state.safe_open", refuse)
    with pytest.raises(InputError, match=r"step-0+7\.safetensors is not .*Permission denied"):
        read_state(state)


def write_at(folder: Path, step: int, keep: int = 2) -> Path:
    return write_state(folder, {"a": torch.ones(1)}, Position(step=step), ABOUT, keep=keep)


def steps(folder: Path) -> list[int]:
    return [int(path.stem.removeprefix("step-")) for path in states(folder)]


def test_the_newest_states_are_kept(tmp_path):
    for step in (1, 9, 10, 99_999_999, 100_000_000):
        write_at(tmp_path, step, keep=3)
    assert steps(tmp_path) == [100_000_000, 99_999_999, 10]
    write_at(tmp_path, 100_000_001, keep=1)
    assert steps(tmp_path) == [100_000_001]


def test_what_stands_for_a_later_state_takes_no_real_ones_place(tmp_path):
    (tmp_path / "step-99999999.safetensors").write_text("hello")
    (tmp_path / "step-99999998.safetensors").mkdir()
    (tmp_path / "step-00000000.safetensors").mkdir()
    (tmp_path / "step-latest.safetensors").write_text("hello")
    for step in (1, 2, 3):
        written = write_at(tmp_path, step)
    assert steps(tmp_path) == [99_999_999, 99_999_998, 3, 2, 0]
    assert newest_whole(tmp_path) == written


def test_a_damaged_state_is_not_called_whole(tmp_path):
    assert newest_whole(tmp_path / "none") is None
    first, second = write_at(tmp_path, 1), write_at(tmp_path, 2)
    os.truncate(second, 100)
    assert newest_whole(tmp_path) == first
    os.truncate(first, 100)
    assert newest_whole(tmp_path) is None
    assert newest_whole(first) is None


@pytest.mark.parametrize("kind", ["file", "link", "closed"])
def test_a_folder_of_states_that_cannot_be_listed_is_named(tmp_path, monkeypatch, kind):
    place = tmp_path / "state"
    if kind == "file":
        place.write_text("")
    elif kind == "link":
        place.symlink_to(tmp_path / "nowhere")
    else:
        place.mkdir()
        monkeypatch.setattr(os, "listdir", lambda path: os.open(path, os.O_WRONLY))
    with pytest.raises(InputError, match=r"state is .*move it away"):
        states(place)


# --- every block, and many bits ------------------------------------------------------------------


def test_no_zeroed_block_and_no_flipped_bit_of_a_state_passes_for_what_was_written(tmp_path):
    everything = Parts(0, width=500).everything()
    state = write_state(tmp_path, everything, AT, ABOUT, keep=2)
    whole = state.read_bytes()

    def read() -> bool:
        position, about = read_header(state)
        same = position == AT and {key: about[key] for key in ABOUT} == ABOUT
        return equal(read_state(state), everything) and same

    zeros = outcomes(state, zeroed(whole), read)
    flips = outcomes(state, flipped(whole, 300), read)  # a thousand in the slow test below
    print(f"{len(whole)} bytes, {zeros.total()} blocks zeroed: {dict(zeros)}; flips: {dict(flips)}")
    assert zeros.total() == -(-len(whole) // 4096) > 10
    assert flips.total() == 300
    for count in (zeros, flips):
        assert count["silent"] == count["traceback"] == 0
    assert zeros["refused"] == zeros.total()
    assert flips["refused"] > 290
    assert read()


# --- which state a run goes on from -------------------------------------------------------------


class Standing:
    """A run folder with three states of a model, as `train` writes them, and what `find_state` looks at."""

    def __init__(self, pictures: Path, out: Path) -> None:
        self.config = tiny_config(
            pictures, out, **VIT, ema=0.9, save_every=0.0, keep=3, max_steps=3
        )
        self.folder = RunFolder(out)
        train(self.config)
        self.data = [open_data(pictures, split) for split in ("train", "val")]
        self.states = states(self.folder.state)

    def find(self, **changes) -> tuple[Path | None, list[str]]:
        config = resolve(replace(self.config, **changes))
        return find_state(config, self.folder, *self.data)

    def resume(self) -> tuple[list[str], Position, dict[str, torch.Tensor]]:
        """What was said; and where the run stands, with all its tensors, after it was brought back."""
        path, notes = self.find()
        torch.manual_seed(1)
        model = build_model(self.config, self.data[0].classes)
        optimizer, ema = create_optimizer(model, self.config), Ema(model, 0.9)
        position = restored(path, model, optimizer, ema)
        return notes, position, gather(model, optimizer, ema)


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory) -> Standing:
    return Standing(pictures, tmp_path_factory.mktemp("standing") / "run")


@pytest.fixture
def standing(finished):
    contents = {path: path.read_bytes() for path in finished.states}
    yield finished
    for path, content in contents.items():
        path.unlink(missing_ok=True)
        path.write_bytes(content)


def test_the_newest_whole_state_is_taken_and_the_damaged_ones_are_named(standing):
    newest, middle, oldest = standing.states
    assert [path.name[5:13] for path in standing.states] == ["00000003", "00000002", "00000001"]
    assert standing.find() == (newest, [])
    foreign = newest.with_name("step-99999999.safetensors")
    foreign.write_text("hello")
    found, notes = standing.find()
    foreign.unlink()
    assert found == newest
    assert len(notes) == 2
    assert str(foreign) in notes[0]
    assert notes[1] == f"going on from the state before, {newest}"
    os.truncate(newest, 5000)
    content = bytearray(middle.read_bytes())
    content[-1] ^= 1
    middle.write_bytes(content)
    notes, position, _ = standing.resume()
    assert position.step == 1
    assert [str(path) in note for path, note in zip((newest, middle, oldest), notes, strict=True)]
    os.truncate(oldest, 0)
    with pytest.raises(InputError, match=r"no whole state is left in .*copy.*start over") as caught:
        standing.find()
    assert all(str(path) in str(caught.value) for path in standing.states)


def test_a_newer_vitrails_state_is_not_passed_over(standing):
    rewrite(standing.states[0], schema_version=3)
    with pytest.raises(NewerVersion, match="update vitrail"):
        standing.find()


def test_a_state_of_the_first_schema_is_taken_with_a_word(standing):
    as_of_schema_1(standing.states[0])
    notes, position, _ = standing.resume()
    assert position.step == 3
    assert len(notes) == 1
    assert "older vitrail and carries no digest" in notes[0]


def test_a_state_of_settings_that_this_version_lacks_is_another_run(standing):
    with safe_open(standing.states[0], framework="pt") as file:
        config = json.loads(file.metadata()["vitrail"])["config"]
    rewrite(standing.states[0], config=config | {"larning_rate": 1})
    with pytest.raises(InputError, match=r"'larning_rate'.*another version of vitrail"):
        standing.find()


def test_a_state_whose_tensors_are_not_the_models_is_named(standing):
    tensors = load_file(standing.states[0])
    tensors["model.head.renamed"] = tensors.pop("model.backbone.pos_embed")
    rewrite(standing.states[0], tensors=tensors)
    with pytest.raises(InputError, match=r"step-0+3.*model.backbone.pos_embed is missing"):
        standing.resume()


def test_the_way_back_to_a_run_is_its_config_only_where_that_is_still_its_own(standing):
    with pytest.raises(
        InputError, match=r"lr: 0\.001 there, 0\.5 now\n.*, --config .*config\.yaml;"
    ):
        standing.find(lr=0.5)
    text = standing.folder.config.read_text()
    standing.folder.config.write_text(text.replace("lr: 0.001", "lr: 0.5"))
    with pytest.raises(
        InputError, match=r"these settings as they are there \(.*no longer that run's"
    ):
        standing.find(lr=0.5)
    standing.folder.config.write_text(text)


@pytest.mark.slow
def test_a_run_with_any_block_zeroed_or_bit_flipped_goes_on_from_what_was_written(standing):
    newest, middle, _ = standing.states
    written = {path: (read_header(path)[0], read_state(path)) for path in (newest, middle)}
    whole = newest.read_bytes()
    taken = []

    def resume() -> bool:
        notes, position, tensors = standing.resume()
        fell_back = position.step == 2
        taken.append(fell_back)
        if fell_back and not (str(newest) in notes[0] and str(middle) in notes[1]):
            return False  # without a word
        there, theirs = written[middle if fell_back else newest]
        return position == there and equal(tensors, theirs) and bool(notes) == fell_back

    for what, damaged in (
        ("blocks of 4 KiB zeroed", zeroed(whole)),
        ("bits flipped", flipped(whole, 1000)),
        ("bits of the header flipped", flipped(whole, 1000, seed=1, header=1.0)),
    ):
        taken.clear()
        count = outcomes(newest, damaged, resume)
        print(
            f"{len(whole)} bytes, {count.total()} {what}: {taken.count(True)} went on from the state before "
            f"with a word, {taken.count(False)} from the damaged one with what was written, "
            f"silent {count['silent']}, traceback {count['traceback']}"
        )
        assert count["equal"] == count.total() == len(taken)


def test_a_state_is_on_the_disk_before_it_has_its_name_and_then_the_name_is(tmp_path, monkeypatch):
    done, opened = [], {}
    real_open, real_replace, real_close = os.open, os.replace, os.close

    def open_named(path, *how):
        descriptor = real_open(path, *how)
        opened[descriptor] = Path(path).name
        return descriptor

    def close(descriptor):
        done.append(f"close {opened.pop(descriptor)}")
        real_close(descriptor)

    def replace_named(source, target):
        done.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "open", open_named)
    monkeypatch.setattr(os, "close", close)
    monkeypatch.setattr(os, "replace", replace_named)
    monkeypatch.setattr(os, "fsync", lambda d: done.append(f"flush {opened[d]}"))
    folder = tmp_path / "run" / "state"
    write_state(folder, {"model.x": torch.zeros(1)}, Position(step=3), ABOUT, keep=1)
    part = "step-00000003.partial"
    assert done == [f"flush {part}", f"close {part}", "rename", "flush state", "close state"]
    assert [p.name for p in folder.iterdir()] == ["step-00000003.safetensors"]
