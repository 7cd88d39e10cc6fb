"""The credit of drawn answers, and the passes of an update on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lite_dil.backends.types import MicroBatch
from lite_dil.base.signs import CHOSEN, REJECTED
from lite_dil.batching.batch import Batch
from lite_dil.batching.schedule import Limits, plan, plan_responses
from lite_dil.data.encoder import Example
from lite_dil.objectives.criterion import Criterion
from lite_dil.online.credit import Spread, best_and_worst, by_group, leave_one_out, regularised
from lite_dil.online.groups import DrawnGroups, Group
from lite_dil.online.loss import POLICY_GRADIENT, PolicyGradient, Surrogate
from lite_dil.online.options import BY_GROUP, K3, RUNNING, ResolvedOnline
from lite_dil.training.step import micro_batches


def advantages_of(drawn: DrawnGroups, options: ResolvedOnline, beta: float, spread: Spread) -> np.ndarray:
    """Return the advantages, (groups, K) float64: of r - beta f, or of r where the KL is in the loss.

    Args:
        spread: of all rewards so far, these included.
    """
    rewards = drawn.rewards
    if options.reward_scale == RUNNING:
        rewards = rewards / spread.deviation
    elif options.reward_scale == BY_GROUP:
        rewards = by_group(rewards)
    return leave_one_out(rewards if options.kl_estimator == K3 else regularised(rewards, drawn.log_ratios, beta))


def loss_of(options: ResolvedOnline, update: int) -> PolicyGradient | Surrogate:
    """Return the loss of update 0, 1, ... on the same answers; equal ones are one object for a backend."""
    kl = options.kl_estimator == K3
    if options.num_iterations == 1 and not kl:
        return POLICY_GRADIENT
    return Surrogate(options.epsilon if update else None, kl)


def answer_passes(
    drawn: DrawnGroups,
    used: Sequence[int] | np.ndarray,
    advantages: np.ndarray,
    loss: PolicyGradient | Surrogate,
    beta: float,
    layout: str,
    limits: Limits,
) -> list[MicroBatch]:
    """Return passes over the groups at `used` whose loss is the mean over all answers, those of other groups included."""
    whole = [_example(group, range(n := len(group.rollouts)), (CHOSEN,) * n) for group in (drawn.groups[at] for at in used)]
    passes = plan_responses(whole, layout, *limits)
    # The backend divides the loss by the number of examples, which are parts of groups here.
    examples = sum(batch.examples for batch, _ in passes)
    weights = advantages[used] / advantages.size * examples
    work = []
    for batch, numbers in passes:
        inputs = {"weights": np.array([weights[number] for number in numbers], np.float32)}
        if isinstance(loss, Surrogate):
            answers = [drawn.groups[used[at]].rollouts[number] for at, number in numbers]
            inputs["weights"] = np.repeat(inputs["weights"], [len(one.ids) for one in answers])
            inputs["old_logps"] = np.concatenate([one.logps for one in answers])
            if loss.kl:
                inputs["reference_logps"] = np.concatenate([one.reference_logps for one in answers])
                inputs["kl_weights"] = np.full(len(inputs["weights"]), beta / advantages.size * examples, np.float32)
        work.append(MicroBatch(batch, inputs))
    return work


def pair_passes(
    drawn: DrawnGroups, used: Sequence[int] | np.ndarray, criterion: Criterion, layout: str, limits: Limits
) -> list[MicroBatch]:
    """Return passes over the best and the worst answer of each group at `used`."""
    best, worst = best_and_worst(drawn.rewards[used]) if len(used) else ((), ())
    groups = [drawn.groups[at] for at in used]
    pairs = [_example(group, pair, (CHOSEN, REJECTED)) for group, *pair in zip(groups, best, worst, strict=True)]
    return micro_batches(plan(pairs, layout, *limits), criterion)


def ratios(work: Sequence[MicroBatch], policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return pi / pi_old of each token of a surrogate's passes, and its weight, each (tokens,)."""
    old, weights = (np.concatenate([one.inputs[name] for one in work]) for name in ("old_logps", "weights"))
    return np.exp(policy.astype(np.float64) - old), weights


def batches_of(work: Sequence[MicroBatch]) -> list[Batch]:
    """Return the batches of some passes."""
    return [one.batch for one in work]


def _example(group: Group, answers: Sequence[int], signs: tuple[int, ...]) -> Example:
    """Return some of a group's answers as an example."""
    return Example(group.prompt.ids, tuple(group.rollouts[at].ids for at in answers), signs, group.prompt.place)
