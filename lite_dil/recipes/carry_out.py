"""Carry out an opened training: its steps, with its observers, to its end or to a Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lite_dil.base.display import Display
from lite_dil.base.observer import Event, Observers
from lite_dil.generation.policy import Policy
from lite_dil.reports.run_report import REPORT
from lite_dil.runs.checkpoints import Checkpoints
from lite_dil.runs.folder import RunFolder
from lite_dil.training.loop import Steps, is_finished, loop


def carry_out(
    training: Steps[Any],
    observers: tuple[Observers, Checkpoints],
    folder: RunFolder,
    policy: Policy,
    display: Display,
    sync: Callable[[], None] = lambda: None,
) -> bool:
    """Take the remaining steps; return whether something is left to do because a stop was asked for.

    Args:
        observers: all of them, and separately the one that saves.
        sync: waits until what the steps kept elsewhere is on the disk.
    """
    watching, checkpoints = observers
    policy.begin_training(folder)
    with folder.going_on(), watching:
        loop(training, watching, checkpoints.keep, folder.again)
        if is_finished(training):
            watching.finished(Event(training.progress.step, training.steps))
        sync()
    if not is_finished(training):
        display.say(f"stopped after step {training.progress.step} of {training.steps}, saved; continue with {folder.again}")
        return True
    display.say(f"adapter in {folder.adapter}, report in {folder.path / REPORT}")
    if watching.left_out:
        display.say(f"the training is finished; to complete its evaluation and report: {folder.again}")
    return watching.left_out
