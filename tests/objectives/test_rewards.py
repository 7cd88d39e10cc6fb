"""Losses of reward models: values of TRL's, optima by exact enumeration, gradients by finite differences, the same on MLX."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from conftest import config

from lite_dil.backends import registry
from lite_dil.batching.batch import Batch
from lite_dil.config.options import build
from lite_dil.data.encoder import Example
from lite_dil.objectives import rewards
from lite_dil.objectives.reward_criterion import RewardCriterion
from lite_dil.objectives.reward_table import REWARDS, identity

RATIOS = ("bce", "ukl", "rulsif", "lsif")
EXACTLY: Any = {"max_iter": 2000, "tolerance_grad": 1e-14, "tolerance_change": 0, "line_search_fn": "strong_wolfe"}
CHOSEN_R, REJECTED_R = [1.25, -0.5, 3.0, 0.1], [0.75, 0.25, -2.0, 0.1]


@pytest.mark.parametrize(
    ("coefficient", "expected"),
    # trl.RewardTrainer.compute_loss of TRL 1.16.0 on these logits, computed once in float32.
    [(0.0, 0.577702641), (0.01, 0.59045887)],
)
def test_bt_is_trls_reward_loss(coefficient: float, expected: float) -> None:
    chosen, rejected = (torch.tensor(values) for values in (CHOSEN_R, REJECTED_R))
    loss = rewards.bradley_terry(chosen, rejected)
    loss = loss + coefficient * rewards.centring(chosen, rejected)
    assert loss.dtype == torch.float32
    assert loss.mean().item() == pytest.approx(expected, abs=1e-6)


def unpaired(chosen: list[int], rejected: list[int]) -> Batch:
    """Outcome y as often on a side as its count there; the prompt's only token names it."""
    rows = [((y,), 1) for y, n in enumerate(chosen) for _ in range(n)]
    rows += [((y,), -1) for y, n in enumerate(rejected) for _ in range(n)]
    return Batch.of([Example((7,), (response,), (sign,)) for response, sign in rows])


def minimised(criterion: RewardCriterion, batch: Batch, outputs: int, start: float = 0.0) -> np.ndarray:
    """The outputs of a free table, (outcomes, outputs), at the minimum of the loss over the batch."""
    outcomes = torch.tensor([int(response[0]) for response in batch.responses])
    table = torch.full((int(outcomes.max()) + 1, outputs), start, dtype=torch.float64, requires_grad=True)
    inputs = {name: torch.from_numpy(value) for name, value in criterion.inputs(batch).items()}
    optimiser = torch.optim.LBFGS([table], **EXACTLY)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = criterion(table[outcomes], None, inputs) / batch.examples
        loss.backward()
        return loss

    for _ in range(4):
        optimiser.step(closure)
    return table.detach().numpy()


def criterion(loss: str, batch: Batch, **options: Any) -> RewardCriterion:
    signs = [Example((7,), (), (int(sign),)) for sign in batch.signs]
    if REWARDS[loss].data == "pairs":
        signs = [Example((7,), (), (1, -1)) for _ in range(batch.examples)]
    return RewardCriterion(config(loss=identity(loss), **options), signs)


@pytest.mark.parametrize("loss", RATIOS)
def test_a_free_head_recovers_the_log_ratio_of_the_sides(loss: str) -> None:
    """Twice as many rejected responses: each side is weighed by its own number."""
    p, q = np.array([5, 3, 1, 1]), np.array([2, 4, 6, 8])
    batch = unpaired(p.tolist(), q.tolist())
    found = minimised(criterion(loss, batch), batch, 1)[:, 0]
    np.testing.assert_allclose(found, np.log(p / p.sum()) - np.log(q / q.sum()), atol=3e-7)


@pytest.mark.parametrize("loss", RATIOS)
def test_smoothing_bounds_the_log_ratio(loss: str) -> None:
    p, q, eps = np.array([6, 4, 0]), np.array([0, 4, 6]), 0.1
    batch = unpaired(p.tolist(), q.tolist())
    found = minimised(criterion(loss, batch, label_smoothing=eps), batch, 1)[:, 0]
    mixed = ((1 - eps) * p + eps * q, (1 - eps) * q + eps * p)
    np.testing.assert_allclose(found, np.log(mixed[0]) - np.log(mixed[1]), atol=1e-6)
    assert np.abs(found).max() == pytest.approx(math.log((1 - eps) / eps), abs=1e-6)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def enumerated(probability: np.ndarray, loss: Callable[..., torch.Tensor], tables: list[torch.Tensor]) -> None:
    """Minimise the expectation of a pairwise loss: y_i beats y_j with the given probability, all pairs equally likely."""
    weights = torch.from_numpy(probability)
    i, j = np.nonzero(~np.eye(len(probability), dtype=bool))
    optimiser = torch.optim.LBFGS(tables, **EXACTLY)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        value = (weights[i, j] * loss(i, j)).mean()
        value.backward()
        return value

    for _ in range(8):
        optimiser.step(closure)


def test_bt_recovers_the_reward_that_labelled_the_pairs_and_a_ratio_head_does_not() -> None:
    """What a ratio head learns of them is the log-ratio of the marginals (docs/rewards.md)."""
    reward, pi = np.array([0.0, 1.0, 2.5, -1.0]), np.array([0.4, 0.3, 0.2, 0.1])
    beats = sigmoid(reward[:, None] - reward)
    table = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    enumerated(beats, lambda i, j: rewards.bradley_terry(table[i], table[j]), [table])
    found = table.detach().numpy()
    np.testing.assert_allclose(found - found[0], reward, atol=1e-6)

    chosen, rejected = 2 * pi * (beats @ pi), 2 * pi * ((1 - beats) @ pi)  # both from pi, labelled by the reward
    d = np.zeros(4)
    for _ in range(200):  # Newton on E_chosen[log(1 + e^-d)] + E_rejected[log(1 + e^d)]
        s = sigmoid(d)
        d -= (rejected * s - chosen * (1 - s)) / ((chosen + rejected) * s * (1 - s))
    np.testing.assert_allclose(d, np.log(chosen / rejected), atol=1e-9)
    assert np.abs((d - d[0]) - reward).max() > 0.5  # not the reward: it is flatter
    assert (np.argsort(d) == np.argsort(reward)).all()


def test_bt_with_variance_recovers_rewards_and_noise_scales_up_to_the_anchor() -> None:
    reward, log_v = np.array([0.0, 1.0, -0.7, 2.0, 0.4, -1.5]), np.array([0.3, -0.4, 0.5, -0.1, 0.1, -0.4])
    assert log_v.mean() == pytest.approx(0)
    scale = np.sqrt((np.exp(2 * log_v)[:, None] + np.exp(2 * log_v)) / 2)
    beats = sigmoid((reward[:, None] - reward) / scale)
    r, s = (torch.zeros(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    enumerated(beats, lambda i, j: rewards.bradley_terry_variance(r[i], r[j], s[i], s[j]), [r, s])
    factor = rewards.anchor(s.detach().numpy())
    found = r.detach().numpy() * factor
    np.testing.assert_allclose(s.detach().numpy() + math.log(factor), log_v, atol=1e-5)
    np.testing.assert_allclose(found - found[0], reward, atol=1e-5)


def test_bt_with_variance_by_hand_and_its_invariance() -> None:
    r, s = np.array([1.0, 0.2]), np.log(np.array([2.0, 1.0]))
    by_hand = -math.log(1 / (1 + math.exp(-0.8 / math.sqrt((4 + 1) / 2))))
    for c in (1.0, 1e-3, 50.0):  # (c R, c V)
        value = rewards.bradley_terry_variance(*(c * r), *(s + math.log(c)))
        assert float(value) == pytest.approx(by_hand, rel=1e-12)
    assert float(rewards.bradley_terry_variance(*r, *np.zeros(2))) == pytest.approx(math.log1p(math.exp(-0.8)), rel=1e-12)


def pairs(number: int = 5) -> tuple[Batch, list[Example]]:
    rows = [Example((7,), ((2 * n, 1), (2 * n + 1, 1)), (1, -1)) for n in range(number)]
    return Batch.of(rows), rows


@pytest.mark.parametrize("smoothing", [None, 0.2])
@pytest.mark.parametrize("loss", REWARDS)
def test_gradients_are_those_of_finite_differences_and_the_same_on_mlx(loss: str, smoothing: float | None) -> None:
    """In float64 by numpy alone, beyond the cap too; and of float32 arrays of both libraries."""
    batch, rows = pairs()
    options: dict[str, Any] = {"label_smoothing": smoothing}
    options |= {"center_rewards_coefficient": 0.03} if loss == "bt" else {}
    made = RewardCriterion(config(loss=identity(loss), **options), rows)
    scores = np.random.default_rng(0).normal(size=(10, made.outputs)) * 2
    scores[0, 0] = 3.7  # above the cap of lsif and ukl
    inputs = made.inputs(batch)

    def value(at: np.ndarray) -> float:
        return float(made(at, None, inputs))

    slopes = np.zeros_like(scores)
    for index in np.ndindex(*scores.shape):
        step = np.zeros_like(scores)
        step[index] = 1e-6
        slopes[index] = (value(scores + step) - value(scores - step)) / 2e-6
    for backend in ("cpu", "mlx"):
        small = scores.astype(np.float32)
        got, slope = registry.value_and_slope(backend, made, small, small, inputs)
        assert float(got) == pytest.approx(value(scores), rel=1e-5)
        np.testing.assert_allclose(slope, slopes, rtol=2e-4, atol=2e-5)


def test_lsif_is_capped_unless_told_otherwise() -> None:
    """Its exponential, which ran to NaN on a free head, is a line above the cap; how often is among the metrics."""
    made = RewardCriterion(build({"loss": identity("lsif"), "data": "x.jsonl"}, {}), pairs()[1])
    assert made.constants["log_ratio_cap"] == 3.0
    batch = pairs()[0]
    at, further = (float(made(np.full((10, 1), d), None, made.inputs(batch))) for d in (100.0, 101.0))
    line = -math.exp(3) + math.exp(6)  # slope of -e^d on one side, and of e^2d / 2 on the other, at 3
    assert (further - at) / 5 == pytest.approx(line, rel=1e-9)
