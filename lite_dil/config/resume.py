"""Going on with a run: with its own options, but for those that change nothing of what is learned."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError, gather
from lite_dil.config.options import read_yaml
from lite_dil.config.train_config import FREE_ON_RESUME, SPLIT, ResolvedConfig, flag


def saved_config(checkpoint: Path) -> dict[str, Any]:
    """Return the resolved options of the run that a checkpoint belongs to."""
    return read_yaml(checkpoint.parent.parent / "config.yaml")


def check_same_run(config: ResolvedConfig, saved: dict[str, Any], where: str) -> None:
    """Raise UserError if an option that decides what is learned differs from the run that is resumed."""
    # How a step is split decides what dropout draws, and nothing else.
    free = FREE_ON_RESUME if config.lora_dropout else FREE_ON_RESUME | SPLIT
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
        raise UserError(gather(problems, f"--resume {where} goes on with the run's own options; start a new run to change:"))
