"""Every file that lite-dil reads back, damaged: equal to the bit, or one message, or said and gone on from what is whole."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soak import forks
from soak.damage_cases import cases
from soak.damage_world import World
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
    """Return the kinds of files of each backend; in the short form the backends."""
    kinds = [""] if short else [f"{kind}, " for kind in dict.fromkeys(_KINDS.values())]
    return [f"{kind}{backend}" for backend in ("cpu", "mlx") for kind in kinds]


@contextmanager
def opened(output: Path, *, short: bool) -> Iterator[Callable[[str], Iterator[Row]]]:
    """Give a function that yields a row for each kind of file of a piece. This process forks for each case."""
    forks.load()
    worlds: dict[str, World] = {}

    def take(name: str) -> Iterator[Row]:
        kind, _, backend = name.rpartition(", ")
        if backend not in worlds:
            worlds[backend] = World(output / backend, backend, short)
            worlds[backend].make()
        yield from _rows(worlds[backend], kind)

    yield take


def _kind(path: str) -> str:
    return next(kind for start, kind in _KINDS.items() if path.startswith(start))


def _rows(world: World, wanted: str) -> Iterator[Row]:
    """Yield the row of the `wanted` kind, or of all kinds for ""."""
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for case in cases(world, lambda path: wanted in ("", _kind(path))):
        found[_kind(case["path"])].append(case)
        if case["failure"]:
            print(case["failure"], file=sys.stderr, flush=True)
    for kind, some in found.items():
        failures = [case["failure"] for case in some if case["failure"]]
        outcomes = Counter(case["outcome"] for case in some)
        yield Row("damage", kind, outcomes, failures, sum(case["cpu"] for case in some), world.backend)
