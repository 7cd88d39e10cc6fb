"""Pass lines of metrics to everything that records them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lite_dil.base.observer import Event, Observer


class MetricsLog(Observer):
    """Passes each line of metrics to all `takers` in order: metrics.jsonl, trackers and others."""

    writes = True

    def __init__(self, takers: Sequence[Callable[[dict[str, Any]], None]]) -> None:
        self._takers = takers

    def log(self, line: dict[str, Any]) -> None:
        """Pass on a line, of training or of an evaluation."""
        for take in self._takers:
            take(line)

    def after_step(self, event: Event) -> None:
        """Pass on the step's line, if it has one."""
        if event.line is not None:
            self.log(event.line)
