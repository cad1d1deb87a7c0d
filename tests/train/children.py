"""Runs in processes of their own, which a test may kill. Forked, so that they start in milliseconds, from
a server that has imported everything and run nothing: autograd refuses forks of a process that used it."""

import faulthandler
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.state import AcceleratorState
from PIL import Image

import vitrail.metrics  # noqa: F401  (imported once, by the server)
from vitrail.data import open_data
from vitrail.data.examples import Images
from vitrail.train import loop
from vitrail.train.config import TrainConfig
from vitrail.train.evaluate import evaluate
from vitrail.train.run import Run
from vitrail.train.trainer import train
from vitrail_runtime.errors import InputError
from vitrail_runtime.preprocess import Preprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.train.children"])
Image.init()  # the formats, too, are imported once


def run(config: TrainConfig, *, dies_at: str = "", unreadable: str = "") -> int:
    """Train in a child, which writes stderr to OUT.stderr; the exit code. It may kill itself on the way.

    dies_at: "rename:N" at the N-th rename of a file (0 based), before it happens.
    unreadable: "train:N" or "val:N": no picture of that split can be read after N updates; "memory:N": what
        was read finds no memory then.
    """
    child = CONTEXT.Process(target=_child, args=(config, dies_at, unreadable))
    child.start()
    child.join()
    return child.exitcode


def run_and_kill(config: TrainConfig, *, growths: int, delay: float) -> int:
    """Train in a child and kill it: some seconds after its log has grown so many times; the exit code."""
    child = CONTEXT.Process(target=_child, args=(config,))
    child.start()
    metrics = Path(config.out) / "metrics.jsonl"
    seen = size = metrics.stat().st_size if metrics.is_file() else 0
    while growths and child.is_alive():
        size = metrics.stat().st_size if metrics.is_file() else 0
        growths -= size > seen
        seen = size
        time.sleep(0.001)
    child.join(delay)
    if child.is_alive():
        child.kill()
        child.join()
    return child.exitcode


def run_many(config: TrainConfig, world: int, *, unreadable: str = "") -> list[int]:
    """Train in `world` processes, as a launcher would start them; their exit codes.

    unreadable: as in `run`, in the last of them alone.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [
        CONTEXT.Process(
            target=_rank, args=(config, rank, world, port, unreadable * (rank == world - 1))
        )
        for rank in range(world)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


def evaluate_many(
    make_model: Callable[[], Any],
    folder: Path,
    preprocessings: Sequence[Preprocessing | None],
    world: int,
    out: Path,
) -> list[int]:
    """Evaluate on the val split of `folder` in `world` processes, in batches of two; their exit codes.

    What each was given by `evaluate`, for one preprocessing after another, stands in OUT-0, OUT-1 and so on.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = [
        CONTEXT.Process(
            target=_evaluate, args=(make_model, folder, preprocessings, rank, world, port, out)
        )
        for rank in range(world)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


def _evaluate(
    make_model: Callable[[], Any],
    folder: Path,
    preprocessings: Sequence[Preprocessing | None],
    rank: int,
    world: int,
    port: int,
    out: Path,
) -> None:
    faulthandler.dump_traceback_later(300, exit=True)
    torch.set_num_threads(1)
    address = f"tcp://localhost:{port}"
    torch.distributed.init_process_group("gloo", address, rank=rank, world_size=world)
    data = open_data(folder, "val")
    how = {"batch_size": 2, "rank": rank, "world": world, "predictions": True}
    scores = [evaluate(make_model(), data, p, **how) for p in preprocessings]
    rows = [
        {
            "values": s.values,
            "details": s.details,
            "said": {name: (str(v.dtype), v.tolist()) for name, v in (s.said or {}).items()},
        }
        for s in scores
    ]
    Path(f"{out}-{rank}").write_text(json.dumps(rows))
    torch.distributed.destroy_process_group()


def ask_to_stop(config: TrainConfig, number: int) -> int:
    """Train in a child, send it and its workers a signal once it has logged something; the exit code."""
    child = _logging(config)
    os.killpg(child.pid, number)
    child.join()
    return child.exitcode


def kill_workers(config: TrainConfig) -> int:
    """Train in a child, kill its workers once it has logged something; the exit code."""
    child = _logging(config)
    for worker in psutil.Process(child.pid).children(recursive=True):
        worker.kill()
    child.join()
    return child.exitcode


def _logging(config: TrainConfig) -> BaseProcess:
    child = CONTEXT.Process(target=_leader, args=(config,))
    child.start()
    metrics = Path(config.out) / "metrics.jsonl"
    while child.is_alive() and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.01)
    return child


def _leader(config: TrainConfig) -> None:
    os.setpgid(0, 0)  # as a shell makes one group of a command's processes
    _child(config)


def _rank(config: TrainConfig, rank: int, world: int, port: int, unreadable: str) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    AcceleratorState._reset_state(reset_partial_state=True)  # the parent was alone
    _child(config, unreadable=unreadable)


def _child(config: TrainConfig, dies_at: str = "", unreadable: str = "") -> None:
    # A server's children would start their workers by a server of their own, which imports everything again.
    multiprocessing.set_start_method("fork", force=True)
    # Processes that wait for each other would wait for ever: say where, and end.
    said = open(f"{config.out}.stderr", "a")  # noqa: SIM115  (the server's own is nobody's capture)
    os.dup2(said.fileno(), 2)
    faulthandler.dump_traceback_later(3000, exit=True)
    torch.set_num_threads(1)  # the server's math threads do not exist in a fork
    if dies_at:
        count = int(dies_at.partition(":")[2])
        real = os.replace

        def replace(*args, **kwargs) -> None:
            nonlocal count
            if count == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            count -= 1
            real(*args, **kwargs)

        os.replace = replace
    if unreadable:
        _lose(unreadable)
    try:
        result = train(config)
    except InputError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(2)
    os._exit(128 + result.signal if result.signal else 0)


def _lose(unreadable: str) -> None:
    split, _, count = unreadable.partition(":")
    left, real_update, real_read = int(count), loop.update, Images.read_bytes
    real_prepared = Run.prepared

    def update(*args) -> int:
        nonlocal left
        left -= 1
        return real_update(*args)

    def read_bytes(self, i: int) -> bytes:
        if left <= 0 and split in Path(self.keys[i]).parts:
            raise InputError(f"{self.where(i)} cannot be read")
        return real_read(self, i)

    def prepared(*args):
        if left < 0 and split == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real_prepared(*args)

    loop.update, Run.prepared, Images.read_bytes = update, prepared, read_bytes
