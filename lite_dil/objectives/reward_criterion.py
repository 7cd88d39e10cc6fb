"""A reward model's loss on a data set: turns the scores of a batch into the loss that a backend differentiates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lite_dil.base.signs import CHOSEN
from lite_dil.objectives.criterion import LossBatch, Signed
from lite_dil.objectives.loss import NOTHING, SCORES
from lite_dil.objectives.losses import Array
from lite_dil.objectives.objective import Pairs
from lite_dil.objectives.options import ResolvedObjective
from lite_dil.objectives.reward_table import Scored, reward_objective
from lite_dil.objectives.table import constants


class RewardCriterion:
    """The loss of a reward model with its weights for a data set; it is a `lite_dil.objectives.loss.Loss`.

    A pairwise loss is a mean over pairs. A density ratio is ``E_chosen[l_1] + E_rejected[l_-1]``: each side is weighted by its
    share of the whole data set, never of a batch, so that a step may be split anywhere.
    """

    reads, reference, token_inputs = SCORES, NOTHING, ()

    def __init__(self, options: ResolvedObjective, examples: Sequence[Signed]) -> None:
        self.objective = reward_objective(options.loss)
        self.constants = constants(options.loss, options)
        self.form = self.objective.form(self.constants)
        self.outputs = self.objective.outputs
        signs = [example.signs for example in examples]
        chosen = sum(side.count(CHOSEN) for side in signs)
        rejected = sum(map(len, signs)) - chosen
        if isinstance(self.form, Pairs):
            chosen = rejected = sum(side.count(CHOSEN) * (len(side) - side.count(CHOSEN)) for side in signs)
        self.chosen_weight, self.rejected_weight = (len(examples) / max(number, 1) for number in (chosen, rejected))

    def inputs(self, batch: LossBatch, baseline: float = 0.0) -> dict[str, np.ndarray]:
        """Return what the loss needs besides scores: indices of chosen and rejected responses, both (pairs,) for a pairwise
        loss, and for one that reads it the margin of each pair. `baseline` is of losses that compare with a reference.
        """
        pairs = isinstance(self.form, Pairs)
        chosen, rejected = batch.pairs if pairs else (batch.chosen, batch.rejected)
        found = {"chosen": chosen, "rejected": rejected}
        return found | {"margin": batch.pair_margins} if self.objective.margins else found

    def __call__(self, policy: Array, reference: None, inputs: dict[str, Any]) -> Array:
        """Return the loss summed over the batch's examples, a scalar.

        Args:
            policy: (responses, outputs) scores, with a gradient.
            inputs: the result of `inputs`, as arrays of the same library.
        """

        def answers(index: Array) -> Scored:
            scores = policy[index]
            return Scored(scores[:, 0], scores[:, 1] if self.outputs == 2 else None, inputs.get("margin"))

        chosen, rejected = answers(inputs["chosen"]), answers(inputs["rejected"])
        if isinstance(self.form, Pairs):
            return self.chosen_weight * self.form.loss(chosen, rejected).sum()
        assert self.form.rejected is not None  # every density ratio has both sides
        return self.chosen_weight * self.form.chosen(chosen).sum() + self.rejected_weight * self.form.rejected(rejected).sum()
