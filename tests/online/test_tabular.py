"""The on-policy gradient against exact expectations, by enumeration of a small token MDP in float64.

Three tokens, 0 ends an answer, at most two tokens: seven answers, and nine logits of three states.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from lite_dil.online.credit import Spread, best_and_worst, by_group, equal_groups, leave_one_out, moved_kl, regularised
from lite_dil.online.loss import POLICY_GRADIENT, Surrogate, bounded, is_clipped

BETA, K = 0.5, 3
ANSWERS = [(0,), *((first, second) for first in (1, 2) for second in range(3))]
REWARDS = np.array([0.3, 1.0, -0.5, 0.2, 0.9, 0.0, -1.0])
TUPLES = np.array(list(itertools.product(range(len(ANSWERS)), repeat=K)))
REFERENCE = np.random.default_rng(0).normal(size=9)
Advantages = Callable[[np.ndarray, np.ndarray], np.ndarray]


LENGTHS = np.array([len(answer) for answer in ANSWERS])
VISITS = [(state, token) for answer in ANSWERS for state, token in zip((0, *answer), answer, strict=False)]


def token_logps(theta: np.ndarray) -> np.ndarray:
    """log pi of each token of every answer, (13,); theta may be complex."""
    states = theta.reshape(3, 3)
    tokens = states - np.log(np.exp(states).sum(1, keepdims=True))
    return np.array([tokens[visit] for visit in VISITS])


def logps(theta: np.ndarray) -> np.ndarray:
    """log pi(y) of every answer, (7,)."""
    return np.add.reduceat(token_logps(theta), np.cumsum(LENGTHS) - LENGTHS)


REF_LOGPS = logps(REFERENCE)
OPTIMUM = np.exp(REF_LOGPS + REWARDS / BETA) / np.exp(REF_LOGPS + REWARDS / BETA).sum()


def slope(function: Callable[[np.ndarray], complex], theta: np.ndarray) -> np.ndarray:
    """The gradient by the complex step, exact to rounding: the oracle needs no derivative by hand."""
    return np.array([function(theta + 1e-30j * unit).imag / 1e-30 for unit in np.eye(9)])


def objective(theta: np.ndarray) -> complex:
    """J = E[r - beta f]."""
    found = logps(theta)
    return (np.exp(found) * (REWARDS - BETA * (found - REF_LOGPS))).sum()


def rloo(rewards: np.ndarray, log_ratios: np.ndarray) -> np.ndarray:
    return leave_one_out(regularised(rewards, log_ratios, BETA))


def expected(theta: np.ndarray, advantages: Advantages) -> np.ndarray:
    """The expectation over all K-tuples of minus the loss's gradient."""
    now = logps(theta)
    chances = np.exp(now)[TUPLES].prod(1)
    weights = advantages(REWARDS[TUPLES], (now - REF_LOGPS)[TUPLES]) * chances[:, None] / K

    def loss(moved: np.ndarray) -> complex:
        return POLICY_GRADIENT(logps(moved)[TUPLES], None, {"weights": weights})

    return -slope(loss, theta)


def climbed(gradient: Callable[[np.ndarray], np.ndarray], steps: int = 1500, rate: float = 1.0) -> np.ndarray:
    theta = REFERENCE.copy()
    for _ in range(steps):
        theta = theta + rate * gradient(theta)
    return theta


def kl_to_optimum(theta: np.ndarray) -> float:
    return float((np.exp(logps(theta)) * (logps(theta) - np.log(OPTIMUM))).sum())


def score(theta: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """sum_y pi(y) weight(y) grad log pi(y)."""
    fixed = np.exp(logps(theta)) * weight
    return slope(lambda moved: (fixed * logps(moved)).sum(), theta)


@pytest.mark.parametrize("seed", range(3))
def test_the_expected_step_is_the_objectives_gradient(seed: int) -> None:
    theta = np.random.default_rng(seed + 1).normal(size=9)
    np.testing.assert_allclose(expected(theta, rloo), slope(objective, theta), atol=1e-12)


def test_it_reaches_the_optimum() -> None:
    theta = climbed(lambda theta: expected(theta, rloo), steps=700, rate=6.0)
    assert kl_to_optimum(theta) < 1e-6


def test_the_groups_own_mean_scales_the_gradient() -> None:
    def with_itself(rewards: np.ndarray, log_ratios: np.ndarray) -> np.ndarray:
        values = regularised(rewards, log_ratios, BETA)
        return values - values.mean(1, keepdims=True)

    theta = np.random.default_rng(4).normal(size=9)
    np.testing.assert_allclose(expected(theta, with_itself), (K - 1) / K * slope(objective, theta), atol=1e-12)


def test_division_by_the_groups_deviation_turns_the_gradient() -> None:
    def divided(rewards: np.ndarray, log_ratios: np.ndarray) -> np.ndarray:
        values = regularised(rewards, log_ratios, BETA)
        return leave_one_out(values) / (values.std(1, keepdims=True) + 1e-4)

    theta = np.random.default_rng(1).normal(size=9)
    found, true = expected(theta, divided), slope(objective, theta)
    assert found @ true / np.linalg.norm(found) / np.linalg.norm(true) < 0.995
    assert kl_to_optimum(climbed(lambda theta: expected(theta, divided), steps=150)) > 1e-3


def test_division_of_the_rewards_by_their_groups_deviation_turns_it_too() -> None:
    def scaled(rewards: np.ndarray, log_ratios: np.ndarray) -> np.ndarray:
        return leave_one_out(regularised(by_group(rewards), log_ratios, BETA))

    # Of the same gradient without it, at beta 0, since the division changes the weight of the KL as well.
    theta = np.random.default_rng(1).normal(size=9)
    found = expected(theta, lambda rewards, f: scaled(rewards, 0 * f))
    true = expected(theta, lambda rewards, f: leave_one_out(rewards))
    assert 0.9 < found @ true / np.linalg.norm(found) / np.linalg.norm(true) < 0.99
    assert kl_to_optimum(climbed(lambda theta: expected(theta, scaled), steps=150)) > 1e-2


def test_one_scale_for_all_rewards_is_another_beta() -> None:
    theta = np.random.default_rng(1).normal(size=9)
    scaled = expected(theta, lambda rewards, f: leave_one_out(regularised(rewards / 4, f, BETA / 4)))
    np.testing.assert_allclose(4 * scaled, slope(objective, theta), atol=1e-12)


def test_the_running_deviation_is_that_of_all_rewards_at_once() -> None:
    rewards = 1e6 + np.random.default_rng(0).normal(size=(5, 4, 3))
    spread = Spread()
    for part in rewards:
        spread = Spread.of(spread.including(part).state)
    assert spread.deviation == pytest.approx(rewards.std(ddof=1), rel=1e-9)
    equal = Spread().including(np.full((2, 3), 0.1)).including(np.full((1, 3), 0.1))
    assert (equal.squares, equal.deviation) == (0, 1) and Spread().including(np.ones((1, 1))).deviation == 1


def per_token(values: np.ndarray) -> np.ndarray:
    return np.repeat(values, LENGTHS)


def test_the_surrogates_first_step_is_the_policy_gradients() -> None:
    theta, weights = np.random.default_rng(3).normal(size=9), np.random.default_rng(4).normal(size=7)
    inputs = {"weights": per_token(weights), "old_logps": token_logps(theta)}
    true = slope(lambda moved: POLICY_GRADIENT(logps(moved), None, {"weights": weights}), theta)
    for loss in (Surrogate(), Surrogate(0.2)):
        np.testing.assert_allclose(slope(partial(surrogate, loss, inputs), theta), true, atol=1e-14)
    assert abs(Surrogate(0.2)(token_logps(theta), None, inputs)) < 1e-15


def surrogate(loss: Surrogate, inputs: dict[str, np.ndarray], theta: np.ndarray) -> complex:
    return loss(token_logps(theta), None, inputs)


def test_the_surrogate_is_ppos_minimum() -> None:
    ratio = np.array([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 3.0] * 2)
    weights = np.repeat([2.0, -3.0], 7)
    ppo = np.minimum(ratio * weights, np.clip(ratio, 0.8, 1.2) * weights)
    np.testing.assert_array_equal(bounded(ratio, weights, 0.2) * weights, ppo)
    # Clipped is what cannot be gained, never what is to be undone.
    assert is_clipped(ratio, weights, 0.2).tolist() == [False] * 5 + [True] * 2 + [True] * 2 + [False] * 5
    inputs = {"weights": weights, "old_logps": np.zeros(14)}
    assert Surrogate(0.2)(np.log(ratio), None, inputs) == pytest.approx(-(ppo - weights).sum())


@pytest.mark.parametrize("first", [True, False])
def test_k3_in_the_loss_has_the_gradient_of_the_forward_kl_where_the_policy_goes(first: bool) -> None:
    theta = np.random.default_rng(5).normal(size=9)
    now, reference = token_logps(theta), token_logps(REFERENCE)
    chances = np.exp(logps(theta))
    inputs = {"weights": np.zeros(13), "kl_weights": per_token(chances), "reference_logps": reference, "old_logps": now}
    loss = Surrogate(None if first else 0.2, kl=True)
    found = slope(partial(surrogate, loss, inputs), theta)

    visited = np.array([1.0, *(np.exp(theta[:3]) / np.exp(theta[:3]).sum())[1:]])  # of the three states

    def forward(moved: np.ndarray) -> complex:
        tokens, fixed = (
            np.log(np.exp(t.reshape(3, 3)) / np.exp(t.reshape(3, 3)).sum(1, keepdims=True)) for t in (moved, REFERENCE)
        )
        return (visited[:, None] * np.exp(fixed) * (fixed - tokens)).sum()

    np.testing.assert_allclose(found, slope(forward, theta), atol=1e-12)
    assert loss(now, None, inputs) == pytest.approx((per_token(chances) * (np.expm1(reference - now) - reference + now)).sum())
    at_reference = {**inputs, "old_logps": reference}
    assert not first or not slope(partial(surrogate, loss, at_reference), REFERENCE).any()  # exactly, for an optimiser


@pytest.mark.parametrize("estimate", ["k1", "k3"])
def test_kl_as_a_loss_misses_the_optimum(estimate: str) -> None:
    # d k1 / df = 1, whose expectation over grad log pi is 0; d k3 / df = 1 - e^-f, which is the forward KL's.
    theta = REFERENCE
    f = logps(theta) - REF_LOGPS
    derivative = {"k1": np.ones_like(f), "k3": 1 - np.exp(-f)}[estimate]
    if estimate == "k1":
        np.testing.assert_allclose(score(theta, derivative), 0, atol=1e-12)

    def gradient(theta: np.ndarray) -> np.ndarray:
        f = logps(theta) - REF_LOGPS
        penalty = {"k1": np.ones_like(f), "k3": 1 - np.exp(-f)}[estimate]
        return score(theta, REWARDS - BETA * penalty)

    assert kl_to_optimum(climbed(gradient)) > 0.01


def test_a_samplers_own_log_probs_move_a_policy_without_rewards() -> None:
    def loss(group: np.ndarray, weights: np.ndarray, moved: np.ndarray) -> complex:
        return POLICY_GRADIENT(logps(moved)[group], None, {"weights": weights})

    def after(noise: float) -> float:
        draw, theta = np.random.default_rng(0), REFERENCE.copy()
        first, second = np.zeros(9), np.zeros(9)
        for step in range(1, 21):  # Adam, which makes a full step of any gradient, however small
            now = logps(theta)
            group = draw.choice(len(ANSWERS), size=(1, K), p=np.exp(now) / np.exp(now).sum())
            f = (now - now)[group] + noise * draw.normal(size=group.shape)
            weights = rloo(np.zeros(group.shape), f) / K
            if not weights.any():
                continue
            at = theta
            found = slope(partial(loss, group, weights), at)
            first, second = 0.9 * first + 0.1 * found, 0.999 * second + 0.001 * found**2
            theta = at - 0.3 * first / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        return float((np.exp(logps(theta)) * (logps(theta) - REF_LOGPS)).sum())

    assert after(0.0) == 0
    assert after(1e-4) > 0.1


def test_the_kl_of_a_moved_policy_from_answers_of_an_earlier_one() -> None:
    """The expectation over all answers is the KL, and no term is below 0, also of a policy that has left the answers."""
    draw = np.random.default_rng(0)
    for scale in (0.3, 3.0, 30.0):
        now, old, reference = (x - np.logaddexp.reduce(x) for x in draw.normal(size=(3, 6)) * [[scale], [1.0], [1.0]])
        terms = np.array([moved_kl(np.array([a]), np.array([f])) for a, f in zip(now - old, old - reference, strict=True)])
        assert (np.exp(old) * terms).sum() == pytest.approx((np.exp(now) * (now - reference)).sum(), rel=1e-9)
        assert terms.min() >= -1e-12
    assert moved_kl(np.array([-40.0]), np.array([0.0])) == pytest.approx(1.0)
    assert moved_kl(np.array([800.0]), np.array([0.0])) == np.inf


def test_advantages_by_hand() -> None:
    # TRL 1.16, rloo_trainer.py: (r - beta kl) minus (the group's sum less its own) / (K - 1), with these values by pencil.
    rewards, kl = np.array([[1.0, 0.0, 0.5, 0.0]]), np.array([[2.0, 0.0, -1.0, 1.0]])
    found = leave_one_out(regularised(rewards, kl, 0.1))
    values = [0.8, 0.0, 0.6, -0.1]
    by_hand = [0.8 - 0.5 / 3, 0.0 - 1.3 / 3, 0.6 - 0.7 / 3, -0.1 - 1.4 / 3]
    np.testing.assert_allclose(regularised(rewards, kl, 0.1)[0], values, atol=1e-15)
    np.testing.assert_allclose(found[0], by_hand, atol=1e-15)


def test_equal_values_have_no_advantage_at_all() -> None:
    assert not leave_one_out(np.full((2, 7), 0.1)).any()


def test_pairs_of_groups() -> None:
    rewards = np.array([[0.0, 1.0, 1.0, -1.0], [0.5, 0.5, 0.5, 0.5]])
    best, worst = best_and_worst(rewards)
    assert (best[0], worst[0]) == (1, 3)
    assert equal_groups(rewards).tolist() == [False, True]
