"""Every file that lite-dil reads back, damaged: equal to the bit, or one message, or said and gone on from what is whole."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from soak.row import Row

# Rows of the table, by how a file's path in the world begins.
_KINDS = {
    "run/checkpoints/": "a checkpoint's files",
    "done/checkpoints/": "a checkpoint's files",
    "run/": "a run's own files",
    "done/adapter/": "a final adapter's files",
    "done/": "a run's own files",
    "cache/": "the caches",
    "sampled": "drawn, generated and labelled rows",
    "answers": "drawn, generated and labelled rows",
    "labels": "drawn, generated and labelled rows",
    "compared/": "a comparison's files",
}


def rows(output: Path, *, short: bool) -> Iterator[Row]:
    """Yield a row for each backend and kind of file. A process with the libraries loaded forks for each case."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    worker = Path(__file__).parent / "damage_worker.py"
    argv = [sys.executable, str(worker), str(output), "short" if short else "long"]
    found: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    with (
        (output / "errors").open("w") as errors,
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=errors, text=True) as done,
    ):
        for line in done.stdout or ():
            case = json.loads(line)
            kind = next(kind for start, kind in _KINDS.items() if case["path"].startswith(start))
            found[case["backend"], kind].append(case)
    for (backend, kind), cases in found.items():
        failures = [case["failure"] for case in cases if case["failure"]]
        outcomes = Counter(case["outcome"] for case in cases)
        yield Row("damage", f"{kind}, {backend}", outcomes, failures, sum(case["seconds"] for case in cases))
    if done.returncode:
        last = (output / "errors").read_text(encoding="utf-8").splitlines()[-1:]
        yield Row("damage", "the cases could not be run", Counter({"ended": 1}), last or [f"exit code {done.returncode}"])
    else:
        shutil.rmtree(output)
