"""Everything that a run leaves for people while it goes: metrics.jsonl, trackers, sample answers and report.html."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import Any

from lite_dil import __version__
from lite_dil.backends.protocol import Backend
from lite_dil.base.disk import DiskFailed, failing
from lite_dil.base.errors import TrainingDiverged, UserError
from lite_dil.base.files import replace_file
from lite_dil.base.formats import KEY, RUN
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.reports.findings import FACTS, read_record
from lite_dil.reports.samples import Samples
from lite_dil.reports.trackers import Trackers
from lite_dil.runs.folder import RunFolder

REPORT = "report.html"
_LIBRARIES = {"mlx": ("mlx", "mlx-lm"), "torch": ("torch", "transformers", "peft")}


class Watcher:
    """Takes down one run, in a ``with`` block: where that ends by an error, trackers and report end with it.

    Args:
        facts: what `facts_of` returned.
        sent: lines of metrics that a run that is resumed had logged before, those that it will log again with them.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: ResolvedConfig,
        facts: dict[str, Any],
        samples: Samples,
        sent: Sequence[dict[str, Any]],
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.facts, self.samples, self.say = folder, facts, samples, say
        self.trackers = Trackers(config, folder.path, sent, say)

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, TrainingDiverged):
            self.facts |= {"state": "diverged", "why": str(error)}
        elif isinstance(error, KeyboardInterrupt):
            self.facts |= {"state": "interrupted"}
        elif error is not None:
            self.facts |= {"state": "failed", "why": str(error) if isinstance(error, UserError) else type(error).__name__}
        if error is not None:
            self.write(said=isinstance(error, DiskFailed))
        self.trackers.close(good=error is None)

    def log(self, line: dict[str, Any]) -> None:
        """Take a line of metrics."""
        self.folder.log(line)
        self.trackers.log(line)

    def look(self, step: int, stop: Callable[[], bool]) -> None:
        """Let the policy answer the sample prompts after `step` steps, unless `stop` ends it, and write the report."""
        self.write(lambda: self.samples.refresh(step, stop))

    def finish(self, stopped: bool, memory: str = "") -> None:
        """Write the report of a run that is finished, or was stopped and saved; `memory` is what `memory_line` returned."""
        self.facts |= {"state": "stopped" if stopped else "finished", "memory": memory}
        self.write()

    def write(self, before: Callable[[], None] | None = None, said: bool = False) -> None:
        """Write report.json and report.html, after what `before` does; a full disk ends neither this nor the training.

        With `said` the user knows already that the disk fails.
        """
        try:
            with failing(self.folder.path / REPORT):
                if before:
                    before()
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
