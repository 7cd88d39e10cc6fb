"""Shares of trials, such as an accuracy, and how far off they may be: Wilson's score interval (1927)."""

from __future__ import annotations

import math


def interval(share: float, of: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the Wilson score interval of a share of `of` trials, by default that of 95 %, valid for few trials too.

    Args:
        share: from 0 to 1.
        z: how many standard errors it reaches to each side.
    """
    spread = z * z / of
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / of + spread / of / 4)
    return middle - half, middle + half


def standard_error(share: float, of: int) -> float:
    """Return the standard error of a share: half the width of its interval for z = 1.

    For many trials it is the textbook's sqrt(share (1 - share) / of), which is 0 where all trials agree; this one is not.
    """
    low, high = interval(share, of, z=1.0)
    return (high - low) / 2
