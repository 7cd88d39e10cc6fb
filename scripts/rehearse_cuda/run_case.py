"""Run one case, in a process on the stand-in card: ``run_case.py CASE.json FOLDER RESULT.json``."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # scripts/

from rehearse_cuda.cases import Case
from rehearse_cuda.failed import Failed

from lite_dil.base.errors import first_line
from lite_dil.base.start import start


def main(case_file: str, folder: str, result_file: str) -> int:
    """Run a case; write {"ok", "text", "figures"}."""
    case = Case(**json.loads(Path(case_file).read_text(encoding="utf-8")))
    start(training=True)
    part = importlib.import_module(f"rehearse_cuda.part_{case.part.replace('-', '_')}")
    result: dict[str, Any]
    try:
        text, figures = part.run(case, Path(folder))
        result = {"ok": True, "text": text, "figures": figures}
    except Failed as error:
        result = {"ok": False, "text": first_line(error), "figures": error.figures}
    result["figures"] |= {"cpu_s": round(sum(os.times()[:4]), 1)}  # including child processes
    Path(result_file).write_text(json.dumps(result), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
