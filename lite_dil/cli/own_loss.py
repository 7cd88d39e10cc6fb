"""``--loss FILE.py:NAME``: the user's own loss, from a file that is run because the command line names it."""

from __future__ import annotations

from pathlib import Path

from lite_dil.base.errors import UserError, did_you_mean
from lite_dil.cli.own_code import run_file
from lite_dil.objectives.own import OwnLoss


def named_file(text: str) -> tuple[Path, str] | None:
    """Return the file and the name in it that ``--loss`` gives, or None if it names a loss of the table."""
    path, _, name = text.rpartition(":")
    return (Path(path), name) if path.endswith(".py") else None


def load_loss(path: Path, name: str) -> OwnLoss:
    """Run the file and return its loss of that name.

    Raises UserError if the file cannot be run or has no such loss.
    """
    where = f"--loss {path}:{name}"
    module = run_file(path, where)
    found = getattr(module, name, None)
    if not isinstance(found, OwnLoss):
        losses = [key for key, value in vars(module).items() if isinstance(value, OwnLoss)]
        wrap = f"; wrap the function: {name} = lite_dil.PairLoss(...)" if callable(found) else did_you_mean(name, losses)
        raise UserError(f"{where}: the file has no lite_dil.PairLoss or SideLoss of that name{wrap}")
    return found
