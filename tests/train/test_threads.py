"""How many math threads a run takes: by what a trial measured, and the same after a stop."""

from unittest.mock import ANY

import pytest
import torch

from tests.train.conftest import tiny_config
from vitrail.train import ranks, threads
from vitrail.train.config import TrainConfig
from vitrail.train.state import read_header, read_state, states
from vitrail.train.trainer import train


class Cores:
    """Four cores, whose speed a test sets. Really, one thread works: others would wait for the machine."""

    def __init__(self) -> None:
        self.seconds = {4: 0.4, 2: 0.3, 1: 0.5}  # of an update with so many threads
        self.now = 1
        self.tried: list[int] = []
        self.shape: tuple[int, ...] = ()

    def seconds_of(self, trial, images, config):
        self.tried.append(self.now)
        self.shape = tuple(images.shape)
        # The first one of each number is slow, as it really is.
        return self.seconds[self.now] + 9 * (self.tried.count(self.now) == 1)


@pytest.fixture
def cores(monkeypatch):
    cores = Cores()
    monkeypatch.setattr(ranks, "cores", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores.now)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: setattr(cores, "now", number))
    monkeypatch.setattr(threads, "seconds_of", cores.seconds_of)
    monkeypatch.setattr(threads, "WORTH_IT", 8)  # the updates of tiny_config
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    return cores


really_try = threads.seconds_of


def threads_of_state(out):
    return read_header(states(out / "state")[0])[1]["threads"]


def test_the_fastest_number_is_taken_told_and_kept_when_the_run_goes_on(
    pictures, tmp_path, cores, capsys
):
    out = tmp_path / "run"
    train(tiny_config(pictures, out))
    assert cores.tried == [4, 2, 1] * 3
    assert cores.shape == (6, 3, 32, 32)
    assert torch.get_num_threads() == threads_of_state(out) == 2
    assert "cpu, 2 threads, 0 workers" in capsys.readouterr().err
    cores.seconds = {4: 0.1, 2: 0.3, 1: 0.5}
    torch.set_num_threads(1)
    train(tiny_config(pictures, out))
    assert len(cores.tried) == 9, "measured again"
    assert torch.get_num_threads() == 2
    train(tiny_config(pictures, out, threads=3))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [({4: 0.1, 2: 0.2, 1: 0.3}, 4), ({4: 9, 2: 3, 1: 1}, 1), ({4: 1, 2: 1, 1: 1}, 4)],
)
def test_a_state_of_more_cores_is_gone_on_with_by_those_there_are(
    pictures, tmp_path, cores, monkeypatch, seconds, chosen
):
    cores.seconds = seconds
    train(tiny_config(pictures, tmp_path))
    assert threads_of_state(tmp_path) == chosen
    monkeypatch.setattr(ranks, "cores", lambda: 2)
    train(tiny_config(pictures, tmp_path))
    assert torch.get_num_threads() == min(chosen, 2)


@pytest.mark.parametrize(
    ("changes", "environment", "expected"),
    [
        ({"threads": 3}, {}, 3),
        ({}, {"OMP_NUM_THREADS": "1"}, 1),  # torch itself reads it, when it is imported
        ({"max_steps": 7}, {}, 4),  # over before a trial would be
        ({"workers": 3}, {}, 1),  # one core is left
    ],
)
def test_nothing_is_tried_where_the_number_is_resolve(
    pictures, tmp_path, cores, monkeypatch, changes, environment, expected
):
    torch.set_num_threads(1)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = tiny_config(pictures, tmp_path, **changes)
    with ranks.processes(config):
        threads.choose_threads(config, ANY, ANY, updates=config.max_steps or 8, saved=None)
        assert torch.get_num_threads() == expected
    assert cores.tried == []


def test_a_trial_changes_neither_the_run_nor_its_random_draws(
    pictures, tmp_path, cores, monkeypatch
):
    """The weights are those of a run that was told the number."""
    found = []
    for name, settings in (("tried", {}), ("told", {"threads": 2})):
        monkeypatch.setattr(threads, "seconds_of", really_try)
        config = tiny_config(pictures, tmp_path / name, ema=0.9, **settings)
        train(config)
        found.append(read_state(states(tmp_path / name / "state")[0]))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_timed_is_an_update_in_the_precision_of_the_run(monkeypatch, precision):
    seen = []

    class Trial(torch.nn.Linear):
        def forward(self, images):
            seen.append(super().forward(images).dtype)
            return super().forward(images)

        def forward_tensors(self, images):
            return {"logits": self(images)}

        def zero_grad(self):
            seen.append(float(self.weight.grad.abs().sum()) > 0)

    clock = iter((10.0, 12.5))
    monkeypatch.setattr(threads.time, "perf_counter", lambda: next(clock))
    config = TrainConfig(precision=precision)
    assert threads.seconds_of(Trial(4, 3), torch.rand(2, 4), config) == 2.5
    assert seen == [torch.bfloat16 if precision == "bf16" else torch.float32, True]


def test_a_trial_takes_the_share_of_a_batch_that_is_computed_at_once(cores, pictures, tmp_path):
    train(tiny_config(pictures, tmp_path, accumulate=3))
    assert cores.shape == (2, 3, 32, 32)
