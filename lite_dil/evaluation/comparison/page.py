"""The figures of a comparison, and its page: one file, readable offline, in dark mode and on a phone."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from lite_dil.base.files import replace_file
from lite_dil.base.text import count
from lite_dil.evaluation.comparison.settings import Comparison
from lite_dil.evaluation.comparison.table import TableRow, cell, spread
from lite_dil.reports import html
from lite_dil.reports.charts import COLOURS, inked, plain_ticks, themed

MARKERS, LINES = "os^Dv*", ("-", "--", ":")
OPEN = 4  # prompts whose answers are shown at once


class Plot(NamedTuple):
    """A figure as an SVG element, and what it shows in a sentence for screen readers."""

    svg: Markup
    sentence: str


def draw_curves(curves: dict[str, Any], path: Path) -> Markup:
    """Write the figure to `path` as a PNG, and return it as an SVG element in the surrounding text's colour."""
    drawn = io.BytesIO()
    _curves(curves, "black").savefig(drawn, dpi=150, facecolor="white", format="png")
    replace_file(path, drawn.getvalue())
    return themed(lambda ink: _curves(curves, ink), "curves")


def draw_accuracy(rows: Sequence[TableRow]) -> Plot | None:
    """Return the losses' accuracy against their KL; None where no loss has both."""
    found = {row["loss"]: row for row in rows if {"accuracy", "kl"} <= row["figures"].keys()}
    if not found:
        return None
    said = (f"{loss}: {cell(row, 'accuracy', '.3f')} at {cell(row, 'kl', '.2f')} nats" for loss, row in found.items())
    order = [row["loss"] for row in rows]
    drawn = themed(lambda ink: _accuracy(found, order, ink), "accuracy")
    return Plot(drawn, f"Accuracy against KL. {'; '.join(said)}.")


def _style(number: int) -> dict[str, Any]:
    """Return how a loss is drawn in every figure."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 5}


def _curves(curves: dict[str, Any], ink: str) -> Any:
    """Draw the paper's Figure 2: chosen and rejected log-probs of held-out responses during training, a curve per loss."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(inked(ink)):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        for axes, side in zip(figure.subplots(1, 2), ("chosen", "rejected"), strict=True):
            axes.set(title=f"{side} responses", xlabel="step", ylabel="log-prob, nats per response")
            axes.patch.set_alpha(0)
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
            plain_ticks(axes.yaxis)
            start = curves["reference"][side]
            if start is not None:
                axes.axhline(start, color=ink, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6, label="reference")
            for number, (loss, sides) in enumerate(curves["losses"].items()):
                curve, style = sides[side], _style(number)
                line = LINES[number // len(COLOURS) % len(LINES)]
                axes.plot(curve["steps"], curve["mean"], label=loss, linestyle=line, **style)
                if curve["std"]:
                    low, high = ([m + sign * s for m, s in zip(curve["mean"], curve["std"], strict=True)] for sign in (-1, 1))
                    axes.fill_between(curve["steps"], low, high, color=style["color"], alpha=0.15, linewidth=0)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False)
    return figure


def _accuracy(rows: dict[str, TableRow], order: Sequence[str], ink: str) -> Any:
    """Draw a point per loss with its noise; `order` is that of all losses, which decides how each is drawn."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(inked(ink)):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.set(xlabel="KL on samples, nats per answer", ylabel="accuracy (sum) on held-out pairs")
        axes.patch.set_alpha(0)
        axes.axhline(0.5, color=ink, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6, label="chance")
        axes.axvline(0, color=ink, linewidth=0.8, linestyle=":", alpha=0.6, label="reference")
        for loss, row in rows.items():
            kl, accuracy = row["figures"]["kl"], row["figures"]["accuracy"]
            style = _style(order.index(loss)) | {"markersize": 7, "linestyle": "", "elinewidth": 1}
            noise = {"xerr": spread(kl) or 0.0, "yerr": spread(accuracy) or 0.0}
            axes.errorbar(kl["mean"], accuracy["mean"], label=loss, **style | noise)
        for axis in (axes.xaxis, axes.yaxis):
            plain_ticks(axis)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False)
    return figure


def render(
    comparison: Comparison,
    headings: list[str],
    cells: list[list[str]],
    sentences: list[str],
    remarks: list[str],
    curves: Markup,
    accuracy: Plot | None,
    samples: list[dict[str, Any]],
    scores: dict[str, Any] | None = None,
) -> str:
    """Return the page.

    Args:
        headings, cells: the table, a row per loss; the page has a column per loss, which fits a screen.
        curves, accuracy: what `draw_curves` and `draw_accuracy` returned.
        samples: by prompt the "prompt" and the "answers", each with the name of whose it is.
        scores: what `page_scores` returned of an evaluation of the runs.
    """
    head, *rows = map(list, zip(headings, *cells, strict=True))
    return html.render(
        "comparison.html",
        losses=list(comparison.configs),
        config=next(iter(comparison.configs.values())),
        comparison=comparison,
        steps=count(comparison.steps, "step"),
        seeds=f"{'seed' if len(comparison.seeds) == 1 else 'seeds'} {', '.join(map(str, comparison.seeds))}",
        sentences=sentences,
        curves=curves,
        accuracy=accuracy,
        head=["", *head[1:]],
        rows=rows,
        remarks=remarks,
        samples=samples,
        scores=scores,
        open=OPEN,
    )
