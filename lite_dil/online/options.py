"""Options of on-policy training."""

from __future__ import annotations

from dataclasses import dataclass

from lite_dil.base.option import FREE, SOURCES, WRITTEN, option
from lite_dil.objectives.options import ObjectiveOptions

GROUP_SIZES, ANSWER_TOKENS, REFILL = {"rloo": 8, "dpo": 2}, 256, 1  # defaults
EPSILON = 0.2
K1, K3 = KL_ESTIMATORS = ("k1", "k3")
NO_SCALE, RUNNING, BY_GROUP = REWARD_SCALES = ("none", "running", "group")


@dataclass(frozen=True, kw_only=True)
class OnlineOptions:
    """How answers are drawn and rewarded; With reward=None, training uses the data's own answers."""

    reward: str | None = option(
        "online",
        None,
        "train on the model's own answers, by this reward: answer:exact, answer:number or answer:choice compares with the "
        "data's column answer; FILE.py:NAME is a function with TRL's signature; DIR is a run of lite-dil reward; "
        "implicit:ADAPTER is beta times the log-ratio of a trained policy; hf:MODEL is a sequence classifier with one label "
        "(cuda, cpu); several with weights are summed, as in answer:number,rewards.py:brief=0.2",
        metavar="SOURCE[=WEIGHT],...",
        kind=SOURCES,
    )
    eval_reward: str | None = option(
        "online",
        None,
        "a second reward of the same answers that is not trained on, as --reward takes it: if it falls while the trained one "
        "rises, the reward is gamed",
        metavar="SOURCE[=WEIGHT],...",
        kind=SOURCES,
    )
    samples: int | None = option(
        "online", None, f"answers drawn for each prompt (default: {', '.join(f'{n} for {k}' for k, n in GROUP_SIZES.items())})"
    )
    max_new_tokens: int | None = option(
        "online", None, f"maximum tokens of a drawn answer, its end token included (default: {ANSWER_TOKENS})"
    )
    missing_eos_penalty: float | None = option(
        "online", None, "subtract this from the reward of an answer that --max-new-tokens cut (default: 0)"
    )
    refill: int | None = option(
        "online",
        None,
        f"draw a group whose answers all have the same reward again, at most this many times a step (default: {REFILL})",
    )
    target_kl: float | None = option(
        "online",
        None,
        "end the training when the KL from the reference, in nats an answer, is above this before a step: the mean log-ratio "
        "of new answers, or an estimate of as much before a further step on the same ones",
    )
    sampler: str | None = option(
        "online",
        None,
        "draw answers from the OpenAI-compatible server at this address, which loads the adapter before each set of answers "
        "and returns token ids, as vLLM does (docs/online.md)",
        metavar="URL",
        kind=WRITTEN,
    )
    num_iterations: int | None = option(
        "online", None, "optimiser steps on each set of answers before new ones are drawn (default: 1)"
    )
    epsilon: float | None = option(
        "online",
        None,
        "with --num-iterations above 1, bound the ratio of each token's probability to that at drawing to 1 - epsilon and "
        f"1 + epsilon (default: {EPSILON}; for rloo)",
    )
    kl_estimator: str | None = option(
        "online",
        None,
        "how the KL from the reference is taken: k1, the log-ratio of an answer in its reward, which is exact; or k3, GRPO's "
        "term in the loss, whose gradient is that of the forward KL (default: k1; for rloo)",
        choices=KL_ESTIMATORS,
    )
    reward_scale: str | None = option(
        "online",
        None,
        "divide rewards by the standard deviation of all rewards so far (running), or of their group (group), which changes "
        "the direction of the gradient (default: none; for rloo)",
        choices=REWARD_SCALES,
    )
    reward_timeout: float | None = option(
        "online", None, "seconds that a call of a reward's Python function may take (default: 60)", kind=FREE
    )

    @property
    def online(self) -> bool:
        """Whether the training is on the model's own answers."""
        return self.reward is not None


@dataclass(frozen=True, kw_only=True)
class OnlineObjective(OnlineOptions, ObjectiveOptions):
    """What is trained on: the objective, and where its answers come from."""


@dataclass(frozen=True, kw_only=True)
class ResolvedOnline(OnlineOptions):
    """The options of an on-policy training with their defaults filled in."""

    reward: str
    samples: int
    max_new_tokens: int
    missing_eos_penalty: float
    refill: int
    num_iterations: int
    reward_timeout: float
