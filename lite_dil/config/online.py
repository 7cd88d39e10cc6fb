"""What on-policy training needs of the options, and what of them it has no use for."""

from __future__ import annotations

from dataclasses import fields
from typing import Any
from urllib.parse import urlsplit

from lite_dil.base.errors import UserError
from lite_dil.objectives.table import ONLINE
from lite_dil.online.options import ANSWER_TOKENS, EPSILON, GROUP_SIZES, K1, NO_SCALE, REFILL, OnlineObjective, OnlineOptions
from lite_dil.rewards.function import TIMEOUT
from lite_dil.rewards.spec import joined, parse

_OWN = [each.name for each in fields(OnlineOptions) if each.name != "reward"]
RANGES: list[tuple[str, float, float]] = [
    ("samples", 2, 1000),
    ("max_new_tokens", 1, 1e18),
    ("missing_eos_penalty", 0, 1e18),
    ("refill", 0, 100),
    ("num_iterations", 1, 1000),
    ("epsilon", 1e-6, 1 - 1e-6),
]
ABOVE_ZERO = ("target_kl", "reward_timeout")
# Options that are refused, and why.
_USELESS = {
    "eval_data": "nothing is held out; the metrics are those of new answers in each step",
    "eval_fraction": "nothing is held out; the metrics are those of new answers in each step",
    "eval_steps": "nothing is held out; the metrics are those of new answers in each step",
    "sample_rejected": "all answers are drawn",
    "precompute_reference": "the answers are not known before",
    "reference_cache": "the answers are new in each step, so that nothing is kept",
    "lora_dropout": "the gradient would be of another policy than the one that drew the answers",
}
# Options of an answer's advantage, and why online DPO has no use for them.
_OF_ADVANTAGES = {
    "epsilon": "has no ratio: a pair is as good for a later update",
    "kl_estimator": "has its own term for the reference",
    "reward_scale": "takes only the order of rewards",
}


def check_url(url: str) -> None:
    """Raise UserError if it is no address of a server."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.query or parts.fragment:
        raise UserError(f"--sampler {url!r} is not an address such as http://localhost:8000")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def online_problems(config: OnlineObjective) -> list[str]:
    """Return what is wrong with the options of an on-policy training, or of any other that has some of them."""
    if config.reward is None:
        problems = [f"{_flag(name)} needs --reward; give that too" for name in _OWN if getattr(config, name) is not None]
        if config.loss in ONLINE:
            problems.append(f"--loss {config.loss} trains on the model's own answers by their reward: give --reward")
        return problems
    problems = [
        f"{_flag(name)}: leave it out with --reward: {reason}" for name, reason in _USELESS.items() if getattr(config, name)
    ]
    if config.loss not in GROUP_SIZES:
        problems.append(f"--reward: --loss {config.loss} trains on given answers; give --loss {' or '.join(GROUP_SIZES)}")
    if config.loss not in ONLINE and config.loss in GROUP_SIZES:
        problems += [
            f"{_flag(name)}: --loss {config.loss} {reason}; leave it out"
            for name, reason in _OF_ADVANTAGES.items()
            if getattr(config, name) is not None
        ]
    if config.epsilon is not None and (config.num_iterations or 1) == 1:
        problems.append("--epsilon needs --num-iterations above 1: there is no ratio in one update")
    if config.loss in ONLINE and config.logp_reduction == "mean":
        problems.append(f"--logp-reduction mean: --loss {config.loss} takes whole answers; leave it out")
    for check, value in ((parse, joined(config.reward, config.eval_reward)), (check_url, config.sampler)):
        try:
            if value is not None:
                check(value)
        except UserError as error:
            problems.append(str(error))
    return problems


def online_defaults(config: OnlineObjective) -> dict[str, Any]:
    """Return the defaults of an on-policy training's options by name; nothing for other trainings."""
    if config.reward is None:
        return {}
    return {
        "samples": GROUP_SIZES[config.loss],
        "max_new_tokens": ANSWER_TOKENS,
        "missing_eos_penalty": 0.0,
        "refill": REFILL,
        "num_iterations": 1,
        "reward_timeout": TIMEOUT,
        **(_advantages(config) if config.loss in ONLINE else {}),
    }


def _advantages(config: OnlineObjective) -> dict[str, Any]:
    """Return the defaults of what only a policy gradient has."""
    several = (config.num_iterations or 1) > 1
    return {"kl_estimator": K1, "reward_scale": NO_SCALE, "epsilon": EPSILON if several else None}
