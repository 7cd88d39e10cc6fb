"""A machine on which FlexAttention cannot be compiled: the plain layout is taken, and the reason is said."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rehearse_cuda.cases import Case
from rehearse_cuda.checkpoints import tiny
from rehearse_cuda.failed import Failed, require
from rehearse_cuda.stepping import Stepper, loaded, resolved

from lite_dil.base.errors import first_line

COMPILERS = ("CC", "CXX")  # by which Triton and Inductor are told of one


def run(case: Case, folder: Path) -> tuple[str, dict[str, Any]]:
    """Load with --layout auto and take a step; return what was seen."""
    take_away(case.settings["without"], folder)
    try:
        backend = loaded(resolved(tiny(folder / "model"), {"dtype": "bfloat16"}))
    except (RuntimeError, ImportError) as error:
        raise Failed(f"a traceback instead of the plain layout: {first_line(error)[:160]}") from None
    require(backend.layout == "plain", f"{backend.layout} layout; it cannot have been compiled")
    require(bool(backend.layout_reason), "the plain layout was taken and no reason given")
    Stepper(resolved(folder / "model", {"dtype": "bfloat16"})).step(backend)
    return backend.layout_reason, {}


def take_away(what: str, folder: Path) -> None:
    """Let this process find no C compiler, or no Triton, and nothing that was compiled before."""
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
        os.environ[name] = str(folder / "empty" / f"{what}-{os.getpid()}")
    if what == "compiler":
        empty = folder / "no-programs"
        empty.mkdir(exist_ok=True)
        os.environ["PATH"] = str(empty)
        for name in COMPILERS:
            os.environ.pop(name, None)
        return
    import sys

    assert "triton" not in sys.modules, "Triton has been imported already"
    sys.modules["triton"] = None  # type: ignore[assignment]  # what makes an import of it an ImportError
