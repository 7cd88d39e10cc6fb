"""The figure of a comparison, and the page that holds everything: one file, readable offline, by night and on a phone."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from lite_dil.base.files import replace_file
from lite_dil.evaluation.comparison.settings import Comparison
from lite_dil.reports.charts import COLOURS, inked, svg
from lite_dil.reports.page import escaped

MARKERS, LINES = "os^Dv*", ("-", "--", ":")

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --paper: #fff; --soft: #f2f2ef; --line: #d5d5d0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e3; --paper: #161616; --soft: #222; --line: #444; } }
body { margin: 0 auto; max-width: 70rem; padding: 1rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
svg { width: 100%; min-width: 38rem; height: auto; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
td { white-space: nowrap; }
.notes, .where { font-size: .85rem; opacity: .85; }
code { overflow-wrap: anywhere; }
details { border: 1px solid var(--line); border-radius: .4rem; padding: .4rem .8rem; margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: .6rem; }
.text { white-space: pre-wrap; overflow-wrap: anywhere; background: var(--soft); border-radius: .4rem; padding: .5rem .7rem; }
.prompt { white-space: pre-wrap; overflow-wrap: anywhere; font-weight: 600; margin: 1.2rem 0 .4rem; }
.who { font-size: .8rem; opacity: .8; }
"""


def draw(curves: dict[str, Any], path: Path) -> str:
    """Write the figure to `path` as a PNG, and return it as an SVG element in the colour of the text around it."""
    drawn = io.BytesIO()
    _figure(curves, "black").savefig(drawn, dpi=150, facecolor="white", format="png")
    replace_file(path, drawn.getvalue())
    return svg(lambda ink: _figure(curves, ink))


def _figure(curves: dict[str, Any], ink: str) -> Any:
    """Draw the paper's Figure 2: chosen and rejected log-probs of held-out answers during training, one curve a loss."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(inked(ink)):
        figure = Figure(figsize=(10, 4.6), layout="constrained")
        for axes, side in zip(figure.subplots(1, 2), ("chosen", "rejected"), strict=True):
            axes.set(title=f"{side} answers", xlabel="step", ylabel="log-prob, nats an answer")
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
    svg: str,
    samples: dict[str, list[dict[str, str]]],
) -> str:
    """Return the page. Everything that comes from data, a model or a flag is escaped here."""
    config = next(iter(comparison.configs.values()))
    head = "".join(f'<th scope="col">{escaped(heading)}</th>' for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{escaped(text)}</td>" for text in line) + "</tr>\n" for line in cells)
    seeds = ", ".join(map(str, comparison.seeds))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lite-dil: {escaped(", ".join(comparison.configs))}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{escaped(", ".join(comparison.configs))}</h1>
<p>{escaped(config.model)} on {escaped(config.data)}, {comparison.steps} steps, seeds {escaped(seeds)}; held out:
{escaped(config.eval_data)}.</p>
<h2>What the numbers say</h2>
{_list(sentences)}
<h2>Held-out answers during training</h2>
<div class="wide" role="img" aria-label="held-out log-probs by training step, a curve a loss">{svg}</div>
<h2>After training</h2>
<div class="wide"><table><thead><tr>{head}</tr></thead>
<tbody>
{body}</tbody></table></div>
<div class="notes">{_list(remarks)}</div>
<h2>Answers to held-out prompts</h2>
<p class="notes">Drawn at temperature 1, at most {comparison.sample_tokens} tokens; of the first seed.</p>
{"".join(_answers(loss, pairs) for loss, pairs in samples.items())}
<p class="where">Made by <code>{escaped(comparison.again)}</code></p>
</body>
</html>
"""


def _list(texts: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{escaped(text)}</li>" for text in texts) + "</ul>"


def _answers(loss: str, pairs: list[dict[str, str]]) -> str:
    blocks = "".join(
        f'<div class="prompt">{escaped(pair["prompt"])}</div>\n<div class="two">'
        f'<div><div class="who">reference</div><div class="text">{escaped(pair["before"])}</div></div>'
        f'<div><div class="who">{escaped(loss)}</div><div class="text">{escaped(pair["after"])}</div></div></div>\n'
        for pair in pairs
    )
    return f"<details><summary>{escaped(loss)}</summary>\n{blocks}</details>\n"
