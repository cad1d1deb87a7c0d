"""What a person is told while a run works, by a clock that the test sets."""

import re

import pytest

from vitrail.train import progress
from vitrail.train.progress import Progress, counted


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    return clock


def told(capsys):
    """(step, images/s, time left) of every line."""
    form = r"epoch \d+/\d+  step (\d+)/\d+  loss \d\.\d{3}  (\d+) images/s  (\S+) left"
    lines = capsys.readouterr().err.splitlines()
    found = [re.fullmatch(form, line) for line in lines]
    assert all(found), lines
    return [(int(m[1]), int(m[2]), m[3]) for m in found if m]


def run(clock, durations, *, total, minutes=None, images=32, done=(0, 0.0), speaks=True):
    """Updates of these durations, the clock's and the run's seconds side by side."""
    (step, seconds) = done
    with Progress(total, minutes=minutes, speaks=speaks) as shown:
        for duration in durations:
            clock.now += duration
            seconds += duration
            step += 1
            shown.step(step, "epoch 1/2", images, 0.5, seconds)
    return shown


def test_lines_come_every_fifteen_seconds_with_rate_and_time_left(clock, capsys):
    run(clock, [4.0] * 10, total=1000)
    # A line behind 16 and 32 seconds; 32 images in 4 s; what is left takes 4 s each.
    assert told(capsys) == [(4, 8, "1:06:24"), (8, 8, "1:06:08")]


def test_the_first_update_counts_neither_for_the_rate_nor_for_the_time_left(clock, capsys):
    """It pays for what happens once; averaged in, the time left would start far too long and fall."""
    run(clock, [60.0] + [20.0] * 5, total=30)
    lines = told(capsys)
    assert lines[0] == (1, 1, "?")  # 0.53 images/s
    assert [left for _, _, left in lines[1:]] == ["?", "?", "8:40", "8:20", "8:00"]
    assert [rate for _, rate, _ in lines[1:]] == [2] * 5  # 1.6


def test_a_resumed_run_learns_its_own_pace(clock, capsys):
    """Another machine's seconds say nothing about this one."""
    run(clock, [20.0] * 5, total=110, done=(90, 90_000.0))
    assert [left for *_, left in told(capsys)] == ["?", "?", "?", "5:20", "5:00"]


def test_with_a_time_limit_the_sooner_end_is_told(clock, capsys):
    run(clock, [20.0] * 5, total=100, minutes=10)
    assert told(capsys)[-1][2] == "8:20"
    run(clock, [20.0] * 5, total=10, minutes=10)
    assert told(capsys)[-1][2] == "1:40"


def test_no_time_is_left_once_the_limit_is_passed(clock, capsys):
    run(clock, [20.0] * 4, total=100, minutes=1)
    assert told(capsys)[-1] == (4, 2, "0:00")


def test_an_evaluation_counts_for_the_time_left_but_not_for_the_rate(clock, capsys):
    with Progress(20, minutes=None, speaks=True) as shown:
        for step in range(1, 6):
            clock.now += 10
            shown.step(step, "epoch 1/2", 32, 0.5, clock.now - 1000)
        clock.now += 40  # an evaluation
        shown.begin_epoch(30)  # packs are counted anew for each epoch
        clock.now += 10
        shown.step(6, "epoch 2/2", 32, 0.5, clock.now - 1000)
    assert told(capsys)[-1] == (6, 3, "7:12")  # 24 updates of (100 - 10) / 5 s
    assert shown.rate == pytest.approx(3.2)


def test_lines_show_the_padding_of_the_last_update_where_there_is_any(clock, capsys):
    with Progress(100, minutes=None, speaks=True) as shown:
        for step, padded in ((1, 0.0), (2, 0.0123), (3, 0.25)):
            clock.now += 20
            shown.step(step, "epoch 1/2", 32, 0.5, 20.0 * step, padded)
    found = [line.split("images/s  ")[1] for line in capsys.readouterr().err.splitlines()]
    assert found == ["? left", "padding 1.2%  ? left", "padding 25.0%  ? left"]


def test_the_bar_shows_the_share_that_is_done_by_updates_or_by_time(clock, monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    seen = []
    for total, minutes in ((8, None), (8, 4), (8, 1), (100, 4)):
        shown = run(clock, [20.0] * 4, total=total, minutes=minutes)
        assert shown.bar is not None
        seen.append(shown.bar.tasks[0].percentage / 100)
    assert seen == [0.5, 0.5, 1.0, pytest.approx(80 / 240)]


def test_only_the_main_process_speaks(clock, capsys):
    shown = run(clock, [20.0] * 5, total=10, speaks=False)
    shown.say("nothing")
    assert capsys.readouterr() == ("", "")


def test_a_line_that_stays_goes_to_stderr_as_it_is(clock, monkeypatch, capsys):
    run(clock, [], total=1).say("[bold] 3 left")
    assert capsys.readouterr() == ("", "[bold] 3 left\n")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    run(clock, [], total=1).say("[bold] 3 left")
    out, err = capsys.readouterr()
    assert out == ""
    assert "[bold] 3 left" in err


def test_counts_are_told_in_the_singular_and_the_plural():
    assert [counted(n, "thread") for n in (0, 1, 2)] == ["0 threads", "1 thread", "2 threads"]
    assert counted(2, "process", "processes") == "2 processes"
    assert counted(1, "process", "processes") == "1 process"


def test_a_line_comes_once_fifteen_seconds_are_full(clock, capsys):
    run(clock, [15.0, 14.0, 1.0], total=1000)
    assert [step for step, _, _ in told(capsys)] == [1, 3]
