"""Break lite-dil on purpose, many times over, and print a table of what became of it.

    make soak                                  # everything, under an hour on two cores
    python scripts/soak damage hostile         # some parts: writes, damage, hostile, steady
    make soak-short                            # a few cases of each kind, two minutes: what CI runs

writes: kills and power cuts at every write of a run, full and failing disks. damage: every file that lite-dil reads back,
damaged. hostile: rows, templates, models and folders made to do harm. steady: long runs and large data.

A part is done in pieces: a command, a backend, a kind of input. Two processes run them side by side. Each piece that ends
without a failure is kept in --output, and is not repeated when the soak is started again with the same code: after an
interruption it goes on where it was. --page writes a page from all pieces that are there. The exit status is 1 if a case
failed, or if a piece tried none.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # scripts/, where this package is

from soak.pieces import Kept, Piece, run
from soak.row import rows_of, table, write_page

PARTS = ("writes", "damage", "hostile", "steady")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--short", action="store_true", help="a few cases of each kind")
    parser.add_argument(
        "--output", type=Path, default=Path("build/soak"), help="folder for the pieces and failed cases' files"
    )
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page of all pieces in --output, after this run's")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side (default: 2)")
    parser.add_argument("--anew", action="store_true", help="repeat pieces that are done")
    parser.add_argument("--any-code", action="store_true", help="keep pieces of other code; the page names every commit")
    args = parser.parse_args(argv)
    kept = Kept(args.output.resolve() / "pieces", args.short)
    every = {part: _pieces(part, args.short) for part in PARTS}
    wanted = [piece for part in args.parts or PARTS for piece in every[part]]
    todo = [piece for piece in wanted if args.anew or not kept.find(piece, args.any_code)]
    if len(todo) < len(wanted):
        print(f"{len(wanted) - len(todo)} of {len(wanted)} pieces are done already; --anew repeats them", flush=True)
    began, found = time.monotonic(), list[dict[str, Any]]()
    for number, (piece, done) in enumerate(run(todo, kept, args.output.resolve(), args.workers), 1):
        found.append(done)
        _print(f"{number}/{len(todo)}", piece, done, time.monotonic() - began)
    there = {part: [done for piece in every[part] if (done := _done(kept, piece, found, args.any_code))] for part in PARTS}
    chosen = [done for part in PARTS if part in (args.parts or PARTS) for done in there[part]]
    print(table(rows_of(chosen)))
    if args.page:
        write_page(args.page, there)
    return 0 if all(done["rows"] for done in chosen) and all(row.ok for row in rows_of(chosen)) else 1


def _pieces(part: str, short: bool) -> list[Piece]:
    return [Piece(part, name) for name in importlib.import_module(f"soak.part_{part}").pieces(short=short)]


def _done(kept: Kept, piece: Piece, found: list[dict[str, Any]], any_code: bool) -> dict[str, Any] | None:
    """Return a piece of this run, with its failures, or one that is kept."""
    return next((done for done in found if done["piece"] == str(piece)), None) or kept.find(piece, any_code)


def _print(place: str, piece: Piece, done: dict[str, Any], since: float) -> None:
    """Print a line for a piece, and its failures."""
    rows = rows_of([done])
    cases, cpu = sum(row.outcomes.total() for row in rows), sum(row.seconds for row in rows)
    failures = [f"{row.what}: {failure}" for row in rows for failure in row.failures]
    state = "FAILED" if failures else "ok" if cases else "NOT RUN"
    print(
        f"{since / 60:5.1f} min  {place}  {state}  {piece}: {cases:,} cases, {cpu:.0f} s of CPU, {done['seconds']:.0f} s",
        flush=True,
    )
    for failure in failures[:20]:
        print(f"           {failure}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
