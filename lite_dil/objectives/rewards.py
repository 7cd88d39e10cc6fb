"""Losses of reward models: pure functions of a head's outputs, written once for torch, MLX and numpy.

R is the reward of a response, one number from the state of its end token; d is the same number where a loss takes it for
the log of a density ratio. Every function is elementwise, in float32 on a backend, and keeps its inputs' shape; reductions
belong to the caller. The values of ``--reward-loss`` are listed in lite_dil.objectives.reward_table.
"""

from __future__ import annotations

import math

from lite_dil.objectives.losses import Array, Bregman, namespace, softplus


def bradley_terry(chosen: Array, rejected: Array, smoothing: float = 0.0, margin: Array | None = None) -> Array:
    """``-log sigmoid(R_w - R_l - m)`` of each pair, (pairs,) (DIL, arXiv 2503.05079, eq. 3, without m).

    Args:
        smoothing: the probability eps that a label is wrong: the loss is ``1 - eps`` times that of the label plus ``eps``
            times that of the opposite one, and its optimum at most ``log((1 - eps) / eps)`` in size.
        margin: m, (pairs,), by how much R_w should be above R_l (Touvron et al. 2023, arXiv 2307.09288, eq. 2); None for 0.
    """
    gap = chosen - rejected if margin is None else chosen - rejected - margin
    return _smoothed(softplus(-gap), softplus(gap), smoothing)


def centring(chosen: Array, rejected: Array) -> Array:
    """``(R_w + R_l)^2`` of each pair, (pairs,) (Eisenstein et al. 2023, arXiv 2312.09244; TRL's center_rewards_coefficient).

    The Bradley-Terry loss is the same for R and R plus a constant of the prompt; this term takes the constant to 0.
    """
    return (chosen + rejected) ** 2


def bradley_terry_variance(
    chosen: Array, rejected: Array, chosen_log_v: Array, rejected_log_v: Array, smoothing: float = 0.0
) -> Array:
    """``-log sigmoid((R_w - R_l) / sqrt((V_w^2 + V_l^2) / 2))`` of each pair, (pairs,).

    Sun 2024, arXiv 2403.12017, eq. 24-26. V > 0 is a response's noise scale, given by its logarithm. With equal V this is
    Bradley-Terry at that temperature. The loss is the same for (c R, c V), so its gradient along that direction is 0: training
    leaves c where it is, and `anchor` fixes it by mean log V = 0 afterwards.
    """
    xp = namespace(chosen)
    log_scale = (xp.logaddexp(2 * chosen_log_v, 2 * rejected_log_v) - math.log(2)) / 2
    gap = (chosen - rejected) * xp.exp(-log_scale)
    return _smoothed(softplus(-gap), softplus(gap), smoothing)


def anchor(log_v: Array) -> float:
    """Return the c for which the mean of log(c V) over these responses is 0: multiply R and V by it."""
    return math.exp(-float(log_v.mean()))


def smoothed(member: Bregman, smoothing: float) -> Bregman:
    """Return a member of the Bregman family on data of which a share eps of the labels is wrong, on both sides.

    The sides are then ``(1 - eps) p + eps q`` and ``(1 - eps) q + eps p``, and the optimum, the log of their ratio, is at most
    ``log((1 - eps) / eps)`` in size.
    """
    return Bregman(
        lambda d: _smoothed(member.chosen(d), member.rejected(d), smoothing),
        lambda d: _smoothed(member.rejected(d), member.chosen(d), smoothing),
    )


def _smoothed(right: Array, wrong: Array, smoothing: float) -> Array:
    return (1 - smoothing) * right + smoothing * wrong if smoothing else right
