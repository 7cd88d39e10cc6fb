"""A finished training, as an object for the calling program."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lite_dil.base import html
from lite_dil.base.display import Display
from lite_dil.base.errors import UserError
from lite_dil.base.observer import Observer
from lite_dil.config import adapter_source
from lite_dil.export.exporting import ExportOptions
from lite_dil.export.making import export
from lite_dil.generation.policy import Policy
from lite_dil.reports.run_report import REPORT
from lite_dil.runs.folder import RunFolder

# Figures whose last values a notebook shows.
_FIGURES = ["loss", "rewards/accuracies", "log_ratio/chosen", "log_ratio/rejected"]
_FIGURES += ["accuracy", "reward/chosen", "reward/rejected", "length_correlation"]  # of a reward model
_SHOWN = ["step", *_FIGURES, *(f"eval_{name}" for name in _FIGURES)]


@dataclass(frozen=True)
class Run:
    """A training that ended, in memory and in its folder.

    Attributes:
        policy: the trained policy.
        folder: everything that the run wrote: config.yaml, metrics.jsonl, checkpoints, the adapter, the report.
        stopped: whether Ctrl-C ended it early, after saving.
        say: called with each line for people.
        go_on: continues from a checkpoint; see `resume`.
    """

    policy: Policy
    folder: Path
    stopped: bool
    say: Callable[[str], None] = field(repr=False)
    go_on: Callable[[Path, Display | None, Sequence[Observer]], Run] = field(repr=False)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl in order, including those of evaluations, whose names begin with ``eval_``.

        Losses and log-ratios are means over pairs or responses, in nats; None is a value that was not finite.
        """
        path = RunFolder(self.folder).metrics
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def frame(self) -> Any:
        """Return the metrics as a pandas DataFrame, one row per line. Raises UserError if pandas is not installed."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError:
            raise UserError("frame() needs pandas: pip install pandas; run.metrics is a list of dicts") from None
        return pandas.DataFrame(self.metrics)

    @property
    def report(self) -> Path:
        """The path of the run's report."""
        return self.folder / REPORT

    def _repr_html_(self) -> str:
        """Return the HTML that a notebook shows."""
        rows: dict[str, object] = {"folder": self.folder, "state": "stopped, and saved" if self.stopped else "finished"}
        last: dict[str, Any] = {}
        for line in self.metrics:
            last |= line
        for name in _SHOWN:
            if last.get(name) is not None:
                rows[name] = f"{last[name]:,.4g}"
        if self.report.is_file():
            rows["report"] = html.Link(self.report)
        return html.facts("Run", rows)

    def resume(self, *, display: Display | None = None, observers: Sequence[Observer] = ()) -> Run:
        """Continue from the newest checkpoint as if the run had never stopped; return the new `Run`.

        Rows from a generator are gone: give them to `lite_dil.train` again, with ``resume=run.folder``.

        Raises UserError if there is no checkpoint.
        """
        checkpoint = RunFolder(self.folder).latest()
        if checkpoint is None:
            raise UserError(f"{self.folder} has no checkpoint to continue from")
        checkpoint = RunFolder(self.folder).whole(checkpoint, display.say if display else self.say)
        return self.go_on(checkpoint, display, observers)

    def export(self, folder: str | Path, *, format: str = "merged", **options: Any) -> Path:
        """Convert the adapter for other programs and compare the result with the trained model; return the folder.

        The trained model is the policy if that is open and still as this run left it; else it is loaded for a while. The check
        loads the result next to it; call ``run.policy.close()`` first to make room.

        Args:
            folder: a new one.
            format: "adapter", "merged", "mlx", "gguf" or "ollama"; of a reward model "reward".
            **options: others of `lite_dil.export.exporting.ExportOptions`, such as ``bits=4`` or ``check_rows=20``.

        Raises:
            UserError: the export failed, or its result differs from the trained model and is kept in FOLDER.refused.
        """
        made = ExportOptions(format, Path(folder), **options)
        return export(made, adapter_source.find(str(self.folder), {}), self.say, self._trained())

    def _trained(self) -> Policy | None:
        """Return the policy if it equals what an export would load: unsloth and offloaded embeddings change its layers."""
        policy, options = self.policy, self.policy.options
        same = policy.open and policy.trained and policy.run is not None and policy.run.path == self.folder
        if not same or options is None or options.unsloth or options.offload_embeddings or policy.backend.strength != 1:
            return None
        return policy
