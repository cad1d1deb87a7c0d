"""One process or many, the same run."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.distributed import device_mesh, fsdp
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import vitrail
from tests.train.children import run, run_many
from tests.train.conftest import TINY, VIT, make_pictures, tiny_config
from vitrail.cli import main
from vitrail.data.plan import BatchPlan
from vitrail.tasks.classify import Settings
from vitrail.train import ranks
from vitrail.train.build import build_model, task_and_settings
from vitrail.train.clip import clip_gradients
from vitrail.train.config import TrainConfig
from vitrail.train.ema import Ema
from vitrail.train.folder import RunFolder
from vitrail.train.optim import create_optimizer
from vitrail.train.ranks import check_shares, check_world, choose_workers
from vitrail.train.replay import NAME, replay
from vitrail.train.state import gather, read_header, restore, states
from vitrail.train.trainer import train
from vitrail_runtime.errors import InputError

OFTEN = {"epochs": 10, "batch_size": 12, "log_every": 1, "eval_every": 5}


def config_for(data: Path, out: Path, **changes):
    """20 updates of a ViT without drop rates."""
    return tiny_config(data, out, **(VIT | OFTEN | changes))


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in RunFolder(out).rows()]  # of training and evaluations


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    train(config_for(pictures, out))
    return out


@pytest.fixture(scope="module")
def alone_of_task(tiny, examples, tmp_path_factory) -> Path:
    """The same of each task."""
    out = tmp_path_factory.mktemp("alone") / "run"
    train(tiny_config(examples, out, **tiny.settings, **OFTEN))
    return out


# Not of a detector: its losses are means over the boxes of each share, as the references' are.
WHOLE = pytest.mark.parametrize("tiny", ["classify", "segment"], indirect=True, scope="session")


@WHOLE
@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {}),
        (2, {"accumulate": 6, "workers": 1}),
        pytest.param(4, {}, marks=pytest.mark.slow),
        pytest.param(2, {"parallel": "fsdp"}, marks=pytest.mark.slow),
    ],
)
def test_losses_do_not_depend_on_the_number_of_processes(
    tiny, examples, tmp_path, alone_of_task, world, changes
):
    """Though each has another number of labelled pixels."""
    out, alone = tmp_path / "run", alone_of_task
    config = tiny_config(examples, out, **tiny.settings, **OFTEN, **changes)
    assert run_many(config, world) == [0] * world
    assert len(losses(out)) == 22
    assert losses(out) == pytest.approx(losses(alone), abs=1e-5)
    ours, theirs = (load_file(p / "last" / "model.safetensors") for p in (out, alone))
    # Of the keys' biases Adam enlarges gradients that are rounding alone: the softmax does not see them.
    atol = 1e-3 if tiny is TINY["contrast"] else 1e-4
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=atol)
    scores, others = (RunFolder(p).rows()[-1][tiny.headline] for p in (out, alone))
    assert scores == pytest.approx(others, abs=1e-2), "of all images"
    assert vitrail.load(out / "best").classes == vitrail.load(alone / "best").classes


@pytest.mark.slow
@pytest.mark.parametrize("tiny", ["contrast"], indirect=True, scope="session")
@pytest.mark.parametrize("world", [2, 3])
def test_every_image_is_held_against_the_captions_of_all_processes(
    tiny, examples, tmp_path, alone_of_task, world
):
    how = (tiny, examples, tmp_path, alone_of_task, world, {})
    test_losses_do_not_depend_on_the_number_of_processes(*how)


@WHOLE
@pytest.mark.parametrize("parallel", ["data", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_run_of_two_goes_on_as_a_run_of_one_and_back(tiny, examples, tmp_path, parallel):
    how = tiny.settings | OFTEN | {"parallel": parallel, "ema": 0.9}
    config = tiny_config(examples, tmp_path / "run", **how, save_every=0.0)
    train(tiny_config(examples, tmp_path / "whole", **how))
    assert run(config, dies_at="rename:7") == -signal.SIGKILL
    assert 0 < read_header(states(tmp_path / "run" / "state")[0])[0].step < 20
    assert run_many(config, 2) == [0, 0]
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


@pytest.mark.slow
def test_a_detector_learns_of_two_processes_what_it_learns_of_two_parts(scenes, tmp_path):
    """Each share is a part."""
    how = TINY["detect"].settings | {"batch_size": 12, "log_every": 1, "epochs": 3}
    parts = tiny_config(scenes, tmp_path / "parts", **how, accumulate=2)
    train(parts)
    assert run_many(replace(parts, out=str(tmp_path / "both"), accumulate=1), 2) == [0, 0]
    found, wanted = (
        [row["loss"] for row in RunFolder(path).rows() if row["kind"] == "train"]
        for path in (tmp_path / "both", tmp_path / "parts")
    )
    assert len(found) == 6
    assert found == pytest.approx(wanted, abs=1e-5)


def test_running_statistics_and_averages_stay_finite_with_a_share_each(pictures, tmp_path):
    out = tmp_path / "run"
    config = tiny_config(pictures, out, ema=0.9, epochs=1)
    assert run_many(config, 2) == [0, 0]
    state = load_file(out / "last" / "model.safetensors")
    assert any("running_var" in key for key in state)
    assert all(value.isfinite().all() for value in state.values())


def test_processes_that_cannot_share_a_batch_are_told_one_that_they_can(pictures, tmp_path, capfd):
    config = config_for(pictures, tmp_path / "run")
    with pytest.raises(
        InputError, match=r"5 processes cannot share a batch of 12.*--batch-size 10"
    ):
        check_world(config, 5)
    with pytest.raises(InputError, match="2 processes in 4 parts each"):
        check_world(replace(config, accumulate=4), 2)
    with pytest.raises(
        InputError, match=r"^1 process in 5 parts cannot share a batch of 12 equally"
    ):
        check_world(replace(config, accumulate=5), 1)
    check_world(replace(config, accumulate=3), 4)


def plan_of(config, length: int = 10_000) -> BatchPlan:
    scales = tuple((side, side) for side in config.sizes)
    return BatchPlan(length=length, batch_size=config.batch_size, size=(32, 32), scales=scales)


def test_every_size_of_a_run_must_be_shared_before_it_starts(pictures, tmp_path):
    config = config_for(pictures, tmp_path, batch_size=96, sizes=(24, 32, 48))
    assert plan_of(config).batch_sizes() == {(24, 24): 168, (32, 32): 96, (48, 48): 40}
    check_shares(config, plan_of(config), 8)
    said = "^3 processes cannot share batches of 40 pictures of 48 x 48 equally; take 2 processes, or other"
    with pytest.raises(InputError, match=said):
        check_shares(config, plan_of(config), 3)
    config = replace(config, batch_size=18, sizes=(32, 24))
    said = "3 processes.* 32 pictures of 24 x 24.*take --batch-size 27, the nearest that they can, or 2 "
    with pytest.raises(InputError, match=said):
        check_shares(config, plan_of(config), 3)
    config = replace(config, batch_size=27)
    check_shares(config, plan_of(config), 3)


def test_pairs_of_mixup_need_even_shares(pictures, tmp_path):
    config = config_for(pictures, tmp_path, batch_size=12)
    check_shares(config, plan_of(config), 4)
    task, settings = task_and_settings(replace(config, task={"mixup": 0.8}))
    assert [task.multiple(s) for s in (settings, Settings(cutmix=0.1), Settings())] == [2, 2, 1]
    check_shares(config, plan_of(config), 2, 2)
    with pytest.raises(
        InputError, match=r"in shares of a multiple of 2, .*--batch-size 8, .* 3 processes$"
    ):
        check_shares(config, plan_of(config), 4, 2)


def test_an_error_of_the_first_process_ends_all_and_is_told_once(pictures, tmp_path):
    config = config_for(pictures, tmp_path / "run", epochs=1)
    assert run_many(config, 2) == [0, 0]
    assert run_many(replace(config, lr=0.5), 2) == [2, 2]
    assert Path(f"{config.out}.stderr").read_text().count("holds another run") == 1


@pytest.mark.parametrize(
    "unreadable",
    ["train:5", "val:3", pytest.param("val:3 fsdp", marks=pytest.mark.slow)],
)
def test_a_picture_that_one_process_cannot_read_leaves_the_run_saved(
    pictures, tmp_path, alone, unreadable
):
    what, _, fsdp = unreadable.partition(" ")
    config = config_for(pictures, tmp_path / "run", parallel=fsdp or "data", save_every=60.0)
    assert run_many(config, 2, unreadable=what) == [2, 2]
    said = Path(f"{config.out}.stderr").read_text()
    assert said.count("cannot be read\nthe run is saved at update") == 1, "the first process tells"
    assert "process 1 on " in said
    assert run_many(config, 2) == [0, 0]
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), abs=1e-5)


def test_a_process_that_runs_out_of_memory_alone_tells_it_and_ends(pictures, tmp_path):
    config = config_for(pictures, tmp_path / "run")
    assert run_many(config, 2, unreadable="memory:2") == [2, 2]
    said = Path(f"{config.out}.stderr").read_text()
    assert "vitrail: process 1 on " in said
    assert (
        "another process of the run has ended; what it told, or the system's log, says why" in said
    )
    assert "Traceback" not in said
    assert "not enough memory for an update on 12 images of 32 x 32 (6 at a time)" in said


def test_a_batch_that_gave_no_number_is_told_once_and_kept_with_all_shares(pictures, tmp_path):
    """As the plan has it: the first process's share, then the second's."""
    config = config_for(pictures, tmp_path / "run", lr=1e30, warmup_epochs=0.0, clip_grad=None)
    assert run_many(config, 2) == [2, 2]
    said = Path(f"{config.out}.stderr").read_text()
    (step,) = re.findall(r"not finite at step (\d+)", said)  # one process tells
    epoch, number = divmod(int(step) - 1, 2)
    plan = BatchPlan(length=24, batch_size=12, size=(32, 32))
    batch = list(plan.batches(epoch))[number]
    kept = load_file(tmp_path / "run" / NAME)
    indices, targets = (
        torch.cat([kept[f"{rank}.{name}"] for rank in range(2)]) for name in ("indices", "targets")
    )
    assert indices.tolist() == list(batch.indices)
    assert [kept[f"{rank}.images"].shape for rank in range(2)] == [(6, 3, 32, 32)] * 2
    assert targets.argmax(1).tolist() == [i // 8 for i in batch.indices]
    assert replay(config.out)["num_images"] == 12


def test_a_mistake_that_all_processes_meet_is_told_once(pictures, tmp_path):
    config = config_for(tmp_path / "nowhere", tmp_path / "run")
    assert run_many(config, 2) == [2, 2]
    assert Path(f"{config.out}.stderr").read_text().count("no such file") == 1
    config = config_for(pictures, tmp_path / "odd", task={"mixup": 1}, batch_size=6)
    assert run_many(config, 2) == [2, 2]
    assert Path(f"{config.out}.stderr").read_text().count("cannot share batches of 6") == 1


def test_a_mistake_in_the_command_is_told_by_the_first_process_of_a_machine(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(["train", "--epochs", "3"]) == 2
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert main(["train", "--epochs", "3"]) == 2
    assert "say which images" in capsys.readouterr().err


def test_only_the_first_process_writes(pictures, tmp_path):
    pytest.importorskip("tensorboard")
    out = tmp_path / "run"
    assert run_many(config_for(pictures, out, tensorboard=True, epochs=1, eval_every=1), 2) == [
        0,
        0,
    ]
    assert len(list((out / "tensorboard").iterdir())) == 1
    assert [(row["kind"], row["step"]) for row in RunFolder(out).rows()] == [
        ("train", 1),
        ("train", 2),
        ("eval", 2),
    ]


def test_a_cpu_run_reads_in_its_own_process_unless_told_otherwise(pictures, tmp_path):
    config = config_for(pictures, tmp_path)
    assert choose_workers(config, Accelerator(cpu=True)) == 0
    assert choose_workers(replace(config, workers=3), Accelerator(cpu=True)) == 3


def machine(device: str, world: int) -> Any:
    main = {"is_main_process": True, "num_processes": world}
    return SimpleNamespace(device=torch.device(device), **main)


def test_beside_a_gpu_some_cores_read(monkeypatch):
    for cores, local_world, workers in ((16, 1, 8), (9, 1, 8), (8, 1, 7), (16, 4, 3), (2, 4, 1)):
        monkeypatch.setattr(ranks, "cores", lambda cores=cores: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_world))
        assert choose_workers(TrainConfig(), machine("cuda", 8)) == workers
        assert choose_workers(TrainConfig(workers=0), machine("cuda", 8)) == 0
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert choose_workers(TrainConfig(), machine("cuda", 1)) == 1


def test_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {process, 3, 5}, raising=False)
    assert ranks.cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    for count, cores in ((7, 7), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        assert ranks.cores() == cores


@pytest.mark.parametrize(
    ("cores", "local_world", "workers", "threads"),
    [(8, 1, 0, 8), (8, 1, 3, 5), (8, 2, 1, 3), (4, 1, 4, 1), (9, 4, 0, 2)],
)
def test_processes_and_their_workers_have_cores_of_their_own(
    monkeypatch, cores, local_world, workers, threads
):
    taken = []
    monkeypatch.setattr(ranks, "cores", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_world))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with ranks.processes(TrainConfig(device="cpu", workers=workers)) as accelerator:
        assert accelerator.device.type == "cpu"
    assert taken == [threads]


def test_batchnorm_is_over_the_whole_batch_on_gpus(monkeypatch):
    for device, world, shared in (("cuda", 2, True), ("cuda", 1, False), ("cpu", 2, False)):
        model = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
        found = ranks.synchronised_batchnorm(model, machine(device, world))
        assert isinstance(found[0], torch.nn.SyncBatchNorm) == shared
        assert found is model


@pytest.fixture
def group():
    """A group of this process alone, in which weights can be sharded."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_weights_learn_save_and_come_back_as_whole_ones_do(
    pictures, tmp_path, monkeypatch, group
):
    """Each block is a unit of its own, and so is what is left; on one process a shard is all there is."""
    mesh = device_mesh.init_device_mesh("cpu", (1,))
    asked = []
    monkeypatch.setattr(device_mesh, "init_device_mesh", lambda *how: asked.append(how) or mesh)
    config = config_for(pictures, tmp_path, ema=0.5, parallel="fsdp")
    torch.manual_seed(0)
    plain = build_model(config, ("a", "b", "c"))
    model = copy.deepcopy(plain)
    smooth = {"label_smoothing": 0.1}
    net = ranks.distribute(model, smooth, config, machine("cpu", 2))
    assert asked == [("cpu", (2,))]
    units = [n for n, m in model.named_modules() if isinstance(m, FSDPModule)]
    assert units == ["", "backbone.blocks.0", "backbone.blocks.1"]
    whole = ranks.distribute(plain, smooth, config, machine("cpu", 1))
    assert whole.model is plain
    states = []
    images = torch.randn(2, 3, 32, 32)
    targets = torch.tensor([0, 2])
    for ours, learner in ((model, net), (plain, whole)):
        optimizer, ema = create_optimizer(ours, config), Ema(ours, config.ema)
        for step in range(2):
            optimizer.zero_grad()
            learner(images, targets)["classify"].backward()
            norm = clip_gradients(ours, config)
            assert not isinstance(norm, DTensor)
            optimizer.step()
            ema.update(ours, step)
        states.append(gather(ours, optimizer, ema))
        again = copy.deepcopy(plain) if ours is plain else ours
        fresh, average = create_optimizer(again, config), Ema(again, config.ema)
        restore(states[-1], again, fresh, average)
        back = gather(again, fresh, average)
        assert all(torch.equal(back[key], value) for key, value in states[-1].items())
        kinds = {type(p) for p in again.parameters()}
        assert (kinds == {DTensor}) == (ours is model)
        slots = {type(v) for s in fresh.state.values() for v in s.values() if v.ndim}
        assert all(issubclass(kind, DTensor) for kind in slots) == (ours is model)
    sharded, whole = states
    assert sharded.keys() == whole.keys()
    for key, value in whole.items():
        assert type(sharded[key]) is torch.Tensor
        torch.testing.assert_close(sharded[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_the_same_command_runs_under_torchrun(pictures, tmp_path):
    config = config_for(pictures, tmp_path / "alone", epochs=2)
    train(config)
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 -m vitrail train --config"
    flags = ["--out", str(tmp_path / "both")]
    command = [sys.executable, *launch.split(), str(tmp_path / "alone" / "config.yaml"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("best top-1") == 1, "only the first process tells"
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "alone"), abs=1e-5)


@pytest.mark.slow
def test_sharded_processes_evaluate_though_one_has_more_batches(tmp_path):
    data = make_pictures(tmp_path / "data", val=3)  # 5 pictures and 4, in batches of 2
    config = config_for(
        data, tmp_path / "run", parallel="fsdp", batch_size=4, epochs=1, eval_every=1
    )
    assert run_many(config, 2) == [0, 0]
    scores = json.loads((tmp_path / "run" / "last" / "metrics.json").read_text())
    assert scores["num_images"] == 9


def test_blocks_and_the_whole_are_sharded_over_one_mesh_of_this_device(monkeypatch):
    """Left to itself, torch would take a mesh of the accelerator that it finds, whatever --device says."""
    sharded = []
    monkeypatch.setattr(device_mesh, "init_device_mesh", lambda kind, shape: (kind, shape))
    monkeypatch.setattr(fsdp, "fully_shard", lambda m, mesh=None: sharded.append((m, mesh)) or m)
    model = vitrail.create_model("vit_tiny_patch16", num_classes=3)
    whole = SimpleNamespace(parallel="fsdp")
    accelerator = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    monkeypatch.setattr(fsdp, "register_fsdp_forward_method", lambda m, name: None)
    net = ranks.distribute(model, {}, whole, accelerator)  # pyright: ignore[reportArgumentType]
    assert net.model is model
    assert {mesh for _, mesh in sharded} == {("cpu", (2,))}
    assert [m for m, _ in sharded][-1] is model
    assert len(sharded) == 1 + len(model.backbone.blocks)
