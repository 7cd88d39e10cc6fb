"""The runs below a folder with their final figures, for a list of them side by side."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError
from lite_dil.config.resume import other_options
from lite_dil.objectives.own import shown
from lite_dil.reports.record import FACTS, RunRecord, read_facts
from lite_dil.reports.scores import read_evaluations, score_words
from lite_dil.runs.folder import RunFolder
from lite_dil.runs.history import History, checked_history, metrics_of
from lite_dil.runs.options_file import OPTIONS_FILE, read_options

_DEPTH = 3  # folders below the given one: a comparison's are in NAME/runs/
_UNFINISHED = "unfinished"


@dataclass(frozen=True)
class ListedRun:
    """A run and its last figures.

    Attributes:
        folder: its folder.
        changed: when it last wrote metrics or its options, in seconds since 1970.
        state: "finished", "stopped" (both saved), "interrupted", "diverged", "failed", "unfinished" (it is in progress or was
            killed), or "damaged".
        why: of a damaged run what is wrong with it, else "".
        loss, model, data: as in its config.yaml; "" of a damaged run.
        step, steps: the steps taken and planned; None if unknown.
        seconds: of the steps taken.
        figures: held-out "accuracy", and the held-out or else recent training "log_ratio/chosen" and "log_ratio/rejected" in
            nats per token or per response; those that it has.
        held_out: whether the log-ratios are of held-out data.
        per: "token" or "response", the unit of the log-ratios.
        evaluated: the first figure of its newest evaluation in words, base and tuned; "" without one.
    """

    folder: Path
    changed: float
    state: str
    why: str = ""
    loss: str = ""
    model: str = ""
    data: str = ""
    step: int | None = None
    steps: int | None = None
    seconds: float = 0.0
    figures: dict[str, float] | None = None
    held_out: bool = False
    per: str = "token"
    evaluated: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return it as a JSON object, with null for what is unknown."""
        return vars(self) | {"folder": str(self.folder), "figures": self.figures or {}}


def list_runs(folder: Path) -> list[ListedRun]:
    """Return the runs in `folder`, or the run that it is, newest first; damaged ones too.

    Raises:
        UserError: there is no such folder, or no run in it.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; lite-dil train writes its runs into runs/, or into --output-dir")
    found = [_read(path) for path in _folders(folder, _DEPTH)]
    if not found:
        raise UserError(f"{folder}: no runs in it; lite-dil train writes its runs into runs/, or into --output-dir")
    return sorted(found, key=lambda run: run.changed, reverse=True)


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the folders of runs: those that hold what training writes."""
    run = RunFolder(folder)
    if any(path.exists() for path in (run.metrics, run.checkpoints, folder / FACTS)) or _has_options(folder):
        yield folder
    elif depth:
        try:
            below = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        except OSError:  # a folder that this user may not read
            return
        for path in below:
            yield from _folders(path, depth - 1)


def _has_options(folder: Path) -> bool:
    return (folder / OPTIONS_FILE).is_file() and (folder / "adapter").is_dir()


def _read(folder: Path) -> ListedRun:
    run = RunFolder(folder)
    written = [path.stat().st_mtime for path in (run.metrics, folder / OPTIONS_FILE) if path.exists()]
    changed = max(written, default=folder.stat().st_mtime)
    try:
        config = read_options(folder)
        facts = read_facts(folder) if (folder / FACTS).exists() else {}
        history, wrong = checked_history(folder, metrics_of(folder), facts.get("metrics"))
        if wrong := wrong or other_options(folder, config):
            raise UserError(wrong)
        return _listed(folder, changed, config, facts, history)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, UserError) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        return ListedRun(folder, changed, "damaged", why.replace(f"{folder}{os.sep}", ""))


def _listed(folder: Path, changed: float, config: dict[str, Any], facts: dict[str, Any], history: History) -> ListedRun:
    record = RunRecord(folder, config, {"data": []} | facts, history)
    (chosen, place), (rejected, _) = record.figure("log_ratio/chosen"), record.figure("log_ratio/rejected")
    figures = {
        "accuracy": history.held_out.last(f"eval_{record.accuracy_name}"),
        "log_ratio/chosen": chosen,
        "log_ratio/rejected": rejected,
    }
    return ListedRun(
        folder,
        changed,
        _state(folder, facts),
        loss=shown(config["loss"]),
        model=str(config.get("model") or ""),
        data=str(config.get("data") or ""),
        step=history.step,
        steps=facts.get("steps"),
        seconds=history.seconds,
        figures={name: value for name, value in figures.items() if value is not None},
        held_out=place == "held out",
        per=record.per,
        evaluated=score_words(read_evaluations(folder)),
    )


def _state(folder: Path, facts: dict[str, Any]) -> str:
    """Return how the run ended. Its own word may be from before: a killed run writes none, and a full disk takes no report."""
    state = facts.get("state")
    if state in ("running", None):
        return "finished" if not facts and (folder / "adapter").is_dir() else _UNFINISHED
    return str(state)
