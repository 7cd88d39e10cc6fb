"""Send metrics to TensorBoard, Weights & Biases and trackio; their libraries are imported only when used."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from lite_dil.base.checked import with_digest, without_digest
from lite_dil.base.errors import UserError, first_line
from lite_dil.base.files import replace_file
from lite_dil.base.install import install
from lite_dil.base.observer import Event, Observer
from lite_dil.base.strict_json import parse_json
from lite_dil.config.train_config import ResolvedConfig, tracker_names

PROJECT = "lite-dil"
IDS = "trackers.json"  # a run's names in the trackers, so that a resumed run continues there
_MODULES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
_UPLOAD_SECONDS = 300  # time for W&B's upload at the end; unsent data stays on disk, for wandb sync


class Tracker(Protocol):
    """One run in one tracker."""

    def log(self, step: int, figures: dict[str, float]) -> None:
        """Record the figures of a step."""

    def close(self, good: bool) -> None:
        """End the run; `good` says whether it succeeded."""


def check(config: ResolvedConfig) -> None:
    """Raise UserError if a requested tracker is not installed or not logged in."""
    for name in tracker_names(config.report_to):
        module = _MODULES[name]
        if importlib.util.find_spec(module) is None:
            raise UserError(f"--report-to {name}: {module} is not installed: {install(name)}")
        if name == "wandb":
            _check_login()


def _check_login() -> None:
    """Let W&B find its API key, or prompt for it in a terminal; WANDB_MODE=offline needs none."""
    import wandb

    try:
        wandb.login(verify=False)
    except wandb.Error as error:
        raise UserError(
            f"--report-to wandb: {first_line(error)} Run wandb login once, or set WANDB_MODE=offline, which keeps the figures "
            "on disk until wandb sync"
        ) from None


def _tensorboard(folder: Path, ids: dict[str, str], resumed: bool, config: dict[str, Any]) -> Tracker:
    """Write TensorBoard event files with tensorboardX, which is a tenth of tensorboard's size and needs no torch."""
    from tensorboardX import SummaryWriter

    class TensorBoard:
        def __init__(self) -> None:
            self.writer = SummaryWriter(str(folder / "tensorboard"))
            if not resumed:
                lines = "\n".join(f"| {name} | {value} |" for name, value in config.items())
                self.writer.add_text("config", f"| option | value |\n|---|---|\n{lines}", 0)

        def log(self, step: int, figures: dict[str, float]) -> None:
            for name, value in figures.items():
                self.writer.add_scalar(name, value, step)
            self.writer.flush()

        def close(self, good: bool) -> None:
            self.writer.close()

    return TensorBoard()


def _wandb(folder: Path, ids: dict[str, str], resumed: bool, config: dict[str, Any]) -> Tracker:
    import wandb

    class WeightsAndBiases:
        def __init__(self) -> None:
            settings: dict[str, Any] = {"console": "off"}
            if "finish_timeout" in wandb.Settings.model_fields:
                settings["finish_timeout"] = _UPLOAD_SECONDS
            self.run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=os.environ.get("WANDB_NAME", folder.name),
                id=ids["wandb"],
                resume="allow",
                dir=os.environ.get("WANDB_DIR", str(folder)),
                config=None if resumed else config,
                settings=wandb.Settings(**settings),
            )

        def log(self, step: int, figures: dict[str, float]) -> None:
            self.run.log(figures, step=step)

        def close(self, good: bool) -> None:
            self.run.finish(exit_code=0 if good else 1)

    return WeightsAndBiases()


def _trackio(folder: Path, ids: dict[str, str], resumed: bool, config: dict[str, Any]) -> Tracker:
    import trackio

    class Trackio:
        def __init__(self) -> None:
            self.run = trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=f"{folder.name}-{ids['trackio']}",  # trackio identifies runs by name
                config=config,
                resume="allow" if resumed else "never",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

        def log(self, step: int, figures: dict[str, float]) -> None:
            self.run.log(figures, step=step)

        def close(self, good: bool) -> None:
            self.run.finish()

    return Trackio()


_OPEN: dict[str, Callable[[Path, dict[str, str], bool, dict[str, Any]], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


class Trackers(Observer):
    """All trackers of a run. One that fails later is dropped with a message, and training continues.

    Args:
        folder: the run's folder.
        sent: lines of metrics.jsonl that the trackers already have. A tracker new to the run gets them first.
        say: shows a line to the user.

    Raises:
        UserError: a tracker cannot be opened.
    """

    writes = True

    def __init__(
        self, config: ResolvedConfig, folder: Path, sent: Sequence[dict[str, Any]], say: Callable[[str], None]
    ) -> None:
        self.say, self._open = say, dict[str, Tracker]()
        self._sent = {_which(line) for line in sent}
        names = tracker_names(config.report_to)
        if not names:
            return
        path = folder / IDS
        ids = _read_ids(path, say)
        known = set(ids)
        ids = {name: secrets.token_hex(4) for name in names} | ids
        replace_file(path, json.dumps(with_digest(ids)) + "\n")
        for name in names:
            try:
                tracker = self._open[name] = _OPEN[name](folder, ids, name in known, config.as_dict())
                for line in sent if name not in known else ():
                    tracker.log(*_figures(line))
            except _errors(name) as error:
                self.close(good=False)
                offline = "; WANDB_MODE=offline keeps the figures on disk until wandb sync" if name == "wandb" else ""
                raise UserError(f"--report-to {name}: cannot be started ({first_line(error)}){offline}") from None

    def log(self, line: dict[str, Any]) -> None:
        """Send a line of metrics to every tracker, unless it was sent before the run was resumed."""
        if _which(line) in self._sent:
            return
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(*_figures(line))
            except _errors(name) as error:
                del self._open[name]
                self.say(f"--report-to {name} failed and is dropped from here on: {first_line(error)}")

    def stopped(self, event: Event) -> None:
        """End the run as a success."""
        self.close(good=True)

    def finished(self, event: Event) -> None:
        """End the run as a success."""
        self.close(good=True)

    def failed(self, error: BaseException) -> None:
        """End the run as a failure."""
        self.close(good=False)

    def close(self, good: bool) -> None:
        """End the run in every tracker."""
        while self._open:
            name, tracker = self._open.popitem()
            try:
                tracker.close(good)
            except _errors(name) as error:
                self.say(f"--report-to {name} could not be closed: {first_line(error)}")


def _errors(name: str) -> tuple[type[Exception], ...]:
    """Return the exceptions of a tracker's library for disk, network or server failures."""
    if name == "wandb":
        import wandb

        return (wandb.Error, OSError, TimeoutError)
    return (OSError, ValueError, sqlite3.Error) if name == "trackio" else (OSError,)


def _read_ids(path: Path, say: Callable[[str], None]) -> dict[str, str]:
    """Return the identifiers that a run has in its trackers, by tracker; none, which `say` is told, if the file is damaged."""
    try:
        return without_digest(parse_json(path.read_text(encoding="utf-8"))) if path.exists() else {}
    except (OSError, ValueError) as error:
        say(f"{path} is damaged ({first_line(error)}); the trackers begin new runs")
        return {}


def _which(line: dict[str, Any]) -> tuple[int, bool]:
    return int(line["step"]), "eval_loss" in line


def _figures(line: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """Return a line's step and figures under the names of TRL's trainers: train/loss, eval/loss."""
    kind = "eval" if "eval_loss" in line else "train"
    figures = {name: float("nan") if value is None else value for name, value in line.items() if name != "step"}
    return int(line["step"]), {f"{kind}/{name.removeprefix('eval_')}": value for name, value in figures.items()}
