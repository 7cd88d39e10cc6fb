"""What a run reads, recognised by its content when it is resumed, wherever its files are by then."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError, gather
from lite_dil.config.resume import paths_of
from lite_dil.config.train_config import ResolvedConfig, flag
from lite_dil.data.encoder import fingerprint
from lite_dil.data.rows import is_rows_name
from lite_dil.models.fingerprint import base_of
from lite_dil.models.fingerprint import fingerprint as files_fingerprint
from lite_dil.recipes.read_data import RunData
from lite_dil.runs.folder import Progress, RunFolder, read_progress
from lite_dil.training.reference_cache import cache_folder

_FOLLOWED = ("data", "eval_data", "model", "init_adapter")  # paths whose content is recognised


def say_paths(config: ResolvedConfig, saved: Mapping[str, Any], say: Callable[[str], None]) -> None:
    """Say which paths of a resumed run are taken from its `saved` options, and which are not."""
    read, written = paths_of(saved)
    taken = [f"{flag(n)} {path}" for n, path in read.items() if path == getattr(config, n) and not is_rows_name(path)]
    if taken:
        say(f"reading what the run did: {', '.join(taken)}; what has moved can be given anew")
    left = [f"{flag(name)} {path}" for name, path in written.items() if path != getattr(config, name)]
    if left:
        say(f"not written to, unless it is given again: {', '.join(left)}")


def recognise(
    data: RunData,
    config: ResolvedConfig,
    model: str,
    folder: RunFolder,
    resume: Path | None,
    say: Callable[[str], None],
    accept: bool,
) -> Progress:
    """Return the progress of a new run, or of a checkpoint whose data, base model and initial adapter are still the same.

    Args:
        model: the result of `resolve_model`.
        resume: the checkpoint that the run continues from.
        accept: go on although something has changed, and say what.

    Raises:
        UserError: something has changed, and `accept` is not given.
    """
    memo = cache_folder(config)
    now = Progress(fingerprint=fingerprint(data.examples), base=base_of(model, memo))
    now.held_out = fingerprint(data.held_out) if data.held_out else ""
    now.init_adapter = files_fingerprint(Path(config.init_adapter), memo) if config.init_adapter else ""
    if resume is None:
        return now
    saved = read_progress(resume)
    changes = list(_changes(now, saved, config))
    if changes and not accept:
        heading = f"--resume {resume}: something has changed; start a new run, or go on with it by --accept-changes:"
        raise UserError(gather(changes, heading))
    for change in changes:
        say(f"accepted: {change}")
    anew = [name for name in _FOLLOWED if getattr(config, name) != folder.options.get(name)]
    known = {"data": saved.fingerprint, "eval_data": saved.held_out, "model": saved.base, "init_adapter": saved.init_adapter}
    for name in (name for name in anew if not known[name]):
        say(f"warning: this run recorded nothing of its {flag(name)}; whether {getattr(config, name)} is the same is unknown")
    if anew:  # so that later commands find them
        folder.create(folder.options | {name: getattr(config, name) for name in _FOLLOWED})
    return replace(saved, fingerprint=now.fingerprint, held_out=now.held_out, base=now.base, init_adapter=now.init_adapter)


def _changes(now: Progress, saved: Progress, config: ResolvedConfig) -> Iterator[str]:
    """Yield what is not as a run recorded it, as far as it did."""
    if saved.fingerprint != now.fingerprint:
        yield f"{config.data} is not the data that this run was trained on"
    if saved.held_out and saved.held_out != now.held_out:
        where = f"--eval-data {config.eval_data} is" if config.eval_data else "the held-out rows are"
        yield f"{where} not what this run was evaluated on"
    if saved.base and saved.base["weights"] != now.base["weights"]:
        yield f"--model {config.model} has other weights than this run began with"
    before, after = (progress.base.get("config", {}) if saved.base else {} for progress in (saved, now))
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            yield f"--model {config.model}: {name} in its config.json was {before.get(name)}, and is {after.get(name)}"
    if saved.init_adapter and saved.init_adapter != now.init_adapter:
        yield f"--init-adapter {config.init_adapter} is not what this run began with"
