"""Run an export from options to the finished folder: checked, described, and refused if it is not the trained model."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lite_dil.backends.head_files import has_head
from lite_dil.base.disk import failing
from lite_dil.base.errors import UserError, did_you_mean, gather
from lite_dil.base.files import finish, make_folder, remove, sweep, work_folder
from lite_dil.export.check import Check
from lite_dil.export.exporting import Export, ExportOptions, describe
from lite_dil.export.formats import EXPORT_FORMATS
from lite_dil.export.reward import RewardExport, ScoreCheck
from lite_dil.export.reward_card import write_reward_card
from lite_dil.generation.policy import AdapterSource, Policy

# The formats that an option applies to.
_OF = {
    "to": ("adapter",),
    "weights_dtype": ("merged", "mlx", "reward"),
    "merge_into": ("merged", "mlx", "gguf", "ollama", "reward"),
    "bits": ("mlx",),
    "outtype": ("gguf", "ollama"),
    "llama_cpp": ("gguf", "ollama"),
}
_FLAGS = {"weights_dtype": "--dtype"}


class Refused(UserError):
    """The exported model differs from the trained one."""


def export(options: ExportOptions, source: AdapterSource, say: Callable[[str], None], trained: Policy | None = None) -> Path:
    """Export an adapter by `options`, compare the result with the trained model, and return its folder.

    Args:
        trained: the source's model and adapter in memory, which stay there; None loads them for a while.

    Raises:
        UserError: the options conflict, or the export cannot be made.
        Refused: the result differs from the trained model; it is left in OUTPUT.refused.
    """
    check_options(options)
    _check_kind(options.format, source)
    output = options.output
    with _work_folder(output) as work:
        made = work / "made" / output.name
        make_folder(made)
        reward = RewardExport(options, source, work, made, say) if options.format == "reward" else None
        check: Check | ScoreCheck | None = (reward or Export(options, source, work, made, say, trained)).make()
        refused = check is not None and not check.ok
        target = _refused(output) if refused else output
        if not refused:
            if reward:
                write_reward_card(made, source, reward.architecture, reward.pad, check)
            else:
                describe(made, source, options.format, check)
        if target.exists():  # an empty folder, or an earlier refused export
            remove(target)
        finish(made, target)
    size = sum(path.stat().st_size for path in target.rglob("*")) / 1e9
    say(f"check: {check}" if check else "check: skipped (--no-check); whether this is the trained model is unknown")
    if check and not check.ok:
        # The checkpoint's weights lie on the 16-bit grid: a change of less than half a grid step is rounded away.
        lost = not check.faults and check.mean <= check.tolerance and 0 < check.share < 1 and not reward
        hint = "; rounding may have erased the adapter: try float32 weights, or --format adapter" if lost else ""
        why = "; ".join(check.faults) or "this is not the trained model"
        raise Refused(f"refused: {why}; the result is in {target}{hint}")
    say(f"{target}: {options.format}, {size:.2f} GB")
    return target


def _check_kind(format: str, source: AdapterSource) -> None:
    """Raise UserError unless the adapter is of the kind that the format is for."""
    assert source.adapter is not None
    if has_head(source.adapter) and format != "reward":
        raise UserError(f"{source.adapter} is a reward model, which writes no text: --format reward, not {format}")
    if format == "reward" and not has_head(source.adapter):
        raise UserError(f"--format reward: {source.adapter} is no reward model; lite-dil reward trains one")


@contextlib.contextmanager
def _work_folder(output: Path) -> Iterator[Path]:
    """Yield a hidden folder on the disk of `output` that is deleted at the end, even if SIGTERM ends the program."""

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    target = output.absolute()
    before: Any = None
    with contextlib.suppress(ValueError):  # not in the main thread, where Python allows no handlers
        before = signal.signal(signal.SIGTERM, stop)
    try:
        with (
            work_folder(target, f"--output {output}: {target.parent}", "--output") as work,
            failing(f"--output {output}", "--output", "Nothing of it is left there"),
        ):
            yield work
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def check_options(options: ExportOptions, more: Sequence[str] = ()) -> None:
    """Raise UserError if options conflict, for the problems in `more`, and if --output is taken.

    What killed exports to this folder left is removed.
    """
    sweep(options.output.absolute())
    if options.format not in EXPORT_FORMATS:
        raise UserError(
            f"--format {options.format}{did_you_mean(options.format, EXPORT_FORMATS)} is not one of "
            f"{', '.join(EXPORT_FORMATS)}"
        )
    problems = [
        f"{flag} is for --format {' and '.join(formats)}; leave it out with {options.format}"
        for name, formats in _OF.items()
        if getattr(options, name) is not None and options.format not in formats
        for flag in [_FLAGS.get(name, f"--{name.replace('_', '-')}")]
    ]
    if options.no_check and (options.check_rows is not None or options.check_data is not None):
        problems.append("--no-check skips the check; leave it out, or --check-rows and --check-data")
    if options.check_rows is not None and options.check_rows < 1:
        problems.append(f"--check-rows {options.check_rows}: expected at least 1; --no-check skips the check")
    if options.no_check and options.push_to_hub:
        problems.append("--push-to-hub uploads only what passed the check; leave --no-check out")
    problems += more
    if options.format in ("gguf", "ollama"):
        from lite_dil.export.gguf import KINDS, QUANTISED

        if options.outtype is not None and options.outtype not in KINDS | QUANTISED:
            near = did_you_mean(options.outtype, KINDS | QUANTISED)
            problems.append(f"--outtype {options.outtype}{near}: expected one of {', '.join(KINDS | QUANTISED)}")
    problems += _not_free(options.output)
    if problems:
        raise UserError(gather(problems, "export cannot start:") if len(problems) > 1 else problems[0])
    if options.push_to_hub:
        from lite_dil.export.push import check as check_name

        check_name(options.push_to_hub)


def _not_free(output: Path) -> list[str]:
    """Return the problems with --output: an export replaces only an empty folder."""
    if output.name in ("", "..") or output.is_symlink() or output.is_mount():
        return [f"--output {output}: expected the name of a new folder"]
    return [
        f"--output: {folder} already exists; give a new folder"
        for folder, mark in ((output, ""), (_refused(output), "export.json"))
        if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or (mark and (folder / mark).is_file())))
    ]


def _refused(output: Path) -> Path:
    """Return the folder for a refused export."""
    return output.with_name(f"{output.name}.refused")
