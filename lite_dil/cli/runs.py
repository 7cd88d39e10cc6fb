"""``lite-dil runs``: the runs in a folder side by side."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lite_dil.reports.listing import ListedRun

HELP = "list runs side by side, newest first"
DESCRIPTION = """\
List the runs in a folder side by side, newest first: loss, data, steps, held-out accuracy, log-ratios to the reference, time,
and how each ended. "unfinished" is a run that is in progress or was killed; lite-dil train --resume continues it. Runs of
comparisons are listed too. Exit code 2 if there are none.

  lite-dil runs
  lite-dil runs runs/sweep --json
"""
_WIDE = 200  # columns where the output is no terminal, so that a pipe gets whole names
_FIGURES = ("step", "acc.", "chosen", "rejected", "time")
_HEADINGS = ("run", "loss", "data", *_FIGURES, "state")
_NONE = "\u2013"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("folder", nargs="?", default="runs", metavar="FOLDER", help="folder of runs, or of one run (runs)")
    parser.add_argument("--json", action="store_true", help="print a JSON list, with log-ratios in nats and times in seconds")


def run(args: argparse.Namespace) -> int:
    """Print the list; return 0."""
    from lite_dil.reports.listing import list_runs

    folder = Path(args.folder)
    found = list_runs(folder)
    if args.json:
        print(json.dumps([run.as_json() for run in found], indent=1))
    else:
        _show(found, folder)
    return 0


def _show(runs: list[ListedRun], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from lite_dil.base.text import visible

    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or pipe that is not UTF-8 shows escapes
        sys.stdout.reconfigure(errors="backslashreplace")
    console = Console(highlight=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(highlight=False, width=_WIDE)
    cells = [[visible(cell) for cell in _cells(run, folder)] for run in runs]
    widths = _widths([list(_HEADINGS), *cells], console.width)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for heading, width in zip(_HEADINGS, widths, strict=True):
        table.add_column(heading, justify="right" if heading in _FIGURES else "left", width=width, overflow="fold")
    table.columns[_HEADINGS.index("data")].overflow = "ellipsis"
    for row in cells:
        table.add_row(*map(Text, row))
    console.print(table)
    for run in runs:
        if run.why:
            text = f"damaged: {run.folder}: {run.why}"
            console.print(visible(text), markup=False, emoji=False, soft_wrap=True)
    for run in runs:
        if run.evaluated:
            name = run.folder.relative_to(folder) if run.folder != folder else run.folder.absolute().name
            console.print(visible(f"eval: {name}: {run.evaluated}"), markup=False, emoji=False, soft_wrap=True)
    if good := [run for run in runs if run.figures]:
        console.print(f"\n{_legend(good)}", markup=False, emoji=False)


def _widths(rows: list[list[str]], room: int) -> list[int]:
    """Return the columns' widths. Where a terminal is narrow the data's names are cut, and then the runs' names folded."""
    from rich.cells import cell_len

    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)]
    for column, least in ((_HEADINGS.index("data"), 6), (0, 12)):
        over = sum(widths) + len(widths) - 1 - room
        widths[column] = max(min(widths[column], least), widths[column] - max(over, 0))
    return widths


def _cells(run: ListedRun, folder: Path) -> list[str]:
    from lite_dil.base.display import duration

    name = str(run.folder.relative_to(folder)) if run.folder != folder else run.folder.absolute().name
    if run.why:
        return [name, *[_NONE] * 7, run.state]
    figures = run.figures or {}
    accuracy, *ratios = (figures.get(key) for key in ("accuracy", "log_ratio/chosen", "log_ratio/rejected"))
    mark = "" if run.held_out else "*"
    return [
        name,
        run.loss,
        ",".join(part.rstrip("/").rpartition("/")[2] for part in run.data.split(",")),
        f"{run.step}/{run.steps}" if run.steps else f"{run.step}",
        _NONE if accuracy is None else f"{accuracy:.3f}",
        *(_NONE if ratio is None else f"{ratio:+.3f}{mark}" for ratio in ratios),
        duration(run.seconds),
        run.state,
    ]


def _legend(runs: list[ListedRun]) -> str:
    units: dict[str, dict[str, None]] = {}
    for run in runs:
        units.setdefault(run.per, {})[run.loss] = None
    per = ", ".join(f"per {unit}" + (f" ({', '.join(losses)})" if len(units) > 1 else "") for unit, losses in units.items())
    text = f"acc.: held-out accuracy. chosen, rejected: held-out log-ratio to the reference in nats {per}."
    return text + ("" if all(run.held_out for run in runs) else " * of the last training steps, not held out.")
