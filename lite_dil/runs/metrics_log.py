"""The lines of metrics, on their way to all that take them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lite_dil.base.observer import Event, Observer


class MetricsLog(Observer):
    """Hands each line of metrics to all `takers`, in their order: metrics.jsonl, and what else is given."""

    writes = True

    def __init__(self, takers: Sequence[Callable[[dict[str, Any]], None]]) -> None:
        self._takers = takers

    def log(self, line: dict[str, Any]) -> None:
        """Take a line: of training, or of an evaluation."""
        for take in self._takers:
            take(line)

    def after_step(self, event: Event) -> None:
        """Take the step's line, if it has one."""
        if event.line is not None:
            self.log(event.line)
