"""What a run reads, recognised by its content when it is resumed, wherever its files are by then."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from lite_dil.base.errors import UserError
from lite_dil.config.resume import paths_of, saved_config
from lite_dil.config.train_config import ResolvedConfig, flag
from lite_dil.data.encoder import Example, fingerprint
from lite_dil.data.rows import is_rows_name
from lite_dil.models.find import model_folder
from lite_dil.models.fingerprint import fingerprint as files_fingerprint
from lite_dil.runs.folder import Progress, RunFolder
from lite_dil.training.reference_cache import cache_folder

# The fields of `Progress` that hold the fingerprint of what an option reads; the training data are compared before.
_KEPT = {"eval_data": "held_out", "model": "weights", "init_adapter": "init_adapter"}


def say_paths(config: ResolvedConfig, resume: Path, say: Callable[[str], None]) -> None:
    """Say which paths of a resumed run are taken from its config.yaml, and which are not."""
    read, written = paths_of(saved_config(resume))
    taken = [f"{flag(n)} {path}" for n, path in read.items() if path == getattr(config, n) and not is_rows_name(path)]
    if taken:
        say(f"reading what the run did: {', '.join(taken)}; what has moved can be given anew")
    left = [f"{flag(name)} {path}" for name, path in written.items() if path != getattr(config, name)]
    if left:
        say(f"not written to, unless it is given again: {', '.join(left)}")


def recognise(
    progress: Progress,
    config: ResolvedConfig,
    model: str,
    held_out: Sequence[Example],
    resume: Path | None,
    say: Callable[[str], None],
) -> None:
    """Put the fingerprints of what is read into `progress`; those of a resumed run must be the same.

    Args:
        model: the result of `resolve_model`.
        held_out: the held-out examples, without drawn responses.
        resume: the checkpoint that the run continues from.

    Raises:
        UserError: the model, the held-out rows or the initial adapter are others than the run's.
    """
    memo, kept = cache_folder(config), Progress()
    kept.held_out = fingerprint(held_out) if held_out else ""
    if config.reference_cache != "off":  # which asks for no such reading of large files
        kept.weights = files_fingerprint(model_folder(model), memo)
    if config.init_adapter:
        kept.init_adapter = files_fingerprint(Path(config.init_adapter), memo)
    saved, moved = (saved_config(resume), False) if resume else ({}, False)
    for name, field in _KEPT.items():
        before, now, path = getattr(progress, field), getattr(kept, field), getattr(config, name)
        if before and now and before != now:
            what = f"{flag(name)} {path} is not what" if path else "the held-out rows are not those that"
            raise UserError(f"--resume {resume}: {what} this run has read; start a new run")
        given_anew = bool(resume) and path != saved.get(name)
        moved |= given_anew
        if given_anew and not (before and now):
            say(f"warning: this run kept no fingerprint of its {flag(name)}, so that {path} is the same is not checked")
        setattr(progress, field, now or before)
    if resume and (moved or config.data != saved.get("data")):  # so that later commands find them
        RunFolder(resume.parent.parent).create(saved | {name: getattr(config, name) for name in ("data", *_KEPT)})
