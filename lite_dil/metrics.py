"""The figures of a batch of pairs, in numpy, the same for training and evaluation and for every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from lite_dil.config import TrainConfig
from lite_dil.losses import OBJECTIVES, log_ratio


def pair_losses(config: TrainConfig) -> Callable[[Any, Any, Any, Any, Any], Any]:
    """Return the config's objective as a function of arrays of any library, with nothing reduced.

    It takes summed log-probs of the policy and the reference and the lengths, each (responses,), and the indices of the chosen
    and of the rejected responses, each (pairs,); it returns a loss a pair, (pairs,).
    """
    objective = OBJECTIVES[config.loss]
    beta, reduction = config.beta, config.logp_reduction
    assert beta is not None and reduction is not None  # filled in by TrainConfig.resolved

    def losses(policy: Any, reference: Any, lengths: Any, chosen: Any, rejected: Any) -> Any:
        f = log_ratio(policy, reference, lengths, reduction)
        return objective.loss(beta * f[chosen], beta * f[rejected])

    return losses


def pair_metrics(
    policy: np.ndarray,
    reference: np.ndarray,
    lengths: np.ndarray,
    chosen: np.ndarray,
    rejected: np.ndarray,
    config: TrainConfig,
) -> dict[str, float]:
    """Return the means over pairs, under TRL's names; arguments as in `pair_losses`.

    A reward is ``beta * f`` and nothing else, an accuracy is the share of pairs with ``f_w > f_l``, and ``logps/*`` are sums
    over the answer's tokens in nats.
    """
    f = log_ratio(policy.astype(np.float64), reference.astype(np.float64), lengths, config.logp_reduction or "mean")
    rewards = (config.beta or 1.0) * f
    return {
        "rewards/chosen": float(rewards[chosen].mean()),
        "rewards/rejected": float(rewards[rejected].mean()),
        "rewards/accuracies": float((f[chosen] > f[rejected]).mean()),
        "rewards/margins": float((rewards[chosen] - rewards[rejected]).mean()),
        "logps/chosen": float(policy[chosen].mean(dtype=np.float64)),
        "logps/rejected": float(policy[rejected].mean(dtype=np.float64)),
        "log_ratio/chosen": float(f[chosen].mean()),
        "log_ratio/rejected": float(f[rejected].mean()),
    }
