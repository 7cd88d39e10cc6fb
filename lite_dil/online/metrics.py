"""Metrics of drawn answers, by TRL's names where it has them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lite_dil.backends.types import MicroBatch
from lite_dil.online.credit import equal_groups, regularised
from lite_dil.online.groups import DrawnGroups
from lite_dil.online.loss import is_clipped
from lite_dil.online.updates import ratios
from lite_dil.training.metrics import Means


def answer_metrics(means: Means, drawn: DrawnGroups, beta: float, skipped: int, refilled: int) -> None:
    """Add a step's metrics.

    ``kl`` and ``entropy`` are estimates in nats per token from the drawn tokens, ``kl/answer`` is the mean log-ratio of a
    whole answer, ``objective`` the mean of r - beta f, and ``reward_std`` the mean of the groups' standard deviations.
    ``eval_reward`` and ``eval_rewards/NAME/mean`` are of the same answers, by --eval-reward.

    Args:
        skipped: groups that contributed no gradient.
        refilled: groups drawn again for this step.
    """
    rewards, ratios = drawn.rewards, drawn.log_ratios
    means.add("reward", rewards)
    means.add("reward_std", rewards.std(1, ddof=1))
    means.add("frac_reward_zero_std", equal_groups(rewards))
    for name in drawn.groups[0].parts:
        means.add(f"rewards/{name}/mean", np.concatenate([group.parts[name] for group in drawn.groups]))
    if drawn.judged:
        means.add("eval_reward", drawn.judged.total)
        for name, values in drawn.judged.parts.items():
            means.add(f"eval_rewards/{name}/mean", values)
    answers = [rollout for group in drawn.groups for rollout in group.rollouts]
    means.add("objective", regularised(rewards, ratios, beta))
    means.add("kl/answer", ratios)
    means.add("kl", np.concatenate([one.logps - one.reference_logps for one in answers]))
    means.add("entropy", -np.concatenate([one.logps for one in answers]))
    means.add("completions/mean_length", np.array([len(one.ids) for one in answers]))
    means.add("completions/clipped_ratio", np.array([not one.ended for one in answers]))
    means.add("skipped_groups", skipped)
    means.add("refilled_groups", refilled)


def ratio_metrics(means: Means, work: Sequence[MicroBatch], policy: np.ndarray, epsilon: float) -> None:
    """Add ``importance_ratio``, the mean of pi / pi_old over the tokens, and ``clip_ratio``, the share beyond its bound.

    Args:
        policy: log-probs of the tokens before the step, (tokens,), in nats.
    """
    ratio, weights = ratios(work, policy)
    means.add("importance_ratio", ratio)
    means.add("clip_ratio", is_clipped(ratio, weights, epsilon))
