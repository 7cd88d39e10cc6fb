"""Charts as SVG in the page's own text colour, for light and dark pages; matplotlib draws them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup

from lite_dil.runs.history import Curve, History

# Okabe and Ito's colour-blind-safe colours, without black and yellow: each is visible on white and on black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK = "#010203"  # a placeholder for the page's text colour
_INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
# Beyond this, matplotlib's axis arithmetic overflows; such values are left out, like values that are not finite.
LARGEST = 1e100
BINS = 24  # of a distribution
# Removed: group names, which would repeat across charts on a page, and styles and fonts, which would affect the whole page.
_NOT_OURS = (
    (r'<g id="[^"]*">', "<g>"),
    (r"<style.*?</style>", ""),
    (r"font-family: [^;\"]*;?", ""),
    (r"\s*\n\s*", " "),
)


def inked(ink: str) -> dict[Any, Any]:
    """Return matplotlib settings that draw texts and axes in one colour."""
    return {**dict.fromkeys(_INKED, ink), "axes.spines.top": False, "axes.spines.right": False}


def svg(make: Callable[[str], Any], salt: str = "lite-dil", text: str = "path") -> Markup:
    """Return the figure that `make` draws in a given ink as an SVG element that takes the surrounding text's colour.

    It is markup: a page shows it unescaped.

    Args:
        salt: seeds the names inside the SVG, so that the same numbers give the same file.
        text: "path" draws letters as shapes, "none" leaves them as text in the page's font.
    """
    import matplotlib

    out = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": text, "svg.hashsalt": salt}):
        make(INK).savefig(out, format="svg", transparent=True, metadata=nothing)
    found = out.getvalue()
    found = found[found.index("<svg") :].replace(INK, "currentColor")
    for pattern, instead in _NOT_OURS:
        found = re.sub(pattern, instead, found)
    return Markup(found)  # noqa: S704 - matplotlib drew it, and escaped the texts in it


def plain_ticks(axis: Any) -> None:
    """Label an axis of matplotlib by `tick_labels`: its own labels may be the rest over an offset or a power of ten."""
    from matplotlib.ticker import Formatter

    class Plain(Formatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return tick_labels([x])[0]

        def format_ticks(self, values: list[float]) -> list[str]:
            return tick_labels(values)

    axis.set_major_formatter(Plain())


def tick_labels(values: Sequence[float]) -> list[str]:
    """Return evenly spaced values as whole numbers, each by itself, with as many digits as it takes to tell them apart."""
    size = max(map(abs, values), default=0.0)
    gap = min((abs(a - b) for a, b in pairwise(values)), default=size)
    form = "e" if size >= 1e6 or 0 < size < 1e-3 else "f"
    labels: list[str] = []
    for digits in range(13):
        labels = [f"{value:.{digits}{form}}" for value in values]
        if all(abs(float(text) - value) <= gap / 50 for text, value in zip(labels, values, strict=True)):
            break
    return ["0" if form == "e" and not float(text) else _short(text) for text in labels]


def _short(text: str) -> str:
    """Return a number with a real minus, and without needless digits of its exponent."""
    number, power, exponent = text.partition("e")
    return (number + (f"e{int(exponent)}" if power else "")).replace("-", "\u2212")


@dataclass(frozen=True)
class Line:
    """One curve of a chart: the metric's name without ``eval_``, and its label."""

    name: str
    label: str = ""
    colour: str = COLOURS[0]


@dataclass(frozen=True)
class Chart:
    """A chart's content. `level` is a value to mark with a thin line, if any."""

    key: str
    title: str
    unit: str
    lines: tuple[Line, ...]
    level: float | None = None


def _sides(prefix: str) -> tuple[Line, ...]:
    return (Line(f"{prefix}/chosen", "chosen", COLOURS[0]), Line(f"{prefix}/rejected", "rejected", COLOURS[1]))


def charts(per: str, reward: bool = False, online: bool = False) -> list[Chart]:
    """Return every chart of a run.

    Args:
        per: the unit of log-ratios, "token" or "response".
        reward: whether it trains a reward model, and no policy.
        online: whether the policy is trained on its own answers.
    """
    own = _REWARD_CHARTS if reward else _ONLINE_CHARTS if online else _policy_charts(per)
    return [Chart("loss", "Loss", "", (Line("loss"),)), *own, *_SHARED_CHARTS]


def _policy_charts(per: str) -> list[Chart]:
    return [
        Chart("accuracy", "Accuracy: pairs whose chosen response gained more", "share", (Line("rewards/accuracies"),), 0.5),
        Chart("margin", "Margin: reward of chosen less rejected", "beta x nats", (Line("rewards/margins"),), 0.0),
        Chart("log-ratio", "Log-ratio to the reference, by side", f"nats per {per}", _sides("log_ratio"), 0.0),
        Chart("log-prob", "Log-prob of the responses, by side", "nats per response", _sides("logps")),
        Chart("kl", "KTO's baseline z0", f"nats per {per}", (Line("kl"),), 0.0),
    ]


_REWARD_CHARTS = (
    Chart("accuracy", "Accuracy: pairs whose chosen response scores higher", "share", (Line("accuracy"),), 0.5),
    Chart("margin", "Margin: reward of chosen less rejected", "", (Line("margin"),), 0.0),
    Chart("reward", "Reward, by side", "", _sides("reward")),
    Chart("log-v", "Mean log of the noise scale V", "", (Line("log_v"),)),
    Chart("length", "Correlation of rewards with length", "", (Line("length_correlation"),), 0.0),
)
_ONLINE_CHARTS = (
    Chart("reward", "Reward of new answers", "mean", (Line("reward"),)),
    Chart("eval-reward", "Held-out reward of new answers, not trained on", "mean", (Line("eval_reward"),)),
    Chart("kl-answer", "KL to the reference, estimated", "nats per answer", (Line("kl/answer"),), 0.0),
    Chart("length", "Length of new answers", "tokens", (Line("completions/mean_length"),)),
    Chart("cut", "Answers cut before their end", "share", (Line("completions/clipped_ratio"),)),
    Chart("entropy", "Entropy, estimated", "nats per token", (Line("entropy"),)),
    Chart("bounded", "Tokens whose ratio is beyond its bound", "share", (Line("clip_ratio"),)),
    Chart("equal", "Groups whose rewards are all equal", "share", (Line("frac_reward_zero_std"),)),
)
_SHARED_CHARTS = (
    Chart("capped", "Responses beyond --log-ratio-cap", "share", (Line("capped"),)),
    Chart("grad-norm", "Gradient norm before clipping", "", (Line("grad_norm"),)),
    Chart("learning-rate", "Learning rate", "", (Line("learning_rate"),)),
    Chart("speed", "Speed", "tokens per second", (Line("tokens_per_second"),)),
    Chart("memory", "Peak memory so far", "MB", (Line("peak_memory_mb"),)),
    Chart("skipped", "Skipped steps", "per line of metrics", (Line("skipped_steps"),)),
)


@dataclass(frozen=True)
class Drawn:
    """A chart's SVG, and its figures in a sentence for screen readers."""

    chart: Chart
    svg: Markup
    sentence: str
    bin: int


def draw(chart: Chart, history: History) -> Drawn | None:
    """Draw a chart of a run, or return None if it has nothing to show."""
    curves = []
    for line in chart.lines:
        curves.append((line, "training", _within(history.train.curve(line.name))))
        curves.append((line, "held out", _within(history.held_out.curve(f"eval_{line.name}"))))
    curves = [entry for entry in curves if entry[2].drawable]
    if not curves or (chart.key == "skipped" and not any(curve.values.any() for _, _, curve in curves)):
        return None
    sentence = f"{chart.title}{f' ({chart.unit})' if chart.unit else ''}. " + " ".join(
        f"{_name(line, part)}: {_figures(curve)}." for line, part, curve in curves
    )
    drawn = themed(lambda ink: _figure(chart, curves, ink), chart.key)
    return Drawn(chart, drawn, sentence, max(curve.bin for _, _, curve in curves))


def draw_margins(margins: np.ndarray, unit: str = "beta x nats") -> Drawn | None:
    """Draw how the margins of pairs, (pairs,), are distributed; None where nothing is to be seen of them."""
    shown = margins[np.abs(margins) < LARGEST]
    if not len(shown):
        return None
    chart = Chart("margins", "Margin: reward of chosen less rejected", unit, ())
    low, median, high = np.quantile(shown, (0, 0.5, 1))
    sentence = (
        f"Margins of {len(shown):,} held-out pairs. Between {low:.4g} and {high:.4g}, median {median:.4g}; "
        f"{int((shown <= 0).sum()):,} not above 0."
    )
    return Drawn(chart, themed(lambda ink: _histogram(shown, ink), chart.key), sentence, 1)


def themed(make: Callable[[str], Any], salt: str) -> Markup:
    """Return `svg` in the page's font, the first three curves in its own colours, which are lighter on a dark page."""
    text = svg(make, salt=salt, text="none")
    for number, colour in enumerate(COLOURS[:3]):
        text = text.replace(colour.lower(), f"var(--curve-{number})")
    return text


def _within(curve: Curve) -> Curve:
    return curve._replace(values=np.where(np.abs(curve.values) < LARGEST, curve.values, np.nan))


def _name(line: Line, part: str) -> str:
    return f"{line.label}, {part}" if line.label else part


def _figures(curve: Curve) -> str:
    finite = np.isfinite(curve.values)
    steps, values = curve.steps[finite], curve.values[finite]
    if len(values) == 1:
        return f"{values[0]:.4g} at step {steps[0]:.0f}"
    return (
        f"{values[0]:.4g} at step {steps[0]:.0f}, {values[-1]:.4g} at step {steps[-1]:.0f}, "
        f"between {values.min():.4g} and {values.max():.4g}"
    )


def _figure(chart: Chart, curves: Sequence[tuple[Line, str, Curve]], ink: str) -> Any:
    """Draw training as a thin line, and held-out figures as a thick one with marks."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(inked(ink) | {"font.size": 12.0}):
        figure = Figure(figsize=(5, 2.9), layout="constrained")
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        plain_ticks(axes.yaxis)
        if chart.level is not None:
            axes.axhline(chart.level, color=ink, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.5)
        for line, part, curve in curves:
            held_out = part == "held out"
            colour = line.colour if line.label or not held_out else COLOURS[2]
            few = np.isfinite(curve.values).sum() <= (40 if held_out else 2)
            axes.plot(
                curve.steps,
                curve.values,
                color=colour,
                linewidth=2.2 if held_out else 1.3,
                alpha=1 if held_out or len(curves) == 1 else 0.7,
                marker="o" if few else None,
                markersize=5,
                label=_name(line, part),
            )
        if len(curves) > 1:
            figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=11, handlelength=1.4, borderaxespad=0.1)
    return figure


def bins(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges of about `BINS` bins, (bins + 1,), one of them 0, and how many values are in each, (bins,).

    A value on an edge is counted below it, so that 0 is not among the positive ones.
    """
    low, high = float(values.min()), float(values.max())
    width = (max(high, 0.0) - min(low, 0.0)) / BINS or 1.0
    first, last = (min(np.floor(low / width), -1) if low <= 0 else 0), (max(np.ceil(high / width), 1) if high > 0 else 0)
    edges = width * np.arange(first, last + 1)
    counts, _ = np.histogram(-np.clip(values, edges[0], edges[-1]), -edges[::-1])  # clipped, since edges are rounded
    return edges, counts[::-1]


def _histogram(values: np.ndarray, ink: str) -> Any:
    """Draw the bins, those that are not above 0 in another colour."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    edges, counts = bins(values)
    with matplotlib.rc_context(inked(ink) | {"font.size": 12.0}):
        figure = Figure(figsize=(5, 2.9), layout="constrained")
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        axes.set(xlabel="margin", ylabel="pairs")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        plain_ticks(axes.xaxis)
        wrong = edges[1:] <= 0
        for picked, colour, label in ((wrong, COLOURS[1], "wrong"), (~wrong, COLOURS[0], "right")):
            if counts[picked].any():
                axes.bar(edges[:-1][picked], counts[picked], np.diff(edges)[picked], align="edge", color=colour, label=label)
        axes.axvline(0, color=ink, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.5)
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=11, handlelength=1.4, borderaxespad=0.1)
    return figure
