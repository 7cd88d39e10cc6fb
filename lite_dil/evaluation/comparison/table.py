"""The numbers of a comparison: a row per loss, the curves over training, and a verdict in plain sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from lite_dil.base.text import count
from lite_dil.evaluation.comparison.files import RESULT, read_measured
from lite_dil.evaluation.comparison.settings import Comparison
from lite_dil.objectives.table import DIL_FAMILY
from lite_dil.reports.record import FACTS, read_facts
from lite_dil.runs.history import read_metrics

FinishedRun = dict[str, Any]  # result.json, with figures from metrics.jsonl
TableRow = dict[str, Any]

# figure, heading, format
COLUMNS = (
    ("learning_rate", "learning rate", "g"),
    ("accuracy", "accuracy (sum)", ".3f"),
    ("accuracy_per_token", "accuracy (mean)", ".3f"),
    ("margin", "margin", "+.2f"),
    ("log_ratio/chosen", "log-ratio chosen", "+.3f"),
    ("log_ratio/rejected", "log-ratio rejected", "+.3f"),
    ("logps/chosen", "log-prob chosen", ".1f"),
    ("change/chosen", "change of chosen", "+.2f"),
    ("logps/rejected", "log-prob rejected", ".1f"),
    ("change/rejected", "change of rejected", "+.2f"),
    ("kl", "KL on samples", "+.2f"),
    ("length", "answer length", ".0f"),
    ("seconds", "seconds", ".0f"),
    ("peak_memory_mb", "peak MB", ".0f"),
)
# These depend on the machine and on interruptions, not on the loss.
MACHINE_FIGURES = ("seconds", "peak_memory_mb")
OTHERS = ("dpo", "simpo")
CLAIM = "DIL keeps the chosen responses' likelihood where dpo and simpo lose it"


def read_runs(comparison: Comparison) -> list[FinishedRun]:
    """Read the finished runs. Raises UserError if their files are damaged."""
    runs = []
    for seed in comparison.seeds:
        for loss in comparison.configs:
            folder = Path(comparison.run(loss, seed).output_dir or "")
            result = read_measured(folder / RESULT, loss=loss, seed=seed)
            runs.append(result | {"folder": folder} | _of_training(read_metrics(folder, _noted(folder))))
    return runs


def _noted(folder: Path) -> Any:
    return read_facts(folder).get("metrics") if (folder / FACTS).exists() else None


def _of_training(lines: list[dict[str, Any]]) -> FinishedRun:
    training = [line for line in lines if "seconds_per_step" in line]
    seconds, before = 0.0, 0
    for line in training:  # a line is the mean over the steps since the previous line
        seconds += line["seconds_per_step"] * (line["step"] - before)
        before = line["step"]
    points = [line for line in lines if "eval_loss" in line]
    return {
        "seconds": seconds,
        "peak_memory_mb": max((line["peak_memory_mb"] for line in training), default=0.0),
        "curve": {
            side: {line["step"]: line[f"eval_logps/{side}"] for line in points if line.get(f"eval_logps/{side}") is not None}
            for side in ("chosen", "rejected")
        },
    }


def make_rows(runs: Sequence[FinishedRun]) -> list[TableRow]:
    """Return a row per loss: each figure's mean over the seeds, its standard deviation, and its error."""
    rows = []
    for loss in dict.fromkeys(run["loss"] for run in runs):
        mine = [run for run in runs if run["loss"] == loss]
        whole = [run for run in mine if not run["diverged"]]
        figures: dict[str, dict[str, float | None]] = {"learning_rate": _summary([mine[0]["learning_rate"]], [])}
        for name in dict.fromkeys(name for run in whole for name in run["figures"]):
            values = [run["figures"][name] for run in whole]
            errors = [run["errors"][name] for run in whole if run["errors"].get(name) is not None]
            figures[name] = _summary(values, errors)
        for name in MACHINE_FIGURES:
            if whole:
                figures[name] = _summary([run[name] for run in whole], [])
        rows.append(
            {
                "loss": loss,
                "seeds": [run["seed"] for run in mine],
                "diverged": {str(run["seed"]): run["diverged"] for run in mine if run["diverged"]},
                "figures": figures,
            }
        )
    return rows


def _summary(values: list[float], errors: list[float]) -> dict[str, float | None]:
    return {
        "mean": fmean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "error": fmean(errors) if errors else None,
    }


def cell(row: TableRow, name: str, form: str) -> str:
    """Return a figure for people, with its `spread`."""
    figure = row["figures"].get(name)
    if figure is None:
        return "–"
    text, noise = format(figure["mean"], form), spread(figure)
    return text if noise is None else f"{text} ± {format(noise, form.replace('+', ''))}"


def spread(figure: dict[str, float | None]) -> float | None:
    """Return a figure's standard deviation over seeds or, for one seed, its error over responses or answers."""
    return figure["error"] if figure["std"] is None else figure["std"]


def label(row: TableRow) -> str:
    """Return the loss, with which of its runs diverged and when."""
    if not row["diverged"]:
        return row["loss"]
    when = ", ".join(
        (f"seed {seed}: " if len(row["seeds"]) > 1 else "") + message.partition(":")[0]
        for seed, message in row["diverged"].items()
    )
    return f"{row['loss']} (diverged: {when})"


def reference_row(reference: dict[str, Any] | None) -> list[TableRow]:
    """Return the reference as a row if it was measured, which it was not if every run diverged."""
    if reference is None:
        return []
    figures = {name: _summary([value], []) for name, value in reference["figures"].items()}
    return [{"loss": "reference", "seeds": [], "diverged": {}, "figures": figures}]


def table_cells(rows: Sequence[TableRow]) -> tuple[list[str], list[list[str]]]:
    """Return the table's headings, and the cells of each row."""
    headings = ["loss", *(heading for _, heading, _ in COLUMNS)]
    return headings, [[label(row), *(cell(row, name, form) for name, _, form in COLUMNS)] for row in rows]


def make_curves(runs: Sequence[FinishedRun], reference: dict[str, Any] | None, from_reference: bool) -> dict[str, Any]:
    """Return the log-probs of the held-out responses during training, by loss and side: mean and deviation over seeds.

    A step has a point if every seed that did not diverge has one. If all diverged, the curve ends where the first did.

    Args:
        from_reference: whether the untrained policy is the reference, so that its figures are those of step 0.
    """
    known = reference["figures"] if reference else {}
    start = {side: known.get(f"logps/{side}") for side in ("chosen", "rejected")}
    losses: dict[str, Any] = {}
    for loss in dict.fromkeys(run["loss"] for run in runs):
        mine = [run for run in runs if run["loss"] == loss]
        mine = [run for run in mine if not run["diverged"]] or mine
        losses[loss] = {}
        for side in ("chosen", "rejected"):
            curves = [run["curve"][side] for run in mine]
            steps = sorted(set.intersection(*map(set, curves)))
            values = [[curve[step] for curve in curves] for step in steps]
            if from_reference and start[side] is not None:
                steps, values = [0, *steps], [[start[side]] * len(mine), *values]
            losses[loss][side] = {
                "steps": steps,
                "mean": [fmean(some) for some in values],
                "std": [stdev(some) for some in values] if len(mine) > 1 else None,
            }
    unit = "log-probs of held-out responses in nats, summed over a response's tokens, averaged over the responses"
    return {"unit": unit, "reference": start, "losses": losses}


def verdict(rows: Sequence[TableRow], steps: int, held_out: int) -> list[str]:
    """Return sentences on how the chosen responses' likelihood changed, and whether this agrees with the DIL paper's claim.

    A change counts if it exceeds twice its standard error over responses and twice its deviation over seeds.
    """
    moved = {row["loss"]: direction(row["figures"].get("change/chosen")) for row in rows}
    sentences = []
    for row in rows:
        chosen, rejected = (row["figures"].get(f"change/{side}") for side in ("chosen", "rejected"))
        if chosen is None:
            sentences.append(f"{label(row)}: {'no result' if row['diverged'] else 'no chosen responses held out'}.")
            continue
        text = f"{label(row)}: the chosen responses' log-prob {_words(chosen)}"
        sentences.append(text + (f"; the rejected responses' {_words(rejected)}." if rejected else "."))
    ours = [loss for loss in DIL_FAMILY if moved.get(loss)]
    theirs = [loss for loss in OTHERS if moved.get(loss)]
    if not ours or not theirs:
        lacking = f"a loss of the DIL family ({', '.join(DIL_FAMILY)})" if not ours else " or ".join(OTHERS)
        return [*sentences, f'The claim "{CLAIM}" is not tested here: there is no result of {lacking}.']
    kept = [loss for loss in ours if moved[loss] in ("rose", "steady")]
    lost = [loss for loss in theirs if moved[loss] == "fell"]
    judged = f'The claim "{CLAIM}" does not agree with these numbers'
    if {moved[loss] for loss in [*ours, *theirs]} == {"steady"}:
        judged = f"These numbers cannot tell whether {CLAIM}"
    elif kept == ours and lost == theirs:
        judged = f'The claim "{CLAIM}" agrees with these numbers'
    elif kept and lost:
        judged = f'The claim "{CLAIM}" agrees with these numbers in part'
    names = {name: ", ".join(loss for loss in [*ours, *theirs] if moved[loss] == name) for name in ("rose", "steady", "fell")}
    found = "; ".join(
        f"{text} with {names[name]}"
        for name, text in (("rose", "it rose"), ("steady", "no change beyond the noise"), ("fell", "it fell"))
        if names[name]
    )
    seeds = max(len(row["seeds"]) for row in rows)
    scope = f"{count(seeds, 'seed')}, {steps} steps and {held_out} held-out rows at these learning rates"
    compared = f" (of {' and '.join(OTHERS)} only {theirs[0]} was compared)" if len(theirs) < len(OTHERS) else ""
    return [*sentences, f"{judged}{compared}: {found}. This holds for {scope} only."]


def direction(change: dict[str, float | None] | None) -> str:
    """Return "rose", "fell" or "steady" for a change, or "" for None; "steady" without any measure of noise."""
    if change is None or change["mean"] is None:
        return ""
    noise = max((2 * value for value in (change["error"], change["std"]) if value is not None), default=float("inf"))
    if abs(change["mean"]) <= noise:
        return "steady"
    return "rose" if change["mean"] > 0 else "fell"


def _words(change: dict[str, float | None]) -> str:
    mean, noise = change["mean"] or 0.0, spread(change)
    within = "" if noise is None else f" ± {noise:.2f}"
    which = direction(change)
    if which == "steady":
        return f"did not clearly move ({mean:+.2f}{within} nats)"
    return f"{which} by {abs(mean):.2f}{within} nats"


def notes(rows: Sequence[TableRow], tokens: int) -> list[str]:
    """Return notes that define the columns."""
    seeds = max((len(row["seeds"]) for row in rows), default=1)
    noise = f"the standard deviation over {seeds} seeds" if seeds > 1 else "the standard error"
    return [
        f"± is {noise}. The figures from accuracy to log-prob are of held-out responses, defined alike for every loss.",
        "accuracy: the share of pairs whose chosen response gained more log-prob than the rejected one, in total (sum) or per "
        "token (mean).",
        "log-ratio: log pi - log pi_ref in nats per token. log-prob: in nats, summed over the response's tokens; its change "
        "is against the reference, and the margin is the chosen response's change minus the rejected one's.",
        f"KL on samples: the mean of log pi - log pi_ref over the trained model's own answers, cut at {tokens} tokens: an "
        "estimate of KL(pi, pi_ref) in nats per answer, which may come out below 0 by chance. Length in tokens, cut likewise.",
        "seconds: of training steps alone. Peak memory: of the device's allocator; on a CPU the process's, the runs before "
        "included.",
    ]
