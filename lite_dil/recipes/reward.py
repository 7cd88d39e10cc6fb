"""Training of a reward model: an adapter with a head that scores responses, on the frozen base."""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import partial
from pathlib import Path

import numpy as np

from lite_dil.backends.types import POLICY, Head
from lite_dil.base.display import Display
from lite_dil.base.errors import UserError
from lite_dil.base.observer import Observer, Observers
from lite_dil.batching.schedule import LargestPass, Schedule, plan, row_tokens
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.evaluation.held_out_scores import HeldOutScores
from lite_dil.objectives import rewards
from lite_dil.objectives.reward_criterion import RewardCriterion
from lite_dil.objectives.reward_table import folder_name, is_reward, name_of
from lite_dil.recipes.given import NOTHING_GIVEN, Given
from lite_dil.recipes.observers import watching_of
from lite_dil.recipes.run import Run
from lite_dil.recipes.running import Recipe, run_training
from lite_dil.recipes.session import Opening, TrainingSession, begin, go_on, load_session
from lite_dil.rewards.description import Description, write_description
from lite_dil.runs.checkpoints import Checkpoints
from lite_dil.training.loop import Training
from lite_dil.training.passes import Passes
from lite_dil.training.reference_cache import ReferenceCache

_MEASURED_ON = 64  # training examples over which the mean of log V is 0, and from which the extreme scores are


def train_reward(
    config: ResolvedConfig,
    display: Display,
    resume: Path | None = None,
    observers: Sequence[Observer] = (),
    given: Given = NOTHING_GIVEN,
    fixed: Set[str] | None = None,
) -> Run:
    """Train a reward model by `config`, from the start or from the checkpoint `resume`; see `preference.train`."""
    if not is_reward(config.loss):
        raise UserError(f"{config.loss} trains a policy, which is lite-dil train, or dil.train")
    recipe = Recipe(folder_name(config.loss), "reward", open_reward, _observe)
    return run_training(recipe, config, display, resume, fixed, observers, given)


def open_reward(opening: Opening) -> TrainingSession:
    """Read the data, load the model and give its adapter a head; go on from the checkpoint if there is one."""
    display = opening.display
    session, progress, _ = load_session(opening)
    config, backend, examples = session.config, session.backend, session.data.examples
    criterion = RewardCriterion(config, examples)
    backend.set_head(Head(criterion.outputs))
    training = Training(
        Passes(backend, config.logp_reduction, ReferenceCache(None, {}), display.say),
        examples,
        Schedule(config, examples, backend.layout),
        criterion,
        config,
        progress,
        LargestPass(backend.layout),
        config.logging_steps,
        bool(config.lora_dropout),
        display.say,
        display.stopping,
    )
    session.beside = partial(_describe, session, training)
    if opening.resume:
        go_on(session, training, opening.resume, display)
    else:
        begin(session, display)
    session.training = training
    return session


def _observe(
    session: TrainingSession, training: Training, display: Display, own: Sequence[Observer]
) -> tuple[Observers, Checkpoints]:
    config, held_out = session.config, session.data.held_out
    measured = HeldOutScores(training.passes, held_out, config, config) if held_out else None
    return watching_of(session, training, display, measured, lambda shown, often: [], own)


def _describe(session: TrainingSession, training: Training, folder: Path) -> None:
    """Write reward.json beside the adapter and the head."""
    config = session.config
    outputs = _outputs(training, config)
    # What the rewards and their noise scales are multiplied with, so that the mean of log V is 0.
    scale = rewards.anchor(outputs[:, 1]) if outputs.shape[1] > 1 else 1.0
    lowest, highest = float(outputs[:, 0].min()) * scale, float(outputs[:, 0].max()) * scale
    description = Description(name_of(config.loss), scale, training.progress.base, config.model, lowest, highest)
    write_description(folder, description)


def _outputs(training: Training, config: ResolvedConfig) -> np.ndarray:
    """Return the head's outputs for the responses of the first training examples, (responses, outputs), float64."""
    examples, backend = training.examples[:_MEASURED_ON], training.passes.backend
    batches = plan(examples, backend.layout, config.batch_size, row_tokens(config))
    scores = [training.passes.run(partial(backend.scores, adapter=POLICY), batch) for batch in batches]
    return np.concatenate(scores).astype(np.float64)
