"""A machine on which FlexAttention cannot be compiled: the plain layout is used, and the reason is given."""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from rehearse_cuda.cases import Case
from rehearse_cuda.checkpoints import tiny
from rehearse_cuda.failed import Failed, require
from rehearse_cuda.stepping import Stepper, loaded, resolved

from lite_dil.base.errors import first_line

COMPILERS = ("CC", "CXX")  # variables by which Triton and Inductor find one
FIXES = {"compiler": "apt install gcc", "triton": "pip install triton"}  # what the reason must name


def run(case: Case, folder: Path) -> tuple[str, dict[str, Any]]:
    """Load with --layout auto and take a step; return what was seen."""
    take_away(case.settings["without"], folder)
    try:
        backend = loaded(resolved(tiny(folder / "model"), {"dtype": "bfloat16"}))
    except (RuntimeError, ImportError) as error:
        raise Failed(f"a traceback instead of the plain layout: {first_line(error)[:160]}") from None
    require(backend.layout == "plain", f"{backend.layout} layout; it cannot have been compiled")
    fix = FIXES[case.settings["without"]]
    require(fix in backend.layout_reason, f"no word of {fix!r}: {backend.layout_reason or 'no reason was given'}")
    Stepper(resolved(folder / "model", {"dtype": "bfloat16"})).step(backend)
    return backend.layout_reason, {}


def take_away(what: str, folder: Path) -> None:
    """Hide the C compiler or Triton from this process, and everything compiled before."""
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ[name] = str(folder / "empty" / f"{what}-{os.getpid()}")
    if what == "compiler":
        empty = folder / "no-programs"
        empty.mkdir(exist_ok=True)
        os.environ["PATH"] = str(empty)
        for name in COMPILERS:
            os.environ.pop(name, None)
        return
    assert "triton" not in sys.modules, "Triton has been imported already"
    sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTriton


class WithoutTriton(PathFinder):
    """Finds everything installed except Triton."""

    @classmethod
    def find_spec(cls, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Return None for Triton, as if it were not installed."""
        return None if fullname.partition(".")[0] == "triton" else super().find_spec(fullname, path, target)
