"""``--loss FILE.py:NAME``: the user's own loss, from a file that is run because the command line names it."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from pathlib import Path

from lite_dil.base.errors import UserError, did_you_mean, first_line
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
    if not path.is_file():
        raise UserError(f"{where}: no such file {path}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent.absolute()))  # it may import its neighbours
    try:
        spec.loader.exec_module(module)
    except UserError:
        raise
    except Exception as error:  # the user's file may raise anything
        line = traceback.extract_tb(error.__traceback__)[-1].lineno
        raise UserError(f"{where}: {type(error).__name__}: {first_line(error)} (line {line})") from error
    finally:
        sys.path.remove(str(path.parent.absolute()))
    found = getattr(module, name, None)
    if not isinstance(found, OwnLoss):
        losses = [key for key, value in vars(module).items() if isinstance(value, OwnLoss)]
        wrap = f"; wrap the function: {name} = lite_dil.PairLoss(...)" if callable(found) else did_you_mean(name, losses)
        raise UserError(f"{where}: the file has no lite_dil.PairLoss or SideLoss of that name{wrap}")
    return found
