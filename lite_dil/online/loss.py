"""Losses of whole answers, and of their tokens where several updates are taken on the same answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from lite_dil.objectives.loss import NOTHING, SUMS, TOKENS
from lite_dil.objectives.losses import Array, namespace


class PolicyGradient:
    """-sum_i w_i log pi(y_i | x_i), a `lite_dil.objectives.loss.Loss`.

    With w_i = A_i / K its gradient is minus the leave-one-out estimate of grad J, summed over the batch's groups. It is for
    one update on a set of answers, with the KL in the reward: there is no importance ratio.
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


@dataclass(frozen=True)
class Surrogate:
    """The clipped surrogate of PPO (Schulman et al. 2017, arXiv 1707.06347, eq. 7) per token, less its value at pi_old.

    -sum_t w_t (bounded(r_t) - 1), r_t = pi(y_t) / pi_old(y_t). min(r w, clip(r) w) bounds r from above where w > 0, and from
    below where w < 0. At pi_old its gradient is that of `PolicyGradient` with the answers' weights.

    Attributes:
        epsilon: the ratio is bounded to 1 - epsilon, 1 + epsilon. None is for the first update: the tangent at pi_old, whose
            gradient is exact there, whatever the rounding of the log-probs.
        kl: add b_t k3_t, k3 = e^d - d - 1, d = log pi_ref - log pi: GRPO's term (arXiv 2402.03300), whose expected gradient is
            that of the forward KL, KL(pi_ref, pi).
    """

    epsilon: float | None = None
    kl: bool = False
    reads, reference = TOKENS, NOTHING

    @property
    def token_inputs(self) -> tuple[str, ...]:
        """The names of `__call__`'s inputs."""
        return ("weights", "old_logps", *(("reference_logps", "kl_weights") if self.kl else ()))

    def __call__(self, policy: Array, reference: Array | None, inputs: dict[str, Any]) -> Array:
        """Return the loss, a scalar.

        Args:
            policy: (tokens,) log-probs in nats, with a gradient.
            inputs: ``weights``, ``old_logps`` and, with `kl`, ``reference_logps`` and ``kl_weights``, all (tokens,).
        """
        moved = policy - inputs["old_logps"]
        gain = moved if self.epsilon is None else bounded(namespace(policy).exp(moved), inputs["weights"], self.epsilon) - 1
        loss = -(inputs["weights"] * gain).sum()
        if self.kl:
            loss = loss + (inputs["kl_weights"] * self._k3(policy, inputs)).sum()
        return loss

    def _k3(self, policy: Array, inputs: dict[str, Any]) -> Array:
        xp, reference = namespace(policy), inputs["reference_logps"]
        if self.epsilon is not None:
            return xp.expm1(reference - policy) - (reference - policy)
        behind = reference - inputs["old_logps"]
        growth = xp.expm1(behind)  # minus the slope; exactly 0 where the policy is its reference
        return growth - behind - growth * (policy - inputs["old_logps"])


def bounded(ratio: Array, weights: Array, epsilon: float) -> Array:
    """Return the ratio where min(r w, clip(r, 1 - epsilon, 1 + epsilon) w) follows it, and else its bound, (tokens,)."""
    xp = namespace(ratio)
    low, high = (1 - epsilon) * xp.ones_like(ratio), (1 + epsilon) * xp.ones_like(ratio)
    return xp.where(weights > 0, xp.minimum(ratio, high), xp.maximum(ratio, low))


def is_clipped(ratio: np.ndarray, weights: np.ndarray, epsilon: float) -> np.ndarray:
    """Return whether a token's ratio is beyond its bound, so that it has no gradient, (tokens,)."""
    return np.asarray((bounded(ratio, weights, epsilon) != ratio) & (weights != 0))
