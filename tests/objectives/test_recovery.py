"""Where training goes on a tabular policy, against the theory: what each objective recovers, and under which conditions.

Write r = pi_theta / pi_ref, p for pi_chosen, q for what the rejected answers are drawn from. The derivative of
sum_y p l_1 + q l_-1 by pi(y) is h''(r) (q r - p) / pi_ref. Were pi free, every h would end at r = p / q. It is normalised, so
the derivatives only have to be equal for all answers. With q = pi_ref, pi_ref p / q *is* normalised: every member of the
family recovers pi_chosen. With another q they agree only if sum_y pi_ref p / q = 1, and then on pi_ref p / q instead; else
each h has an optimum of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import toys

from lite_dil.objectives.objective import Pairs, Responses
from lite_dil.objectives.table import OBJECTIVES

LIBRARIES = ["torch", "mlx"]
# h''(r), by hand from DIL's Table 1; rulsif's is -l_1'(f) / r of its own definition.
CURVATURE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "lsif": np.ones_like,
    "ukl": lambda r: 1 / r,
    "bce": lambda r: 1 / (r * (1 + r)),
    "basu": lambda r: 1.5 / np.sqrt(r),  # alpha 0.5
    "rulsif": lambda r: 0.9**2 / (0.1 * r + 0.9) ** 3,  # alpha 0.1
}
FAMILY = list(CURVATURE)


def distributions(count: int, seed: int = 0, prompts: int = 3, answers: int = 8) -> np.ndarray:
    """Random ones of shape (count, prompts, answers), none of whose answers is rare."""
    weights = np.random.default_rng(seed).uniform(0.5, 3, (count, prompts, answers))
    return weights / weights.sum(-1, keepdims=True)


def total_variation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a - b).sum(-1) / 2


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def train(library: str, name: str, reference: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """The policy that an objective of the table ends at from f = 0, in float32; shapes (runs, answers)."""
    loss = toys.expected_loss(toys.sides(name), library, reference, chosen, rejected)
    return softmax(toys.adam(library, loss, np.log(reference), steps=300, rate=0.1)[0])


def optimum(name: str, reference: np.ndarray, chosen: np.ndarray, rejected: np.ndarray) -> np.ndarray:
    """The oracle: exponentiated gradient in float64 until the derivative by pi(y) is the same for all answers."""
    policy = reference.copy()
    for _ in range(20000):
        r = policy / reference
        by_pi = CURVATURE[name](r) * (rejected * r - chosen) / reference
        by_pi -= (policy * by_pi).sum(-1, keepdims=True)
        if np.abs(by_pi).max() < 1e-9:
            return policy
        policy = policy * np.exp(-0.3 * by_pi)
        policy /= policy.sum(-1, keepdims=True)
    raise AssertionError(f"no optimum of {name}: {np.abs(by_pi).max()}")


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("library", LIBRARIES)
def test_recovery_with_rejected_answers_from_the_reference(library: str, name: str) -> None:
    """The theorem's condition: pi_theta = pi_chosen."""
    chosen, reference = distributions(2)
    assert total_variation(reference, chosen).min() > 0.1  # it has somewhere to go
    np.testing.assert_allclose(optimum(name, reference, chosen, reference), chosen, atol=1e-7)
    assert total_variation(train(library, name, reference, chosen, reference), chosen).max() < 1e-4


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("library", LIBRARIES)
def test_recovery_from_samples_errs_as_one_over_sqrt_n(library: str, name: str) -> None:
    """n chosen and n rejected samples: the mean error over 24 draws has slope -1/2 on log-log axes."""
    chosen, reference = distributions(2, seed=1, prompts=1)[:, 0]
    draw, sizes, draws = np.random.default_rng(2), (300, 3000, 30000, 300000), 24
    counts = [np.stack([draw.multinomial(n, of, draws) / n for n in sizes]).reshape(-1, 8) for of in (chosen, reference)]
    policy = train(library, name, np.broadcast_to(reference, counts[0].shape), *counts)
    error = total_variation(policy, chosen).reshape(len(sizes), draws).mean(1)
    slope = np.polyfit(np.log(sizes), np.log(error), 1)[0]
    assert slope == pytest.approx(-0.5, abs=0.1)
    assert error[-1] < 0.01


@pytest.mark.parametrize("library", LIBRARIES)
def test_recovery_with_other_rejected_answers_goes_where_each_h_says(library: str) -> None:
    chosen, reference, other = distributions(3)
    rejected = 0.5 * reference + 0.5 * other  # much further off, lsif gives some answers probability 0 and has no finite f
    ends = {name: optimum(name, reference, chosen, rejected) for name in FAMILY}
    for name, end in ends.items():
        assert total_variation(train(library, name, reference, chosen, rejected), end).max() < 2e-4, name
        assert total_variation(end, chosen).min() > 0.03, name  # which is not pi_chosen
    apart = [total_variation(ends[a], ends[b]).max() for a in FAMILY for b in FAMILY if a < b]
    assert min(apart) > 0.005

    # Two of them in closed form up to one number: ukl p / (q / pi_ref - c), lsif (p + c pi_ref) pi_ref / q.
    c = rejected / reference - chosen / ends["ukl"]
    np.testing.assert_allclose(c, np.broadcast_to(c[:, :1], c.shape), atol=1e-6)
    c = (1 - (reference * chosen / rejected).sum(-1)) / (reference**2 / rejected).sum(-1)
    closed = (chosen + c[:, None] * reference) * reference / rejected
    np.testing.assert_allclose(ends["lsif"], closed, atol=1e-6)


@pytest.mark.parametrize("library", LIBRARIES)
def test_recovery_of_p_over_q_where_that_is_normalised(library: str) -> None:
    """A q other than pi_ref with sum_y pi_ref p / q = 1: all members agree on pi_ref p / q, which is not pi_chosen."""
    chosen, reference = distributions(2, seed=3, prompts=1)
    direction = np.linspace(-1, 1, 8) * np.sign(np.linspace(-1, 1, 8) @ (reference - chosen)[0])

    def excess(t: float) -> float:  # convex, 0 and falling at t = 0: of q = pi_ref e^(-t direction) / Z
        return float(np.log(reference @ np.exp(-t * direction))[0] + np.log(chosen @ np.exp(t * direction))[0])

    low, high = 1e-3, 50.0
    assert excess(low) < 0 < excess(high)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) < 0 else (low, middle)
    rejected = reference * np.exp(-low * direction)
    rejected /= rejected.sum()
    end = reference * chosen / rejected
    assert end.sum() == pytest.approx(1, abs=1e-9)
    assert total_variation(end, chosen)[0] > 0.05
    for name in FAMILY:
        assert total_variation(train(library, name, reference, chosen, rejected), end)[0] < 2e-4, name


@pytest.mark.parametrize("library", LIBRARIES)
def test_recovery_with_both_sides_as_the_denominator(library: str) -> None:
    """`--denominator both` puts (p + q) / 2 in the place of q: right where that mixture is pi_ref, and not where q is."""
    chosen, other = distributions(2, seed=4)
    mixture = (chosen + other) / 2
    for name in FAMILY:
        assert total_variation(train(library, name, mixture, chosen, mixture), chosen).max() < 1e-3, name
        elsewhere = optimum(name, other, chosen, mixture)
        assert total_variation(elsewhere, chosen).min() > 0.02, name
        assert total_variation(train(library, name, other, chosen, mixture), elsewhere).max() < 2e-4, name


# --- dpo ----------------------------------------------------------------------------------------------------------------


def train_dpo(library: str, reference: np.ndarray, weights: np.ndarray, beta: float) -> np.ndarray:
    """The policy dpo ends at, where `weights` (chosen, rejected) is how often each pair of answers is seen."""
    form = OBJECTIVES["dpo"].form({"beta": beta})
    assert isinstance(form, Pairs)
    reference_logps, pairs = toys.array(library, np.log(reference)), toys.array(library, weights)

    def loss(logits: Any) -> Any:
        f = toys.log_softmax(logits) - reference_logps
        good, bad = (Responses(side, side, side, None, f[0] * 0) for side in (f[:, None], f[None, :]))
        return (pairs * form.loss(good, bad)).sum()

    return softmax(toys.adam(library, loss, np.log(reference), steps=400, rate=0.2)[0])


def fit_scores(weights: np.ndarray) -> np.ndarray:
    """The oracle: Newton's method in float64 on sum W[y, z] log(1 + e^(s_z - s_y)), convex in s, with s_0 = 0."""
    s = np.zeros(len(weights))
    for _ in range(100):
        wrong = 1 / (1 + np.exp(s[:, None] - s[None, :]))
        gradient = (weights.T * wrong.T).sum(1) - (weights * wrong).sum(1)
        bend = weights * wrong * (1 - wrong)
        bend = bend + bend.T
        hessian = np.diag(bend.sum(1)) - bend
        s[1:] -= np.linalg.solve(hessian[1:, 1:], gradient[1:])
    assert np.abs(gradient).max() < 1e-12
    return s


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("library", LIBRARIES)
def test_recovery_by_dpo_of_independent_answers(library: str, beta: float) -> None:
    """Chosen ~ p, rejected ~ q: beta f = log(p / q) + c, as the odds that y and not y' is the chosen one are p q' to p' q.

    So pi is in proportion to pi_ref (p / q)^(1 / beta): pi_chosen at q = pi_ref and beta 1 (DIL by CPC), sharper below.
    """
    chosen, reference, other = distributions(3, seed=5, prompts=1)[:, 0]
    for rejected in (reference, other):
        scores = fit_scores(np.outer(chosen, rejected))
        ratio = np.log(chosen / rejected)
        np.testing.assert_allclose(scores, ratio - ratio[0], atol=1e-9)
        end = softmax(np.log(reference) + scores / beta)
        if rejected is reference and beta == 1:
            np.testing.assert_allclose(end, chosen, atol=1e-9)
        else:
            assert total_variation(end, chosen) > 0.1
        assert total_variation(train_dpo(library, reference, np.outer(chosen, rejected), beta), end) < 1e-3


@pytest.mark.parametrize("beta", [1.0, 0.5])
@pytest.mark.parametrize("library", LIBRARIES)
def test_recovery_by_dpo_of_bradley_terry_preferences(library: str, beta: float) -> None:
    """Answers drawn from anything, preferred by a known reward: pi is in proportion to pi_ref exp(reward / beta)."""
    draw = np.random.default_rng(6)
    reference, drawn = distributions(2, seed=6, prompts=1)[:, 0]
    reward = draw.normal(size=8) / 2
    weights = np.outer(drawn, drawn) / (1 + np.exp(reward[None, :] - reward[:, None]))
    np.testing.assert_allclose(fit_scores(weights), reward - reward[0], atol=1e-9)
    end = softmax(np.log(reference) + reward / beta)
    assert total_variation(train_dpo(library, reference, weights, beta), end) < 1e-3
