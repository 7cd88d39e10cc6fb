"""python scripts/benchmark_figure.py: draw docs/benchmark.png, the README's figure, from docs/benchmark.json.

That file holds the measured rows of one `python scripts/benchmark.py --quick --json FILE`, without its raw samples.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
CASES = {"hh": "HH helpful", "long": "prompt 512, responses 64", "short": "prompt 64, responses 128"}
# Label and colour (Okabe and Ito's) by contestant and checkpointing, as named in the rows.
BARS = {
    ("lite-dil", "off"): ("lite-dil", "#0072B2"),
    ("lite-dil", "full"): ("lite-dil, checkpointing full", "#56B4E9"),
    ("trl-best", "off"): ("TRL, 16-bit weights, reference precomputed", "#E69F00"),
    ("trl", "full"): ("TRL, defaults", "#D55E00"),
}
PANELS = {"pairs_per_second": ("pairs per second", 1), "memory_mb": ("memory above the model, GB", 1 / 1024)}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw a panel per figure, a group per case and a bar per contestant; `rows` are those of scripts/benchmark.py."""
    import matplotlib
    from matplotlib.figure import Figure

    found = {(row["case"], (row["contestant"], row["checkpointing"])): row for row in rows}
    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for axes, (metric, (title, unit)) in zip(figure.subplots(1, 2, sharey=True), PANELS.items(), strict=True):
            for number, (key, (label, colour)) in enumerate(BARS.items()):
                values = [found[case, key][metric] * unit for case in CASES]
                places = [case * (len(BARS) + 1) + number for case in range(len(CASES))]
                bars = axes.barh(places, values, height=0.9, color=colour, label=label)
                axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
            axes.set(title=title, yticks=[case * (len(BARS) + 1) + 1.5 for case in range(len(CASES))])
            axes.set_yticklabels(CASES.values())
            axes.margins(x=0.12)
        figure.axes[0].invert_yaxis()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(path, dpi=150, facecolor="white")


if __name__ == "__main__":
    draw(json.loads((DOCS / "benchmark.json").read_text())["rows"], DOCS / "benchmark.png")
