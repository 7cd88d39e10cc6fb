"""The progress line: what matters most is there at any width, and a pipe gets whole lines."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from lite_dil.base.display import TimeLeft, duration, held_out
from lite_dil.cli import progress
from lite_dil.cli.progress import Terminal

LINE = {
    "loss": -0.51234,
    "rewards/accuracies": 0.75,
    "log_ratio/chosen": 0.123,
    "log_ratio/rejected": -0.456,
    "examples_per_second": 1.234,
    "peak_memory_mb": 1234.5,
    "seconds_per_step": 3.0,
}
STEP, LEFT, LOSS, ACCURACY = "step 40/200", "8.0 min left", "loss -0.5123", "accuracy 0.75"
RATIOS, SPEED, MEMORY = "log-ratio chosen +0.123 rejected -0.456", "1.23 pairs/s", "1234 MB"


def shown(width: int, line: dict[str, Any] | None = LINE, doing: str = "") -> str:
    """Return the last line on a terminal of this width."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=width, color_system=None, soft_wrap=True, legacy_windows=False)
    with Terminal(console).bar(200, 39, "the first step takes longest") as bar:
        bar.update(40, line)
        if doing:
            with bar.doing(doing):
                bar.live.refresh()  # type: ignore[union-attr]
                return last(file.getvalue())
    return last(file.getvalue())


def last(text: str) -> str:
    """Return the last line that says something, without control codes."""
    return [line for line in re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)) if line.strip()][-1]


@pytest.mark.parametrize(
    ("width", "there"),
    [
        (60, [STEP, LEFT, LOSS]),
        (80, [STEP, LEFT, LOSS, ACCURACY, MEMORY]),
        (110, [STEP, LEFT, LOSS, ACCURACY, RATIOS]),
        (200, [STEP, LEFT, LOSS, ACCURACY, RATIOS, SPEED, MEMORY]),
    ],
)
def test_as_much_as_fits_the_most_important_first(width: int, there: list[str]) -> None:
    line = shown(width)
    assert line.rstrip().endswith("  ".join(there))
    assert len(line.rstrip()) <= width


@pytest.mark.parametrize(
    ("line", "unit"),
    [
        ({"rewards/accuracies": 0.5}, "pairs"),
        ({}, "answers"),
        ({"completions/mean_length": 8.0}, "prompts"),  # each with its --samples answers
        ({"completions/mean_length": 8.0, "rewards/accuracies": 0.5}, "prompts"),
    ],
)
def test_the_speed_names_what_a_step_counts(line: dict[str, float], unit: str) -> None:
    bare = {"loss": 0.0, "examples_per_second": 1.234, "peak_memory_mb": 1.0, "seconds_per_step": 3.0}
    assert f"1.23 {unit}/s" in shown(200, bare | line)


def test_what_is_being_done_stands_beside_the_step() -> None:
    assert "step 40/200  evaluating ..." in shown(80, doing="evaluating")


def test_it_moves_after_the_last_step_too() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system=None, legacy_windows=False)
    with Terminal(console).bar(2, 1) as bar:
        bar.update(2, LINE)
        with bar.doing("evaluating"):
            frames = set()
            for now in (0.0, 0.2, 0.4):
                bar.live.tasks[0]._get_time = lambda now=now: now  # type: ignore[union-attr]
                bar.live.refresh()  # type: ignore[union-attr]
                frames.add(last(file.getvalue())[0])
            assert len(frames) == 3
    assert last(file.getvalue())[0] == " "


def test_a_slow_step_shows_its_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=80, color_system=None, legacy_windows=False)
    with Terminal(console).bar(200, 39, "the first step takes longest") as bar:
        bar.passes(3, 16)
        bar.live.refresh()  # type: ignore[union-attr]
        assert "pass" not in file.getvalue()  # a step of less than 2 seconds
        monkeypatch.setattr(progress, "SLOW", 0.0)
        bar.passes(5, 16)
        bar.live.refresh()  # type: ignore[union-attr]
        assert "step 39/200  pass 5/16  the first step takes longest" in last(file.getvalue())
        bar.update(40, LINE)
        bar.live.refresh()  # type: ignore[union-attr]
        assert "pass " not in last(file.getvalue())


def test_a_pipe_gets_a_line_a_step_and_one_as_each_phase_starts() -> None:
    file = io.StringIO()
    with Terminal(Console(file=file, width=80, soft_wrap=True)).bar(200, 39, "the first step takes longest") as bar:
        bar.passes(5, 16)
        bar.update(40, LINE)
        bar.update(41, None)
        with bar.doing("evaluating") as tell:
            assert file.getvalue().endswith("\nevaluating ...\n")
            for seconds in (9, 8, 7):
                tell(f"about {seconds} s left")
    line = "  ".join([STEP, LEFT, LOSS, ACCURACY, RATIOS, SPEED, MEMORY])
    lines = ["step 40/200: the first step takes longest ...", line, "evaluating ...", "evaluating: about 9 s left"]
    assert file.getvalue().splitlines() == lines


def test_the_time_left_of_slow_work() -> None:
    """Nothing is said of the first piece, and before two seconds of the ten others, three quarters of a second each."""
    now, said = 100.0, list[str]()
    left = TimeLeft(said.append, 11, "at most", clock=lambda: now)
    for seconds in (50, *[0.75] * 11):
        now += seconds
        left.add()
    assert said[:2] == ["at most 5 s left", "at most 4 s left"] and said[-2:] == ["at most 0 s left"] * 2 and len(said) == 9


def test_demonstrations_have_no_rejected_side() -> None:
    line = {"step": 7, "eval_loss": 1.5, "eval_log_ratio/chosen": 0.25}
    assert held_out(line) == "held out, step 7: loss 1.5000  log-ratio chosen +0.250"


@pytest.mark.parametrize(("seconds", "said"), [(0, "0 s"), (89, "89 s"), (90, "1.5 min"), (5399, "90.0 min"), (5400, "1.5 h")])
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said
