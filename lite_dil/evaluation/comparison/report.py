"""Writing the results of a comparison: tables, curves, the figure, and one page with everything."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lite_dil.base.files import replace_file
from lite_dil.evaluation.comparison import page
from lite_dil.evaluation.comparison import table as tables
from lite_dil.evaluation.comparison.files import ANSWERS_FILE, REFERENCE_FILE, read_answers, read_measured
from lite_dil.evaluation.comparison.settings import Comparison
from lite_dil.reports.scores import markdown_scores, page_scores, read_evaluations

PAGE = "index.html"


@dataclass(frozen=True)
class Findings:
    """The results of a comparison: a row per loss, the same as cells for people, and sentences."""

    rows: list[tables.TableRow]
    headings: list[str]
    cells: list[list[str]]
    sentences: list[str]
    page: Path


def report(comparison: Comparison) -> Findings:
    """Write table.md, table.json, curves.json, figure2.png and index.html; return their content."""
    output = comparison.output
    runs = tables.read_runs(comparison)
    first = next(iter(comparison.configs.values()))
    measured, reference = comparison.reference / REFERENCE_FILE, None
    if not all(run["diverged"] for run in runs):
        reference = read_measured(measured, model=first.model, seed=comparison.seeds[0])
    rows = tables.make_rows(runs)
    curves = tables.make_curves(runs, reference, not (first.init_adapter and first.reference == "base"))
    sentences = tables.verdict(rows, comparison.steps, next((run["held_out"] for run in runs if not run["diverged"]), 0))
    remarks = tables.notes(rows, comparison.sample_tokens)
    headings, cells = tables.table_cells([*tables.reference_row(reference), *rows])

    markdown = ["| " + " | ".join(line) + " |" for line in (headings, ["---"] * len(headings), *cells)]
    listed = ["\n".join(f"- {text}" for text in texts) for texts in (sentences, remarks)]
    scores = read_evaluations(output)
    listed += markdown_scores(scores)
    replace_file(output / "table.md", "\n".join(markdown) + "\n\n" + "\n\n".join(listed) + "\n")
    content = {"rows": rows, "reference": reference["figures"] if reference else None, "verdict": sentences, "notes": remarks}
    replace_file(output / "table.json", json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    replace_file(output / "curves.json", json.dumps(curves, indent=1) + "\n")
    drawn = page.draw_curves(curves, output / "figure2.png"), page.draw_accuracy(rows)
    samples = _samples(comparison, runs, reference)
    html = page.render(comparison, headings, cells, sentences, remarks, *drawn, samples, page_scores(scores))
    replace_file(output / PAGE, html)
    return Findings(rows, headings, cells, sentences, output / PAGE)


def _samples(comparison: Comparison, runs: list[tables.FinishedRun], reference: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return each prompt with the answers of the reference and, by loss, of the first seed that did not diverge."""
    if reference is None:
        return []
    found = {"reference": read_answers(comparison.reference / ANSWERS_FILE, comparison.seeds[0], reference.get("samples"))}
    for run in runs:
        if not run["diverged"] and run["loss"] not in found:
            found[run["loss"]] = read_answers(run["folder"] / ANSWERS_FILE, run["seed"], run["samples"])
    return [
        {"prompt": answers[0]["prompt"], "answers": [(name, a["answer"]) for name, a in zip(found, answers, strict=True)]}
        for answers in zip(*found.values(), strict=True)
    ]
