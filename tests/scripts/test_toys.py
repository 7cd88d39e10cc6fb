"""What docs/mass_covering.png and docs/overlap.png show, in numbers, on both libraries."""

from __future__ import annotations

import math

import numpy as np
import pytest
import toys

STEPS = 1600


@pytest.fixture(scope="module", params=["torch", "mlx"])
def bells(request: pytest.FixtureRequest) -> dict[str, tuple[toys.Fit, toys.Fit]]:
    return toys.mass_covering(request.param)


@pytest.fixture(scope="module", params=["torch", "mlx"])
def descents(request: pytest.FixtureRequest) -> dict[str, toys.Descent]:
    return toys.overlap(request.param, STEPS)


def test_which_objectives_cover_both_modes(bells: dict[str, tuple[toys.Fit, toys.Fit]]) -> None:
    """From the reference: the covering ones are wide and put a third of their mass where pi_chosen has 0.3 %."""
    chosen = toys.Fit(0, 0, toys.two_bells(), 0)
    assert chosen.between < 0.005
    for name in ("sft", "ukl", "bce", "basu", "rulsif"):
        fit = bells[name][0]
        assert fit.spread > 0.9 * chosen.spread, name
        assert fit.between > 0.3, name
    for name in ("lsif", "reverse KL"):
        fit = bells[name][0]
        assert fit.place == pytest.approx(-2, abs=0.1), name
        assert fit.spread < 0.6, name
        assert fit.between < 0.03, name
    assert bells["reverse KL"][0].spread == pytest.approx(toys.MODE_WIDTH, abs=0.01)
    assert bells["reverse KL"][0].spread < bells["lsif"][0].spread - 0.1


def test_basu_and_rulsif_cover_only_because_of_where_they_start(bells: dict[str, tuple[toys.Fit, toys.Fit]]) -> None:
    for name in ("basu", "rulsif"):
        near, best = bells[name]
        assert best.loss < near.loss - 0.3, name
        assert best.spread < 0.5 and best.place == pytest.approx(-2, abs=0.1), name
    for name in ("sft", "ukl", "bce", "lsif", "reverse KL"):
        near, best = bells[name]
        assert best.loss > near.loss - 1e-3, name


def test_ukl_is_sft_for_a_normalised_policy(bells: dict[str, tuple[toys.Fit, toys.Fit]]) -> None:
    """E_ref[pi / pi_ref] = 1, so that -E log pi is all that is left."""
    ukl, sft = bells["ukl"][0], bells["sft"][0]
    np.testing.assert_allclose(ukl.policy, sft.policy, atol=1e-4)
    constant = 1 + toys.two_bells() @ np.log(toys.bell(0, toys.REFERENCE_WIDTH))
    assert ukl.loss - sft.loss == pytest.approx(constant, abs=1e-4)


def test_lsif_runs_away_where_nothing_covers(descents: dict[str, toys.Descent]) -> None:
    """Each step is larger than the one before, until a value or a gradient is not finite."""
    run = descents["lsif"]
    assert run.overflowed
    assert len(run.loss) < 30
    steps = np.diff(run.log_ratio)
    assert np.all(np.diff(steps) > 0)
    assert steps[-1] > 20 * steps[0]
    assert run.loss[-1] < -1000


def test_the_cap_stops_the_overflow_and_not_the_drift(descents: dict[str, toys.Descent]) -> None:
    """Beyond the cap f grows by equal steps, until the answer that nothing covers has all of the mass."""
    run = descents[f"lsif, log-ratio-cap {toys.CAP:g}"]
    assert not run.overflowed
    steps = np.diff(run.log_ratio)[(run.log_ratio[:-1] > toys.CAP) & (run.log_ratio[:-1] < 90)]
    assert len(steps) > 50
    # rate * p * e^cap, and as much again times the sum of pi^2 of the other two, which fall: 1/4 + 1/4
    np.testing.assert_allclose(steps, 0.1 * 0.5 * math.exp(toys.CAP) * 1.5, rtol=1e-2)
    assert run.policy[1] > 0.99


def test_ukl_ends_with_both_good_answers(descents: dict[str, toys.Descent]) -> None:
    """Its optimum p / (q / pi_ref - c), with q / pi_ref = 1, 0, 1 for the three: c = -sqrt(1/2)."""
    run = descents["ukl"]
    assert not run.overflowed
    np.testing.assert_allclose(run.policy, [0.5 / (1 + math.sqrt(0.5)), 0.5 / math.sqrt(0.5), 0], atol=0.02)


@pytest.mark.parametrize("name", ["rulsif", "bce"])
def test_rulsif_and_bce_stay_bounded_and_hardly_move(descents: dict[str, toys.Descent], name: str) -> None:
    run = descents[name]
    assert not run.overflowed
    assert len(run.loss) == STEPS
    assert np.isfinite(run.loss).all()
    assert run.loss.min() > {"rulsif": -1 / (2 * 0.1), "bce": 0.0}[name]
    steps = np.diff(run.log_ratio)
    assert steps.min() > 0 and steps.max() < 0.3
    assert 4 < run.log_ratio[-1] < 7  # of the 99.3 that it should have; as log(step)
    assert run.policy[1] < 1e-40
