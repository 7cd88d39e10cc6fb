"""A training on fresh pairs, given as token ids, in their order; measured on the way."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import lite_dil as dil
from lite_dil.base.streams import epoch_order
from lite_dil.generation.policy import Policy


class Measured(dil.Observer):
    """Measures the policy after some steps and the last, and collects the metrics of all.

    Attributes:
        lines: the metrics of each step.
        points: what `measure` returned, by step.
    """

    def __init__(self, measure: Callable[[], dict[str, Any]], steps: Collection[int]) -> None:
        self._measure, self._steps = measure, steps
        self.lines, self.points = list[dict[str, Any]](), dict[int, dict[str, Any]]()

    def after_step(self, event: dil.Event) -> None:
        """Take the step's metrics, and measure if it is time."""
        assert event.line is not None  # each step is logged
        self.lines.append(event.line)
        if event.last or event.step in self._steps:
            self.points[event.step] = self._measure()


def train(policy: Policy, pairs: Sequence[Mapping[str, Any]], options: dict[str, Any], measured: Measured) -> None:
    """Train the policy's adapter once on the pairs, in their order, with a constant rate; its run's folder is not kept."""
    assert policy.options is not None
    order = epoch_order(policy.options.seed, 0).permutation(len(pairs)).tolist()  # in which the epoch takes the rows
    rows = [pair for _, pair in sorted(zip(order, pairs, strict=True), key=lambda both: both[0])]
    options = options | {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "logging_steps": 1, "reference_cache": "off"}
    options |= {"epochs": 1, "gradient_accumulation_steps": 1, "eval_fraction": 0.0, "report_samples": 0}
    longest = max(len(pair["prompt_ids"]) + max(len(pair["chosen_ids"]), len(pair["rejected_ids"])) for pair in pairs)
    if longest > (most := policy.options.max_length):
        raise dil.UserError(f"a pair of {longest} tokens would be cut to {most}; give a smaller --tokens or --longest")
    with tempfile.TemporaryDirectory() as folder:
        dil.train(policy, rows, observers=[measured], output_dir=Path(folder) / "run", **options)
