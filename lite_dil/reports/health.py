"""Whether a training goes well, from its lines of metrics: said once while it runs, and in its report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.base.observer import Event, Observer
from lite_dil.runs.history import MetricColumns, read_history
from lite_dil.training.divergence import what_helps

_STEPS = 20  # before anything is said: the first steps are noisy, and the learning rate rises
_CLIPPED, _TIMES = 0.9, 10.0  # share of clipped steps, and how many times the norm allowed, and at the start, the norm is
_ABOVE = 2.0  # times its own size, at least 1, that the loss is above its start
_CARRIED = 0.25  # effective share of responses: below it, a few carry the loss
_FALLEN = {"mean": 0.02, "sum": 1.0}  # nats by which chosen responses became less likely, per token or response


def complaints(train: MetricColumns, config: Mapping[str, Any]) -> dict[str, str]:
    """Return what goes wrong in a training and what to try, a sentence or two each, by a key that stays the same.

    Args:
        train: the lines of metrics so far.
        config: the run's options, by name.
    """
    if not train.number or (train.last("step") or 0) < _STEPS:
        return {}
    helps = what_helps(config["loss"], config["logp_reduction"], config.get("log_ratio_cap"))
    found = {
        "clipping": _clipping(train, config.get("max_grad_norm"), helps),
        "loss": _loss(train, helps),
        "carried": _carried(train, helps),
    }
    return {key: text for key, text in found.items() if text}


def falling(train: MetricColumns, config: Mapping[str, Any]) -> str:
    """Return a sentence if the chosen responses become less likely in training; the report has its own, of the end."""
    value, reduction = train.recent("log_ratio/chosen"), config["logp_reduction"]
    if value is None or (train.last("step") or 0) < _STEPS or value > -_FALLEN[reduction]:
        return ""
    per = "token" if reduction == "mean" else "response"
    return (
        f"the chosen responses lose probability: {value:.3g} nats per {per} on average over the last lines, although accuracy "
        "and margin may rise. What to try: a lower --learning-rate or fewer --epochs; the report says more."
    )


def _clipping(train: MetricColumns, most: float | None, helps: list[str]) -> str:
    if not most or "clipped_steps" not in train:  # an old run
        return ""
    lines = max(1, train.number // 4)  # as in `MetricColumns.recent`
    steps = np.diff(train.get("step"), prepend=0.0)[-lines:]
    clipped, norm = train.get("clipped_steps")[-lines:], train.recent("grad_norm")
    share = float(np.nansum(clipped) / steps.sum())
    # Sums of log-probs are clipped in every step of a training that goes well, too: what tells is that the norm has grown.
    if norm is None or share < _CLIPPED or norm < _TIMES * max(most, train.at(0, "grad_norm") or 0.0):
        return ""
    return (
        f"The gradient was clipped in {share:.0%} of the last {steps.sum():.0f} steps, from a mean norm of {norm:.3g} to "
        f"{most:g}: outliers decide where these steps go, and the loss stays finite only for that. What to try: "
        f"{'; '.join(helps)}."
    )


def _loss(train: MetricColumns, helps: list[str]) -> str:
    first, now = train.at(0, "loss"), train.recent("loss")
    if first is None or now is None or now - first <= _ABOVE * max(abs(first), 1.0):
        return ""
    return f"The loss is far above its start: {now:.4g} after {first:.4g}. What to try: {'; '.join(helps)}."


def _carried(train: MetricColumns, helps: list[str]) -> str:
    share = train.recent("ratio/effective_share")
    if share is None or share >= _CARRIED:
        return ""
    return (
        f"A few responses carry the loss: in effect {share:.0%} of a line's responses decide it (effective sample size of "
        f"e^(beta f)). What to try: {'; '.join(helps)}."
    )


class Health(Observer):
    """Says once what goes wrong in a training, while it can still be stopped.

    Args:
        metrics: the run's metrics.jsonl, whose lines before a resumed step count too.
        config: the run's options, by name.
    """

    def __init__(self, metrics: Path, config: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._metrics, self._config, self._say = metrics, config, say
        self._lines, self._said = MetricColumns(), set[str]()

    def started(self, event: Event) -> None:
        """Read the lines that are there."""
        if event.step:
            self._lines = read_history(self._metrics).train

    def after_step(self, event: Event) -> None:
        """Say what has become worse at this line."""
        if event.line is None:
            return
        self._lines.add(event.line)
        found = complaints(self._lines, self._config) | {"falling": falling(self._lines, self._config)}
        for key, text in found.items():
            if text and key not in self._said:
                self._said.add(key)
                self._say(f"step {event.step}: {text[0].lower()}{text[1:].removesuffix('.')}")
