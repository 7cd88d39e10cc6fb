"""A run's folder: config.yaml, metrics.jsonl, checkpoints and the final adapter, safe against half-written files."""

from __future__ import annotations

import datetime
import errno
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lite_dil.base import shell
from lite_dil.base.disk import DiskFailed, failing, writing
from lite_dil.base.errors import UserError, gather
from lite_dil.base.files import (
    append,
    appending,
    make_folder,
    move,
    recover,
    remove,
    replace_file,
    replace_folder,
    sync,
    write,
)
from lite_dil.base.formats import KEY, RUN, NewerFormat
from lite_dil.base.hashing import sha256
from lite_dil.base.lock import Lock
from lite_dil.base.strict_json import parse_json
from lite_dil.data.reader import Problem
from lite_dil.runs.metrics_lines import parse_lines
from lite_dil.runs.options_file import OPTIONS_FILE, Edited, read_options, text_of
from lite_dil.runs.progress import Progress, read_progress, write_progress
from lite_dil.runs.seal import DIGESTS, Damaged, recorded, seal, unsealed

RUNS = Path("runs")
_POLICY = ("adapters", "policy")  # in a checkpoint
_STEP = re.compile(r"step-(\d+)")
# What a run writes under its own names.
_OWN = {
    *("config.yaml", "metrics.jsonl", "checkpoints", "adapter", "set_aside", "skipped_rows.jsonl", "loss_source.txt"),
    *("report.html", "report.json", "report_samples.jsonl", "held_out_pairs.json", "rollouts.jsonl"),
}


class RunFolder:
    """One run's folder.

    Attributes:
        options: the run's options by name, once `create` or `repair` has been called.
        again: the flags that continue the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.again = shell.command("--resume", str(path))
        self.options: dict[str, Any] = {}
        self._lock: Lock | None = None
        self.metrics = path / "metrics.jsonl"
        self.adapter = path / "adapter"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def new(cls, output_dir: str | None, name: str) -> RunFolder:
        """Choose a new run's folder, `output_dir` or one in runs/ whose name begins with `name`, without creating it.

        Raises UserError if it would overwrite another run.
        """
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        folder = cls(Path(output_dir) if output_dir else unused(RUNS / f"{name}-{now}"))
        folder._check_new()
        return folder

    def _check_new(self) -> None:
        if self.metrics.exists() or self.adapter.exists() or self.checkpoints.exists():
            raise UserError(
                f"--output-dir {self.path} already holds a run; continue it with --resume {self.path}, or give another folder"
            )
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--output-dir {self.path} is a file")

    @contextmanager
    def alone(self, say: Callable[[str], None] | None = None) -> Iterator[None]:
        """Let no other process write to the folder during the block, from when it exists.

        Raises UserError if another one does already.
        """
        try:
            if self.path.is_dir():
                self._hold(say)
            yield
        finally:
            if self._lock:
                self._lock.release()

    def _hold(self, say: Callable[[str], None] | None = None) -> None:
        """Take the folder's lock and remove what killed processes left unfinished."""
        self._lock = Lock(self.path, "--output-dir", say)
        for path in self.path.iterdir():
            if path.is_symlink() and path.name in _OWN:
                raise UserError(f"{path} is a link; a run writes into its own folder only: put there what it points to")
        for name in _OWN:
            recover(self.path / name)
        steps = {name.split(".")[1] for name in _names(self.checkpoints) if name.startswith(".step-")}
        for name in steps:
            recover(self.checkpoints / name)

    def create(self, options: dict[str, Any]) -> None:
        """Make the folder and write `options`, by field name, to config.yaml."""
        with writing(f"--output-dir {self.path}", "--output-dir"):
            make_folder(self.path)
        if self._lock is None:
            self._hold()
            self._check_new()  # another process may have written there meanwhile
        self.options = {**options, "output_dir": str(self.path)}
        replace_file(self.path / OPTIONS_FILE, text_of(self.options))

    def repair(self, options: dict[str, Any]) -> None:
        """Write config.yaml again, with `options`, if it was edited or cannot be read; keep the other file beside it."""
        self.options, path = options, self.path / OPTIONS_FILE
        try:
            read_options(self.path)
        except NewerFormat:
            raise
        except UserError as error:
            if path.exists():
                with writing(path):
                    move(
                        path,
                        unused(self.path / ("config.edited.yaml" if isinstance(error, Edited) else "config.damaged.yaml")),
                    )
            replace_file(path, text_of(options))

    def drop_unsaved(self) -> None:
        """Drop the metrics of a run that was killed before its first checkpoint: there is nothing to resume."""
        if not self.path.is_dir():
            return
        with self.alone():
            ours = (self.path / OPTIONS_FILE).is_file() and not self.adapter.exists() and self.latest() is None
            if ours and not (self.checkpoints.is_dir() and any(self.checkpoints.iterdir())):
                with suppress(OSError):
                    remove(self.checkpoints)
                remove(self.metrics)

    def list_skipped(self, problems: Sequence[Problem]) -> None:
        """Write skipped_rows.jsonl: the place of every row left out, and why."""
        lines = (json.dumps(problem._asdict(), ensure_ascii=False) + "\n" for problem in problems)
        replace_file(self.path / "skipped_rows.jsonl", "".join(lines))

    def log(self, line: dict[str, float]) -> None:
        """Append one object to metrics.jsonl; figures that are not finite become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
        with writing(self.metrics), appending(self.metrics) as file:
            append(file, (json.dumps(finite) + "\n").encode())

    def latest(self) -> Path | None:
        """Return the newest checkpoint, if there is one."""
        steps = self._steps()
        return self.checkpoints / f"step-{steps[-1]}" if steps else None

    def save_checkpoint(self, progress: Progress, save: Callable[[Path], None], keep: int | None) -> Path:
        """Write checkpoints/step-N completely or not at all, then delete all but the `keep` newest.

        Raises DiskFailed, and deletes none, if the new one cannot be written or is not read back as it was written.
        """
        target = self.checkpoints / f"step-{progress.step}"
        if self.metrics.exists():
            with writing(self.metrics):
                sync(self.metrics)
                sync(self.path)
            content = self.metrics.read_bytes()
            progress.metrics = [len(content), sha256([content])]

        def fill(folder: Path) -> None:
            save(folder)
            write_progress(folder, progress)
            seal(folder, self.options)

        replace_folder(target, fill)
        if keep and len(self._steps()) > keep:
            try:
                unsealed(target)
            except Damaged as error:
                raise DiskFailed(target, OSError(errno.EIO, f"read back, {error}"), "--output-dir") from None
            self.drop_old(keep)
        return target

    def drop_old(self, keep: int | None) -> None:
        """Delete all checkpoints but the `keep` newest; the newest is known to be whole."""
        for step in self._steps()[: -keep if keep else 0]:
            with writing(path := self.checkpoints / f"step-{step}"):
                remove(path)

    def save_adapter(self, save: Callable[[Path], None]) -> None:
        """Write adapter/, the result of the run."""

        def fill(folder: Path) -> None:
            save(folder)
            seal(folder, self.options)

        replace_folder(self.adapter, fill)

    def whole(self, checkpoint: Path, say: Callable[[str], None]) -> Path:
        """Return `checkpoint`, or if it is damaged the newest whole one before it; `say` is told which are passed over.

        Raises UserError if none is whole.
        """
        problems: list[str] = []
        last = _number(checkpoint)
        for step in reversed([step for step in self._steps() if step <= last]):
            path = self.checkpoints / f"step-{step}"
            if (number := _format(path)) > RUN:
                read_progress(path)  # says so
            try:
                if unsealed(path) is None and number >= 3:
                    raise Damaged("digests.json is missing")
                read_progress(path)
                # A checkpoint appears complete, so one without progress.json has lost it.
                for lost in self.checkpoints.glob("step-*"):
                    if _STEP.fullmatch(lost.name) and not (lost / "progress.json").exists() and _number(lost) > step:
                        problems.append(f"{lost} is damaged: progress.json is missing")
                for problem in problems:
                    say(f"{problem}; going back to {path.name}")
                return path
            except (Damaged, UserError) as error:
                problems.append(f"{path} is damaged: {error}")
        raise UserError(gather(problems, f"{self.path} has no checkpoint to continue from; start a new run:"))

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """If the disk fails in the block, say from which checkpoint the run can continue."""
        try:
            with failing():
                yield
        except DiskFailed as error:
            latest = self.latest()
            if latest:
                safe = f". The run is safe up to {latest.name}: {self.again} continues from it"
            else:
                safe = ". No checkpoint was saved before; choose another place with --output-dir" if self.path.exists() else ""
            raise UserError(f"{error}{safe}") from None

    def _steps(self) -> list[int]:
        found = (path.parent.name.removeprefix("step-") for path in self.checkpoints.glob("step-*/progress.json"))
        return sorted(int(step) for step in found if step.isdigit())

    def rewind(self, progress: Progress, say: Callable[[str], None]) -> list[dict[str, Any]]:
        """Take the lines of metrics.jsonl after the checkpoint out, which the resumed run writes again.

        Return all lines, also those. A damaged file is kept, and later checkpoints and their lines are moved to set_aside/.
        """
        content = self.metrics.read_bytes() if self.metrics.exists() else b""
        lines, bad = parse_lines(content)
        size, digest = progress.metrics or (0, sha256([b""]))
        if size and not content:
            say(f"{self.metrics} is missing: the report begins after step {progress.step}")
        elif bad or sha256([content[:size]]) != digest:
            kept = unused(self.path / "metrics.damaged.jsonl")
            replace_file(kept, content)
            what = f"{bad} lines cannot be read" if bad else "lines before the checkpoint are not those that the run wrote"
            say(f"{self.metrics}: {what}; the others are used, and the file as it was is {kept.name}")
        later = [line for line in lines if line["step"] > progress.step]
        newer = [step for step in self._steps() if step > progress.step]
        if newer:
            aside = unused(self.path / "set_aside")
            with writing(aside):
                make_folder(aside)
                for step in newer:
                    move(self.checkpoints / f"step-{step}", aside / f"step-{step}")
                write(aside / self.metrics.name, _encoded(later))
            say(f"what came after step {progress.step} is in {aside}")
        if content or lines:
            replace_file(self.metrics, _encoded([line for line in lines if line["step"] <= progress.step]))
        return lines


def find_checkpoint(where: str, output_dir: str | None) -> Path | None:
    """Return the checkpoint that ``--resume`` selects by a checkpoint's folder, a run's folder, or "auto".

    "auto" takes the newest one in `output_dir`, or in the newest run under runs/ that has one, or None.
    """
    if where == "auto":
        if output_dir:
            return RunFolder(Path(output_dir)).latest()
        found = [c for run in RUNS.glob("*/") if (c := RunFolder(run).latest())]
        return max(found, key=lambda checkpoint: checkpoint.stat().st_mtime, default=None)
    path = Path(where)
    if (path / "progress.json").is_file():
        path = path.resolve()  # so that a checkpoint named from within the run's folder has a parent
        if path.parent.name != "checkpoints" or not _STEP.fullmatch(path.name):
            raise UserError(f"--resume {where}: a checkpoint is resumed as checkpoints/step-N of its run; move it back there")
        return path
    if latest := RunFolder(path).latest():
        return latest
    raise UserError(f"--resume {where}: no checkpoint there; give a run's folder, one of its checkpoints, or auto")


def adapter_of(checkpoint: Path) -> Path:
    """Return the folder of the trained adapter in a checkpoint: adapters/policy, or adapter in runs of format 1."""
    found = checkpoint.joinpath(*_POLICY)
    return found if found.is_dir() or not (checkpoint / "adapter").is_dir() else checkpoint / "adapter"


def checkpoint_of(adapter: Path) -> Path | None:
    """Return the checkpoint that holds this folder of a trained adapter, or None."""
    names = (_POLICY, ("adapter",))
    found = next((adapter.parents[len(name) - 1] for name in names if adapter.parts[-len(name) :] == name), None)
    return found if found and found.parent.name == "checkpoints" and _STEP.fullmatch(found.name) else None


def say_unfinished(adapter: Path | None, run: RunFolder | None, say: Callable[[str], None]) -> None:
    """Say so if an adapter is the newest checkpoint of a run that has not finished."""
    checkpoint = checkpoint_of(adapter) if adapter else None
    if checkpoint and run and not run.adapter.exists() and checkpoint == run.latest():
        say(f"{run.path} has not finished: using its newest checkpoint, {checkpoint.name}")


def recorded_with(adapter: Path) -> dict[str, Any]:
    """Return the options that an adapter's seal, or its checkpoint's, records; none if it has none, as one from elsewhere.

    Raises UserError if one of the adapter's files is not what was written.
    """
    checkpoint = checkpoint_of(adapter)
    part = adapter.relative_to(checkpoint).as_posix() if checkpoint else ""
    try:
        return unsealed(checkpoint or adapter, part) or {}
    except Damaged as error:
        raise UserError(
            f"adapter {adapter} is damaged: {error}. Give an older checkpoint, or --resume the run, which writes it again; "
            f"if you changed it on purpose, delete {DIGESTS}"
        ) from None


def trained_options(adapter: Path) -> dict[str, Any]:
    """Return what `recorded_with` does, without reading the files again; none if the seal itself is damaged."""
    try:
        return recorded(checkpoint_of(adapter) or adapter) or {}
    except Damaged:
        return {}


def _format(checkpoint: Path) -> int:
    """Return the format of a checkpoint's progress.json; the latest if it cannot be read."""
    try:
        return int(parse_json((checkpoint / "progress.json").read_text(encoding="utf-8")).get(KEY, 1))
    except (OSError, ValueError, TypeError, AttributeError, OverflowError):
        return RUN


def _number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []


def _encoded(lines: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def unused(path: Path) -> Path:
    """Return `path`, or the first of path-2, path-3, ... that does not exist (two runs in one second)."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
