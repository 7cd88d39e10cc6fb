"""What an objective is: the figures its loss reads, the two forms of loss, and a row of the table of objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from lite_dil.objectives.losses import Array

Constants = Mapping[str, Any]  # an objective's constants by name: beta and its options


class Responses(NamedTuple):
    """What a loss may read of responses: float32 arrays of shape (responses,), in nats.

    Attributes:
        log_ratio: f, summed over the response's tokens or averaged, as `--logp-reduction` says.
        logps: log pi_theta(y|x), summed or averaged in the same way.
        mean_logps: log pi_theta(y|x) averaged over the response's tokens.
        weighted_logps: the tokens' log-probs times the objective's token weights, summed; None if it has no weights.
        baseline: kto's reference point z0, a scalar; 0 for other losses.
    """

    log_ratio: Array
    logps: Array
    mean_logps: Array
    weighted_logps: Array
    baseline: Array


@dataclass(frozen=True)
class Sides:
    """A loss with one expectation per side, so that it needs no pairs; without `rejected` it reads chosen responses only.

    Its functions take `Responses`; those of a reward model's loss take `lite_dil.objectives.reward_table.Scored`.
    """

    chosen: Callable[[Any], Array]
    rejected: Callable[[Any], Array] | None = None


@dataclass(frozen=True)
class Pairs:
    """A loss on pairs, a chosen and a rejected response to the same prompt; its function takes what those of `Sides` take."""

    loss: Callable[[Any, Any], Array]


@dataclass(frozen=True)
class Option:
    """A constant of some objectives: its help, its default (None is off) and its range."""

    help: str
    default: float | str | None
    low: float = 0.0
    high: float = 1e18
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Objective:
    """A row of the table.

    Attributes:
        data: "pairs", "sides" (pairs, or unpaired chosen and rejected responses) or "chosen" (demonstrations).
        form: makes the loss from beta and the constants named by `options`.
        reduction: the default of whether f and log pi are summed over a response's tokens or averaged.
        beta: the default, or None if the objective has no beta.
        learning_rate: the default for LoRA, from a sweep (docs/LOG.md).
        formula, title, use, source: for people.
        note: where the paper and its authors' code differ or a default is ours, and what is done here.
        options: names of its constants, in `lite_dil.objectives.table.OPTIONS`.
        reference: whether the loss depends on pi_ref; f is computed for the metrics in any case.
        capped: from a log-ratio and the constants, returns the value compared with a cap and the cap, or None.
        token_weights: returns the weight of each token of a response of n tokens; None for weights of 1.
        baseline: whether it needs the reference point z0, the mean log-ratio of responses to other prompts.
        outputs: numbers that it reads of a reward head for each response; 0 if it reads log-probs.
        margins: whether it reads the margin of each pair.
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
    outputs: int = 0
    margins: bool = False
