"""Each objective against its definition, the tangents where exponentials would overflow, and the small functions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from numeric import complex_step, constants, gradients, slope, values

from lite_dil.objectives import losses
from lite_dil.objectives.losses import EXPONENT_LIMIT, Bregman
from lite_dil.objectives.objective import Responses, Sides
from lite_dil.objectives.table import OBJECTIVES, OPTIONS

F = np.linspace(-3, 3, 25)  # float64, 0 among them


# --- the Bregman family by its definition ------------------------------------------------------------------------------

# member, h(r), and the constants by which the closed forms of l_1 and l_-1 leave the definition out (DIL, Table 1).
DEFINITIONS: dict[str, tuple[Bregman, Callable[[Any], Any], float, float]] = {
    "lsif": (losses.lsif(), lambda r: (r - 1) ** 2 / 2, 1.0, -0.5),
    "ukl": (losses.ukl(), lambda r: r * np.log(r) - r, 0.0, 0.0),
    "bce": (losses.bce(), lambda r: r * np.log(r) - (r + 1) * np.log(r + 1), 0.0, 0.0),
    **{
        f"basu-{alpha}": (losses.basu(alpha), lambda r, a=alpha: (r ** (1 + a) - r) / a, 0.0, 0.0)
        for alpha in (0.1, 0.5, 1.0, 2.0)
    },
}
RELATIVE = {f"rulsif-{alpha}": (losses.rulsif(alpha), alpha) for alpha in (0.05, 0.1, 0.5, 0.9)}
FAMILY = {name: row[0] for name, row in DEFINITIONS.items()} | {name: row[0] for name, row in RELATIVE.items()}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_closed_forms_equal_the_definition(name: str) -> None:
    """l_1 = -h'(r) and l_-1 = r h'(r) - h(r), from h alone."""
    member, h, chosen_constant, rejected_constant = DEFINITIONS[name]
    r = np.exp(F)
    h_prime = complex_step(h, r)
    np.testing.assert_allclose(member.chosen(F), -h_prime - chosen_constant, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(member.rejected(F), r * h_prime - h(r) - rejected_constant, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", RELATIVE)
def test_rulsif_is_least_squares_on_the_relative_ratio(name: str) -> None:
    """Yamada et al. 2013, eq. 7: alpha/2 E_p[g^2] + (1 - alpha)/2 E_q[g^2] - E_p[g], with g = r / (alpha r + 1 - alpha)."""
    member, alpha = RELATIVE[name]
    r = np.exp(F)
    g = r / (alpha * r + 1 - alpha)
    np.testing.assert_allclose(member.chosen(F), alpha / 2 * g**2 - g, rtol=1e-12)
    np.testing.assert_allclose(member.rejected(F), (1 - alpha) / 2 * g**2, rtol=1e-12)


@pytest.mark.parametrize("name", FAMILY)
def test_tilt_identity(name: str) -> None:
    """l_-1'(f) = -e^f l_1'(f) for every member: with equal numbers of both sides, a fresh adapter's pulls cancel."""
    chosen, rejected = slope(FAMILY[name].chosen, F), slope(FAMILY[name].rejected, F)
    assert np.all(chosen < 0)
    np.testing.assert_allclose(rejected, -np.exp(F) * chosen, rtol=1e-11)


def test_basu_lies_between_ukl_and_lsif() -> None:
    ukl, lsif = losses.ukl(), losses.lsif()
    gaps = []
    for alpha in (1e-3, 1e-4, 1e-5):
        basu = losses.basu(alpha)
        gaps.append(max(abs(basu.chosen(F) - (ukl.chosen(F) - 1)).max(), abs(basu.rejected(F) - ukl.rejected(F)).max()))
    assert gaps[0] < 0.1
    np.testing.assert_allclose(np.divide(gaps[:-1], gaps[1:]), 10, rtol=0.01)  # of first order in alpha
    basu = losses.basu(1.0)
    np.testing.assert_allclose(basu.chosen(F), 2 * lsif.chosen(F) + 1, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(basu.rejected(F), 2 * lsif.rejected(F), rtol=1e-12)


def test_rulsif_is_bounded_and_its_gradient_finite() -> None:
    """-1 / (2 alpha) <= l_1 <= 0 and 0 <= l_-1 <= (1 - alpha) / (2 alpha^2), where e^f overflows too."""
    alpha, x = 0.1, np.array([-1e4, -200.0, -89.0, -10.0, 0.0, 10.0, 89.0, 200.0, 1e4])
    member = losses.rulsif(alpha)
    for side, low, high in ((member.chosen, -1 / (2 * alpha), 0.0), (member.rejected, 0.0, (1 - alpha) / (2 * alpha**2))):
        for value in values(side, x).values():
            assert np.all((value >= low * (1 + 1e-6)) & (value <= high * (1 + 1e-6)))
            np.testing.assert_allclose(value[[0, -1]], [0.0, low or high], atol=1e-6)
        for gradient in gradients(side, x).values():
            assert np.isfinite(gradient).all()
            np.testing.assert_allclose(gradient[4], slope(side, np.zeros(1))[0], rtol=1e-6)
            np.testing.assert_allclose(gradient[5], slope(side, np.array([10.0]))[0], rtol=1e-3)  # it fades, to e^-2f


# --- the tangent --------------------------------------------------------------------------------------------------------

CAPPED: dict[str, Callable[[float | None], Bregman]] = {
    "lsif": losses.lsif,
    "ukl": losses.ukl,
    "basu-0.1": lambda cap: losses.basu(0.1, cap),
    "basu-0.5": lambda cap: losses.basu(0.5, cap),
    "basu-2": lambda cap: losses.basu(2.0, cap),
}


@pytest.mark.parametrize("cap", [0.0, 2.0, 10.0])
@pytest.mark.parametrize("name", CAPPED)
def test_the_cap_is_the_tangent_line(name: str, cap: float) -> None:
    """Below it nothing changes, bit for bit; from it on the line through l(cap) with the slope l'(cap)."""
    free, capped = CAPPED[name](None), CAPPED[name](cap)
    below, above = cap - np.array([50.0, 3.0, 1e-9]), cap + np.array([0.0, 1e-6, 0.5, 7.0, 190.0])
    for side, with_cap in ((free.chosen, capped.chosen), (free.rejected, capped.rejected)):
        np.testing.assert_array_equal(with_cap(below), side(below))
        at = np.array([cap])
        line = side(at) + slope(side, at) * (above - cap)
        np.testing.assert_allclose(with_cap(above), line, rtol=1e-12)
        np.testing.assert_allclose(slope(with_cap, above), np.full(5, slope(side, at)[0]), rtol=1e-12)
        near = cap + np.array([-1e-6, 0, 1e-6])  # value and slope are continuous
        np.testing.assert_allclose(with_cap(near), side(near), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(slope(with_cap, near), slope(side, near), rtol=1e-5)


@pytest.mark.parametrize("cap", [1.0, 10.0, 44.0])
@pytest.mark.parametrize("name", CAPPED)
def test_the_cap_keeps_float32_gradients_right(name: str, cap: float) -> None:
    """Far above the cap the gradient is the slope at the cap: not 0, not NaN, to float32's precision."""
    free, capped = CAPPED[name](None), CAPPED[name](cap)
    power = {"lsif": 2, "ukl": 1, "basu-0.1": 1.1, "basu-0.5": 1.5, "basu-2": 3}[name]
    for side, with_cap, exponent in ((free.chosen, capped.chosen, power - 1), (free.rejected, capped.rejected, power)):
        start = min(cap, EXPONENT_LIMIT / exponent) if exponent else cap  # beyond 80 float32 has no room for a line
        expected = slope(side, np.array([start]))[0]
        for library, gradient in gradients(with_cap, np.array([cap, cap + 1, 200.0, 1e6])).items():
            np.testing.assert_allclose(gradient, expected, rtol=1e-4, err_msg=library)
            assert np.all(gradient != 0)


def test_without_a_cap_float32_overflows() -> None:
    """What the cap is for: no silent guard hides a run that diverges."""
    for gradient in gradients(losses.lsif().rejected, np.array([50.0])).values():
        assert np.isinf(gradient).all()
    for gradient in gradients(losses.ukl().rejected, np.array([90.0])).values():
        assert np.isinf(gradient).all()


def test_the_highest_cap_that_is_allowed_leaves_float32_room() -> None:
    high = OPTIONS["log_ratio_cap"].high
    for gradient in gradients(losses.lsif(high).rejected, np.array([high + 1, 200.0])).values():
        np.testing.assert_allclose(gradient, math.exp(2 * high), rtol=1e-4)


@pytest.mark.parametrize("name", ["lsif", "ukl", "basu"])
def test_the_cap_is_of_beta_f(name: str) -> None:
    """As its help says, and as the metric `capped` counts."""
    c = constants(name, {"beta": 0.5, "log_ratio_cap": 2.0})
    form, member = OBJECTIVES[name].form(c), CAPPED["basu-0.5" if name == "basu" else name](2.0)
    assert isinstance(form, Sides) and form.rejected is not None
    f = np.array([-3.0, 3.99, 4.5])
    seen = Responses(f, f, f, None, f * 0)
    np.testing.assert_array_equal(form.chosen(seen), member.chosen(f / 2))
    np.testing.assert_array_equal(form.rejected(seen), member.rejected(f / 2))
    count = OBJECTIVES[name].capped
    assert count is not None
    compared = count(np.array([3.99, 4.5]), c)
    assert compared is not None
    np.testing.assert_array_equal(compared[0] > compared[1], [False, True])
    assert count(np.zeros(1), {**c, "log_ratio_cap": None}) is None


# --- f-DPO --------------------------------------------------------------------------------------------------------------


def test_f_dpo_reverse_kl_is_dpo() -> None:
    f_w, f_l = np.random.default_rng(1).normal(size=(2, 100)) * 50
    for make in (np.asarray, torch.tensor, lambda x: mx.array(x.astype(np.float32))):
        good, bad = make(f_w), make(f_l)
        ours, dpo = losses.f_dpo(good, bad, 0.1, "reverse_kl", 0.5), losses.dpo(good, bad, 0.1)
        np.testing.assert_array_equal(np.array(ours.tolist()), np.array(dpo.tolist()))


@pytest.mark.parametrize(("divergence", "alpha"), [("forward_kl", 0.5), ("alpha", 0.5), ("alpha", 0.9)])
def test_f_dpo_goes_on_along_the_tangent_beyond_an_exponent_of_80(divergence: str, alpha: float) -> None:
    power = 1.0 if divergence == "forward_kl" else alpha
    limit = -EXPONENT_LIMIT / power

    def of(f: Any) -> Any:
        return losses.f_divergence_slope(f, divergence, alpha)

    def definition(f: Any) -> Any:
        return -np.exp(-f) if divergence == "forward_kl" else (1 - np.exp(-alpha * f)) / alpha

    just_above = limit + np.array([0.0, 1e-3, 20.0])
    np.testing.assert_allclose(of(just_above), definition(just_above), rtol=1e-12)
    beyond, at = limit - np.array([1e-6, 1.0, 100.0]), np.array([limit])
    line = definition(at) + complex_step(definition, at) * (beyond - limit)
    np.testing.assert_allclose(of(beyond), line, rtol=1e-11)
    for gradient in gradients(of, limit - np.array([1.0, 100.0, 1e5])).values():
        np.testing.assert_allclose(gradient, complex_step(definition, at)[0], rtol=1e-4)
    for found in values(lambda f: losses.f_dpo(f, f * 0, 0.1, divergence, alpha), limit - np.array([0.0, 10.0])).values():
        assert np.isfinite(found).all() and np.all(found > 1e30)

    row = OBJECTIVES["f-dpo"]
    assert row.capped is not None
    c = constants("f-dpo", {"divergence": divergence, "divergence_alpha": alpha})
    compared = row.capped(np.append(beyond, just_above[1:]), c)
    assert compared is not None
    np.testing.assert_array_equal(compared[0] > compared[1], [True, True, True, False, False])


def test_f_dpo_has_nothing_to_cap_where_nothing_overflows() -> None:
    row, f = OBJECTIVES["f-dpo"], np.array([-1e4, 0.0, 1e4])
    assert row.capped is not None
    for divergence in ("reverse_kl", "js"):
        c = constants("f-dpo", {"divergence": divergence})
        assert row.capped(f, c) is None
        for gradient in gradients(lambda f, d=divergence: losses.f_divergence_slope(f, d, 0.5), f).values():
            np.testing.assert_allclose(gradient, [1, 1, 1] if divergence == "reverse_kl" else [1, 0.5, 0], atol=1e-6)


# --- the small functions ------------------------------------------------------------------------------------------------


def test_softplus_and_sigmoid_at_their_extremes() -> None:
    """Right where e^x overflows, and with their slope at 0, where training starts."""
    x = np.array([-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4])
    tiny = math.exp(-20)
    for found in values(losses.softplus, x).values():
        np.testing.assert_allclose(found, [0, 0, tiny, math.log(2), 20 + tiny, 100, 1e4], rtol=1e-5, atol=1e-30)
    for found in values(losses.sigmoid, x).values():
        np.testing.assert_allclose(found, [0, 0, tiny, 0.5, 1, 1, 1], rtol=1e-5, atol=1e-30)
    for found in gradients(losses.softplus, x).values():
        np.testing.assert_allclose(found, [0, 0, tiny, 0.5, 1, 1, 1], rtol=1e-5, atol=1e-30)
    for found in gradients(losses.sigmoid, x).values():
        np.testing.assert_allclose(found, [0, 0, tiny, 0.25, tiny, 0, 0], rtol=1e-5, atol=1e-7)


def test_occupancy_weights_by_hand() -> None:
    assert losses.occupancy_weights(1) == [1.0]
    assert losses.occupancy_weights(4) == [1.0, 0.75, 0.5, 0.25]  # the end token has 1/n, not 0


def test_occupancy_weights_oracle() -> None:
    """Sun 2024, eq. 12: a uniformly drawn prefix of the answer, and the log-probs of what it holds."""
    logps = np.random.default_rng(2).normal(size=7)
    prefixes = [logps[:end].sum() for end in range(1, 8)]
    assert logps @ losses.occupancy_weights(7) == pytest.approx(np.mean(prefixes), rel=1e-12)


def test_log_ratio_sum_and_mean() -> None:
    policy, reference, lengths = np.array([-10.0, -6.0]), np.array([-12.0, -5.0]), np.array([4.0, 2.0])
    np.testing.assert_array_equal(losses.log_ratio(policy, reference, lengths, "sum"), [2.0, -1.0])
    np.testing.assert_array_equal(losses.log_ratio(policy, reference, lengths, "mean"), [0.5, -0.5])
