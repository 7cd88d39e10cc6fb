"""Observers of a training: when they are called and with what, and that each is due when it says."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import config, write_pairs

from lite_dil.base.display import Silent
from lite_dil.base.errors import TrainingDiverged
from lite_dil.base.observer import Event, Observer, Observers
from lite_dil.evaluation.held_out import HeldOut
from lite_dil.recipes.preference import train
from lite_dil.recipes.run import Run
from lite_dil.runs.checkpoints import Checkpoints
from lite_dil.runs.folder import RunFolder, find_checkpoint
from lite_dil.runs.progress import Progress


class Notes(Observer):
    """Notes down what it is told; asks for a stop, or fails, after a step."""

    def __init__(self, stop_after: int = 0, fail_after: int = 0) -> None:
        self.stop_after, self.fail_after = stop_after, fail_after
        self.seen: list[tuple[str, int]] = []
        self.lines: list[dict[str, Any]] = []

    def started(self, event: Event) -> None:
        self.seen.append(("started", event.step))

    def after_step(self, event: Event) -> None:
        self.seen.append(("after_step", event.step))
        if event.line:
            self.lines.append(event.line)
        if event.step == self.stop_after:
            os.kill(os.getpid(), signal.SIGINT)
        if event.step == self.fail_after:
            raise ZeroDivisionError

    def stopped(self, event: Event) -> None:
        self.seen.append(("stopped", event.step))
        assert event.stop()

    def finished(self, event: Event) -> None:
        self.seen.append(("finished", event.step))
        assert event.last

    def failed(self, error: BaseException) -> None:
        self.seen.append((type(error).__name__, -1))


@pytest.fixture
def options(tiny: str, tmp_path: Path) -> dict[str, Any]:
    """12 pairs in 3 steps of 4."""
    data = str(write_pairs(tmp_path / "pairs.jsonl"))
    made: dict[str, Any] = {"model": tiny, "backend": "cpu", "data": data, "output_dir": str(tmp_path / "run")}
    return made | {"report_samples": 0, "reference_cache": "off", "logging_steps": 2}


def run(options: dict[str, Any], notes: Observer, resume: Path | None = None) -> Run:
    return train(config(**options), Silent(), resume, observers=[notes])


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_ones_own_observer_sees_the_whole_training(options: dict[str, Any]) -> None:
    notes = Notes()
    made = run(options, notes)
    steps = [("after_step", step) for step in (1, 2, 3)]
    assert notes.seen == [("started", 0), *steps, ("finished", 3)]
    assert notes.lines == lines_of(made.folder)
    assert [line["step"] for line in notes.lines] == [2, 3]  # each second step, and the last


def test_a_stop_and_going_on(options: dict[str, Any]) -> None:
    notes, after = Notes(stop_after=1), Notes()
    made = run(options, notes)
    assert made.stopped and notes.seen == [("started", 0), ("after_step", 1), ("stopped", 1)]
    again = run(options, after, find_checkpoint(str(made.folder), None))
    assert not again.stopped and after.seen == [("started", 1), ("after_step", 2), ("after_step", 3), ("finished", 3)]
    assert [line["step"] for line in lines_of(made.folder)] == [2, 3]


def test_an_error_is_told_and_goes_on(options: dict[str, Any]) -> None:
    notes = Notes(fail_after=2)
    with pytest.raises(ZeroDivisionError):
        run(options, notes)
    assert notes.seen[-2:] == [("after_step", 2), ("ZeroDivisionError", -1)]
    assert json.loads((Path(options["output_dir"]) / "report.json").read_text())["state"] == "failed"


def test_a_divergence_is_told_after_the_state_before_it_is_saved(options: dict[str, Any]) -> None:
    notes = Notes()
    with pytest.raises(TrainingDiverged):
        run(options | {"logp_reduction": "sum", "beta": 1e4}, notes)
    last = max(step for _, step in notes.seen)
    assert notes.seen[-1] == ("TrainingDiverged", -1) and last > 0
    assert (Path(options["output_dir"]) / "checkpoints" / f"step-{last}").is_dir()


def test_a_step_is_saved_before_it_is_evaluated(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    measure, there = HeldOut.run, []

    def look(self: HeldOut, *args: Any) -> Any:
        folder = RunFolder(Path(options["output_dir"]))
        latest = folder.latest()
        there.append((latest.name if latest else "", folder.adapter.is_dir()))
        return measure(self, *args)

    monkeypatch.setattr(HeldOut, "run", look)
    run(options | {"eval_data": options["data"], "eval_steps": 1, "save_steps": 1}, Notes())
    assert there == [("step-1", False), ("step-2", False), ("step-3", True)]


@pytest.mark.parametrize(("every", "due"), [(None, [6]), (1, [1, 2, 3, 4, 5, 6]), (2, [2, 4, 6]), (4, [4, 6]), (9, [6])])
def test_what_comes_every_so_many_steps_comes_at_the_end_too(every: int | None, due: list[int]) -> None:
    assert [step for step in range(7) if Event(step, 6).due(every)] == due


def test_the_last_step_is_saved_once(tmp_path: Path) -> None:
    progress, saved = Progress(), []
    folder = RunFolder(tmp_path)
    checkpoints = Checkpoints(folder, progress, lambda path: saved.append(path), lambda path: None, config(save_steps=2))
    for progress.step in (1, 2, 3):
        checkpoints.after_step(Event(progress.step, 5))
    assert [path.name for path in checkpoints.folder.checkpoints.iterdir()] == ["step-2"] and len(saved) == 1
    for _ in range(2):
        assert checkpoints.keep() == folder.checkpoints / "step-3"
    checkpoints.stopped(Event(3, 5))
    assert len(saved) == 2 and not folder.adapter.exists()


def test_what_was_left_out_is_known() -> None:
    first, second = Notes(), Notes()
    both = Observers([first, second])
    assert not both.left_out
    second.left_out = True
    assert both.left_out and not first.left_out


def test_all_hear_of_an_error_in_their_order_though_one_fails_at_it() -> None:
    told: list[str] = []

    class Hears(Observer):
        def __init__(self, name: str) -> None:
            self.name = name

        def failed(self, error: BaseException) -> None:
            told.append(self.name)
            if self.name == "first":
                raise OSError("a tracker's")

    with pytest.raises(OSError, match="a tracker's"), Observers([Hears("first"), Hears("second")]):
        raise ZeroDivisionError
    assert told == ["first", "second"]
