"""The options of the objective, made from the table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lite_dil.base.option import option
from lite_dil.objectives.table import OBJECTIVES, ONLINE, OPTIONS


def per_loss(attribute: str) -> str:
    """Return the losses' defaults as text, losses with the same default together."""
    values: dict[Any, list[str]] = {}
    for name, objective in (OBJECTIVES | ONLINE).items():
        values.setdefault(getattr(objective, attribute), []).append(name)
    values.pop(None, None)
    return "; ".join(f"{value} {', '.join(names)}" for value, names in values.items())


def _by_data() -> str:
    """Return the losses with their full names, grouped by the data that they train on."""
    kinds = {
        "sides": "On pairs, or on unpaired good and bad responses",
        "pairs": "On pairs",
        "chosen": "On demonstrations",
    }
    listed = {kind: ", ".join(f"{name} ({o.title})" for name, o in OBJECTIVES.items() if o.data == kind) for kind in kinds}
    online = ", ".join(f"{name} ({o.title})" for name, o in ONLINE.items())
    return (
        " ".join(f"{text}: {listed[kind]}." for kind, text in kinds.items()) + f" On its own answers, by --reward: {online}."
    )


def _constant(name: str) -> Any:
    """Return the option for a constant of the table of objectives."""
    constant = OPTIONS[name]
    losses = ", ".join(loss for loss, objective in OBJECTIVES.items() if name in objective.options)
    default = "off" if constant.default is None else constant.default
    return option("objective", None, f"{constant.help} (default: {default}; for {losses})", choices=constant.choices)


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """The loss and its constants; None means the objective's own default."""

    loss: str = option(
        "objective",
        "lsif",
        f"the objective; see docs/losses.md for formulas, sources and when to use which. {_by_data()} "
        "FILE.py:NAME is your own loss, a lite_dil.PairLoss or SideLoss (docs/api.md)",
        choices=(*OBJECTIVES, *ONLINE),
    )
    logp_reduction: str | None = option(
        "objective",
        None,
        f"whether the log-ratio is summed over a response's tokens or averaged (default: {per_loss('reduction')})",
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
    """An objective with its reduction and beta resolved."""

    logp_reduction: str
    beta: float
