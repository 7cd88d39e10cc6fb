"""What the report says of an on-policy run: reward against KL, length beside reward, and answers over time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.base.strict_json import parse_json
from lite_dil.online.rollouts_file import ROLLOUTS
from lite_dil.reports.charts import COLOURS, Chart, Drawn, inked, plain_ticks, themed
from lite_dil.runs.history import History

_RECENT = 0.25  # share of the steps that the final figures are of
_CLEAR = 3.0  # standard errors by which a mean has moved without doubt
_BY_LENGTH, _LONGER = 0.5, 1.3  # a correlation, and a growth of the mean length, that together are a warning


@dataclass(frozen=True)
class DrawnAnswers:
    """The answers of a run.

    Attributes:
        correlation: of length and reward over the answers of the last quarter of the steps; None if one of them is constant.
        moments: for the first, the middle and the last step, the best, a typical and the worst answer by reward.
    """

    correlation: float | None
    moments: list[tuple[int, list[tuple[str, dict[str, Any]]]]]


def read_drawn(folder: Path) -> DrawnAnswers | None:
    """Read a run's rollouts.jsonl; None if there is none. Damaged lines are left out."""
    path = folder / ROLLOUTS
    figures = np.array([(row["step"], row["reward"], len(row["ids"])) for row in _rows(path)])
    if not len(figures):
        return None
    steps = np.unique(figures[:, 0])
    recent = figures[figures[:, 0] >= steps[int(len(steps) * (1 - _RECENT))]]
    rewards, lengths = recent[:, 1], recent[:, 2]
    varied = np.ptp(rewards) > 0 and np.ptp(lengths) > 0
    shown = sorted({int(steps[0]), int(steps[len(steps) // 2]), int(steps[-1])})
    at: dict[int, list[dict[str, Any]]] = {step: [] for step in shown}
    for row in _rows(path):
        if row["step"] in at:
            at[row["step"]].append(row)
    moments = []
    for step, rows in at.items():
        ordered = sorted(rows, key=lambda row: float(row["reward"]))
        names = {"best": ordered[-1], "typical": ordered[len(ordered) // 2], "worst": ordered[0]}
        moments.append((step, list(names.items())))
    return DrawnAnswers(float(np.corrcoef(rewards, lengths)[0, 1]) if varied else None, moments)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole rows of the file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                row = parse_json(line)
            except ValueError:
                continue
            if isinstance(row, dict) and {"step", "reward", "ids", "prompt", "response", "log_ratio"} <= row.keys():
                yield row


def outcome_of(history: History) -> str:
    """Return what was reached, in words."""
    train = history.train
    first, last = (train.at(0, "reward") if train.number else None), train.recent("reward")
    kl, length = train.recent("kl/answer"), train.recent("completions/mean_length")
    if first is None or last is None or kl is None or length is None:
        return "No step was logged yet."
    start = train.at(0, "completions/mean_length")
    before, after = train.at(0, "eval_reward"), train.recent("eval_reward")
    judged = "" if before is None or after is None else f" The held-out reward went from {before:.3g} to {after:.3g}."
    return (
        f"The mean reward of new answers went from {first:.3g} to {last:.3g}, at a distance of {kl:.3g} nats per answer from "
        f"the reference (KL, estimated).{judged} Answers have {length:.3g} tokens, {start:.3g} at the start. The last "
        "figures are means over the last quarter of the run."
    )


def warnings_of(history: History, drawn: DrawnAnswers | None) -> list[str]:
    """Return what looks wrong, each with what to try."""
    train, found = history.train, []
    first = train.at(0, "completions/mean_length") if train.number else None
    last, cut = train.recent("completions/mean_length"), train.recent("completions/clipped_ratio")
    by_length = drawn.correlation if drawn else None
    if by_length is not None and by_length > _BY_LENGTH and first and last and last > _LONGER * first:
        found.append(
            f"Answers grew from {first:.3g} to {last:.3g} tokens, and longer ones have higher rewards (correlation "
            f"{by_length:+.2f}): the reward may be gamed by length. What to try: a reward of brevity in the sum, a larger "
            "--beta, or --target-kl."
        )
    if _moved(train.get("reward")) > _CLEAR and _moved(train.get("eval_reward")) < -_CLEAR:
        found.append(
            "The reward rose while the held-out reward fell: the answers please the one and not the other, as where a reward "
            "is gamed. What to try: an earlier checkpoint, a larger --beta, --target-kl, or the two rewards in a sum."
        )
    if cut is not None and cut > 0.5:
        found.append(
            f"{cut:.0%} of the last answers were cut before their end. What to try: a larger --max-new-tokens, or "
            "--missing-eos-penalty, which makes answers end."
        )
    if (equal := train.recent("frac_reward_zero_std")) is not None and equal > 0.8:
        found.append(
            f"In {equal:.0%} of the last groups all answers had the same reward, which teaches nothing but the distance to "
            "the reference. What to try: harder or easier prompts, more --samples, or a finer reward."
        )
    return found


def _moved(values: np.ndarray) -> float:
    """Return how far the mean over the last quarter of the lines is from that over the first, in standard errors.

    0 where the lines are too few to tell.
    """
    values = values[np.isfinite(values)]
    quarter = int(len(values) * _RECENT)
    if quarter < 2:
        return 0.0
    first, last = values[:quarter], values[-quarter:]
    error = float(np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / quarter))
    gap = float(last.mean() - first.mean())
    return gap / error if error else math.copysign(math.inf, gap) if gap else 0.0


def draw_reward_and_kl(history: History) -> Drawn | None:
    """Draw the mean reward of each line of metrics against its KL; None with less than two."""
    reward, kl = (np.array(history.train.get(name), float) for name in ("reward", "kl/answer"))
    if len(reward) < 2 or len(reward) != len(kl):
        return None
    chart = Chart("reward-kl", "Reward against KL to the reference", "reward; nats per answer", ())
    sentence = f"{chart.title}: {reward[0]:.4g} at {kl[0]:.4g} nats at first, {reward[-1]:.4g} at {kl[-1]:.4g} nats at last."
    return Drawn(chart, themed(lambda ink: _figure(reward, kl, ink), chart.key), sentence, 1)


def _figure(reward: np.ndarray, kl: np.ndarray, ink: str) -> Any:
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context(inked(ink) | {"font.size": 12.0}):
        figure = Figure(figsize=(5, 2.9), layout="constrained")
        axes = figure.subplots()
        axes.patch.set_alpha(0)
        axes.set(xlabel="KL, nats per answer", ylabel="reward")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
            plain_ticks(axis)
        axes.plot(kl, reward, color=COLOURS[0], linewidth=0.8, marker="o", markersize=3)
    return figure
