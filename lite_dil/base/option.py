"""Declare an option: a dataclass field with its help, its flags, and whether it may change when a run is resumed."""

from __future__ import annotations

from dataclasses import field
from typing import Any

# What an option means when a run is resumed.
READ = "read"  # a path that is read: its content decides what is learned, and it may have moved
WRITTEN = "written"  # a path that is written; a resumed run has it from the user alone
SOURCES = "sources"  # as LEARNED, but the models that it names may have moved: their content is compared
LEARNED = "learned"  # changes what is learned: must be the same on resume
FREE = "free"  # changes how it is computed or shown, not what is learned


def option(
    group: str,
    default: Any,
    help: str,
    *,
    flags: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    metavar: str = "",
    kind: str = LEARNED,
) -> Any:
    """Return a dataclass field with what the command line, YAML files and resuming need to know.

    Args:
        group: the heading in ``--help``.
        default: None means "decided by another option or by the model", as the help says.
        flags: further flags; messages use the first.
        choices: the allowed values; empty allows all of the field's type.
        kind: `READ`, `WRITTEN`, `SOURCES`, `LEARNED` or `FREE`.
    """
    metadata = {"group": group, "help": help, "flags": flags, "choices": choices, "metavar": metavar, "kind": kind}
    return field(default=default, metadata=metadata)
