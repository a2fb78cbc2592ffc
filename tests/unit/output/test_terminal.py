"""Progress with a clock of the test's own, and tables at any width."""

import contextlib
import io
import pickle
import re
import sys

import pytest

from mowe_ray.output.terminal import (
    LINE,
    Pace,
    ProgressLine,
    ProgressReporter,
    RunDisplay,
    amount,
    duration,
    folded,
    format_table,
    track,
)


class Clock:
    """Time that passes when the test says so."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_rate_and_time_left_count_what_was_done_since_the_start():
    clock = Clock()
    pace = Pace(total=10, done=4, clock=clock)
    clock.now_s += 5
    assert (pace.rate, pace.left_s) == (None, None), "nothing was done"
    pace.done = 6
    assert pace.rate == pytest.approx(2 / 5)
    assert pace.left_s == pytest.approx(4 / (2 / 5))
    pace.restart()
    clock.now_s += 2
    pace.done = 10
    assert (pace.rate, pace.left_s) == (2, 0)
    pace.done = 3
    assert pace.left_s is None, "there is more to do than before"
    assert Pace(total=None).left_s is None


def test_lines_come_at_intervals_and_at_the_end():
    clock, lines = Clock(), []
    progress = ProgressReporter("judging clips", 8, unit="answers", log=lines.append, every_s=10, clock=clock)
    for _ in range(8):
        clock.now_s += 4
        progress.advance()
    assert lines == [
        "judging clips: 3 of 8 answers, 0.25/s, 20s left",
        "judging clips: 6 of 8 answers, 0.25/s, 8s left",
    ]
    progress.finish()
    assert lines[2:] == ["judging clips: 8 answers, 0.25/s, 32s"]


def test_without_a_total_there_is_no_time_left():
    clock, lines = Clock(), []
    progress = ProgressReporter("reading", log=lines.append, every_s=1, clock=clock)
    clock.now_s += 2
    progress.advance(4000)
    assert lines == ["reading: 4,000, 2,000/s"]


def test_start_up_does_not_count():
    clock, lines = Clock(), []
    progress = ProgressReporter("answering", 10, log=lines.append, every_s=0, clock=clock)
    clock.now_s += 60
    progress.advance(2)
    progress.restart()
    clock.now_s += 1
    progress.advance(4)
    assert lines[-1] == "answering: 6 of 10, 4/s, 1s left"


def test_a_terminal_shows_one_line_and_a_log_file_all(monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    assert list(track([1, 2], "work", total=2, every_s=0)) == [1, 2]
    assert screen.getvalue().count("\r") == 3
    assert screen.getvalue().count("\n") == 1
    monkeypatch.setattr(sys, "stderr", log := io.StringIO())
    assert list(track([1, 2], "work", total=2, every_s=0)) == [1, 2]
    assert [line.split(",")[0] for line in log.getvalue().splitlines()] == ["work: 1 of 2", "work: 2 of 2", "work: 2"]
    assert "\r" not in log.getvalue()


ROWS = [["whisper", "1", "b" * 64], ["hubert-large", "12", "[not] markup"]]


def test_a_table_in_a_pipe_has_a_line_a_row(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert format_table(ROWS, ["name", "n", "id"], right=[1]) == (
        f"  name           n  id\n  whisper        1  {'b' * 64}\n  hubert-large  12  [not] markup\n"
    )
    assert format_table([["a", "1"], ["bb"]]) == "  a   1\n  bb\n"
    assert format_table([], ["a", "b"]) == "  a  b\n"


@pytest.mark.parametrize("width", [30, 40, 80])
def test_a_narrow_table_continues_cells_and_loses_no_letter(width):
    text = format_table(ROWS, ["name", "n", "id"], width=width)
    assert max(map(len, text.splitlines())) <= width
    assert text.count("b") == 64 + 1
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (7810, "2h10m")]
)
def test_durations_are_told_in_two_units_at_most(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (12, "12"), (1.25e3, "1.25 k"), (1.234e6, "1.23 M"), (2e9, "2 B"), (3e12, "3 T")]
)
def test_amounts_have_three_digits(value, text):
    assert amount(value) == text


def shown(stream: io.StringIO) -> str:
    with contextlib.redirect_stderr(stream), RunDisplay() as show:
        show("data       3 samples")
        for step in (1, 2):
            show(ProgressLine(f"step {step}/2", step / 2))
        show("validation of [held]")
    return stream.getvalue()


def test_without_a_terminal_every_line_of_a_run_has_the_time():
    lines = shown(io.StringIO()).splitlines()
    assert [re.sub(r"^\d\d:\d\d:\d\d ", "", line) for line in lines] == [
        "data       3 samples",
        "step 1/2",
        "step 2/2",
        "validation of [held]",
    ]
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)


def test_on_a_terminal_the_last_progress_stays_below_the_other_lines(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    screen = shown(Terminal())
    assert screen.count("data       3 samples") == 1
    assert screen.index("validation of [held]") < screen.rindex("step 2/2") < screen.rindex("━")
    assert "\x1b[2K" in screen, "the earlier line is taken away"


def test_a_progress_line_travels_between_processes_with_its_fraction():
    line = pickle.loads(pickle.dumps(ProgressLine("step 1/4", 0.25)))
    assert (line, line.done) == ("step 1/4", 0.25)


def test_long_lines_are_folded_between_their_parts():
    lines = folded(["validation held at step 5: loss 1.000", *["asr 0.75 (majority 0.50)"] * 4]).split("\n")
    assert all(len(line) <= LINE for line in lines)
    assert "".join(lines).count("asr 0.75 (majority 0.50)") == 4
    assert lines[1].startswith("  asr")
