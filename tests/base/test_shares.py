"""Wilson's interval of a share, and the standard error that pages show."""

from __future__ import annotations

import pytest

from lite_dil.base.shares import interval, standard_error


def test_the_interval_is_wilsons() -> None:
    """Newcombe (1998), table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    for won, of, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert interval(won / of, of) == pytest.approx((low, high), abs=6e-5)


def test_the_error_is_the_textbooks_for_many_trials_and_never_0() -> None:
    """With z = 1 and n trials, all of them right, the interval is from n / (n + 1) to 1."""
    assert standard_error(0.3, 10_000) == pytest.approx((0.3 * 0.7 / 10_000) ** 0.5, rel=2e-4)
    for share in (0.0, 1.0):
        assert standard_error(share, 9) == pytest.approx(0.05)
