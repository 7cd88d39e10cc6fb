"""Write report.html and report.json during a run and at its end."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from lite_dil.backends.protocol import Backend
from lite_dil.base.disk import DiskFailed, failing
from lite_dil.base.display import unheard
from lite_dil.base.errors import TrainingDiverged, UserError
from lite_dil.base.files import replace_file
from lite_dil.base.formats import KEY, RUN
from lite_dil.base.observer import Event, Observer
from lite_dil.base.version import __version__
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.reports.record import digests_of, other_files, read_facts, read_record, write_facts
from lite_dil.runs.folder import RunFolder
from lite_dil.runs.history import metrics_of, size_and_hash, wrong_metrics

REPORT = "report.html"
_LIBRARIES = {"mlx": ("mlx", "mlx-lm"), "torch": ("torch", "transformers", "peft")}


class RunReport(Observer):
    """Writes report.html during a run and when it ends, even with an error.

    Args:
        facts: the result of `facts_of`.
        every: steps between reports; None writes only one at the end.
        memory: returns a line on the run's memory.
        say: shows a line to the user.
    """

    writes = True

    def __init__(
        self,
        folder: RunFolder,
        facts: dict[str, Any],
        every: int | None,
        memory: Callable[[], str],
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.facts, self.every, self.memory, self.say = folder, facts, every, memory, say
        self._told: set[str] = set()
        self._noted: Any = None
        self._others: dict[str, str] = {}

    def started(self, event: Event) -> None:
        """Write the report of a run whose steps were all taken before; in others, note the metrics that were kept."""
        if event.last:
            self._check_metrics()
            self.write()
        else:
            self._write_facts(metrics_of(self.folder.path))

    def after_step(self, event: Event) -> None:
        """Write if due."""
        if event.due(self.every):
            self.write()

    def stopped(self, event: Event) -> None:
        """Write the report of a stopped run."""
        self.facts |= {"state": "stopped", "memory": self.memory()}
        self.write()

    def finished(self, event: Event) -> None:
        """Show the run's memory, and write its final report."""
        if memory := self.memory():
            self.say(memory)
        if event.steps < (planned := self.facts["steps"]):
            self.facts |= {"steps": event.steps, "why": f"It ended before the {planned} steps that were planned."}
        self.facts |= {"state": "finished", "memory": memory}
        self.write()

    def failed(self, error: BaseException) -> None:
        """Write why the run ended."""
        if isinstance(error, TrainingDiverged):
            self.facts |= {"state": "diverged", "why": str(error)}
        elif isinstance(error, KeyboardInterrupt):
            self.facts |= {"state": "interrupted"}
        else:
            self.facts |= {"state": "failed", "why": str(error) if isinstance(error, UserError) else type(error).__name__}
        self.write(said=isinstance(error, DiskFailed))

    def write(self, said: bool = False) -> None:
        """Write report.json and report.html; a full disk does not end the training.

        `said` means that the user already knows about the disk failure.
        """
        try:
            with failing(self.folder.path / REPORT):
                metrics = metrics_of(self.folder.path)
                self._write_facts(metrics)
                write_report(self.folder.path, self._tell, metrics)
        except DiskFailed as error:
            if not said:
                self.say(f"{error}. The run continues without its report")

    def _write_facts(self, metrics: bytes | None) -> None:
        self.facts["metrics"] = self._noted or size_and_hash(metrics)
        self.facts["files"] = digests_of(self.folder.path) | self._others
        write_facts(self.folder.path, self.facts)

    def _check_metrics(self) -> None:
        """Keep the digests in report.json of files that are others by now, so that this stays known."""
        with suppress(UserError):  # there is no report yet, or it is damaged and written anew
            facts = read_facts(self.folder.path)
            noted = facts.get("metrics")
            self._noted = noted if wrong_metrics(self.folder.path, noted) else None
            self._others = other_files(self.folder.path, facts)

    def _tell(self, damage: str) -> None:
        if damage not in self._told:
            self._told.add(damage)
            self.say(f"warning: {damage}")


def write_report(folder: Path, say: Callable[[str], None] = unheard, metrics: bytes | None = None) -> Path:
    """Write a run's report.html from the other files in its folder; return its path.

    `say` is told what is damaged. `metrics` is the content of metrics.jsonl if it has been read.
    """
    from lite_dil.reports.page import render

    record, path = read_record(folder, metrics), folder / REPORT
    for damage in record.damage:
        say(damage)
    replace_file(path, render(record))
    return path


def facts_of(config: ResolvedConfig, backend: Backend, steps: int, data: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the content of report.json, the facts that no other file of the run has."""
    names = _LIBRARIES["mlx" if config.backend == "mlx" else "torch"]
    versions = [f"{name} {metadata.version(name)}" for name in names]
    return {
        KEY: RUN,
        "version": __version__,
        "state": "running",
        "why": "",
        "steps": steps,
        "device": backend.description,
        "layout": backend.layout,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores",
        "software": ", ".join([f"Python {sys.version.split()[0]}", *versions]),
        "memory": "",
        "data": data,
    }
