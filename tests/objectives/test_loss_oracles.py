"""Every row of the table of objectives against an oracle written from its paper, finite differences and values by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numeric import complex_step, constants, gradients, slope, values

from lite_dil.objectives import losses
from lite_dil.objectives.objective import Pairs, Responses, Sides
from lite_dil.objectives.table import OBJECTIVES

FIELDS = ("log_ratio", "logps", "mean_logps", "weighted_logps")
BASELINE = 0.3

# What is tried of each objective beside its defaults.
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "lsif": [{"beta": 0.5}, {"log_ratio_cap": 1.0}],
    "ukl": [{"log_ratio_cap": 1.0}],
    "bce": [{"beta": 0.5}],
    "basu": [{"basu_alpha": 0.1}, {"basu_alpha": 1.0}, {"basu_alpha": 2.0}, {"log_ratio_cap": 1.0}],
    "rulsif": [{"relative_alpha": 0.5}, {"relative_alpha": 0.9}, {"beta": 0.5}],
    "dpo": [{"beta": 1.0}],
    "f-dpo": [{"divergence": d, "beta": b, "divergence_alpha": 0.3} for d in losses.DIVERGENCES for b in (0.1, 1.0)],
    "slic": [{"slic_delta": 2.0, "slic_lambda": 0.5}],
    "bpo": [{"beta": 1.0, "bpo_lambda": 0.25}],
    "kto": [{"beta": 1.0}],
    "cpo": [{"beta": 1.0, "cpo_lambda": 0.5}],
    "simpo": [{"simpo_gamma": 0.5}],
}
CASES = [
    pytest.param(name, options, id="-".join([name, *(f"{key}={value}" for key, value in options.items())]))
    for name in OBJECTIVES
    for options in [{}, *VARIANTS.get(name, [])]
]


def evaluate(form: Sides | Pairs, good: Responses, bad: Responses) -> Any:
    """The loss of each pair."""
    if isinstance(form, Pairs):
        return form.loss(good, bad)
    return form.chosen(good) if form.rejected is None else form.chosen(good) + form.rejected(bad)


def of_stack(form: Sides | Pairs) -> Callable[[Any], Any]:
    """The loss as a function of one array of shape (side, field, pairs)."""

    def loss(x: Any) -> Any:
        baseline = x[0, 0, 0] * 0 + BASELINE
        good, bad = (Responses(*(x[side, field] for field in range(4)), baseline) for side in range(2))
        return evaluate(form, good, bad)

    return loss


def inputs(pairs: int = 40) -> np.ndarray:
    """Random (side, field, pairs); the first pair is a fresh adapter's: f is 0 on both sides, the log-probs are not."""
    draw = np.random.default_rng(0)
    x = np.stack([draw.uniform(-3, 3, (2, pairs)), *(draw.uniform(-5, 0, (2, pairs)) for _ in range(3))], 1)
    x[:, 0, 0] = 0
    return x


def log_sigmoid(z: np.ndarray) -> np.ndarray:
    return -np.log(1 + np.exp(-z))


def dil_oracle(l_1: Callable[..., Any], l_minus_1: Callable[..., Any], *options: str) -> Callable[..., np.ndarray]:
    """A row of the DIL table by r = e^f; with a cap the line through (cap, l(cap)) with the slope that l has there."""

    def side(of_r: Callable[..., Any], f: np.ndarray, c: dict[str, Any]) -> np.ndarray:
        f = c["beta"] * f

        def of(f: Any) -> Any:
            return of_r(np.exp(f), *(c[option] for option in options))

        cap = c.get("log_ratio_cap")
        if cap is None:
            return of(f)
        at = np.array([cap])
        return np.where(f <= cap, of(f), of(at) + complex_step(of, at) * (f - cap))

    return lambda good, bad, c: side(l_1, good.log_ratio, c) + side(l_minus_1, bad.log_ratio, c)


def f_divergence(u: Any, name: str, a: float) -> Any:
    """The f-divergences of Wang et al. 2024, Table 1, as functions of u = pi / pi_ref."""
    if name == "reverse_kl":
        return u * np.log(u)
    if name == "forward_kl":
        return -np.log(u)
    if name == "js":
        return u * np.log(u) - (u + 1) * np.log((u + 1) / 2)
    return (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1))


def f_dpo_oracle(good: Responses, bad: Responses, c: dict[str, Any]) -> np.ndarray:
    def slope(f: np.ndarray) -> np.ndarray:
        return complex_step(lambda u: f_divergence(u, c["divergence"], c["divergence_alpha"]), np.exp(f))

    return -log_sigmoid(c["beta"] * (slope(good.log_ratio) - slope(bad.log_ratio)))


def bpo_oracle(good: Responses, bad: Responses, c: dict[str, Any]) -> np.ndarray:
    ratio, power = (np.exp(bad.log_ratio) / np.exp(good.log_ratio)) ** c["beta"], c["bpo_lambda"]
    return ratio ** (1 + power) / (4 * (1 + power)) - 1 / (4 * power * ratio**power)


def relative(r: Any, a: float) -> Any:
    return 1 / (a + (1 - a) / r)


ORACLES: dict[str, Callable[..., np.ndarray]] = {
    "lsif": dil_oracle(lambda r: -r, lambda r: r**2 / 2),
    "ukl": dil_oracle(lambda r: -np.log(r), lambda r: r),
    "bce": dil_oracle(lambda r: np.log(1 + 1 / r), lambda r: np.log(1 + r)),
    "basu": dil_oracle(lambda r, a: -((1 + a) * r**a - 1) / a, lambda r, a: r ** (1 + a), "basu_alpha"),
    "rulsif": dil_oracle(
        lambda r, a: a * relative(r, a) ** 2 / 2 - relative(r, a),
        lambda r, a: (1 - a) * relative(r, a) ** 2 / 2,
        "relative_alpha",
    ),
    "dpo": lambda good, bad, c: -log_sigmoid(c["beta"] * (good.log_ratio - bad.log_ratio)),
    "f-dpo": f_dpo_oracle,
    "ipo": lambda good, bad, c: (good.log_ratio - bad.log_ratio - 0.5 / c["beta"]) ** 2,
    "slic": lambda good, bad, c: np.clip(c["slic_delta"] - good.logps + bad.logps, 0, None) - c["slic_lambda"] * good.logps,
    "kto": lambda good, bad, c: (
        (1 - 1 / (1 + np.exp(-c["beta"] * (good.log_ratio - good.baseline)))) / 2
        + (1 - 1 / (1 + np.exp(-c["beta"] * (bad.baseline - bad.log_ratio)))) / 2
    ),
    "cpo": lambda good, bad, c: -log_sigmoid(c["beta"] * (good.logps - bad.logps)) - c["cpo_lambda"] * good.mean_logps,
    "simpo": lambda good, bad, c: -log_sigmoid(c["beta"] * (good.logps - bad.logps) - c["simpo_gamma"]),
    "bpo": bpo_oracle,
    "sft": lambda good, bad, c: -good.logps,
    "sft-occupancy": lambda good, bad, c: -good.weighted_logps,
}


@pytest.mark.parametrize(("name", "options"), CASES)
def test_values_equal_the_oracle(name: str, options: dict[str, Any]) -> None:
    c, x = constants(name, options), inputs()
    good, bad = (Responses(*x[side], np.array(BASELINE)) for side in range(2))
    expected = ORACLES[name](good, bad, c)
    found = values(of_stack(OBJECTIVES[name].form(c)), x)
    np.testing.assert_allclose(found["numpy"], expected, rtol=1e-11, atol=1e-12)
    for library in ("torch", "mlx"):
        np.testing.assert_allclose(found[library], expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_gradients_equal_finite_differences(name: str, options: dict[str, Any]) -> None:
    """For each input on each side, f = 0 among them; what an objective does not look at has gradient 0."""
    loss, x = of_stack(OBJECTIVES[name].form(constants(name, options))), inputs()
    expected, step = np.zeros_like(x), 1e-5
    for index in np.ndindex(2, 4):
        there, here = x.copy(), x.copy()
        there[index] += step
        here[index] -= step
        expected[index] = (loss(there) - loss(here)) / (2 * step)
    assert np.abs(expected[:, :, 0]).max() > 0.005  # a fresh adapter learns
    for gradient in gradients(loss, x).values():
        np.testing.assert_allclose(gradient, expected, rtol=2e-4, atol=2e-5)


def test_values_at_0_by_hand() -> None:
    """f = 0 on both sides and z0 = 0; the reference-free ones at log-probs (sum, mean, weighted) -2, -0.5, -1.5 and -3."""
    zero = np.zeros(1)
    good = Responses(zero, zero - 2, zero - 0.5, zero - 1.5, np.array(0.0))
    bad = Responses(zero, zero - 3, zero - 1, zero - 2, np.array(0.0))
    found = {name: evaluate(row.form(constants(name, {})), good, bad).item() for name, row in OBJECTIVES.items()}
    assert found == pytest.approx(
        {
            "lsif": -1 + 1 / 2,
            "ukl": 0 + 1,
            "bce": 2 * math.log(2),
            "basu": -1 + 1,
            "rulsif": -1 + 0.1 / 2 + 0.9 / 2,
            "dpo": math.log(2),
            "f-dpo": math.log(2),
            "ipo": 25.0,  # (0 - 1 / 0.2)^2
            "slic": 0.2,  # the hinge max(0, 1 + 2 - 3) is 0, and 0.1 * 2
            "kto": 1 / 4 + 1 / 4,
            "cpo": math.log(1 + math.exp(-0.1)) + 0.5,
            "simpo": math.log(1 + math.exp(-1)),  # 2 * (-2 + 3) - 1 = 1
            "bpo": 1 / 6 - 1 / 2,
            "sft": 2.0,
            "sft-occupancy": 1.5,
        }
    )


def test_values_by_hand() -> None:
    # dpo: log(1 + e^-1) = 0.313262 and log(1 + e^3) = 3.048587
    np.testing.assert_allclose(losses.dpo(np.array([1.5, -1.0]), np.array([0.5, 2.0]), 1.0), [0.313262, 3.048587], atol=1e-6)
    # slic: 1 + 3 - 2 = 2 above the hinge, and 0.1 * 3
    np.testing.assert_allclose(losses.slic(np.array([-3.0]), np.array([-2.0]), 1.0, 0.1), [2.3])
    # kto: sigmoid(2) = 0.880797 wrong by two nats above z0 = 1; a good answer at z0 costs a half
    np.testing.assert_allclose(losses.kto_rejected(np.array([3.0]), np.array(1.0), 1.0), [0.880797], atol=1e-6)
    np.testing.assert_allclose(losses.kto_chosen(np.array([1.0]), np.array(1.0), 1.0), [0.5])
    # bpo at R = 4, lambda = 1/2: 8 / 6 - 0.5 / 2
    np.testing.assert_allclose(losses.bpo(np.array([0.0]), np.log([4.0]), 1.0, 0.5), [8 / 6 - 1 / 4])


def test_bpo_starts_with_the_slope_of_dpo() -> None:
    """What its scale of 4 is for."""
    for beta in (0.1, 1.0):
        bpo = slope(lambda f, beta=beta: losses.bpo(f, f * 0, beta, 0.5), np.zeros(1))
        np.testing.assert_allclose(bpo, slope(lambda f, beta=beta: losses.dpo(f, f * 0, beta), np.zeros(1)), rtol=1e-12)


def test_what_the_table_says_is_what_the_forms_look_at() -> None:
    """`reference` and `data` of each row against the inputs that its gradient reaches."""
    for name, row in OBJECTIVES.items():
        form = row.form(constants(name, {}))
        gradient = np.abs(gradients(of_stack(form), inputs())["torch"]).sum(-1)
        assert row.reference == bool(gradient[:, FIELDS.index("log_ratio")].any()), name
        assert (row.data == "chosen") == (not gradient[1].any()), name
        assert (row.data == "pairs") == isinstance(form, Pairs), name
        assert (row.token_weights is not None) == bool(gradient[0, FIELDS.index("weighted_logps")]), name
