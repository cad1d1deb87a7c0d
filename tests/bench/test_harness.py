import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitrail.bench.harness import (
    Row,
    compare,
    geomean,
    interleave,
    machine,
    report,
    summary,
    threads,
)

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_rounds_run_every_call_once_and_turn_the_order():
    seen: list[str] = []
    calls = [lambda: seen.append("a"), lambda: seen.append("b"), lambda: seen.append("c")]
    times = interleave(calls, seconds=0, min_rounds=4, warmup=1)
    assert "".join(seen) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert [len(t) for t in times] == [4, 4, 4]


def test_time_bounds_the_rounds_once_the_fewest_are_done():
    assert len(interleave([lambda: None], seconds=60, max_rounds=7)[0]) == 7
    assert len(interleave([lambda: None], seconds=0, min_rounds=2)[0]) == 2


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


def test_threads_are_set_within_the_block_and_put_back():
    before = torch.get_num_threads()
    with threads(1):
        assert machine()["threads"] == 1
    assert torch.get_num_threads() == before


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
