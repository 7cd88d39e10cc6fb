"""report.html and report.json of a run, while it goes on and where it ends."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from lite_dil.backends.protocol import Backend
from lite_dil.base.disk import DiskFailed, failing
from lite_dil.base.errors import TrainingDiverged, UserError
from lite_dil.base.files import replace_file
from lite_dil.base.formats import KEY, RUN
from lite_dil.base.observer import Event, Observer
from lite_dil.base.version import __version__
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.reports.outcome import FACTS, read_record
from lite_dil.runs.folder import RunFolder

REPORT = "report.html"
_LIBRARIES = {"mlx": ("mlx", "mlx-lm"), "torch": ("torch", "transformers", "peft")}


class RunReport(Observer):
    """Writes report.html while a run goes on and where it ends, by an error too.

    Args:
        facts: what `facts_of` returned.
        every: steps between reports; None writes one at the end only.
        memory: returns what the run took, for people.
        say: tells the user.
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

    def started(self, event: Event) -> None:
        """Write the report of a run that took all its steps before."""
        if event.last:
            self.write()

    def after_step(self, event: Event) -> None:
        """Write where it is due."""
        if event.due(self.every):
            self.write()

    def stopped(self, event: Event) -> None:
        """Write the report of a run that goes on another time."""
        self.facts |= {"state": "stopped", "memory": self.memory()}
        self.write()

    def finished(self, event: Event) -> None:
        """Say what memory the run took, and write its last report."""
        if memory := self.memory():
            self.say(memory)
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
        """Write report.json and report.html; a full disk ends neither this nor the training.

        With `said` the user knows already that the disk fails.
        """
        try:
            with failing(self.folder.path / REPORT):
                replace_file(self.folder.path / FACTS, json.dumps(self.facts, indent=1) + "\n")
                write_report(self.folder.path)
        except DiskFailed as error:
            if not said:
                self.say(f"{error}. The run goes on without its report")


def write_report(folder: Path) -> Path:
    """Write report.html of a run's folder from the other files there; return its path."""
    from lite_dil.reports.page import render

    path = folder / REPORT
    replace_file(path, render(read_record(folder)))
    return path


def facts_of(config: ResolvedConfig, backend: Backend, steps: int, data: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what report.json holds: what no other file of a run's folder says."""
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
