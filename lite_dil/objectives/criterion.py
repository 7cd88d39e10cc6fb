"""An objective on a data set: turns the log-probs of a batch into the loss that a backend differentiates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lite_dil.base.signs import CHOSEN
from lite_dil.objectives.loss import SUMS, TOKENS
from lite_dil.objectives.losses import Array, log_ratio
from lite_dil.objectives.objective import Pairs, Responses
from lite_dil.objectives.options import ResolvedObjective
from lite_dil.objectives.own import OwnLoss
from lite_dil.objectives.table import constants, objective_of


class Signed(Protocol):
    """The part of an example that the loss weights depend on: the sign of each of its responses."""

    @property
    def signs(self) -> tuple[int, ...]:
        """1 for a chosen response, -1 for a rejected one."""


class LossBatch(Protocol):
    """The part of a batch that a loss reads; see `lite_dil.batching.batch.Batch`."""

    @property
    def responses(self) -> Sequence[np.ndarray]:
        """Token ids of each response."""

    @property
    def lengths(self) -> np.ndarray:
        """(responses,) tokens of each."""

    @property
    def chosen(self) -> np.ndarray:
        """Indices of the chosen responses."""

    @property
    def rejected(self) -> np.ndarray:
        """Indices of the rejected responses."""

    @property
    def pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Indices of both sides of every pair, each (pairs,)."""

    @property
    def pair_margins(self) -> np.ndarray:
        """(pairs,) the margin of every pair, 0 where the data has none."""


class Criterion:
    """The objective of `options` with the weights for a data set.

    A loss of the DIL family is ``E_chosen[l_1] + E_ref[l_-1]``. Each side is weighted by its share of the whole data set,
    never of a batch, so that a batch may hold any mixture of chosen and rejected responses (and splitting a step changes
    nothing). The loss is a mean over examples: pairs, or unpaired responses. It is a
    `lite_dil.objectives.loss.Loss`.

    Args:
        own: the user-defined loss, if the options name one.
    """

    reference = SUMS

    def __init__(self, options: ResolvedObjective, examples: Sequence[Signed], own: OwnLoss | None = None) -> None:
        self.objective = objective_of(options.loss)
        self.constants = constants(options.loss, options)
        self.form = own.form if own else self.objective.form(self.constants)
        self.reduction = options.logp_reduction
        self.reads = TOKENS if self.objective.token_weights else SUMS
        self.token_inputs = ("token_weights",) if self.objective.token_weights else ()
        signs = [example.signs for example in examples]
        chosen = sum(side.count(CHOSEN) for side in signs)
        rejected = sum(map(len, signs)) - chosen
        if isinstance(self.form, Pairs):
            chosen = rejected = sum(side.count(CHOSEN) * (len(side) - side.count(CHOSEN)) for side in signs)
        elif self.constants.get("denominator") == "both":
            rejected += chosen
        self.chosen_weight = self.constants.get("chosen_weight", 1.0) * len(examples) / max(chosen, 1)
        self.rejected_weight = self.constants.get("rejected_weight", 1.0) * len(examples) / max(rejected, 1)

    def inputs(self, batch: LossBatch, baseline: float = 0.0) -> dict[str, np.ndarray]:
        """Return what the loss needs besides log-probs, as arrays for a backend to convert.

        These include ``chosen`` and ``rejected``, indices into the batch's responses, both of shape (pairs,) for a pairwise
        objective; if the objective weights tokens, also ``token_weights`` (tokens,) float32 and, for the tokens of each
        response, ``token_index`` and ``token_mask``, (responses, longest).

        Args:
            baseline: kto's reference point z0, computed over the whole optimiser step.
        """
        chosen, rejected = batch.pairs if isinstance(self.form, Pairs) else (batch.chosen, batch.rejected)
        if self.constants.get("denominator") == "both":
            rejected = np.arange(len(batch.responses))
        arrays = {
            "lengths": batch.lengths,
            "chosen": chosen,
            "rejected": rejected,
            "baseline": np.array(baseline, np.float32),
        }
        if self.objective.token_weights:
            weights = [self.objective.token_weights(len(response)) for response in batch.responses]
            arrays["token_weights"] = np.concatenate(weights).astype(np.float32)
            arrays["token_index"], arrays["token_mask"] = rows_of_tokens(batch.lengths)
        return arrays

    def __call__(self, policy: Array, reference: Array, inputs: dict[str, Any]) -> Array:
        """Return the loss summed over the batch's examples, a scalar; the caller divides by the step's number of examples.

        Args:
            policy: (responses,) summed log-probs in nats, with a gradient; (tokens,) if the objective weights tokens.
            reference: (responses,) the reference's sums.
            inputs: the result of `inputs`, as arrays of the same library.
        """
        weighted = None
        if self.reads == TOKENS:
            index, mask = inputs["token_index"], inputs["token_mask"]
            weighted = ((policy * inputs["token_weights"])[index] * mask).sum(-1)
            policy = (policy[index] * mask).sum(-1)
        mean = policy / inputs["lengths"]
        figures = {
            "log_ratio": log_ratio(policy, reference, inputs["lengths"], self.reduction),
            "logps": mean if self.reduction == "mean" else policy,
            "mean_logps": mean,
            "weighted_logps": weighted,
        }

        def answers(index: Array) -> Responses:
            sides = {name: None if values is None else values[index] for name, values in figures.items()}
            return Responses(**sides, baseline=inputs["baseline"])

        chosen, rejected = answers(inputs["chosen"]), answers(inputs["rejected"])
        if isinstance(self.form, Pairs):
            return self.chosen_weight * self.form.loss(chosen, rejected).sum()
        total = self.chosen_weight * self.form.chosen(chosen).sum()
        if self.form.rejected is not None:
            total = total + self.rejected_weight * self.form.rejected(rejected).sum()
        return total


def rows_of_tokens(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of each response's tokens, (responses, columns), and a float32 mask of the real ones.

    For lengths=[2, 1] the rows begin with [0, 1] and [2, 2], and the mask with [1, 1] and [1, 0].
    """
    lengths = lengths.astype(np.int64)  # a batch has them as floats
    column = np.arange(-(-lengths.max() // 64) * 64)  # few shapes, since a step is compiled for each
    starts = np.cumsum(lengths) - lengths
    index = np.minimum(starts[:, None] + column, lengths.sum() - 1)
    return index, (column < lengths[:, None]).astype(np.float32)
