"""Preference training of an adapter with any objective."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import replace
from pathlib import Path

from lite_dil.base.display import Display
from lite_dil.base.observer import Observer
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.models.options import trusting
from lite_dil.objectives.own import shown
from lite_dil.recipes.carry_out import carry_out
from lite_dil.recipes.given import NOTHING_GIVEN, Given
from lite_dil.recipes.observers import observers_of
from lite_dil.recipes.run import Run
from lite_dil.recipes.session import Opening, open_session
from lite_dil.runs.folder import RunFolder


def train(
    config: ResolvedConfig,
    display: Display,
    resume: Path | None = None,
    fixed: Set[str] | None = None,
    observers: Sequence[Observer] = (),
    given: Given = NOTHING_GIVEN,
) -> Run:
    """Train an adapter by `config`, from the start or from the checkpoint `resume`.

    Args:
        fixed: the options that --auto does not change; None means all that are not at their default.
        observers: further observers, besides those that save, log and report.
        given: objects passed by a program; its policy is changed in place.

    Raises:
        UserError: something that the user can fix, raised before anything was changed or with the last step saved.
        TrainingDiverged: the loss or gradient became non-finite; earlier checkpoints are good.
    """
    folder = RunFolder(resume.parent.parent) if resume else RunFolder.new(config.output_dir, shown(config.loss))
    folder.again = " ".join([folder.again, *trusting(config)])
    with folder.alone(display.say):
        session = open_session(Opening(config, display, folder, resume, fixed, given))
        training, policy, taken = session.training, session.policy, session.config

        def ended(stopped: bool) -> Run:
            # It holds nothing of the session, so that closing the policy frees its memory.
            def go_on(checkpoint: Path, other: Display | None, watching: Sequence[Observer]) -> Run:
                return train(taken, other or display, checkpoint, fixed, watching, replace(given, policy=policy))

            return Run(policy, folder.path, stopped, display.say, go_on)

        if training is None:
            return ended(stopped=True)
        watched = observers_of(session, training, display, observers)
        return ended(carry_out(training, watched, folder, policy, display, training.passes.sync))
