"""A training on token ids, measured on the way: the recipe of preference training, with data that no row could express."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from lite_dil.api.training import decided
from lite_dil.base.display import Display, Silent
from lite_dil.base.hashing import digest
from lite_dil.base.observer import Event, Observer, Observers
from lite_dil.batching.schedule import Schedule
from lite_dil.config.options import build
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.data.encoder import Encoder, Example
from lite_dil.data.rows import rows_name
from lite_dil.generation.policy import Policy
from lite_dil.recipes.given import Given
from lite_dil.recipes.read_data import RunData
from lite_dil.recipes.running import Recipe, Watched, run_training
from lite_dil.recipes.session import Opening, TrainingSession, open_session
from lite_dil.runs.checkpoints import Checkpoints
from lite_dil.runs.metrics_log import MetricsLog


class Measured(Observer):
    """Measures the policy after some steps and the last, and collects the metrics of all.

    Attributes:
        lines: the metrics of each step.
        points: what `measure` returned, by step.
    """

    def __init__(self, measure: Callable[[], dict[str, Any]], steps: Collection[int]) -> None:
        self._measure, self._steps = measure, steps
        self.lines, self.points = list[dict[str, Any]](), dict[int, dict[str, Any]]()

    def after_step(self, event: Event) -> None:
        """Take the step's metrics, and measure if it is time."""
        assert event.line is not None  # each step is logged
        self.lines.append(event.line)
        if event.last or event.step in self._steps:
            self.points[event.step] = self._measure()


def train(policy: Policy, pairs: Sequence[Example], options: dict[str, Any], measured: Measured) -> None:
    """Train the policy's adapter once on the pairs, in their order, with a constant rate; its run's folder is not kept."""
    given = decided(policy, "theorem.py") | options
    given |= {"data": rows_name(digest([(pair.prompt, pair.responses) for pair in pairs])), "gradient_accumulation_steps": 1}
    given |= {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "logging_steps": 1, "reference_cache": "off"}
    with tempfile.TemporaryDirectory() as folder:
        config = build(given | {"output_dir": str(Path(folder) / "run")}, {})
        order = Schedule(config, pairs).order(0)
        shuffled = [pair for _, pair in sorted(zip(order.tolist(), pairs, strict=True), key=lambda both: both[0])]
        recipe = Recipe("theorem", "", partial(_open, pairs=shuffled), _watched)
        run_training(recipe, config, Silent(), None, None, [measured], Given(policy))


def _open(opening: Opening, pairs: Sequence[Example]) -> TrainingSession:
    def read(encoder: Encoder, config: ResolvedConfig, say: Callable[[str], None], given: Given) -> RunData:
        return RunData(pairs, [], [], [], [], config)

    return open_session(replace(opening, read=read))


def _watched(session: TrainingSession, training: Any, display: Display, own: Sequence[Observer]) -> Watched:
    checkpoints = Checkpoints(session.folder, training.progress, session.save_state, session.save_adapter, session.config)
    return Observers([MetricsLog([session.folder.log]), *own, checkpoints]), checkpoints
