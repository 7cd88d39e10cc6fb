"""A short measurement of how fast a training runs here, which leaves nothing but the rate."""

from __future__ import annotations

import time
from collections.abc import Set
from dataclasses import replace
from typing import Any

from lite_dil.base.display import Display
from lite_dil.base.errors import UserError
from lite_dil.base.files import work_folder
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.models.find import cache_dir
from lite_dil.recipes.given import Given
from lite_dil.recipes.observers import FIRST, setting_of
from lite_dil.recipes.session import Opening, open_session
from lite_dil.runs import rates
from lite_dil.runs.folder import RunFolder
from lite_dil.training.loop import is_finished


def measure(config: ResolvedConfig, display: Display, fixed: Set[str], given: Given) -> rates.Rate:
    """Take a few steps of the run that `config` describes, keep their rate and return it; the adapter is dropped.

    Args:
        fixed: the options that --auto does not change.
        given: the loss, if it is a program's own.

    Raises UserError if the model or the data cannot be used, or memory does not hold a step.
    """
    if config.sample_rejected:
        raise UserError("--measure: it would have to draw the answers of --sample-rejected first; leave one of them out")
    changes: dict[str, Any] = {
        "logging_steps": 1,
        "max_steps": rates.LEAST + 1,
        "reference_cache": "off",
        "precompute_reference": False,
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
        session = open_session(Opening(short, display, RunFolder(folder / "run"), None, fixed, given))
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
    rates.keep(rate)
    return rate
