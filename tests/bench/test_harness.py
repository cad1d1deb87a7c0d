import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from vitrail.bench.harness import (
    CLOCKS,
    Row,
    arguments,
    compare,
    geomean,
    interleave,
    machine,
    report,
    summary,
    table,
    threads,
)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_rounds_run_every_call_once_and_turn_the_order():
    seen: list[str] = []
    calls = [lambda: seen.append("a"), lambda: seen.append("b"), lambda: seen.append("c")]
    times = interleave(calls, seconds=0, min_rounds=4, warmup=1)
    assert "".join(seen) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert [len(t) for t in times] == [4, 4, 4]


def test_a_call_settles_before_it_is_timed(monkeypatch):
    time = Time(monkeypatch)
    calls = [time.work(90, 80, 2, 70, 60, 4), time.work(50, 40, 3, 30, 20, 5)]
    taken = interleave(calls, seconds=0, min_rounds=2, warmup=0, settle=2)
    assert taken == [pytest.approx([0.002, 0.004]), pytest.approx([0.003, 0.005])]


def test_time_bounds_the_rounds_once_the_fewest_are_done():
    assert len(interleave([lambda: None], seconds=60, max_rounds=7)[0]) == 7
    assert len(interleave([lambda: None], seconds=0, min_rounds=2)[0]) == 2


class Time:
    """A clock that stands still but for what a call takes."""

    def __init__(self, monkeypatch):
        self.wall = self.cpu = 0.0
        monkeypatch.setattr("vitrail.bench.harness.time.perf_counter", lambda: self.wall)
        monkeypatch.setitem(CLOCKS, "wall", lambda: self.wall)
        monkeypatch.setitem(CLOCKS, "cpu", lambda: self.cpu)

    def work(self, *milliseconds, busy=1.0):
        """A call that takes so long, one time after another; a share `busy` of it on a core."""
        left = list(milliseconds)

        def call():
            took = left.pop(0) / 1000
            self.wall += took
            self.cpu += took * busy

        return call


def test_a_row_is_the_median_the_quartiles_and_the_median_of_the_ratios(monkeypatch):
    time = Time(monkeypatch)
    ours = time.work(999, 999, 2, 4, 3, 10, 1)  # the first two warm up
    peer = time.work(1, 1, 3, 2, 9, 10, 2)
    row = compare("x", ours, peer, seconds=0)
    # Quartiles of n values stand at (n + 1) / 4 and 3 (n + 1) / 4, between their neighbours.
    assert asdict(row) == {
        "name": "x",
        "ours": 3.0,
        "peer": 3.0,
        "ratio": 1.5,  # of 3/2, 2/4, 9/3, 10/10, 2/1: how many times faster ours is
        "ours_spread": round(100 * (7 - 1.5) / 3, 1),
        "peer_spread": round(100 * (9.5 - 2) / 3, 1),
        "rounds": 5,
    }


def test_alone_there_is_no_ratio(monkeypatch):
    time = Time(monkeypatch)
    row = compare("x", time.work(7, 4, 5, 6), seconds=0, warmup=1, min_rounds=3)
    assert (row.ours, row.peer, row.ratio, row.peer_spread, row.rounds) == (
        5.0,
        None,
        None,
        None,
        3,
    )


def test_busy_time_is_measured_on_the_core_and_bounded_by_the_wall(monkeypatch):
    time = Time(monkeypatch)
    call = time.work(*[100] * 50, busy=0.25)
    (taken,) = interleave([call], seconds=1, min_rounds=2, clock="cpu")
    assert taken == pytest.approx([0.025] * len(taken))
    # Warm-up is not counted; it goes on while no more than the second is over.
    assert len(taken) in (10, 11)
    time = Time(monkeypatch)
    (taken,) = interleave([time.work(*[500] * 50)], seconds=1, min_rounds=2)
    assert len(taken) == 3


def test_a_peer_that_does_ten_times_the_work_is_slower():
    def work(n):
        return lambda: sum(range(n))

    row = compare("sum", work(20_000), work(200_000), seconds=0.2, clock="cpu")
    assert row.ratio is not None
    assert row.ratio > 4
    assert row.peer is not None
    assert row.peer > row.ours > 0


def test_median_and_spread_are_in_milliseconds_and_per_cent():
    middle, spread = summary([0.010, 0.011, 0.009, 0.010, 1.0])
    assert middle == 10.0
    assert spread > 5
    assert summary([0.002]) == (2.0, 0.0)


def test_the_spread_of_nothing_is_zero_and_values_are_rounded():
    assert summary([0.0, 0.0, 0.0]) == (0.0, 0.0)
    assert summary([0.0012344, 0.0012346]) == (1.234, pytest.approx(0.0, abs=0.1))
    assert summary([0.001, 0.002, 0.003]) == (2.0, 100.0)


def test_the_mean_of_ratios_is_geometric_and_skips_rows_without_a_peer():
    rows = [Row(name=n, ours=1, peer=1, ratio=r) for n, r in (("a", 2.0), ("b", 0.5), ("c", 8.0))]
    assert geomean([*rows, Row(name="alone", ours=1)]) == 2.0
    assert geomean([Row(name="alone", ours=1)]) is None


def test_the_report_is_a_table_and_a_file_with_the_machine(tmp_path, capsys):
    rows = [compare("x", lambda: None, lambda: None, seconds=0), compare("y", int, seconds=0)]
    report(rows, json_file=tmp_path / "deep" / "out.json", clock="wall")
    written = json.loads((tmp_path / "deep" / "out.json").read_text())
    assert written.keys() == {"machine", "rows", "geomean", "clock"}
    assert {"name", "ours", "peer", "ratio"} <= written["rows"][0].keys()
    assert written["rows"][1]["peer"] is None
    assert written["machine"]["threads"] == torch.get_num_threads()
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1].startswith("geometric mean")
    assert shown[-2].startswith("| y |")


def test_the_table_shows_times_spreads_and_ratio_with_their_units():
    peer = {"peer": 3.0, "peer_spread": 5.5, "ratio": 1.25}
    rows = [
        Row(name="a", ours=2.4, ours_spread=12.4, rounds=7, **peer),
        Row(name="b", ours=0.125, ours_spread=1.0, rounds=3),
    ]
    header, line, one, other = table(rows).splitlines()
    assert header == "| what | ours ms | spread % | peer ms | spread % | ratio | rounds |"
    assert line.count("|") == header.count("|")
    assert one == "| a | 2.40 | 12 | 3.00 | 6 | 1.250x | 7 |"
    assert other == "| b | 0.12 | 1 |  |  |  | 3 |"


def test_the_file_has_the_rows_the_mean_and_what_else_is_told(tmp_path, capsys):
    peer = {"peer": 3.0, "peer_spread": 5.5}
    rows = [Row(name=n, ours=2.0, ratio=r, **peer) for n, r in (("a", 2.0), ("b", 8.0))]
    result = report(rows, json_file=tmp_path / "out.json", threads=3)
    assert json.loads((tmp_path / "out.json").read_text()) == result
    assert result["rows"] == [asdict(row) for row in rows]
    assert (result["geomean"], result["threads"]) == (4.0, 3)
    assert capsys.readouterr().out == f"{table(rows)}\ngeometric mean 4.000x\n"
    assert report([Row(name="alone", ours=1)])["geomean"] is None
    assert "geometric" not in capsys.readouterr().out


def test_the_machine_is_written_down():
    facts = machine()
    assert facts["torch"] == torch.__version__
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert facts["cores"] == os.cpu_count()
    assert facts["cpu"]
    assert facts["load"] >= 0
    assert ("gpu" in facts) == torch.cuda.is_available()


def test_every_script_has_the_same_flags(tmp_path):
    parser = arguments("what", quick=False, models="a")
    given = vars(parser.parse_args([]))
    assert given == {"quick": False, "json": None, "threads": 1, "clock": "wall", "models": "a"}
    line = ["--quick", "--json", "a.json", "--threads", "2", "--clock", "cpu"]
    given = vars(parser.parse_args(line))
    assert given == {
        "quick": True,
        "json": Path("a.json"),
        "threads": 2,
        "clock": "cpu",
        "models": "a",
    }


def test_threads_are_set_within_the_block_and_put_back():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with threads(2):
            assert machine()["threads"] == 2
        assert torch.get_num_threads() == 3
        with pytest.raises(OSError, match="gone"), threads(2):
            raise OSError("gone")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    ["startup.py", "eager.py --models efficientvit_m0", "train_step.py --models efficientvit_m0"],
)
def test_a_script_prints_its_table_last_and_writes_the_file(command, tmp_path):
    script, *flags = command.split()
    out = tmp_path / "out.json"
    done = subprocess.run(
        [sys.executable, BENCHMARKS / script, "--quick", *flags, "--json", out],
        check=True,
        capture_output=True,
        text=True,
    )
    last = done.stdout.rstrip().splitlines()[-1]
    assert last.startswith(("geometric mean", "| "))
    assert json.loads(out.read_text())["rows"]
