"""Every file that lite-dil reads back, damaged: equal to the bit, or one message, or said and gone on from what is whole."""

from __future__ import annotations

import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soak import forks
from soak.damage_cases import cases
from soak.row import Row

# Rows of the table, by how a file's path in the world begins.
_KINDS = {
    "run/checkpoints/": "a checkpoint's files",
    "done/checkpoints/": "a checkpoint's files",
    "run/": "a run's own files",
    "done/adapter/": "a final adapter's files",
    "done/": "a run's own files",
    "cache/tokens/": "the store of tokens",
    "cache/": "the other caches",
    "sampled": "drawn, generated and labelled rows",
    "answers": "drawn, generated and labelled rows",
    "labels": "drawn, generated and labelled rows",
    "compared/": "a comparison's files",
}


def pieces(*, short: bool) -> list[str]:
    """Return the backends."""
    return ["cpu", "mlx"]


@contextmanager
def opened(output: Path, *, short: bool) -> Iterator[Callable[[str], Iterator[Row]]]:
    """Give a function that yields a row for each kind of file of a backend. This process forks for each case."""
    forks.load()
    yield lambda backend: _rows(output / backend, backend, short)


def _rows(output: Path, backend: str, short: bool) -> Iterator[Row]:
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in cases(output, backend, short=short):
        found[next(kind for start, kind in _KINDS.items() if case["path"].startswith(start))].append(case)
        if case["failure"]:
            print(case["failure"], file=sys.stderr, flush=True)
    for kind, some in found.items():
        failures = [case["failure"] for case in some if case["failure"]]
        outcomes = Counter(case["outcome"] for case in some)
        yield Row("damage", kind, outcomes, failures, sum(case["cpu"] for case in some), backend)
    shutil.rmtree(output)
