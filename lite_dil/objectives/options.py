"""The options of the objective, made from the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lite_dil.base.option import option
from lite_dil.objectives.table import OBJECTIVES, OPTIONS


def per_loss(attribute: str) -> str:
    """Return every loss's default, losses of the same default together."""
    values: dict[Any, list[str]] = {}
    for name, objective in OBJECTIVES.items():
        values.setdefault(getattr(objective, attribute), []).append(name)
    values.pop(None, None)
    return "; ".join(f"{value} {', '.join(names)}" for value, names in values.items())


def _by_data() -> str:
    """Return every loss with its name in words, by the data that it takes."""
    kinds = {
        "sides": "Of pairs, or of good and bad answers without partners",
        "pairs": "Of pairs",
        "chosen": "Of good answers",
    }
    listed = {kind: ", ".join(f"{name} ({o.title})" for name, o in OBJECTIVES.items() if o.data == kind) for kind in kinds}
    return " ".join(f"{text}: {listed[kind]}." for kind, text in kinds.items())


def _constant(name: str) -> Any:
    """Return the option of a constant in the table of objectives."""
    constant = OPTIONS[name]
    losses = ", ".join(loss for loss, objective in OBJECTIVES.items() if name in objective.options)
    default = "off" if constant.default is None else constant.default
    return option("objective", None, f"{constant.help} (default: {default}; of {losses})", choices=constant.choices)


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """The loss and its constants, each None where the objective's own default stands."""

    loss: str = option(
        "objective",
        "lsif",
        f"the objective; formulas, sources and when to use which are in docs/losses.md. {_by_data()} "
        "FILE.py:NAME is a loss of one's own, a lite_dil.PairLoss or SideLoss (docs/api.md)",
        choices=tuple(OBJECTIVES),
    )
    logp_reduction: str | None = option(
        "objective",
        None,
        f"whether the log-ratio is summed over an answer's tokens or averaged (default: {per_loss('reduction')})",
        choices=("mean", "sum"),
    )
    beta: float | None = option("objective", None, f"multiplies the log-ratio (default: {per_loss('beta')})")
    basu_alpha: float | None = _constant("basu_alpha")
    relative_alpha: float | None = _constant("relative_alpha")
    denominator: str | None = _constant("denominator")
    log_ratio_cap: float | None = _constant("log_ratio_cap")
    chosen_weight: float | None = _constant("chosen_weight")
    rejected_weight: float | None = _constant("rejected_weight")
    divergence: str | None = _constant("divergence")
    divergence_alpha: float | None = _constant("divergence_alpha")
    slic_delta: float | None = _constant("slic_delta")
    slic_lambda: float | None = _constant("slic_lambda")
    cpo_lambda: float | None = _constant("cpo_lambda")
    simpo_gamma: float | None = _constant("simpo_gamma")
    bpo_lambda: float | None = _constant("bpo_lambda")


@dataclass(frozen=True, kw_only=True)
class ResolvedObjective(ObjectiveOptions):
    """An objective whose reduction and beta are known."""

    logp_reduction: str
    beta: float
