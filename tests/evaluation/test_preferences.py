"""Figures on preferences, by hand: rewards as the runs take them, ties, several adapters, and the rule of length."""

from __future__ import annotations

import numpy as np
import pytest

from lite_dil.data.encoder import Example
from lite_dil.evaluation.preferences import PairReward, PreferencePairs, calibration, preference_figures

# Chosen and rejected of 4 and 1, 1 and 4, 2 and 2 tokens; log-probs of both in nats.
PAIRS = PreferencePairs([Example((1,), ((2,) * n, (3,) * m), (1, -1)) for n, m in ((4, 1), (1, 4), (2, 2))], ["a", "a", ""])
BASE = np.array([[-8.0, -2.0], [-3.0, -8.0], [-4.0, -4.0]])
TUNED = BASE + np.array([[2.0, 1.0], [1.0, 2.0], [0.5, 0.5]])


def test_the_implicit_reward_is_that_of_the_loss() -> None:
    """Summed log-ratios prefer the chosen response of the first pair, averaged ones that of the second; the third is a tie."""
    lengths = np.array([[4, 1], [1, 4], [2, 2]], float)
    np.testing.assert_allclose(PairReward(2.0, mean=False).margins(BASE, TUNED, lengths), [2, -2, 0])
    np.testing.assert_allclose(PairReward(2.0, mean=True).margins(BASE, TUNED, lengths), [-1, 1, 0])
    for mean, error in ((False, 2), (True, 1)):
        (found,) = preference_figures(PAIRS, BASE, {"run": TUNED}, {"run": PairReward(2.0, mean, "A note.")}).values()
        every, some = found["subsets"]
        assert (every["pairs"], some["subset"], some["pairs"]) == (3, "a", 2)
        assert every["implicit reward"]["mean"] == every["the longer answer"]["mean"] == 0.5
        # Per token: the base has -2 and -2, -3 and -2, -2 and -2; the tuned model -1.5 and -1, -2 and -1.5, and the tie.
        assert every["mean log-prob of the base"]["mean"] == pytest.approx((0.5 + 0 + 0.5) / 3)
        assert every["mean log-prob"]["mean"] == pytest.approx((0 + 0 + 0.5) / 3)
        assert found["calibration"] == calibration(np.array([error, -error, 0]))
        assert found["reduction"] == ("mean" if mean else "sum") and found["sentences"][-1] == "A note."


def test_several_adapters_are_corrected_for_their_number_and_measured_by_the_rule_of_length() -> None:
    """Six pairs that the rule of length gets wrong and an adapter right: p is 1/32 for one, and twice that for two of them."""
    pairs = PreferencePairs([Example((1,), ((2,), (3, 3)), (1, -1))] * 6, [""] * 6)
    base = np.zeros((6, 2)) - [1.0, 2.0]
    better, reward = base + np.array([1.0, 0.0]), PairReward(1.0, mean=False)
    alone = preference_figures(pairs, base, {"one": better}, {"one": reward})["one"]["sentences"]
    assert (
        alone[1].startswith("implicit reward against the longer answer: accuracy is higher by 1.000")
        and "p = 0.031" in alone[1]
    )
    both = preference_figures(pairs, base, {"one": better, "two": better}, {"one": reward, "two": reward})
    for name, found in both.items():
        assert found["sentences"][1].startswith(f"{name}: implicit reward against the longer answer: accuracy: no difference")
