"""The objectives against their definitions, finite differences, hand-worked values and the theory's promise."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from lite_dil.losses import OBJECTIVES, dpo, log_ratio, softplus

F = np.linspace(-3, 3, 25)  # float64, 0 among them
# h(r), h'(r) and the constants by which the closed forms of l_1 and l_-1 leave the definition out (DIL, Table 1).
DEFINITIONS: dict[str, tuple[Any, Any, float, float]] = {
    "lsif": (lambda r: (r - 1) ** 2 / 2, lambda r: r - 1, 1.0, -0.5),
    "ukl": (lambda r: r * np.log(r) - r, np.log, 0.0, 0.0),
    "bce": (lambda r: r * np.log(r) - (r + 1) * np.log(r + 1), lambda r: np.log(r) - np.log(r + 1), 0.0, 0.0),
}
FAMILY = list(DEFINITIONS)


def derivative(function: Any, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    return (function(x + step) - function(x - step)) / (2 * step)


@pytest.mark.parametrize("name", FAMILY)
def test_closed_forms_equal_the_definition(name: str) -> None:
    h, slope, chosen_constant, rejected_constant = DEFINITIONS[name]
    objective = OBJECTIVES[name].loss
    r = np.exp(F)
    np.testing.assert_allclose(objective.chosen(F), -slope(r) - chosen_constant, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(objective.rejected(F), r * slope(r) - h(r) - rejected_constant, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", FAMILY)
def test_h_prime_is_the_derivative_of_h(name: str) -> None:
    h, slope, *_ = DEFINITIONS[name]
    np.testing.assert_allclose(derivative(h, np.exp(F)), slope(np.exp(F)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILY)
def test_tilt_identity(name: str) -> None:
    """l_-1'(f) = -e^f l_1'(f) for every member of the family."""
    objective = OBJECTIVES[name].loss
    np.testing.assert_allclose(
        derivative(objective.rejected, F), -np.exp(F) * derivative(objective.chosen, F), rtol=1e-6, atol=1e-8
    )


def test_values_at_0_by_hand() -> None:
    zero = np.zeros(1)
    values = {name: float(objective.loss(zero, zero)[0]) for name, objective in OBJECTIVES.items()}
    assert values == pytest.approx({"lsif": -0.5, "ukl": 1.0, "bce": 2 * math.log(2), "dpo": math.log(2)})


def test_dpo_by_hand() -> None:
    # -log sigmoid(1) = log(1 + e^-1) = 0.313262, -log sigmoid(-3) = 3.048587
    np.testing.assert_allclose(dpo(np.array([1.5, -1.0]), np.array([0.5, 2.0])), [0.313262, 3.048587], atol=1e-6)


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_torch_and_mlx_values_and_gradients(name: str) -> None:
    """float32 values against numpy's float64, gradients against its finite differences, f = 0 included."""
    loss = OBJECTIVES[name].loss
    f_w, f_l = (grid.ravel() for grid in np.meshgrid(F, F))
    expected = (
        loss(f_w, f_l),
        derivative(lambda f: loss(f, f_l), f_w),
        derivative(lambda f: loss(f_w, f), f_l),
    )

    a, b = (torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in (f_w, f_l))
    value = loss(a, b)
    in_torch = (value.detach(), *torch.autograd.grad(value.sum(), (a, b)))
    a, b = (mx.array(x.astype(np.float32)) for x in (f_w, f_l))
    in_mlx = (loss(a, b), *mx.grad(lambda a, b: loss(a, b).sum(), argnums=(0, 1))(a, b))
    for found in (in_torch, in_mlx):
        for value, right in zip(found, expected, strict=True):
            np.testing.assert_allclose(value.tolist(), right, rtol=2e-4, atol=2e-5)


def test_softplus_has_its_slope_at_0_and_does_not_overflow() -> None:
    x = torch.zeros(1, requires_grad=True)
    softplus(x).backward()
    assert x.grad is not None
    assert x.grad.item() == 0.5
    assert mx.grad(lambda x: softplus(x).sum())(mx.zeros(1)).item() == 0.5
    for large in (np.array([1000.0]), torch.tensor([1000.0]), mx.array([1000.0])):
        assert softplus(large).item() == 1000.0


def test_log_ratio_sum_and_mean() -> None:
    policy, reference, lengths = np.array([-10.0, -6.0]), np.array([-12.0, -5.0]), np.array([4.0, 2.0])
    np.testing.assert_array_equal(log_ratio(policy, reference, lengths, "sum"), [2.0, -1.0])
    np.testing.assert_array_equal(log_ratio(policy, reference, lengths, "mean"), [0.5, -0.5])


@pytest.mark.parametrize("name", FAMILY)
def test_minimiser_is_the_density_ratio(name: str) -> None:
    """A tabular policy over 5 answers, rejected answers from pi_ref, sum reduction, beta 1: f -> log(pi_chosen / pi_ref)."""
    reference = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    chosen = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64)
    logits = reference.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )
    objective = OBJECTIVES[name].loss

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        f = logits.log_softmax(0) - reference.log()
        loss = (chosen * objective.chosen(f)).sum() + (reference * objective.rejected(f)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    f = logits.detach().log_softmax(0) - reference.log()
    np.testing.assert_allclose(f.numpy(), (chosen / reference).log().numpy(), atol=1e-5)


def test_dpo_does_not_recover_the_density_ratio() -> None:
    """What the recovery test would miss if it could not fail: dpo on the same toy goes elsewhere."""
    reference = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)
    chosen = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25], dtype=torch.float64)
    logits = reference.log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, line_search_fn="strong_wolfe")
    weight = chosen[:, None] * reference

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        f = 0.1 * (logits.log_softmax(0) - reference.log())
        loss = (weight * dpo(f[:, None].expand(5, 5), f.expand(5, 5))).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert (logits.detach().softmax(0) - chosen).abs().sum() / 2 > 0.1
