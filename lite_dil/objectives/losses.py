"""Losses: pure functions of log-probs and log-ratios, written once for torch, MLX and numpy.

``f(x, y) = log pi_theta(y|x) - log pi_ref(y|x)`` is the log-ratio of a response and ``r = exp(f)`` the density ratio that
Direct Imitation Learning fits (Xiao et al., ICLR 2025, arXiv 2503.05079). Every function here is elementwise and keeps its
input's shape; reductions belong to the caller. The array library is found from the array and never imported. The values of
`--loss` are listed in lite_dil.objectives.table.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Array = Any  # a torch.Tensor, an mlx.core.array or a numpy.ndarray
Elementwise = Callable[[Array], Array]

# float32's exp overflows at 88: above this exponent f-DPO's exponentials continue along their tangent, and no cap is higher.
EXPONENT_LIMIT = 80.0


def namespace(x: Array) -> Any:
    """Return the library of `x`: torch, mlx.core or numpy; the functions used here have the same names in all three."""
    module = type(x).__module__
    return sys.modules["mlx.core" if module.startswith("mlx") else module.partition(".")[0]]


def softplus(x: Array) -> Array:
    """log(1 + e^x) without overflow. (max(x, 0) + log1p(e^-|x|) has gradient 0 at x = 0 in MLX, where training starts.)"""
    xp = namespace(x)
    return xp.logaddexp(x, xp.zeros_like(x))


def sigmoid(x: Array) -> Array:
    """1 / (1 + e^-x) without overflow, in value and gradient."""
    return namespace(x).exp(-softplus(-x))


def exp(x: Array, cap: float | None = None) -> Array:
    """e^x, and above `cap` (or EXPONENT_LIMIT, if that is lower) its tangent line there: ``e^cap (1 + x - cap)``.

    A clip would have gradient 0 there. The line is added rather than multiplied by e^(x - over): as a factor its parts would
    cancel in the gradient, which loses digits far above the cap and is NaN if the value overflows.
    """
    xp = namespace(x)
    if cap is None:
        return xp.exp(x)
    cap = min(cap, EXPONENT_LIMIT)
    over = xp.maximum(x - cap, xp.zeros_like(x))
    return xp.exp(x - over) + math.exp(cap) * over


@dataclass(frozen=True)
class Bregman:
    """One member of the Bregman family (DIL, Table 1 and eq. 18-24), given by a convex h.

    `chosen` is ``l_1(f) = -h'(r)`` and `rejected` is ``l_-1(f) = r h'(r) - h(r)``, in closed form and up to a constant.
    For each of them ``l_-1'(f) = -e^f l_1'(f)``. A `cap` continues both along their tangent lines above ``f = cap``.
    """

    chosen: Elementwise
    rejected: Elementwise


def lsif(cap: float | None = None) -> Bregman:
    """Least-squares importance fitting, ``h = (r - 1)^2 / 2``: ``-e^f`` and ``e^2f / 2``."""
    return Bregman(lambda f: -exp(f, cap), lambda f: exp(2 * f, cap and 2 * cap) / 2)


def ukl(cap: float | None = None) -> Bregman:
    """Unnormalised KL, ``h = r log r - r``: ``-f`` and ``e^f``."""
    return Bregman(lambda f: -f, lambda f: exp(f, cap))


def bce() -> Bregman:
    """Binary cross-entropy, ``h = r log r - (r + 1) log(r + 1)``: ``log(1 + e^-f)`` and ``log(1 + e^f)``."""
    return Bregman(lambda f: softplus(-f), softplus)


def basu(alpha: float, cap: float | None = None) -> Bregman:
    """Basu's power divergence, ``h = (r^(1+alpha) - r) / alpha`` with alpha > 0; ukl - 1 as alpha -> 0, 2 lsif + 1 at 1."""
    return Bregman(
        lambda f: -((1 + alpha) * exp(alpha * f, cap and alpha * cap) - 1) / alpha,
        lambda f: exp((1 + alpha) * f, cap and (1 + alpha) * cap),
    )


def rulsif(alpha: float) -> Bregman:
    """Relative LSIF (Yamada et al. 2013, arXiv 1106.4729): least squares on ``g = r / (alpha r + 1 - alpha)``, 0 < alpha < 1.

    ``-g + alpha g^2 / 2`` and ``(1 - alpha) g^2 / 2``. g is never above 1 / alpha, so both are bounded.
    """

    shift = math.log((1 - alpha) / alpha)

    def relative(f: Array) -> Array:  # 1 / (alpha + (1 - alpha) e^-f), which overflows at neither end
        return sigmoid(f - shift) / alpha

    return Bregman(
        lambda f: -relative(f) + alpha * relative(f) ** 2 / 2,
        lambda f: (1 - alpha) * relative(f) ** 2 / 2,
    )


def dpo(chosen_log_ratio: Array, rejected_log_ratio: Array, beta: float) -> Array:
    """``-log sigmoid(beta (f_w - f_l))`` (Rafailov et al. 2023, arXiv 2305.18290, eq. 7; DIL by CPC, eq. 25-27)."""
    return softplus(beta * (rejected_log_ratio - chosen_log_ratio))


# f-DPO's g'(r) as a function of the log-ratio, up to a constant, which cancels; its exponent must stay below EXPONENT_LIMIT.
DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


def f_divergence_slope(f: Array, divergence: str, alpha: float) -> Array:
    """g'(r) of an f-divergence as a function of the log-ratio, up to a constant (Wang et al. 2024, arXiv 2309.16240, Table 1).

    reverse_kl ``f``, forward_kl ``-e^-f``, js ``f - log(1 + e^f)``, alpha ``(1 - e^(-alpha f)) / alpha`` with alpha > 0.
    """
    if divergence == "js":
        return f - softplus(f)
    if divergence == "forward_kl":
        return -exp(-f, EXPONENT_LIMIT)
    if divergence == "alpha":
        xp = namespace(f)
        over = xp.maximum(-alpha * f - EXPONENT_LIMIT, xp.zeros_like(f))
        return -(xp.expm1(-alpha * f - over) + math.exp(EXPONENT_LIMIT) * over) / alpha
    return f


def f_divergence_exponent(f: Array, divergence: str, alpha: float) -> Array | None:
    """Return the exponent in `f_divergence_slope`, or None; beyond EXPONENT_LIMIT its tangent continues the exponential."""
    return {"forward_kl": -f, "alpha": -alpha * f}.get(divergence)


def f_dpo(chosen_log_ratio: Array, rejected_log_ratio: Array, beta: float, divergence: str, alpha: float) -> Array:
    """``-log sigmoid(beta (g'(r_w) - g'(r_l)))`` for an f-divergence g (Wang et al. 2024, arXiv 2309.16240, eq. 9)."""
    chosen = f_divergence_slope(chosen_log_ratio, divergence, alpha)
    return softplus(beta * (f_divergence_slope(rejected_log_ratio, divergence, alpha) - chosen))


def ipo(chosen_log_ratio: Array, rejected_log_ratio: Array, beta: float) -> Array:
    """``(f_w - f_l - 1 / (2 beta))^2`` (Azar et al. 2023, arXiv 2310.12036, eq. 17, whose tau is beta)."""
    return (chosen_log_ratio - rejected_log_ratio - 1 / (2 * beta)) ** 2


def slic(chosen_logps: Array, rejected_logps: Array, delta: float, weight: float) -> Array:
    """``max(0, delta - log pi(y_w) + log pi(y_l)) - weight log pi(y_w)`` (Zhao et al. 2023, arXiv 2305.10425, eq. 5)."""
    xp = namespace(chosen_logps)
    rank = delta - chosen_logps + rejected_logps
    return xp.maximum(rank, xp.zeros_like(rank)) - weight * chosen_logps


def kto_chosen(log_ratio: Array, baseline: Array, beta: float) -> Array:
    """``1 - sigmoid(beta (f - z0))`` for desirable responses (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8)."""
    return sigmoid(beta * (baseline - log_ratio))


def kto_rejected(log_ratio: Array, baseline: Array, beta: float) -> Array:
    """``1 - sigmoid(beta (z0 - f))`` for undesirable responses (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8)."""
    return sigmoid(beta * (log_ratio - baseline))


def cpo(chosen_logps: Array, rejected_logps: Array, chosen_mean_logps: Array, beta: float, weight: float) -> Array:
    """``-log sigmoid(beta (log pi(y_w) - log pi(y_l)))`` minus `weight` times the per-token mean of log pi(y_w).

    Xu et al. 2024, arXiv 2401.08417, eq. 5.
    """
    return softplus(beta * (rejected_logps - chosen_logps)) - weight * chosen_mean_logps


def simpo(chosen_logps: Array, rejected_logps: Array, beta: float, gamma: float) -> Array:
    """``-log sigmoid(beta (p_w - p_l) - gamma)``, p per-token mean log-probs (Meng et al. 2024, arXiv 2405.14734, eq. 6)."""
    return softplus(gamma - beta * (chosen_logps - rejected_logps))


def bpo(chosen_log_ratio: Array, rejected_log_ratio: Array, beta: float, power: float) -> Array:
    """``R^(1+power) / (s (1+power)) - R^(-power) / (s power)``, ``R = e^(-beta (f_w - f_l))``, s = 4.

    The scaled Basu divergence of Kim et al. 2025, arXiv 2505.19601; with this s the gradient at R = 1 equals dpo's.
    """
    log_r = beta * (rejected_log_ratio - chosen_log_ratio)
    return exp((1 + power) * log_r) / (4 * (1 + power)) - exp(-power * log_r) / (4 * power)


def occupancy_weights(tokens: int) -> list[float]:
    """Return the weight ``(n - k) / n`` of each of a response's n tokens, k = 0 .. n - 1 (Sun 2024, arXiv 2403.12017, eq. 12).

    Token k is in n - k prefixes of the response, so this is the mean over prefixes of their summed losses.
    """
    return [(tokens - k) / tokens for k in range(tokens)]


def log_ratio(policy: Array, reference: Array, lengths: Array, reduction: str) -> Array:
    """Return the log-ratio f of each response, shape (responses,), in nats.

    `policy` and `reference` are summed log-probs and `lengths` numbers of tokens, all of shape (responses,).
    ``reduction="sum"`` is the paper's sequence log-ratio, ``"mean"`` its average over the response's tokens, as in the
    authors' code.
    """
    total = policy - reference
    return total / lengths if reduction == "mean" else total
