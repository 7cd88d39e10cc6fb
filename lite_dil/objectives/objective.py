"""What an objective is: what its loss sees, what kinds of loss there are, and what the table says of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lite_dil.objectives.losses import Array

Constants = Mapping[str, Any]  # the options of an objective by name: beta, and the options that it lists


class Responses(NamedTuple):
    """What an objective may see of some answers: arrays of shape (answers,), float32, in nats.

    Attributes:
        log_ratio: f, summed over the answer's tokens or averaged, as `--logp-reduction` says.
        logps: log pi_theta(y|x), summed or averaged in the same way.
        mean_logps: log pi_theta(y|x) averaged over the answer's tokens.
        weighted_logps: the sum of the tokens' log-probs times the objective's token weights; None where it has none.
        baseline: kto's z0, a scalar; 0 elsewhere.
    """

    log_ratio: Array
    logps: Array
    mean_logps: Array
    weighted_logps: Array
    baseline: Array


@dataclass(frozen=True)
class Sides:
    """A loss that is one expectation a side, so that it needs no pairs; without `rejected` it is of good answers alone."""

    chosen: Callable[[Responses], Array]
    rejected: Callable[[Responses], Array] | None = None


@dataclass(frozen=True)
class Pairs:
    """A loss of a chosen and a rejected answer to the same prompt."""

    loss: Callable[[Responses, Responses], Array]


@dataclass(frozen=True)
class Option:
    """A constant of some objectives: what it is, its default (None is off) and its range."""

    help: str
    default: float | str | None
    low: float = 0.0
    high: float = 1e18
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Objective:
    """A row of the table.

    Attributes:
        data: "pairs", "sides" (pairs, or good and bad answers without partners) or "chosen" (good answers alone).
        form: makes the loss from beta and the constants named by `options`.
        reduction: whether f and log pi are summed over an answer's tokens or averaged, by default.
        beta: its default, or None where the objective has none.
        learning_rate: the default for LoRA, from a sweep (docs/LOG.md).
        formula, title, use, source: for people.
        note: where the paper and its authors' code differ, or where a default is ours, and what is done here.
        options: names of its constants, in `lite_dil.objectives.table.OPTIONS`.
        reference: whether the loss depends on pi_ref; f is computed for the metrics in any case.
        capped: for a log-ratio and the constants, what is compared with a cap, and the cap; None where nothing is.
        token_weights: for an answer of n tokens, the weight of each; None for 1.
        baseline: whether it needs z0, the mean log-ratio of answers to other prompts.
    """

    title: str
    data: str
    form: Callable[[Constants], Sides | Pairs]
    reduction: str
    beta: float | None
    learning_rate: float
    formula: str
    use: str
    source: str
    note: str = ""
    options: tuple[str, ...] = ()
    reference: bool = True
    capped: Callable[[Array, Constants], tuple[Array, float] | None] | None = None
    token_weights: Callable[[int], list[float]] | None = None
    baseline: bool = False
