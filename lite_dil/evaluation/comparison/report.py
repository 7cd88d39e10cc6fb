"""Writes what a comparison found: tables, curves, the figure and one page with all of it."""

from __future__ import annotations

import json
from typing import Any

import compare_page as page
import compare_table as tables
from compare import RESULT
from compare_settings import Comparison

from lite_dil.base.files import replace_file


def report(comparison: Comparison, display: Any) -> None:
    """Write table.md, table.json, curves.json, figure2.png and index.html, and print the table and what it says."""
    from rich.box import SIMPLE
    from rich.table import Table

    output = comparison.output
    runs = tables.read_runs(comparison, RESULT)
    measured = comparison.reference / "reference.json"
    reference = json.loads(measured.read_text(encoding="utf-8")) if measured.exists() else None
    first = next(iter(comparison.configs.values()))
    rows = tables.make_rows(runs)
    curves = tables.make_curves(runs, reference, not (first.init_adapter and first.reference == "base"))
    sentences = tables.verdict(rows, comparison.steps, next((run["held_out"] for run in runs if not run["diverged"]), 0))
    remarks = tables.notes(rows, comparison.sample_tokens)
    headings, cells = tables.table_cells([*tables.reference_row(reference), *rows])

    markdown = ["| " + " | ".join(line) + " |" for line in (headings, ["---"] * len(headings), *cells)]
    listed = ["\n".join(f"- {text}" for text in texts) for texts in (sentences, remarks)]
    replace_file(output / "table.md", "\n".join(markdown) + "\n\n" + "\n\n".join(listed) + "\n")
    content = {"rows": rows, "reference": reference["figures"] if reference else None, "verdict": sentences, "notes": remarks}
    replace_file(output / "table.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    replace_file(output / "curves.json", json.dumps(curves, indent=1) + "\n")
    svg = page.draw(curves, output / "figure2.png")
    html = page.render(comparison, headings, cells, sentences, remarks, svg, _samples(comparison, runs))
    replace_file(output / "index.html", html)

    # Losses side by side: a row a loss would be wider than a terminal.
    title = f"{comparison.steps} steps, seeds {', '.join(map(str, comparison.seeds))}"
    table = Table(title=title, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for number, line in enumerate([headings[:1], *([line[0]] for line in cells)]):
        table.add_column(line[0], justify="left" if number == 0 else "right", no_wrap=number == 0, overflow="fold")
    for number, heading in enumerate(headings[1:], 1):
        table.add_row(heading, *(line[number] for line in cells))
    display.console.print(table)
    for text in [*sentences, "", f"all of it on one page: {output / 'index.html'}"]:
        display.say(text)


def _samples(comparison: Comparison, runs: list[tables.Run]) -> dict[str, list[dict[str, str]]]:
    """Return by loss the prompts with the reference's answer and the loss's, of its first seed that did not diverge."""
    found: dict[str, list[dict[str, str]]] = {}
    for run in runs:
        if run["diverged"] or run["loss"] in found:
            continue
        both = [
            [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
            for folder in (comparison.reference, run["folder"])
        ]
        found[run["loss"]] = [
            {"prompt": before["prompt"], "before": before["answer"], "after": after["answer"]}
            for before, after in zip(*both, strict=True)
        ]
    return found
