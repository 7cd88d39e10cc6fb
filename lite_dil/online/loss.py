"""The policy-gradient loss of whole answers."""

from __future__ import annotations

from typing import Any

from lite_dil.objectives.loss import NOTHING, SUMS
from lite_dil.objectives.losses import Array


class PolicyGradient:
    """-sum_i w_i log pi(y_i | x_i), a `lite_dil.objectives.loss.Loss`.

    With w_i = A_i / K its gradient is minus the leave-one-out estimate of grad J, summed over the batch's groups. There is
    one update for each set of answers, so there is no importance ratio.
    """

    reads, reference, token_inputs = SUMS, NOTHING, ()

    def __call__(self, policy: Array, reference: Array | None, inputs: dict[str, Any]) -> Array:
        """Return the loss, a scalar.

        Args:
            policy: (responses,) summed log-probs in nats, with a gradient.
            inputs: ``weights``, (responses,), constants.
        """
        return -(inputs["weights"] * policy).sum()


POLICY_GRADIENT = PolicyGradient()  # one object, since a step is compiled for each
