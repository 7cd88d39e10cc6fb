"""Preference training of an adapter with any objective."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path

from lite_dil.base.display import Display
from lite_dil.base.errors import UserError
from lite_dil.base.observer import Observer
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.objectives.own import shown
from lite_dil.objectives.reward_table import is_reward
from lite_dil.recipes.given import NOTHING_GIVEN, Given
from lite_dil.recipes.observers import observers_of
from lite_dil.recipes.run import Run
from lite_dil.recipes.running import Recipe, run_training
from lite_dil.recipes.session import open_session


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
    if is_reward(config.loss):
        raise UserError(f"{config.loss} trains a reward model, which is lite-dil reward, or dil.train_reward")
    recipe = Recipe(shown(config.loss), "", open_session, observers_of)
    return run_training(recipe, config, display, resume, fixed, observers, given)
