"""Groups of the policy's own answers, with their log-ratios and rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lite_dil.backends.protocol import Backend
from lite_dil.base.hashing import digest
from lite_dil.batching.schedule import Schedule, row_tokens
from lite_dil.data.encoder import Encoder, continuation_text
from lite_dil.data.prompts import Prompt
from lite_dil.generation.rollouts import Rollout, rollouts
from lite_dil.generation.served import ServedPolicy
from lite_dil.online.credit import equal_groups
from lite_dil.online.options import ResolvedOnline
from lite_dil.rewards.source import Answered
from lite_dil.rewards.total import Rewarded, TotalReward


@dataclass(frozen=True)
class Group:
    """Answers to one prompt, drawn at temperature 1.

    Attributes:
        rollouts: the answers' tokens and log-probs.
        answers: the same answers as what is rewarded.
        seeds: what each was drawn with.
        parts: each source's rewards by name, (K,).
        rewards: their weighted sum, (K,) float64.
    """

    prompt: Prompt
    rollouts: list[Rollout]
    answers: list[Answered]
    seeds: list[int]
    parts: dict[str, np.ndarray]
    rewards: np.ndarray

    @property
    def log_ratios(self) -> np.ndarray:
        """f of each answer, summed over its tokens in nats, (K,) float64."""
        return np.array([np.sum(one.logps - one.reference_logps, dtype=np.float64) for one in self.rollouts])


@dataclass(frozen=True)
class DrawnGroups:
    """The groups of a step, and how many times a group was drawn again because its rewards were equal.

    `judged` are the rewards of --eval-reward for all answers, group by group; None without it.
    """

    groups: list[Group]
    refilled: int
    judged: Rewarded | None = None

    @property
    def rewards(self) -> np.ndarray:
        """(groups, K) float64."""
        return np.stack([group.rewards for group in self.groups])

    @property
    def log_ratios(self) -> np.ndarray:
        """(groups, K) float64, in nats."""
        return np.stack([group.log_ratios for group in self.groups])


class GroupSampler:
    """Draws the groups of each step, a function of the seed, the step and the policy's weights: resuming needs no more.

    Args:
        prompts: in the order of the schedule's examples.
        judge: a reward that is only measured.
        served: draws in the backend's place, and is given the adapter before each step's answers.
    """

    def __init__(
        self,
        backend: Backend,
        encoder: Encoder,
        prompts: Sequence[Prompt],
        schedule: Schedule,
        options: ResolvedOnline,
        reward: TotalReward,
        say: Callable[[str], None],
        judge: TotalReward | None = None,
        served: ServedPolicy | None = None,
    ) -> None:
        self.backend, self.encoder, self.prompts, self.reward, self.judge = backend, encoder, prompts, reward, judge
        self.schedule, self.options, self._say, self.served = schedule, options, say, served
        self._ends = encoder.end_ids()
        self._kept: tuple[int, DrawnGroups] | None = None

    def draw(self, step: int) -> DrawnGroups:
        """Return the groups of step 1, 2, ...; what was drawn last is kept until other answers are asked for.

        Groups whose rewards are all equal are drawn again, `refill` times at most, with other seeds.
        """
        step = self.schedule.first(step)
        if self._kept is None or self._kept[0] != step:
            self._kept = step, self._drawn(step)
        return self._kept[1]

    def keep(self, step: int, drawn: DrawnGroups) -> None:
        """Take the groups of a step, which its checkpoint had."""
        self._kept = self.schedule.first(step), drawn

    def asked(self, step: int) -> list[Prompt]:
        """Return the prompts of step 1, 2, ..."""
        return [self.prompts[index] for index in self.schedule.picked(step)]

    def _drawn(self, step: int) -> DrawnGroups:
        prompts = self.asked(step)
        if self.served:
            self.served.serve(step)
        groups, refilled = self._groups(prompts, step, 0), 0
        for attempt in range(1, self.options.refill + 1):
            equal = np.flatnonzero(equal_groups(np.stack([group.rewards for group in groups])))
            again = self._groups([prompts[at] for at in equal], step, attempt)
            refilled += len(again)
            for at, group in zip(equal, again, strict=True):
                groups[at] = group
        judged = self.judge([answer for group in groups for answer in group.answers]) if self.judge else None
        return DrawnGroups(groups, refilled, judged)

    def _groups(self, prompts: Sequence[Prompt], step: int, attempt: int) -> list[Group]:
        if not prompts:
            return []
        seeds = [[self._seed(prompt, step, attempt, number) for number in range(self.options.samples)] for prompt in prompts]
        limit, tokens = self.options.max_new_tokens, row_tokens(self.schedule.options)
        ids, draw = [prompt.ids for prompt in prompts], self.served.draw if self.served else None
        found = rollouts(self.backend, ids, seeds, limit, self._ends, self._say, tokens, draw)
        if self.served:
            self.served.check(ids, found)
        answers = [
            [self.answered(prompt, rollout.ids, rollout.ended) for rollout in several]
            for prompt, several in zip(prompts, found, strict=True)
        ]
        rewarded = self.reward([answer for several in answers for answer in several])
        shape = (len(prompts), self.options.samples)
        parts = {name: values.reshape(shape) for name, values in rewarded.parts.items()}
        total = rewarded.total.reshape(shape)
        return [
            Group(prompt, found[at], answers[at], seeds[at], {name: of[at] for name, of in parts.items()}, total[at])
            for at, prompt in enumerate(prompts)
        ]

    def answered(self, prompt: Prompt, ids: tuple[int, ...], ended: bool) -> Answered:
        """Return an answer as what is rewarded; `ids` are its tokens, with the end token if it has one."""
        tokenizer = self.encoder.tokenizer
        text = continuation_text(tokenizer, prompt.ids, ids[:-1] if ended else ids, plain=True)
        if isinstance(prompt.prompt, str):
            return Answered(prompt.prompt, text, prompt.ids, ids, ended, prompt.columns, prompt.place)
        asked = str(tokenizer.decode(list(prompt.ids), clean_up_tokenization_spaces=False))
        return Answered(asked, text, prompt.ids, ids, ended, prompt.columns, prompt.place, prompt.prompt)

    def _seed(self, prompt: Prompt, step: int, attempt: int, number: int) -> int:
        return int(digest("rollout", self.schedule.options.seed, step, attempt, number, prompt.ids)[:16], 16)
