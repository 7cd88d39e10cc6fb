"""The user's own Python files, which are run because the command line names them."""

from __future__ import annotations

import importlib.util
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from lite_dil.base.errors import UserError, did_you_mean, first_line
from lite_dil.rewards.spec import files


def run_file(path: Path, where: str) -> ModuleType:
    """Run a Python file and return its module. Raises UserError, which begins with `where`, if it cannot be run."""
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
    return module


def reward_functions(text: str) -> dict[str, Callable[..., Any]]:
    """Return the functions of ``--reward`` by name, from the files that it names.

    Raises UserError if a file cannot be run or has no such function.
    """
    found = dict[str, Callable[..., Any]]()
    for name, (path, function) in files(text).items():
        where = f"--reward {path}:{function}"
        module = run_file(path, where)
        if not callable(value := getattr(module, function, None)):
            names = [key for key, of in vars(module).items() if callable(of)]
            raise UserError(f"{where}: the file has no function of that name{did_you_mean(function, names)}")
        found[name] = value
    return found
