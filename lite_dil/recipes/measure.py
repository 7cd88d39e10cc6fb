"""A short measurement of how fast a training runs here, which leaves nothing but the rate."""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from dataclasses import replace
from functools import partial
from typing import Any

from lite_dil.base.display import Display
from lite_dil.base.errors import UserError
from lite_dil.base.files import work_folder
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.models.find import cache_dir
from lite_dil.objectives.reward_table import is_reward
from lite_dil.recipes.given import Given
from lite_dil.recipes.observers import FIRST, setting_of
from lite_dil.recipes.online import open_online
from lite_dil.recipes.reward import open_reward
from lite_dil.recipes.reward_sources import RewardSources
from lite_dil.recipes.session import Opening, TrainingSession, open_session
from lite_dil.runs import rates
from lite_dil.runs.folder import RunFolder
from lite_dil.training.loop import is_finished


def measure(config: ResolvedConfig, display: Display, fixed: Set[str], given: Given) -> rates.Rate:
    """Take a few steps of the run that `config` describes and return their rate; the adapter is dropped.

    The rate is kept, but not that of drawn answers, which depends on the reward and on their number and length.

    Args:
        fixed: the options that --auto does not change.
        given: the loss and the reward's functions, if they are the user's own.

    Raises UserError if the model or the data cannot be used, or memory does not hold a step.
    """
    if config.sample_rejected:
        raise UserError("--measure: it would have to draw the answers of --sample-rejected first; leave one of them out")
    if config.sampler:
        raise UserError("--measure: it would leave an adapter on the server of --sampler; leave one of them out")
    # Behind the first step, whole sets of steps on the same answers, of which one draws them.
    several = config.num_iterations or 1
    changes: dict[str, Any] = {
        "logging_steps": 1,
        "max_steps": 1 + several * -(-rates.LEAST // several),
        "reference_cache": "off",
        "precompute_reference": False,
        "target_kl": None,
    }
    no_more: dict[str, Any] = {
        "eval_data": None,
        "eval_fraction": 0.0,
        "eval_steps": None,
        "report_samples": 0,
        "report_to": None,
    }
    display.say(f"measuring {changes['max_steps']} steps, of which only the speed is kept")
    with work_folder(cache_dir() / "measure") as folder:
        short = replace(config, **changes, **no_more, output_dir=str(folder / "run"))
        session = _opener(config, given)(Opening(short, display, RunFolder(folder / "run"), None, fixed, given))
        training, lines = session.training, []
        assert training is not None  # only drawing and caching before the first step can be stopped
        with display.bar(training.steps, 0, FIRST) as bar:
            while not is_finished(training):
                since = time.perf_counter()
                taken = training.take(training.progress.step + 1, lambda passes, done: bar.passes(done, passes))
                line = training.count(taken, time.perf_counter() - since)
                bar.update(training.progress.step, line)
                lines += [line] if line else []
        rate = rates.rate_of(lines, 0, setting_of(session))
        session.policy.close()
    assert rate is not None  # there were as many steps as it needs
    if not config.online:
        rates.keep(rate)
    return rate


def _opener(config: ResolvedConfig, given: Given) -> Callable[[Opening], TrainingSession]:
    """Return what opens a session of the kind of training that `config` describes."""
    if config.online:
        return partial(open_online, rewards=RewardSources(config, given))
    return open_reward if is_reward(config.loss) else open_session
