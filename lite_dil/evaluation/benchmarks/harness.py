"""lm-eval, which is an extra: found, and quiet."""

from __future__ import annotations

import importlib.util
import logging
import os
from typing import Any

from lite_dil.base.errors import UserError
from lite_dil.base.install import install


def require() -> None:
    """Raise UserError, with the fix, if lm-eval is not installed; else silence its notices and bars."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"benchmarks need lm-eval: {install('eval')}")
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm makes a bar; progress is shown by this program
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def jsonable(value: Any) -> Any:
    """Return a value as JSON holds it, as lm-eval itself writes what JSON has not: `default` of json.dumps."""
    from lm_eval.utils import handle_non_serializable

    return handle_non_serializable(value)
