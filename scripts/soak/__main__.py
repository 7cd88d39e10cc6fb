"""Break lite-dil on purpose, many times over, and print a table of what became of it.

    make soak                                  # everything, under an hour on two cores
    python scripts/soak damage hostile         # some parts: writes, damage, hostile, steady
    python scripts/soak writes --short         # the form that CI runs

writes: kills and power cuts at every write of a run, full and failing disks. damage: every file that lite-dil reads back,
damaged. hostile: rows, templates, models and folders made to do harm. steady: long runs and large data.

The rows of each part are kept in --output as JSON, and --page writes a page from all that are there. The exit status is 1 if a
case failed.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # scripts/, where this package is

from soak.row import Row, kept, page, table

PARTS = ("writes", "damage", "hostile", "steady")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser("soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--short", action="store_true", help="a few cases of each kind")
    parser.add_argument("--output", type=Path, default=Path("build/soak"), help="folder for the table and failed cases' files")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write the page of all parts in --output, after this run's")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    for part in args.parts or PARTS:
        before = len(rows)
        for row in importlib.import_module(f"soak.part_{part}").rows(args.output.resolve() / part, short=args.short):
            rows.append(row)
            print(f"{'ok    ' if row.ok else 'FAILED'} {row.part}: {row.what}, {row.outcomes.total()} cases", flush=True)
            for failure in row.failures[:20]:
                print(f"         {failure}", flush=True)
        (args.output / f"{part}.json").write_text(kept(rows[before:], args.short), encoding="utf-8")
    print(table(rows))
    if args.page:
        args.page.write_text(page([args.output / f"{part}.json" for part in PARTS]), encoding="utf-8")
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
