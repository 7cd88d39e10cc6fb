"""The table and the figure of scripts/theorem.py's trainings, for docs/theorem.md."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from lite_dil.base.files import replace_file

Trained: TypeAlias = dict[str, Any]
MARK = "<!-- Below: made by scripts/theorem.py --page -->"
SIDES = ("chosen", "rejected")
PANELS = {"kl_forward": "KL(pi_chosen, pi)", "kl_reverse": "KL(pi, pi_chosen)"}
RESAMPLES = 2000
STYLES = ("-", "--", ":", "-.")  # of a loss with several rates
TRIED = 1000  # the seed of the trainings that choose rates
COLOURS = {
    "sft": "#000000",
    "ukl": "#0072B2",
    "bce": "#56B4E9",
    "rulsif": "#009E73",
    "lsif": "#D55E00",
    "dpo": "#CC79A7",
    "dpo, beta 0.1": "#E69F00",
}


def write_page(folder: Path, page: Path) -> None:
    """Replace what is below the page's mark by a section a setting, with the figures beside the page."""
    groups = defaultdict[tuple[str, float, int, str], list[Trained]](list)
    for path in sorted(folder.glob("*.json")):
        trained = json.loads(path.read_text(encoding="utf-8"))
        if trained["seed"] != TRIED:
            groups[trained["setting"], trained["clip"], trained["steps"], trained["asked"]].append(trained)
    sections = []
    for (setting, clip, steps, asked), arms in sorted(groups.items()):
        alone = sum((setting, clip, steps) == other[:3] for other in groups) == 1
        name = f"{page.stem}-{setting}{'' if clip == 1 else f'-clip-{clip:g}'}-{steps}{'' if alone else f'-{asked}'}"
        figure = page.with_name(f"{name}.png")
        draw(arms, figure)
        sections.append(section(setting, clip, arms) + f"\n\n![KL to pi_chosen]({figure.name})")
    head = page.read_text(encoding="utf-8").split(MARK)[0].rstrip() if page.exists() else "# The theorem on a language model"
    replace_file(page, "\n\n".join([head, MARK, *sections]) + "\n")


def section(setting: str, clip: float, arms: list[Trained]) -> str:
    """Return a setting's heading, facts and table in Markdown."""
    start = {name: np.concatenate([arm["start"][name] for arm in _one_a_seed(arms)]) for name in arms[0]["start"]}
    ratio = {side: np.exp(start[f"true/{side}"]) for side in ("chosen", "rejected")}
    squares, items, date = (ratio["rejected"] ** 2).mean(), len(start["kl_forward"]), max(arm["date"] for arm in arms)
    facts = (
        f"At the start: KL(pi_chosen, pi_ref) {_error(start['kl_forward'])}, KL(pi_ref, pi_chosen) "
        f"{_error(start['kl_reverse'])} nats an answer; E_ref[r^2] {squares:.2f} from draws of pi_ref, "
        f"{ratio['chosen'].mean():.2f} from draws of pi_chosen. {items} held-out prompts in all; {date}."
    )
    lines = [
        "| loss | rate | seeds | answers | KL(pi_chosen, pi) | KL(pi, pi_chosen) | below sft's by | correlation | slope "
        "| offset | change of chosen | clipped steps |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    by_rate = defaultdict[tuple[str, float], list[Trained]](list)
    for arm in arms:
        by_rate[arm["loss"], arm["rate"]].append(arm)
    sft = min(([each for (loss, _), each in by_rate.items() if loss == "sft"]), key=_end, default=[])
    for loss in COLOURS:
        rows = [_row(loss, each, sft) for (name, _), each in sorted(by_rate.items()) if name == loss]
        lines += rows or [f"| {loss} | missing |" + " |" * 10]
    kind, _, tokens = setting.rpartition("-")
    what = {"system": "Another system prompt", "null": "pi_chosen is pi_ref"}.get(kind, kind.replace("-", " ").capitalize())
    return "\n".join([f"## {what}: at most {tokens} tokens, gradients clipped at {clip:g}", "", facts, "", *lines])


def _end(arms: list[Trained]) -> float:
    """Return the mean KL(pi_chosen, pi) at the end."""
    return float(np.mean([arm["points"][-1]["kl_forward"] for arm in arms]))


def _row(loss: str, arms: list[Trained], sft: list[Trained]) -> str:
    ends = [arm["points"][-1] for arm in arms]
    forward, reverse = (_over_seeds([end[name] for end in ends]) for name in ("kl_forward", "kl_reverse"))
    base = {arm["seed"]: arm["points"][-1]["kl_forward"] for arm in sft}
    both = [(base[arm["seed"]], end["kl_forward"]) for arm, end in zip(arms, ends, strict=True) if arm["seed"] in base]
    less = _over_seeds([np.subtract(*pair).tolist() for pair in both]) if both and loss != "sft" else "–"
    fits = {side: [fit(arm["start"][f"true/{side}"], arm["points"][-1][f"learned/{side}"]) for arm in arms] for side in SIDES}
    correlation, slope, offset = ([float(np.mean([each[i] for each in fits[side]])) for side in SIDES] for i in range(3))
    change = _over_seeds([end["learned/chosen"] for end in ends])
    clipped = sum(end["clipped_steps"] for end in ends) / sum(end["step"] for end in ends)
    rates, answers = sorted({f"{arm['rate']:g}" for arm in arms}), sorted({str(end["answers"]) for end in ends})
    cells = [loss, ", ".join(rates), str(len(arms)), ", ".join(answers), forward, reverse, less]
    cells += [f"{first:.2f}, {second:.2f}" for first, second in (correlation, slope, offset)]
    return f"| {' | '.join([*cells, change, f'{clipped:.0%}'])} |"


def fit(true: list[float], learned: list[float]) -> tuple[float, float, float]:
    """Return the correlation of two log-ratios, and slope and offset of the learned one by least squares."""
    x, y = np.array(true), np.array(learned)
    if not x.std():  # the null setting has no true ratio
        return np.nan, np.nan, float(y.mean())
    slope = float(((x - x.mean()) * (y - y.mean())).mean() / x.var())
    correlation = float(np.corrcoef(x, y)[0, 1]) if y.std() else 0.0
    return correlation, slope, float(y.mean() - slope * x.mean())


def _one_a_seed(arms: list[Trained]) -> list[Trained]:
    return list({arm["seed"]: arm for arm in arms}.values())


def _error(values: np.ndarray) -> str:
    """Return a mean with its standard error over prompts."""
    return f"{values.mean():.3f} ± {values.std(ddof=1) / np.sqrt(len(values)):.3f}"


def _over_seeds(values: list[list[float]]) -> str:
    """Return a mean over seeds and prompts with its standard error: by bootstrap of the seeds, and of each one's prompts."""
    draw, means = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        some = [values[i] for i in draw.integers(0, len(values), len(values))]
        means.append(np.mean([np.mean(np.array(each)[draw.integers(0, len(each), len(each))]) for each in some]))
    return f"{np.mean([np.mean(each) for each in values]):.3f} ± {np.std(means):.3f}"


def draw(arms: list[Trained], path: Path) -> None:
    """Draw the divergence from pi_chosen against the number of answers, a line a loss: the mean of its seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        for axes, (name, title) in zip(figure.subplots(1, 2), PANELS.items(), strict=True):
            for loss, colour in COLOURS.items():
                rates = sorted({arm["rate"] for arm in arms if arm["loss"] == loss})
                for rate, style in zip(rates, STYLES, strict=False):
                    same = [arm for arm in arms if (arm["loss"], arm["rate"]) == (loss, rate)]
                    steps = min((arm["points"] for arm in same), key=len)
                    answers = [0, *(point["answers"] for point in steps)]
                    curves = [[arm["start"], *arm["points"][: len(steps)]] for arm in same]
                    rows = np.array([[np.mean(point[name]) for point in curve] for curve in curves])
                    label = loss if len(rates) == 1 else f"{loss}, rate {rate:g}"
                    axes.plot(answers, rows.mean(0), style, color=colour, label=label)
                    if len(rows) > 1:
                        axes.fill_between(answers, rows.min(0), rows.max(0), color=colour, alpha=0.15, linewidth=0)
            axes.set(title=title, xlabel="answers trained on", ylabel="nats an answer")
            axes.set_ylim(bottom=0)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False)
        figure.savefig(path, dpi=150, facecolor="white")
