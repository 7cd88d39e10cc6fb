"""What every training does around its loop: its folder and lock, its end, and how it is continued."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lite_dil.base.display import Display
from lite_dil.base.observer import Event, Observer, Observers
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.generation.policy import Policy
from lite_dil.models.options import trusting
from lite_dil.recipes.given import Given
from lite_dil.recipes.run import Run
from lite_dil.recipes.session import Opening, TrainingSession
from lite_dil.reports.run_report import REPORT
from lite_dil.runs.checkpoints import Checkpoints
from lite_dil.runs.folder import RunFolder
from lite_dil.training.loop import Steps, is_finished, loop

Watched = tuple[Observers, Checkpoints]
Observe = Callable[[TrainingSession, Any, Display, Sequence[Observer]], Watched]


@dataclass(frozen=True)
class Recipe:
    """What trainings differ in.

    Attributes:
        name: the beginning of the name of a new run's folder.
        command: the command that continues a run.
        open: prepares a training.
        observe: returns its observers, and separately the one that saves.
        flags: what must be given again to continue a run.
    """

    name: str
    command: str
    open: Callable[[Opening], TrainingSession]
    observe: Observe
    flags: tuple[str, ...] = ()


def run_training(
    recipe: Recipe,
    config: ResolvedConfig,
    display: Display,
    resume: Path | None,
    fixed: Set[str] | None,
    observers: Sequence[Observer],
    given: Given,
) -> Run:
    """Train by a recipe; the other arguments and the errors are those of `lite_dil.recipes.preference.train`."""
    folder = RunFolder(resume.parent.parent) if resume else RunFolder.new(config.output_dir, recipe.name)
    folder.again = " ".join([recipe.command, folder.again, *recipe.flags, *trusting(config)]).strip()
    with folder.alone(display.say):
        session = recipe.open(Opening(config, display, folder, resume, fixed, given))
        training, policy, taken = session.training, session.policy, session.config

        def ended(stopped: bool) -> Run:
            # It holds nothing of the session, so that closing the policy frees its memory.
            def go_on(checkpoint: Path, other: Display | None, watching: Sequence[Observer]) -> Run:
                return run_training(
                    recipe, taken, other or display, checkpoint, fixed, watching, replace(given, policy=policy)
                )

            return Run(policy, folder.path, stopped, display.say, go_on)

        if training is None:
            return ended(stopped=True)
        return ended(_carry_out(training, recipe.observe(session, training, display, observers), folder, policy, display))


def _carry_out(training: Steps[Any], watched: Watched, folder: RunFolder, policy: Policy, display: Display) -> bool:
    """Take the remaining steps; return whether something is left to do because a stop was asked for."""
    watching, checkpoints = watched
    policy.begin_training(folder)
    with folder.going_on(), watching:
        loop(training, watching, checkpoints.keep, folder.again)
        if is_finished(training):
            watching.finished(Event(training.progress.step, training.steps))
        training.sync()
    if not is_finished(training):
        display.say(f"stopped after step {training.progress.step} of {training.steps}, saved; continue with {folder.again}")
        return True
    display.say(f"adapter in {folder.adapter}, report in {folder.path / REPORT}")
    if watching.left_out:
        display.say(f"the training is finished; to complete its evaluation and report: {folder.again}")
    return watching.left_out
