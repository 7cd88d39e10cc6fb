"""A run's folder: config.yaml, metrics.jsonl, checkpoints and the final adapter, safe against half-written files."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lite_dil.base.disk import DiskFailed, failing, writing
from lite_dil.base.errors import UserError
from lite_dil.base.files import append, appending, make_folder, remove, replace_file, replace_folder, write
from lite_dil.base.formats import KEY, RUN, check_format
from lite_dil.data.reader import Problem

RUNS = Path("runs")
_POLICY = ("adapters", "policy")  # in a checkpoint
_STEP = re.compile(r"step-(\d+)")


@dataclass
class Progress:
    """A run's progress, apart from the backend's state; saved with each checkpoint.

    `window` holds the sums of the metrics since the last logged line, so that a resumed run logs the same means. Fingerprints
    are of the training data, the held-out data, the model's weights and the initial adapter; "" for none, or unknown.
    """

    step: int = 0
    num_tokens: int = 0
    fingerprint: str = ""
    held_out: str = ""
    weights: str = ""
    init_adapter: str = ""
    window: dict[str, list[float]] = field(default_factory=dict)


class RunFolder:
    """One run's folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
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
        if folder.metrics.exists() or folder.adapter.exists() or folder.checkpoints.exists():
            raise UserError(
                f"--output-dir {folder.path} already holds a run; continue it with --resume {folder.path}, or give another "
                "folder"
            )
        if folder.path.exists() and not folder.path.is_dir():
            raise UserError(f"--output-dir {folder.path} is a file")
        return folder

    def create(self, options: dict[str, Any]) -> None:
        """Make the folder and write `options`, by field name, to config.yaml."""
        import yaml

        with writing(f"--output-dir {self.path}", "--output-dir"):
            make_folder(self.path)
        saved = {KEY: RUN, **options, "output_dir": str(self.path)}
        replace_file(self.path / "config.yaml", yaml.safe_dump(saved, sort_keys=False, allow_unicode=True))

    def drop_unsaved(self) -> None:
        """Drop the metrics of a run that was killed before its first checkpoint: there is nothing to resume."""
        ours = (self.path / "config.yaml").is_file() and not self.adapter.exists() and self.latest() is None
        left = [*self.checkpoints.iterdir()] if self.checkpoints.is_dir() else []
        if ours and all(path.name.startswith(".step-") and path.suffix == ".partial" for path in left):
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
        """Write checkpoints/step-N completely or not at all, then delete all but the `keep` newest."""
        target = self.checkpoints / f"step-{progress.step}"

        def fill(folder: Path) -> None:
            save(folder)
            write(folder / "progress.json", json.dumps({KEY: RUN, **asdict(progress)}))

        replace_folder(target, fill)
        for step in self._steps()[: -keep if keep else 0]:
            with writing(old := self.checkpoints / f"step-{step}"):
                remove(old)
        return target

    def save_adapter(self, save: Callable[[Path], None]) -> None:
        """Write adapter/, the result of the run."""
        replace_folder(self.adapter, save)

    @contextmanager
    def going_on(self) -> Iterator[None]:
        """If the disk fails in the block, say from which checkpoint the run can continue."""
        try:
            with failing():
                yield
        except DiskFailed as error:
            latest = self.latest()
            if latest:
                safe = f". The run is safe up to {latest.name}: --resume {self.path} continues from it"
            else:
                safe = ". No checkpoint was saved before; choose another place with --output-dir" if self.path.exists() else ""
            raise UserError(f"{error}{safe}") from None

    def _steps(self) -> list[int]:
        found = (path.parent.name.removeprefix("step-") for path in self.checkpoints.glob("step-*/progress.json"))
        return sorted(int(step) for step in found if step.isdigit())

    def rewind(self, step: int) -> list[dict[str, Any]]:
        """Drop the lines of metrics.jsonl after `step`, which the resumed run writes again. Return all lines, also those."""
        if not self.metrics.exists():
            return []
        lines = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:  # the last line of a killed run may be incomplete
                break
        replace_file(self.metrics, "".join(json.dumps(line) + "\n" for line in lines if line["step"] <= step))
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
        path = path.absolute()  # so that a checkpoint named from within the run's folder has a parent
        latest = RunFolder(path.parent.parent).latest()
        if latest and latest.name != path.name:
            raise UserError(f"--resume {where}: the run has reached {latest.name}; move the later checkpoints away first")
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


def read_progress(checkpoint: Path) -> Progress:
    """Read a checkpoint's progress.json."""
    try:
        content = dict(json.loads((checkpoint / "progress.json").read_text(encoding="utf-8")))
        check_format(content, RUN, checkpoint)
        content.pop(KEY, None)
        return Progress(**content)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{checkpoint / 'progress.json'}: cannot be read ({error})") from None


def unused(path: Path) -> Path:
    """Return `path`, or the first of path-2, path-3, ... that does not exist (two runs in one second)."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
