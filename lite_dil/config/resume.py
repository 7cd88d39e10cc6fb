"""Resume a run with its own options; only those that do not change what is learned may differ."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError, gather
from lite_dil.base.option import READ, WRITTEN
from lite_dil.config.options import build, read_yaml
from lite_dil.config.train_config import FIELDS, FREE_ON_RESUME, SPLIT, ResolvedConfig, flag
from lite_dil.runs.folder import RunFolder, find_checkpoint


def saved_config(checkpoint: Path) -> dict[str, Any]:
    """Return the resolved options of a checkpoint's run."""
    return read_yaml(checkpoint.parent.parent / "config.yaml")


def resumed(given: dict[str, Any], base: dict[str, Any], where: str) -> tuple[ResolvedConfig, Path | None]:
    """Return the options of a resumed run and its newest checkpoint, or those of a new run if "auto" finds none.

    Args:
        given: options by name; they override `base`, which overrides the run's own.
        where: a run's folder, a checkpoint or "auto"; see `lite_dil.runs.folder.find_checkpoint`.

    Raises:
        UserError: there is no such run, or an option would change what it learns.
    """
    output_dir = given.get("output_dir", base.get("output_dir"))
    checkpoint = find_checkpoint(where, output_dir)
    if checkpoint is None:
        if output_dir:
            RunFolder(Path(output_dir)).drop_unsaved()
        return build(given, base), None
    saved, run = saved_config(checkpoint), checkpoint.parent.parent
    if output_dir and Path(output_dir).resolve() != run.resolve():
        raise UserError(f"--resume {where} continues in {run}; leave --output-dir {output_dir} out")
    # "auto" stands for what the run already chose.
    given, base = ({n: v for n, v in options.items() if v != "auto" and n != "output_dir"} for options in (given, base))
    # Only the user says where to write: the run may come from another machine, or from somebody else.
    own = {name: value for name, value in saved.items() if name not in paths_of(saved)[1]}
    # The choices of --auto are saved; it chooses again only if it is given again.
    config = build(given, own | {"auto": False} | base | {"output_dir": str(run)})
    check_same_run(config, saved, where)
    return config, checkpoint


def paths_of(saved: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
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
        if name not in free and name in saved and value != saved[name]
    ]
    examples, before = (math.prod(options[name] for name in SPLIT) for options in (config.as_dict(), config.as_dict() | saved))
    if examples != before:
        names = " x ".join(map(flag, sorted(SPLIT)))
        problems.append(f"{names} makes steps of {examples} examples, but the run has steps of {before}")
    if problems:
        raise UserError(gather(problems, f"--resume {where} keeps the run's own options; start a new run to change:"))
