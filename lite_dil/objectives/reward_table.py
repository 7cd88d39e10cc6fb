"""The table of losses of reward models, the values of ``--reward-loss``. Flags, help and error messages are made from it.

In a run's files such a loss is called ``reward:NAME``, so that nothing takes it for a loss of the policy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lite_dil.objectives import losses, rewards
from lite_dil.objectives.losses import EXPONENT_LIMIT, Array, Bregman
from lite_dil.objectives.objective import Constants, Objective, Option, Pairs, Sides

_PREFIX = "reward:"
_CAP = 3.0  # of log p/q: beyond a ratio of 20 lsif grows along its tangent line
REWARD_OPTIONS = {
    "center_rewards_coefficient": Option(
        "weight of (R_w + R_l)^2, which keeps rewards near 0: without it only differences within a prompt are learned", None
    ),
    "label_smoothing": Option(
        "share eps of the labels taken to be wrong, which bounds what is learned by log((1 - eps) / eps)", None, high=0.499
    ),
    "log_ratio_cap": Option(
        "above this log-ratio the loss continues along its tangent line instead of exponentially; metrics say how often "
        "(capped)",
        _CAP,
        low=1e-3,
        high=EXPONENT_LIMIT / 2,  # lsif takes e^2d
    ),
    "relative_alpha": Option(
        "share of the chosen responses in the denominator of the relative ratio, which is at most 1 / this",
        0.1,
        low=1e-3,
        high=0.999,
    ),
}


class Scored(NamedTuple):
    """What a loss reads of responses: float32 arrays, (responses,).

    Attributes:
        reward: R, or the log-ratio d.
        log_v: the log of the noise scale V; None if the head has one output.
        margin: by how much R_w should be above R_l, (pairs,); None if the loss does not read it.
    """

    reward: Array
    log_v: Array | None
    margin: Array | None = None


def is_reward(loss: str) -> bool:
    """Return whether `loss` is that of a reward model, as a run's files hold it."""
    return loss.startswith(_PREFIX) and loss.removeprefix(_PREFIX) in REWARDS


def identity(name: str) -> str:
    """Return a reward loss's name in a run's files."""
    return _PREFIX + name


def name_of(loss: str) -> str:
    """Return a loss's name for people, from its name in a run's files."""
    return loss.removeprefix(_PREFIX)


def folder_name(loss: str) -> str:
    """Return a reward loss's name in the names of folders."""
    return f"reward-{name_of(loss)}"


def reward_objective(loss: str) -> Objective:
    """Return the row of a loss by its name in a run's files."""
    return REWARDS[name_of(loss)]


def _bt(c: Constants) -> Pairs:
    smoothing, coefficient = c["label_smoothing"] or 0.0, c["center_rewards_coefficient"] or 0.0

    def loss(w: Scored, l: Scored) -> Array:  # noqa: E741 - chosen and rejected, as in the papers
        value = rewards.bradley_terry(w.reward, l.reward, smoothing, w.margin)
        return value + coefficient * rewards.centring(w.reward, l.reward) if coefficient else value

    return Pairs(loss)


def _bt_variance(c: Constants) -> Pairs:
    smoothing = c["label_smoothing"] or 0.0
    return Pairs(lambda w, l: rewards.bradley_terry_variance(w.reward, l.reward, w.log_v, l.log_v, smoothing))  # noqa: E741


def _ratio(make: Callable[[Constants], Bregman]) -> Callable[[Constants], Sides]:
    def form(c: Constants) -> Sides:
        member = rewards.smoothed(make(c), c["label_smoothing"] or 0.0)
        return Sides(lambda a: member.chosen(a.reward), lambda a: member.rejected(a.reward))

    return form


def _above_cap(d: Array, c: Constants) -> tuple[Array, float]:
    return d, c["log_ratio_cap"]


_DIL = "Xiao et al., ICLR 2025, arXiv 2503.05079"
_MARGINALS = (
    "d = log p/q, the log-ratio of chosen to rejected responses. On pairs labelled by comparing the two it is the log-ratio "
    "of the marginals, which is not the reward that labelled them ([what a head learns](#what-a-head-learns))."
)
_RATE = 1e-4  # as every objective

REWARDS: dict[str, Objective] = {
    "bt": Objective(
        title="Bradley-Terry",
        data="pairs",
        form=_bt,
        reduction="sum",
        beta=None,
        learning_rate=_RATE,
        formula="-log sigmoid(R_w - R_l - m)",
        use="The usual reward model, and the default.",
        source=f"{_DIL}, eq. 3",
        note="R is known up to a constant for each prompt; `--center-rewards-coefficient` keeps it near 0. m is the column "
        "`margin` of the data, 0 without it.",
        options=("center_rewards_coefficient", "label_smoothing"),
        margins=True,
        reference=False,
        outputs=1,
    ),
    "bt-variance": Objective(
        title="Bradley-Terry with learned variance",
        data="pairs",
        form=_bt_variance,
        reduction="sum",
        beta=None,
        learning_rate=_RATE,
        formula="-log sigmoid((R_w - R_l) / sqrt((V_w^2 + V_l^2) / 2))",
        use="A second output says how noisy a response's reward is.",
        source="Sun 2024, arXiv 2403.12017, eq. 24-26",
        note="The loss is the same for (c R, c V): the saved scale makes the mean of log V 0 over training responses.",
        options=("label_smoothing",),
        reference=False,
        outputs=2,
    ),
    "bce": Objective(
        title="density ratio by classification",
        data="sides",
        form=_ratio(lambda c: losses.bce()),
        reduction="sum",
        beta=None,
        learning_rate=_RATE,
        formula="log(1 + e^-d_w) + log(1 + e^d_l)",
        use="The density ratio to recommend: a classifier of chosen against rejected responses, whose gradient is bounded. "
        "Also on unpaired responses.",
        source=f"{_DIL}, Table 1 and eq. 18-24; h(r) = r log r - (r + 1) log(r + 1)",
        note=_MARGINALS,
        options=("label_smoothing",),
        reference=False,
        outputs=1,
    ),
    "ukl": Objective(
        title="density ratio by unnormalised KL",
        data="sides",
        form=_ratio(lambda c: losses.ukl(c["log_ratio_cap"])),
        reduction="sum",
        beta=None,
        learning_rate=_RATE,
        formula="-d_w + e^d_l",
        use="As bce, with a chosen side that never saturates. Also on unpaired responses.",
        source=f"{_DIL}, Table 1 and eq. 18-24; h(r) = r log r - r",
        note=_MARGINALS,
        options=("label_smoothing", "log_ratio_cap"),
        reference=False,
        capped=_above_cap,
        outputs=1,
    ),
    "rulsif": Objective(
        title="density ratio by relative least squares",
        data="sides",
        form=_ratio(lambda c: losses.rulsif(c["relative_alpha"])),
        reduction="sum",
        beta=None,
        learning_rate=_RATE,
        formula="-g_w + alpha g_w^2 / 2 + (1 - alpha) g_l^2 / 2,  g = 1 / (alpha + (1 - alpha) e^-d)",
        use="lsif made bounded. Also on unpaired responses.",
        source="Yamada et al. 2013, arXiv 1106.4729",
        note=_MARGINALS,
        options=("label_smoothing", "relative_alpha"),
        reference=False,
        outputs=1,
    ),
    "lsif": Objective(
        title="density ratio by least squares",
        data="sides",
        form=_ratio(lambda c: losses.lsif(c["log_ratio_cap"])),
        reduction="sum",
        beta=None,
        learning_rate=_RATE,
        formula="-e^d_w + e^(2 d_l) / 2",
        use="The paper's first choice for a policy. On a free head it is not bounded below and ran to NaN without the cap: "
        "prefer bce or rulsif.",
        source=f"{_DIL}, Table 1 and eq. 18-24; h(r) = (r - 1)^2 / 2",
        note=_MARGINALS,
        options=("label_smoothing", "log_ratio_cap"),
        reference=False,
        capped=_above_cap,
        outputs=1,
    ),
}
