"""Comparing two models on the same items: intervals, tests, and how many items a difference would need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.05  # a difference is seen where its p-value, after Holm's correction, is below this
_RESAMPLES = 10_000
_POWER = 0.8
_AT_ONCE = 2**22  # numbers of a resampling in memory


@dataclass(frozen=True)
class PairedDifference:
    """How a figure of two models differs over the same items.

    Attributes:
        items: how many there are.
        first, second: the figure's mean of each model.
        low, high: the bootstrap interval of 95 % of second - first.
        gained, lost: items on which the second model's figure is larger, and smaller: the discordant ones.
        p: the probability of a difference like this one or larger if there is none: by McNemar's exact test for figures that
            are 0 or 1, else by random signs.
        needed: items that would show a difference of this size with a probability of 80 %, by `items_needed`; None if there is
            no difference.
    """

    items: int
    first: float
    second: float
    low: float
    high: float
    gained: int
    lost: int
    p: float
    needed: int | None

    @property
    def difference(self) -> float:
        """Return second - first."""
        return self.second - self.first


def compare_paired(
    first: Sequence[float] | np.ndarray, second: Sequence[float] | np.ndarray, seed: int = 0, tests: int = 1
) -> PairedDifference:
    """Compare two models' figures of the same items in the same order.

    Args:
        seed: for the resampling.
        tests: how many such comparisons Holm's correction is over.

    Raises ValueError if there are no items, or not the same number.
    """
    one, other = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if one.ndim != 1 or one.shape != other.shape or not len(one):
        raise ValueError(f"figures of shapes {one.shape} and {other.shape}; expected the same items, at least one")
    change = other - one
    low, high = mean_interval(change, seed)
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    binary = bool(np.isin(one, (0, 1)).all() and np.isin(other, (0, 1)).all())
    p = mcnemar(gained, lost) if binary else random_signs(change, seed)
    return PairedDifference(
        len(change), float(one.mean()), float(other.mean()), low, high, gained, lost, p, items_needed(change, tests)
    )


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the percentile bootstrap interval of 95 % of a mean over items, (items,) (Efron 1979).

    Its ends are moved by sqrt(n / (n - 1)), since resampling has the variance of n and not of n - 1.
    """
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return float(values[0]), float(values[0])
    found, counts = np.unique(values, return_counts=True)
    draw, means = np.random.default_rng(seed), list[np.ndarray]()
    for size in _pieces(_RESAMPLES, len(found)):
        means.append(draw.multinomial(len(values), counts / len(values), size) @ found / len(values))
    middle, stretch = values.mean(), math.sqrt(len(values) / (len(values) - 1))
    low, high = np.quantile(np.concatenate(means), (LEVEL / 2, 1 - LEVEL / 2))
    return float(middle + stretch * (low - middle)), float(middle + stretch * (high - middle))


def mcnemar(gained: int, lost: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: discordant items fall to either side like a coin's."""
    of = gained + lost
    tail = sum(math.comb(of, k) for k in range(min(gained, lost) + 1))
    return min(1.0, float(2 * tail / 2**of)) if of < 1000 else min(1.0, 2 * math.exp(_log_tail(min(gained, lost), of)))


def _log_tail(most: int, of: int) -> float:
    """Return the log of the probability of at most `most` heads among `of` tosses."""
    k = np.arange(most + 1)
    logs = np.array([math.lgamma(of + 1) - math.lgamma(i + 1) - math.lgamma(of - i + 1) for i in k]) - of * math.log(2)
    return float(logs.max() + math.log(np.exp(logs - logs.max()).sum()))


def random_signs(change: np.ndarray, seed: int = 0) -> float:
    """Return the two-sided p-value of a mean change, (items,), if each item's sign were random."""
    change = np.asarray(change, np.float64)
    draw, beyond = np.random.default_rng(seed), 0
    observed = abs(change.sum()) * (1 - 1e-12)  # sums of the same numbers round differently
    for size in _pieces(_RESAMPLES, len(change)):
        signs = 2.0 * draw.integers(0, 2, (size, len(change))) - 1
        beyond += int((np.abs(signs @ change) >= observed).sum())
    return (beyond + 1) / (_RESAMPLES + 1)


def items_needed(change: np.ndarray, tests: int = 1) -> int | None:
    """Return how many items would show the mean of these changes with a power of 80 %; None if the mean is 0.

    The level is 5 % divided by the number of tests, that of the first step of Holm's correction.
    """
    mean = float(np.mean(change))
    if mean == 0:
        return None
    if len(change) < 2:
        return 2
    both = NormalDist().inv_cdf(1 - LEVEL / tests / 2) + NormalDist().inv_cdf(_POWER)
    return max(2, math.ceil((both * float(np.std(change, ddof=1)) / mean) ** 2))


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979), in their order."""
    found, largest = [0.0] * len(values), 0.0
    for place, index in enumerate(sorted(range(len(values)), key=lambda i: values[i])):
        largest = max(largest, min(1.0, (len(values) - place) * values[index]))
        found[index] = largest
    return found


def sentence(name: str, found: PairedDifference, p: float, words: tuple[str, str] = ("rose", "fell")) -> str:
    """Return in words what a comparison shows; `p` is its p-value after Holm's correction."""
    change, items = found.difference, f"n = {found.items:,}"
    between = f"95 % interval {found.low:+.3f} to {found.high:+.3f}"
    if p < LEVEL:
        return f"{name} {words[change < 0]} by {abs(change):.3f} ({between}, p = {p:.2g}, {items})."
    if found.needed is None:
        return f"{name}: no difference can be seen with {items}; the two means are the same."
    needed = max(found.needed, found.items + 1)  # by the normal distribution, which may take these items for enough
    return (
        f"{name}: no difference can be seen with {items} ({change:+.3f}, {between}); one of this size would need about "
        f"n = {needed:,}."
    )


def _pieces(of: int, width: int) -> list[int]:
    """Return sizes of pieces of `of` rows, such that rows of `width` numbers fit in memory."""
    size = max(1, _AT_ONCE // max(1, width))
    return [min(size, of - start) for start in range(0, of, size)]
