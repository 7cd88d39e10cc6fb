"""Preference training of an adapter by any objective of the table."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from lite_dil.backends.protocol import Backend
from lite_dil.base.display import Display
from lite_dil.base.observer import Event, Observer
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.data.encoder import Encoder
from lite_dil.recipes.observers import observers_of
from lite_dil.recipes.session import open_session
from lite_dil.reports.run_report import REPORT
from lite_dil.runs.folder import RunFolder
from lite_dil.training.loop import loop


@dataclass(frozen=True)
class Run:
    """A training that ended: the model in memory, and its folder. `stopped` says that Ctrl-C ended it early, after saving."""

    backend: Backend
    encoder: Encoder
    folder: RunFolder
    stopped: bool


def train(
    config: ResolvedConfig,
    display: Display,
    resume: Path | None = None,
    fixed: Set[str] | None = None,
    observers: Sequence[Observer] = (),
) -> Run:
    """Train an adapter as `config` says, from the start or from the checkpoint `resume`.

    Args:
        fixed: the options that --auto leaves alone; None stands for all that are not at their default.
        observers: what watches the training beside the observers that save, log and report it.

    Raises:
        UserError: something that the user can mend, before anything was changed, or with the last step saved.
        TrainingDiverged: loss or gradient became non-finite; the checkpoints up to then are good.
    """
    session = open_session(config, display, resume, fixed)
    training, folder = session.training, session.folder
    if training is None:
        return Run(session.backend, session.encoder, folder, stopped=True)
    watching, checkpoints = observers_of(session, training, display, observers)
    with folder.going_on(), watching:
        loop(training, watching, checkpoints.keep)
        if training.finished:
            watching.finished(Event(training.progress.step, training.schedule.steps))
    steps, again = training.schedule.steps, f"--resume {folder.path}"
    if not training.finished:
        display.say(f"stopped after step {training.progress.step} of {steps}, saved; go on with {again}")
    else:
        display.say(f"adapter in {folder.adapter}, report in {folder.path / REPORT}")
        if watching.left_out:
            display.say(f"the training is finished; what was left out of its evaluation and report: {again}")
    return Run(session.backend, session.encoder, folder, stopped=not training.finished or watching.left_out)
