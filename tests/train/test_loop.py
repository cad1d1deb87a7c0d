"""When a run logs, evaluates, saves, keeps and stops, and what its rows say: scores and clock are given."""

import json
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from tests.train.conftest import TINY, VIT, tiny_config
from vitrail.data.batch import Dense, Padded
from vitrail.train import loop
from vitrail.train.build import build_model
from vitrail.train.config import TrainConfig
from vitrail.train.evaluate import evaluate
from vitrail.train.folder import RunFolder
from vitrail.train.interrupt import Interrupt
from vitrail.train.ranks import SharedError
from vitrail.train.replay import NAME, batch_of, flat, nested, replay, some
from vitrail.train.run import Run
from vitrail.train.state import read_header, states
from vitrail.train.trainer import failures_told, train
from vitrail.weights.files import read_metadata, read_safetensors, write_state
from vitrail_runtime.errors import InputError


def rows(out: Path, kind: str) -> list[dict[str, Any]]:
    return [row for row in RunFolder(out).rows() if row["kind"] == kind]


def position(out: Path):
    return read_header(states(out / "state")[0])[0]


def scored(monkeypatch, best: list[float], name: str = "top1") -> list[dict[str, Any]]:
    """Let the evaluations of a run give these scores; what each was asked for, as it comes."""
    asked = []

    def evaluate_as_told(model, data, **how):
        asked.append(how | {"split": data.split})
        scores = evaluate(model, data, **how)
        return replace(scores, values=scores.values | {name: best[len(asked) - 1]})

    monkeypatch.setattr(loop, "evaluate", evaluate_as_told)
    return asked


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """Every update takes six seconds, and nothing else takes any."""
    now, real = [1000.0], loop.update

    def update(*args) -> int:
        now[0] += 6
        return real(*args)

    monkeypatch.setattr(loop, "update", update)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def ten_updates(data: Path, out: Path, settings: dict[str, Any], **changes: Any) -> TrainConfig:
    return tiny_config(data, out, **settings, batch_size=12, epochs=5, **changes)


@pytest.fixture(scope="module")
def each(pictures, tmp_path_factory) -> list[dict[str, Any]]:
    """The rows of a run of ten updates, one by one."""
    out = tmp_path_factory.mktemp("each") / "run"
    train(ten_updates(pictures, out, VIT, log_every=1))
    return rows(out, "train")


def test_best_is_the_first_of_the_highest_scores_and_last_the_newest(
    tiny, examples, tmp_path, monkeypatch, capsys
):
    train(ten_updates(examples, tmp_path / "each", tiny.settings, log_every=1))
    capsys.readouterr()
    each, out = rows(tmp_path / "each", "train"), tmp_path / "run"
    scores = [0.2, 0.5, 0.5, 0.4, 0.6]
    asked = scored(monkeypatch, scores, tiny.headline)
    config = ten_updates(examples, out, tiny.settings, log_every=3, keep_every=2)
    result = train(config)
    assert (result.reason, result.steps, result.best, result.signal) == ("all epochs", 10, 0.6, 0)
    shown = f"  {result.shown} "
    said = [line for line in capsys.readouterr().err.splitlines() if shown in line]
    assert [line.endswith("(best)") for line in said] == [True, True, False, False, True]
    evaluated = rows(out, "eval")
    assert [row["best"] for row in evaluated] == [0.2, 0.5, 0.5, 0.5, 0.6]
    assert [row[tiny.headline] for row in evaluated] == scores
    assert [(row["epoch"], row["step"], row["images"]) for row in evaluated] == [
        (e, 2 * e, 24 * e) for e in range(1, 6)
    ]
    at = position(out)
    assert (at.best, at.best_step, at.stale, at.finished) == (0.6, 10, 0, "all epochs")
    assert (at.epoch, at.batch, at.rows, at.images) == (5, 0, 3 + 5, 120)
    assert sorted(p.name for p in out.glob("epoch-*")) == ["epoch-0002", "epoch-0004"]
    told = {"batch_size": 12, "workers": 0, "rank": 0, "world": 1, "predictions": True}
    assert asked == [told | {"split": "val"}] * 5
    trained = rows(out, "train")
    assert [row["step"] for row in trained] == [3, 6, 9]
    assert [row["epoch"] for row in trained] == [1, 2, 4], "epochs that are over"
    for i, row in enumerate(trained):
        mean = sum(r["loss"] for r in each[3 * i : 3 * i + 3]) / 3
        assert row["loss"] == pytest.approx(mean, rel=1e-12)
        assert row["lr"] == each[3 * i + 2]["lr"]
        assert row["grad_norm"] == each[3 * i + 2]["grad_norm"]
    assert at.losses == (each[9]["loss"],), "since the last row"


@pytest.mark.parametrize(
    ("scores", "evaluations"),
    [([0.5, 0.5, 0.4], 3), ([0.2, 0.1, 0.3, 0.3, 0.2], 5), ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 6)],
)
def test_early_stopping_counts_evaluations_since_the_best(
    tiny, examples, tmp_path, monkeypatch, scores, evaluations
):
    out = tmp_path / "run"
    scored(monkeypatch, scores, tiny.headline)
    how = {"batch_size": 24, "epochs": 6, "early_stopping": 2}
    config = tiny_config(examples, out, **tiny.settings, **how)
    result = train(config)
    assert len(rows(out, "eval")) == evaluations == result.steps
    stopped = "no better score in 2 evaluations"
    assert result.reason == ("all epochs" if evaluations == 6 else stopped)
    assert result.best == max(scores)
    assert position(out).best_step == 1 + scores.index(max(scores))


def test_a_run_that_ends_by_itself_is_not_said_to_be_stopped_early(pictures, tmp_path, monkeypatch):
    scored(monkeypatch, [0.5, 0.4, 0.3])
    config = tiny_config(
        pictures, tmp_path / "run", **VIT, batch_size=24, epochs=3, early_stopping=2
    )
    assert train(config).reason == "all epochs"


@pytest.mark.parametrize(
    ("changes", "epochs", "kept"),
    [
        ({"epochs": 5, "eval_every": 2, "keep_every": 4}, [2, 4, 5], ["epoch-0004"]),
        ({"epochs": 3, "max_steps": 3, "keep_every": 1}, [1, 1], ["epoch-0001"]),
        ({"epochs": 3, "max_steps": 1, "keep_every": 1}, [0], []),
        ({"epochs": 2, "max_steps": 99, "eval_every": 3}, [2], []),
    ],
    ids=str,
)
def test_evaluations_stand_at_the_ends_of_epochs_and_of_the_run(
    pictures, tmp_path, changes, epochs, kept
):
    out = tmp_path / "run"
    result = train(tiny_config(pictures, out, **VIT, batch_size=12, **changes))
    assert [row["epoch"] for row in rows(out, "eval")] == epochs
    assert sorted(p.name for p in out.glob("epoch-*")) == kept
    assert result.reason == ("all steps" if "max_steps" in changes else "all epochs")
    assert result.steps == min(changes.get("max_steps", 99), 2 * changes["epochs"])


def test_a_time_limit_ends_the_run_and_its_schedule(pictures, tmp_path, clock):
    out = tmp_path / "run"
    settings = {"lr": 0.5, "min_lr": 0.1, "warmup_epochs": 1.0, "warmup_lr": 0.0, "log_every": 1}
    config = tiny_config(pictures, out, **VIT, epochs=10, max_minutes=1.0, **settings)
    result = train(config)
    assert (result.reason, result.steps, result.seconds) == ("time limit", 10, 60.0)
    trained = rows(out, "train")
    assert [row["seconds"] for row in trained] == [6.0 * k for k in range(1, 11)]
    rates = [0.0, 0.125, 0.25, 0.375]  # four updates of warm-up, a tenth of forty
    for k in range(4, 10):  # when k tenths of the time are over
        turned = math.pi * (k / 10 - 0.1) / 0.9
        rates.append(0.1 + 0.4 * (1 + math.cos(turned)) / 2)
    assert [row["lr"] for row in trained] == pytest.approx(rates)


def test_a_person_sees_where_the_run_stands(pictures, tmp_path, clock, capsys, each):
    config = tiny_config(pictures, tmp_path / "run", **VIT, batch_size=12, epochs=5, log_every=1)
    train(config)
    said = [line for line in capsys.readouterr().err.splitlines() if " left" in line]
    assert said == [  # every fifteen seconds, of updates of six
        f"epoch {epoch}/5  step {step}/10  loss {each[step - 1]['loss']:.3f}  2 images/s  {left} left"
        for epoch, step, left in ((2, 3, "?"), (3, 6, "0:24"), (5, 9, "0:06"))
    ]
    assert [row["images_per_second"] for row in rows(tmp_path / "run", "train")] == [2.0] * 10


def test_a_stop_behind_the_last_update_of_an_epoch_leaves_its_evaluation_to_the_next_start(
    pictures, tmp_path, monkeypatch
):
    config = tiny_config(pictures, tmp_path / "run", **VIT, epochs=2)
    real = loop.update

    def update(run, *args) -> int:
        return real(run, *args) or (signal.SIGTERM if run.at.step == 4 else 0)

    with monkeypatch.context() as once:
        once.setattr(loop, "update", update)
        assert train(config).steps == 4
    at = position(tmp_path / "run")
    assert (at.epoch, at.batch, at.finished) == (0, 4, "")
    assert rows(tmp_path / "run", "eval") == []
    assert train(config).steps == 8
    assert [row["step"] for row in rows(tmp_path / "run", "eval")] == [4, 8]


def test_an_image_that_cannot_be_read_at_once_leaves_no_state(pictures, tmp_path, monkeypatch):
    def next_batch(run, batches):
        raise SharedError("a.png cannot be read")

    monkeypatch.setattr(loop, "next_batch", next_batch)
    with pytest.raises(InputError, match=r"^a\.png cannot be read$"):
        train(tiny_config(pictures, tmp_path / "run", **VIT))
    assert states(tmp_path / "run" / "state") == []


@pytest.mark.parametrize(
    ("changes", "world", "what", "less"),
    [
        ({}, 1, "6 images of 32 x 32", ", or --grad-checkpointing"),
        ({"batch_size": 1}, 1, "1 image of 32 x 32", ", or --grad-checkpointing"),
        ({"batch_size": 12}, 2, "12 images of 32 x 32 (6 at a time)", ", or --grad-check"),
        ({"batch_size": 12, "accumulate": 3}, 2, "12 images of 32 x 32 (2 at a time)", ", or"),
        ({"image_size": None}, 1, "6 images of the model's own size", ", or --grad-check"),
        ({"grad_checkpointing": True}, 1, "6 images of 32 x 32", ""),
    ],
)
def test_memory_that_runs_out_is_told_with_what_was_asked_for(tmp_path, changes, world, what, less):
    config = tiny_config(tmp_path, tmp_path / "run", **changes)
    with (
        pytest.raises(InputError) as told,
        failures_told(config, RunFolder(config.out), world),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    start = (
        f"not enough memory for an update on {what} (CUDA out of memory.); give a smaller --batch-size, "
        "a larger --accumulate, a smaller --image-size"
    )
    assert str(told.value).startswith(start + less)
    assert less or str(told.value) == start


def test_a_connection_that_breaks_is_another_process_that_ended_where_there_are_others(tmp_path):
    config, folder = tiny_config(tmp_path, tmp_path / "run"), RunFolder(tmp_path / "run")
    with (
        pytest.raises(InputError, match="another process of the run has ended"),
        failures_told(config, folder, 2),
    ):
        raise RuntimeError("Connection closed by peer")
    with pytest.raises(RuntimeError, match="closed by peer"), failures_told(config, folder, 1):
        raise RuntimeError("Connection closed by peer")


@pytest.mark.parametrize(("batch_size", "share"), [(12, 4), (2, 1)])
def test_processes_share_the_batches_of_an_evaluation(monkeypatch, batch_size, share):
    def evaluate_as_asked(model, data, **how):
        assert (model, data) == (run.model, "images")
        assert how == expected
        raise KeyError

    config = tiny_config(Path("x"), Path("x"), batch_size=batch_size)
    expected = {"batch_size": share, "workers": 2, "rank": 1, "world": 3, "predictions": True}
    stand = {"config": config, "at": None, "ema": None, "model": torch.nn.Identity()}
    run: Any = SimpleNamespace(val_data="images", workers=2, rank=1, world=3, **stand)
    monkeypatch.setattr(loop, "evaluate", evaluate_as_asked)
    with pytest.raises(KeyError):
        loop.score(run)


def test_states_are_saved_by_the_clock_and_the_newest_kept(pictures, tmp_path, clock):
    config = tiny_config(pictures, tmp_path / "all", **VIT, save_every=0.3, keep=9, epochs=2)
    train(config)
    saved = [path.name for path in states(tmp_path / "all" / "state")]
    assert saved == [f"step-0000000{n}.safetensors" for n in (8, 6, 3)]
    train(replace(config, out=str(tmp_path / "two"), keep=2))
    assert len(states(tmp_path / "two" / "state")) == 2


def test_training_time_goes_on_where_it_stood(pictures, tmp_path, clock, monkeypatch):
    out = tmp_path / "run"
    config = tiny_config(pictures, out, **VIT, epochs=2, log_every=1, save_every=0.3, keep=9)
    real = loop.update

    def update(run, *args) -> int:
        return real(run, *args) or (signal.SIGTERM if run.at.step == 3 else 0)

    with monkeypatch.context() as once:
        once.setattr(loop, "update", update)
        stopped = train(config)
    assert (stopped.reason, stopped.signal, stopped.steps) == ("SIGTERM", signal.SIGTERM, 3)
    assert stopped.seconds == 18.0
    assert [p.name for p in states(out / "state")] == ["step-00000003.safetensors"]
    clock[0] += 500  # between the two starts
    assert train(config).seconds == 48.0
    saved = [int(path.stem.removeprefix("step-")) for path in states(out / "state")]
    assert saved == [8, 6, 3], "eighteen seconds after the last one, whichever start wrote it"
    assert [row["seconds"] for row in rows(out, "train")] == [6.0 * k for k in range(1, 9)]


def test_a_run_in_a_thread_leaves_signals_alone():
    """Python allows handlers in the main thread alone."""
    with ThreadPoolExecutor(1) as pool:

        def enter() -> object:
            with Interrupt() as interrupt:
                return signal.getsignal(signal.SIGTERM), interrupt.asked

        assert pool.submit(enter).result() == (signal.getsignal(signal.SIGTERM), 0)


def test_a_signal_is_a_wish_and_a_second_one_an_end():
    before = signal.getsignal(signal.SIGTERM)
    with Interrupt() as interrupt:
        assert interrupt.asked == 0
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupt.asked == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_batch_that_gave_no_number_replays_as_it_was_trained(
    tiny, examples, tmp_path, monkeypatch, what
):
    fields = tiny.settings["model_fields"] | {"drop_path_rate": 0.3}
    parts = 1 if tiny is TINY["contrast"] else 2  # whose loss is of whole batches
    how = tiny.settings | {"model_fields": fields, "accumulate": parts, "log_every": 1, "epochs": 1}
    config = tiny_config(examples, tmp_path / "whole", **how)
    train(config)
    out, real = tmp_path / "run", loop.backward

    def backward(run, batch, weight):
        loss = real(run, batch, weight)
        if run.at.step != 2:
            return loss
        if what == "loss":
            return loss * math.nan
        next(run.model.parameters()).grad[0] = math.inf
        return loss

    monkeypatch.setattr(loop, "backward", backward)
    with pytest.raises(InputError, match=r"not finite at step 3 \(epoch 1, batch 3\)"):
        train(replace(config, out=str(out)))
    found = replay(out)
    whole = rows(tmp_path / "whole", "train")[2]
    assert found["step"] == 3
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    assert found["loss_fp32"] == found["loss"]
    assert found["gradient_norm"] == pytest.approx(whole["grad_norm"], rel=1e-5)
    assert (found["weights"], found["images"], found["num_images"]) == ([], [], 6)
    assert [row["step"] for row in rows(out, "train")] == [1, 2]


def test_a_replay_names_the_images_and_the_weights_that_are_not_finite(
    tiny, examples, tmp_path, monkeypatch
):
    how = tiny.settings | {"precision": "bf16", "train_only": "head"}
    config = tiny_config(examples, tmp_path / "run", **how)
    real = Run.prepared

    def prepared(run, batch):
        batch = real(run, batch)
        batch.images[4] = math.nan
        prepared.name = run.train_data.where(int(batch.indices[4]))
        return batch

    monkeypatch.setattr(Run, "prepared", prepared)
    with pytest.raises(InputError, match=r"not finite at step 1 .*\n.*--replay"):
        train(config)
    found = replay(config.out)
    assert found["images"] == [prepared.name]
    assert math.isnan(found["loss"])
    assert math.isnan(found["loss_fp32"])


@pytest.mark.parametrize(
    ("tiny", "task"),
    [("classify", {"label_smoothing": 0.2}), ("segment", {"class_weights": "balanced"})],
    indirect=["tiny"],
)
def test_the_shares_of_several_processes_replay_with_the_draws_of_each(
    tiny, examples, tmp_path, monkeypatch, task
):
    fields = tiny.settings["model_fields"] | {"drop_path_rate": 0.3}
    how = tiny.settings | {"model_fields": fields, "accumulate": 2, "task": task}
    config = tiny_config(examples, tmp_path / "run", **how)
    real = loop.backward
    monkeypatch.setattr(loop, "backward", lambda *given: real(*given) * math.inf)
    with pytest.raises(InputError, match=r"not finite at step 1 \(epoch 1, batch 1\)"):
        train(config)
    file = tmp_path / "run" / NAME
    kept, about = read_safetensors(file), json.loads(read_metadata(file)["vitrail"])
    halves = {
        f"{rank}.{name}": kept[f"0.{name}"][3 * rank : 3 * rank + 3].clone()
        for name in ("images", "targets", "indices")
        for rank in range(2)
    }
    weights = {k: v for k, v in kept.items() if k.startswith("model.")}
    about = json.dumps(about | {"padding": [{}, {}]})
    write_state(weights | halves, file, metadata={"vitrail": about})
    model = build_model(config, tiny.classes).train()
    model.load_state_dict({k[6:]: v for k, v in weights.items()})
    targets = kept["0.targets"]
    if tiny.headline == "mIoU":
        weight = balanced(examples)
        labelled = targets[targets != 255]
        total = weight[labelled.long()].sum()
        how = {"weight": weight, "ignore_index": 255}
        targets = targets.long()
    else:
        total, how = 6, {"label_smoothing": 0.2}
    losses = []
    for rank, images in enumerate((kept["0.images"][:3], kept["0.images"][3:])):
        key = np.random.SeedSequence([config.seed, 0, rank]).generate_state(1, np.uint64)[0]
        torch.manual_seed(int(key) // 2)
        own = targets[3 * rank : 3 * rank + 3]
        for x, y in ((images[:2], own[:2]), (images[2:], own[2:])):
            losses.append(F.cross_entropy(model(x), y, **how, reduction="sum"))
    loss = torch.stack(losses).sum() / total
    loss.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in model.parameters()))
    found = replay(config.out)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert found["gradient_norm"] == pytest.approx(norm, rel=1e-5)
    assert (found["step"], found["num_images"]) == (1, 6)


def test_a_padded_share_with_targets_by_image_is_kept_and_found_again():
    targets = (
        {"boxes": torch.ones(2, 4), "labels": torch.tensor([1, 0])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
        *({"boxes": torch.full((1, 4), 1.0 * i), "labels": torch.tensor([i])} for i in range(9)),
    )
    met = {"images": torch.rand(11, 3, 4, 6), "targets": targets, "indices": torch.arange(11)}
    named = flat(met)
    assert set(named) > {"images", "indices", "targets.0.boxes", "targets.10.labels"}
    back = nested(named)
    assert isinstance(back["targets"], tuple)
    assert len(back["targets"]) == 11
    for want, got in zip(targets, back["targets"], strict=True):
        assert want.keys() == got.keys()
        assert all(torch.equal(want[k], got[k]) for k in want)
    sizes = ((4, 6), *((3, 5),) * 10)
    padding = json.loads(json.dumps({"sizes": sizes}))
    batch = batch_of(back, padding)
    assert isinstance(batch, Padded)
    assert (batch.sizes, batch.padding) == (sizes, {"sizes": sizes})
    assert torch.equal(batch.images, met["images"])
    assert torch.equal(batch.indices, met["indices"])
    assert isinstance(batch_of(back, {}), Dense)


def balanced(root: Path) -> torch.Tensor:
    """The weights of three classes: the median of their frequencies over each; a frequency is the share of
    the pixels of those images that show the class."""
    seen, whole = np.zeros(3), np.zeros(3)
    for path in (root / "masks" / "train").iterdir():
        counts = np.bincount(np.array(Image.open(path)).ravel(), minlength=256)[:3]
        seen += counts
        whole += counts.sum() * (counts > 0)
    frequency = seen / whole
    return torch.tensor(np.median(frequency) / frequency, dtype=torch.float32)


def test_what_is_many_is_told_by_its_number_and_a_few():
    names = [f"n{i}" for i in range(1234)]
    assert some([]) == "none"
    assert some(names[:1]) == "1 (n0)"
    assert some(names[:5]) == "5 (n0, n1, n2, n3, n4)"
    assert some(names[:6]) == "6 (n0, n1, n2, n3, n4 and 1 more)"
    assert some(names, 2) == "1,234 (n0, n1 and 1,232 more)"


def test_what_is_evaluated_and_saved_is_the_average_and_training_goes_on_from_the_weights(
    tiny, examples, tmp_path, monkeypatch
):
    seen = []

    def evaluate_and_look(model, data, **how):
        seen.append({k: v.clone() for k, v in model.state_dict().items()})
        return evaluate(model, data, **how)

    monkeypatch.setattr(loop, "evaluate", evaluate_and_look)
    config = tiny_config(examples, tmp_path / "run", **tiny.settings, epochs=2, ema=0.9)
    train(config)
    train(replace(config, out=str(tmp_path / "own"), ema=0.0))
    average, weights = seen[1], seen[3]
    assert any(not torch.equal(average[k], weights[k]) for k in weights)
    run, own = (
        {k: v for k, v in _tensors(tmp_path / n).items() if k.startswith("model.")}
        for n in ("run", "own")
    )
    assert all(torch.equal(run[k], own[k]) for k in own), "the average changes no update"
    saved = _tensors(tmp_path / "run")
    assert all(torch.equal(saved[f"ema.{k}"], v) for k, v in average.items())


def _tensors(out: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(states(out / "state")[0])
