"""The statistics of comparisons: by hand, by simulation, and by what they must not say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lite_dil.evaluation import statistics
from lite_dil.evaluation.statistics import compare_paired, holm, items_needed, mcnemar, mean_interval, random_signs, sentence


def test_mcnemar_by_hand() -> None:
    assert mcnemar(0, 0) == 1.0 and mcnemar(1, 1) == 1.0
    assert mcnemar(0, 5) == mcnemar(5, 0) == 2 / 32
    assert mcnemar(1, 7) == pytest.approx(2 * (1 + 8) / 256)
    # Many discordant items, by logarithms: the same as by whole numbers.
    whole = 2 * sum(math.comb(1200, k) for k in range(561)) / 2**1200
    assert mcnemar(560, 640) == pytest.approx(whole, rel=1e-9)


def test_holm_by_hand() -> None:
    """Holm's own example: the smallest times 4, the next times 3, and never below the one before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_random_signs_agree_with_all_signs() -> None:
    change = np.array([0.3, -0.1, 0.7, 0.2, 0.4])
    signs = np.array([[1 if bits >> i & 1 else -1 for i in range(5)] for bits in range(32)])
    exact = (np.abs(signs @ change) >= change.sum() - 1e-9).mean()
    assert random_signs(change) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize(("items", "gain", "loss"), [(100, 0.15, 0.10), (200, 0.12, 0.12), (1000, 0.05, 0.02)])
def test_intervals_cover_the_true_difference(items: int, gain: float, loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 0.93 to 0.97 of simulated evaluations."""
    monkeypatch.setattr(statistics, "_RESAMPLES", 1000)
    draw, covered, trials = np.random.default_rng(1), 0, 2000
    for seed in range(trials):
        low, high = mean_interval(draw.choice([1.0, -1.0, 0.0], items, p=[gain, loss, 1 - gain - loss]), seed)
        covered += low <= gain - loss <= high
    assert 0.93 <= covered / trials <= 0.97


def test_intervals_of_numbers_cover_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "_RESAMPLES", 500)
    draw, covered, trials = np.random.default_rng(2), 0, 1000
    for seed in range(trials):
        low, high = mean_interval(draw.normal(0.3, 1.0, 60), seed)
        covered += low <= 0.3 <= high
    assert 0.93 <= covered / trials <= 0.97


def test_the_items_needed_show_the_difference() -> None:
    """With that many, four fifths of simulated evaluations reject; p = 0.08 and 0.05 of discordant items."""
    sides = [0.08, 0.05, 0.87]
    change = np.array([1.0] * 80 + [-1.0] * 50 + [0.0] * 870)
    needed = items_needed(change)
    assert needed is not None
    draw = np.random.default_rng(3)
    counts = draw.multinomial(needed, sides, 400)
    seen = np.mean([mcnemar(int(gained), int(lost)) < 0.05 for gained, lost, _ in counts])
    assert 0.72 < seen < 0.88
    assert items_needed(np.zeros(5)) is None
    # Of several tests each must be below a smaller level: z of 5 % / 4 is 2.498, and 0.842 that of the power.
    assert items_needed(change, 4) == math.ceil(((2.4977 + 0.8416) * change.std(ddof=1) / change.mean()) ** 2)


def test_a_comparison_in_words() -> None:
    first, second = [0, 0, 1, 1] * 50, [1, 0, 1, 1] * 50
    found = compare_paired(first, second)
    assert (found.items, found.first, found.second, found.gained, found.lost) == (200, 0.5, 0.75, 50, 0)
    assert found.low < 0.25 < found.high and found.p < 1e-10
    assert sentence("acc", found, found.p).startswith("acc rose by 0.250 (95 % interval +0.1")
    nearly = compare_paired([0, 1] * 100, [*[0, 1] * 99, 1, 1])
    said = sentence("acc", nearly, nearly.p)
    assert "no difference can be seen with n = 200 (+0.005" in said and f"n = {nearly.needed:,}" in said
    # One that 10 items would show by the normal distribution, and 12 do not by the exact test.
    few = compare_paired([0] * 12, [1] * 5 + [0] * 7)
    assert few.p == 2 / 32 and few.needed is not None and few.needed <= 12
    assert "one of this size would need about n = 13." in sentence("acc", few, few.p)
    assert sentence("acc", few, 0.01, ("is higher", "is lower")).startswith("acc is higher by 0.417")
    same = compare_paired([0, 1], [0, 1])
    assert sentence("acc", same, 1.0) == "acc: no difference can be seen with n = 2; the two means are the same."
    with pytest.raises(ValueError, match="the same items"):
        compare_paired([1], [1, 0])
