"""Objectives: pure functions of log-ratios, written once for torch, MLX and numpy.

``f(x, y) = log pi_theta(y|x) - log pi_ref(y|x)`` is the log-ratio of an answer and ``r = exp(f)`` the density ratio that
Direct Imitation Learning fits (Xiao et al., ICLR 2025, arXiv 2503.05079). Every function here is elementwise and keeps its
input's shape; reductions belong to the caller. The array library is found from the array and never imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Array = Any  # a torch.Tensor, an mlx.core.array or a numpy.ndarray
Elementwise = Callable[[Array], Array]


def namespace(x: Array) -> Any:
    """Return the library that made `x`: torch, mlx.core or numpy, all of which name these functions alike."""
    module = type(x).__module__
    return sys.modules["mlx.core" if module.startswith("mlx") else module.partition(".")[0]]


def softplus(x: Array) -> Array:
    """log(1 + e^x) without overflow. (max(x, 0) + log1p(e^-|x|) has gradient 0 at x = 0 in MLX, where training starts.)"""
    xp = namespace(x)
    return xp.logaddexp(x, xp.zeros_like(x))


@dataclass(frozen=True)
class Bregman:
    """One member of the Bregman family (paper, Table 1 and eq. 18-24), given by a convex h.

    `chosen` is ``l_1(f) = -h'(r)`` and `rejected` is ``l_-1(f) = r h'(r) - h(r)``, in closed form and up to a constant.
    For each of them ``l_-1'(f) = -e^f l_1'(f)``.
    """

    chosen: Elementwise
    rejected: Elementwise

    def __call__(self, chosen_log_ratio: Array, rejected_log_ratio: Array) -> Array:
        """Return ``l_1(f_w) + l_-1(f_l)``, the paper's objective with the rejected answers standing for pi_ref."""
        return self.chosen(chosen_log_ratio) + self.rejected(rejected_log_ratio)


def _lsif_chosen(f: Array) -> Array:
    return -namespace(f).exp(f)


def _lsif_rejected(f: Array) -> Array:
    return namespace(f).exp(2 * f) / 2


def _ukl_chosen(f: Array) -> Array:
    return -f


def _ukl_rejected(f: Array) -> Array:
    return namespace(f).exp(f)


def _bce_chosen(f: Array) -> Array:
    return softplus(-f)


def dpo(chosen_log_ratio: Array, rejected_log_ratio: Array) -> Array:
    """-log sigmoid(f_w - f_l), with f already multiplied by beta (Rafailov et al. 2023, eq. 7; DIL by CPC, eq. 25-27)."""
    return softplus(rejected_log_ratio - chosen_log_ratio)


@dataclass(frozen=True)
class Objective:
    """A row of the table of objectives.

    `loss` takes ``beta * f`` of the chosen and of the rejected answers, each of shape (pairs,), and returns a loss a pair.
    `reduction` says whether f is summed over the answer's tokens or averaged; `learning_rate` is for LoRA (docs/LOG.md).
    """

    loss: Callable[[Array, Array], Array]
    reduction: str
    beta: float
    learning_rate: float
    formula: str
    source: str


_DIL = "DIL, arXiv 2503.05079"

OBJECTIVES: dict[str, Objective] = {
    "lsif": Objective(
        Bregman(_lsif_chosen, _lsif_rejected), "mean", 1.0, 1e-4, "-r_w + r_l^2 / 2", f"{_DIL}, h = (r - 1)^2 / 2"
    ),
    "ukl": Objective(Bregman(_ukl_chosen, _ukl_rejected), "mean", 1.0, 1e-4, "-f_w + r_l", f"{_DIL}, h = r log r - r"),
    "bce": Objective(
        Bregman(_bce_chosen, softplus),
        "mean",
        1.0,
        1e-4,
        "log(1 + 1/r_w) + log(1 + r_l)",
        f"{_DIL}, h = r log r - (r + 1) log(r + 1)",
    ),
    "dpo": Objective(dpo, "sum", 0.1, 1e-4, "-log sigmoid(beta (f_w - f_l))", "DPO, arXiv 2305.18290"),
}


def log_ratio(policy: Array, reference: Array, lengths: Array, reduction: str) -> Array:
    """Return the log-ratio f of each answer, shape (answers,), in nats.

    `policy` and `reference` are summed log-probs of shape (answers,), `lengths` the answers' tokens. ``reduction="sum"`` is
    the sequence log-ratio of the paper, ``"mean"`` its average over the answer's tokens, as in the authors' code.
    """
    total = policy - reference
    return total / lengths if reduction == "mean" else total
