"""Measuring: ours beside a named peer, in one process, in turn, on a machine that is written down."""

import argparse
import contextlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

Clock = Literal["wall", "cpu"]
CLOCKS: dict[Clock, Callable[[], float]] = {
    "wall": time.perf_counter,
    # Seconds of this process on a core: what a machine that is busy with something else still measures.
    "cpu": time.process_time,
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One comparison. Times are medians in milliseconds; a spread is the distance between the quartiles in
    per cent of the median; `ratio` is how many times faster ours is, the median over rounds of peer / ours.
    """

    name: str
    ours: float
    peer: float | None = None
    ratio: float | None = None
    ours_spread: float = 0.0
    peer_spread: float | None = None
    rounds: int = 1


def interleave(
    calls: Sequence[Callable[[], object]],
    *,
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    warmup: int = 2,
    settle: int = 0,
    clock: Clock = "wall",
) -> list[list[float]]:
    """Seconds of each call in each round. A round runs every call once, in an order that turns from round
    to round, so that a machine that slows down slows all alike. Stops after `seconds` of wall time, warm-up
    not counted, but not before `min_rounds`. Before it is timed a call runs `settle` times, for what takes
    much memory: the first run after another call finds the memory as that one left it.
    """
    now = CLOCKS[clock]
    for _ in range(warmup):
        for call in calls:
            call()
    taken: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    for r in range(max_rounds):
        if r >= min_rounds and time.perf_counter() - start > seconds:
            break
        for i in range(len(calls)):
            j = (i + r) % len(calls)
            for _ in range(settle):
                calls[j]()
            before = now()
            calls[j]()
            taken[j].append(now() - before)
    return taken


def compare(
    name: str, ours: Callable[[], object], peer: Callable[[], object] | None = None, **how: Any
) -> Row:
    """Ours against a peer, or alone; `how` as for `interleave`."""
    calls = [ours] if peer is None else [ours, peer]
    times = interleave(calls, **how)
    row: dict[str, Any] = {"name": name, "rounds": len(times[0])}
    for side, seconds in zip(("ours", "peer"), times, strict=False):
        row[side], row[f"{side}_spread"] = summary(seconds)
    if peer is not None:
        row["ratio"] = round(statistics.median(p / o for o, p in zip(*times, strict=True)), 3)
    return Row(**row)


def summary(seconds: Sequence[float]) -> tuple[float, float]:
    """(median in milliseconds, distance between the quartiles in per cent of it)."""
    middle = statistics.median(seconds)
    spread = 0.0
    if len(seconds) > 1 and middle > 0:
        low, _, high = statistics.quantiles(seconds, n=4)
        spread = 100 * (high - low) / middle
    return round(1000 * middle, 3), round(spread, 1)


def geomean(rows: Sequence[Row]) -> float | None:
    """Geometric mean of the ratios; None where no row has a peer."""
    ratios = [row.ratio for row in rows if row.ratio]
    if not ratios:
        return None
    return round(math.exp(statistics.fmean(map(math.log, ratios))), 3)


def machine() -> dict[str, Any]:
    """What a reader needs to know of the machine, and how busy it was."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    with contextlib.suppress(AttributeError, OSError):  # not every system has it
        facts["load"] = round(os.getloadavg()[0], 1)
    return facts


def arguments(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """The flags that every script in benchmarks/ has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="under a minute, fewer rounds")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file")
    parser.add_argument(
        "--threads", type=int, default=1, help="math threads, for ours and the peer"
    )
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: on a machine busy with something else"
    )
    parser.set_defaults(**defaults)
    return parser


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Math threads within the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def report(rows: Sequence[Row], *, json_file: Path | None = None, **facts: Any) -> dict[str, Any]:
    """Print the table and write the file: {"machine", "rows", "geomean", ...facts}."""
    result = {
        "machine": machine(),
        **facts,
        "rows": [asdict(row) for row in rows],
        "geomean": geomean(rows),
    }
    print(table(rows))
    if result["geomean"] is not None:
        print(f"geometric mean {result['geomean']:.3f}x")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| what | ours ms | spread % | peer ms | spread % | ratio | rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        peer = ("", "", "")
        if row.peer is not None:
            peer = (f"{row.peer:.2f}", f"{row.peer_spread:.0f}", f"{row.ratio:.3f}x")
        cells = [row.name, f"{row.ours:.2f}", f"{row.ours_spread:.0f}", *peer, str(row.rounds)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
