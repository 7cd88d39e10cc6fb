"""The figure of a comparison, and its page: one file, readable offline, in dark mode and on a phone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from markupsafe import Markup

from lite_dil.base.files import replace_file
from lite_dil.evaluation.comparison.settings import Comparison
from lite_dil.reports import html
from lite_dil.reports.charts import COLOURS, inked, svg

MARKERS, LINES = "os^Dv*", ("-", "--", ":")


def draw(curves: dict[str, Any], path: Path) -> Markup:
    """Write the figure to `path` as a PNG, and return it as an SVG element in the surrounding text's colour."""
    drawn = io.BytesIO()
    _figure(curves, "black").savefig(drawn, dpi=150, facecolor="white", format="png")
    replace_file(path, drawn.getvalue())
    return svg(lambda ink: _figure(curves, ink))


def _figure(curves: dict[str, Any], ink: str) -> Any:
    """Draw the paper's Figure 2: chosen and rejected log-probs of held-out answers during training, one curve per loss."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(inked(ink)):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        for axes, side in zip(figure.subplots(1, 2), ("chosen", "rejected"), strict=True):
            axes.set(title=f"{side} answers", xlabel="step", ylabel="log-prob, nats per answer")
            axes.patch.set_alpha(0)
            start = curves["reference"][side]
            if start is not None:
                axes.axhline(start, color=ink, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.6, label="reference")
            for number, (loss, sides) in enumerate(curves["losses"].items()):
                curve, colour = sides[side], COLOURS[number % len(COLOURS)]
                style = {"marker": MARKERS[number % len(MARKERS)], "linestyle": LINES[number // len(COLOURS) % len(LINES)]}
                axes.plot(curve["steps"], curve["mean"], color=colour, markersize=5, label=loss, **style)
                if curve["std"]:
                    low, high = ([m + sign * s for m, s in zip(curve["mean"], curve["std"], strict=True)] for sign in (-1, 1))
                    axes.fill_between(curve["steps"], low, high, color=colour, alpha=0.15, linewidth=0)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), frameon=False)
    return figure


def render(
    comparison: Comparison,
    headings: list[str],
    cells: list[list[str]],
    sentences: list[str],
    remarks: list[str],
    figure: Markup,
    samples: dict[str, list[dict[str, str]]],
) -> str:
    """Return the page; `figure` is what `draw` returned."""
    return html.render(
        "comparison.html",
        losses=list(comparison.configs),
        config=next(iter(comparison.configs.values())),
        comparison=comparison,
        sentences=sentences,
        figure=figure,
        head=headings,
        rows=cells,
        remarks=remarks,
        samples=samples,
    )
