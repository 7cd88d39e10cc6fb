"""Resume a run with its own options; only those that do not change what is learned may differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lite_dil.base.display import unheard
from lite_dil.base.errors import UserError, gather
from lite_dil.base.formats import NewerFormat
from lite_dil.base.option import READ, SOURCES, WRITTEN
from lite_dil.config.options import build, read_yaml
from lite_dil.config.train_config import FIELDS, FREE_ON_RESUME, SPLIT, ResolvedConfig, flag
from lite_dil.data.rows import is_rows_name
from lite_dil.rewards.spec import gone, moved
from lite_dil.runs.folder import RunFolder, find_checkpoint, trained_options
from lite_dil.runs.options_file import OPTIONS_FILE
from lite_dil.runs.seal import Damaged, recorded


def run_options(path: Path, noted: Mapping[str, Any], where: str, say: Callable[[str], None] = unheard) -> dict[str, Any]:
    """Return the options in a run's config.yaml or, if that cannot be read, those `noted` elsewhere, and say so.

    Raises UserError if it is of a newer version, or cannot be read and nothing is noted.
    """
    try:
        return read_yaml(path)
    except NewerFormat:
        raise
    except UserError as error:
        if not noted:
            raise
        say(f"{error}; the options are those that {where} records")
        return dict(noted)


def other_options(folder: Path, written: Mapping[str, Any]) -> str:
    """Return how the options `written` in a run's config.yaml differ from those that its newest checkpoint records; else "".

    What a resumed run may change, and the places of its files, may differ.
    """
    checkpoint = RunFolder(folder).latest()
    try:
        options = recorded(checkpoint) if checkpoint else None
    except Damaged:
        options = None
    for name, value in (options or {}).items():
        fixed = name in FIELDS.keys() - FREE_ON_RESUME - SPLIT and FIELDS[name].metadata["kind"] != READ
        if fixed and checkpoint and not _same(name, written.get(name), value):
            now = written.get(name, "missing")
            return f"{folder / OPTIONS_FILE} is not what {checkpoint.name} records: {name} was {value}, and is {now}"
    return ""


def trained_with(adapter: Path, run: RunFolder) -> dict[str, Any]:
    """Return the options of a run: those of its config.yaml, and what that lacks from the seal of its `adapter`."""
    noted = {name: value for name, value in trained_options(adapter).items() if name in FIELDS and name != "trust_remote_code"}
    found = noted | run_options(run.path / OPTIONS_FILE, noted, str(adapter))
    return {name: found[name] for name in FIELDS if name in found}


def saved_config(checkpoint: Path, say: Callable[[str], None] = unheard, accept: bool = False) -> dict[str, Any]:
    """Return the resolved options of a checkpoint's run: those of config.yaml, which must be what the checkpoint records.

    Args:
        say: is told what of config.yaml is not used, and what `accept` takes from it.
        accept: take config.yaml as somebody edited it.

    The checkpoint is whole: `RunFolder.whole` has returned it. Raises UserError if config.yaml was changed or cut.
    """
    path = checkpoint.parent.parent / "config.yaml"
    try:
        options = recorded(checkpoint)
    except Damaged as error:
        raise UserError(f"{checkpoint} is damaged: {error}") from None
    if options is None:
        say(f"{checkpoint.parent.parent} is of an older lite-dil, so damage to its files cannot be seen")
        return read_yaml(path)
    options = {name: value for name, value in options.items() if name in FIELDS and name != "trust_remote_code"}
    written = run_options(path, options, checkpoint.name, say)
    changes = [
        f"{name} was {options[name]}, and is {written.get(name, 'missing')}"
        for name in options
        # A run may move; of what it reads the content is compared.
        if name not in written
        or (not _same(name, written[name], options[name]) and FIELDS[name].metadata["kind"] not in (READ, WRITTEN))
    ]
    for name in options.keys() & written.keys():
        if written[name] != options[name] and FIELDS[name].metadata["kind"] in (READ, SOURCES):
            say(f"{path}: {name} is {written[name]}; {checkpoint.name} records {options[name]}")
    if changes and not accept:
        raise UserError(
            gather(changes, f"{path} is not what the run wrote; restore it, or --accept-changes takes it as it is:")
        )
    for change in changes:
        say(f"accepted: {change}")
    return options | written


def resumed(
    given: dict[str, Any],
    base: dict[str, Any],
    where: str,
    say: Callable[[str], None] = unheard,
    accept: bool = False,
    rows: Sequence[str] = (),
    new: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[ResolvedConfig, Path | None]:
    """Return the options of a resumed run and its newest whole checkpoint, or those of a new run if "auto" finds none.

    Args:
        given: options by name; they override `base`, which overrides the run's own.
        where: a run's folder, a checkpoint or "auto"; see `lite_dil.runs.folder.find_checkpoint`.
        say: is told of damaged checkpoints, and of changes to config.yaml.
        accept: take changes to config.yaml.
        rows: the options for which a program gives rows. They keep the run's name for them: what they hold is compared later.
        new: options of a new run that neither `given` nor `base` names.

    Raises:
        UserError: there is no such run, or an option would change what it learns.
    """
    output_dir = given.get("output_dir", base.get("output_dir"))
    checkpoint = find_checkpoint(where, output_dir)
    if checkpoint is None:
        if output_dir:
            RunFolder(Path(output_dir)).drop_unsaved()
        return build(given, {**new, **base}), None
    run = checkpoint.parent.parent
    checkpoint = RunFolder(run).whole(checkpoint, say)
    saved = saved_config(checkpoint, say, accept)
    given = given | {name: saved[name] for name in rows if is_rows_name(str(saved.get(name)))}
    if output_dir and Path(output_dir).resolve() != run.resolve():
        raise UserError(f"--resume {where} continues in {run}; leave --output-dir {output_dir} out")
    # "auto" stands for what the run already chose.
    given, base = ({n: v for n, v in options.items() if v != "auto" and n != "output_dir"} for options in (given, base))
    # Only the user says where to write: the run may come from another machine, or from somebody else.
    own = {name: value for name, value in saved.items() if name not in paths_of(saved)[1]}
    _check_places(own, given | base, where)
    # The choices of --auto are saved; it chooses again only if it is given again.
    config = build(given, own | {"auto": False} | base | {"output_dir": str(run)})
    check_same_run(config, saved, where)
    return config, checkpoint


def _same(name: str, value: Any, before: Any) -> bool:
    """Return whether an option has the value that it had, or names the same models in other places."""
    if FIELDS[name].metadata["kind"] == SOURCES and isinstance(value, str) and isinstance(before, str):
        return value == before or moved(value, before)
    return bool(value == before)


def _check_places(own: Mapping[str, Any], new: Mapping[str, Any], where: str) -> None:
    """Raise UserError if models that the run's `own` options name are not where they were, and `new` does not say where."""
    for name in (name for name, field in FIELDS.items() if field.metadata["kind"] == SOURCES):
        if name not in new and own.get(name) and (lost := gone(own[name])):
            raise UserError(
                f"--resume {where}: {', '.join(lost)} is not there; put it back, or give {flag(name)} {own[name]} with its "
                "new place: what is there is compared with what the run began with"
            )


def paths_of(saved: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the paths in a run's options by name: those that it reads, and those other than its own folder that it writes."""
    paths = {name: value for name, value in saved.items() if value not in (None, "off") and name in FIELDS}
    read, written = ({n: v for n, v in paths.items() if FIELDS[n].metadata["kind"] == kind} for kind in (READ, WRITTEN))
    written.pop("output_dir", None)
    return read, written


def check_same_run(config: ResolvedConfig, saved: dict[str, Any], where: str) -> None:
    """Raise UserError if an option that decides what is learned differs from the resumed run.

    Of the paths that are read, the content decides; see `lite_dil.recipes.inputs`.
    """
    # The split of a step affects only what dropout draws.
    free = FREE_ON_RESUME if config.lora_dropout else FREE_ON_RESUME | SPLIT
    free = free | {name for name, field in FIELDS.items() if field.metadata["kind"] == READ}
    problems = [
        f"{flag(name)} is {value}, but the run has {saved[name]}"
        for name, value in config.as_dict().items()
        if name not in free and name in saved and not _same(name, value, saved[name])
    ]
    examples, before = (math.prod(options[name] for name in SPLIT) for options in (config.as_dict(), config.as_dict() | saved))
    if examples != before:
        names = " x ".join(map(flag, sorted(SPLIT)))
        problems.append(f"{names} makes steps of {examples} examples, but the run has steps of {before}")
    if problems:
        raise UserError(gather(problems, f"--resume {where} keeps the run's own options; start a new run to change:"))
