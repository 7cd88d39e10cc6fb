"""What is seen of a reward before the first step: whether it reads the data, and whether it tells answers apart."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lite_dil.online.credit import equal_groups
from lite_dil.online.groups import DrawnGroups, GroupSampler
from lite_dil.rewards.answer import AnswerSource

PREFLIGHT = "drawing the first answers and rewarding them"
_OWN = ("chosen", "completion", "response")  # columns that may hold the data's own answer
_MOST = 200  # own answers that are rewarded


def preflight(sampler: GroupSampler, say: Callable[[str], None]) -> None:
    """Reward the data's own answers, if it has some, and the first step's groups; say what will not train.

    Raises UserError if the reward cannot be used: a row without a right answer, an exception, NaN, a wrong number of rewards.
    """
    judges = sampler.judge.sources if sampler.judge else []
    for source, _ in [*sampler.reward.sources, *judges]:
        if isinstance(source, AnswerSource):
            for prompt in sampler.prompts:
                source.right(prompt.columns, prompt.place)
    own, longer = _own_rewards(sampler)
    if own.size:
        extent = f"{own.min():.3g} to {own.max():.3g}"
        say(f"reward of the data's own answers: mean {own.mean():.3g}, {extent} over {own.size} rows")
    if longer:
        limit = sampler.options.max_new_tokens
        say(f"{longer} of the data's own answers are longer than --max-new-tokens {limit}, and were not rewarded")
    drawn = sampler.draw(1)
    rewards = drawn.rewards
    spread = int((~equal_groups(rewards)).sum())
    say(
        f"reward of the first {rewards.size} answers: mean {rewards.mean():.3g}, {rewards.min():.3g} to {rewards.max():.3g}; "
        f"{spread} of {len(rewards)} prompts have answers of different rewards"
    )
    if drawn.judged:
        judged = drawn.judged.total
        say(f"held-out reward of the same answers: mean {judged.mean():.3g}, {judged.min():.3g} to {judged.max():.3g}")
    if spread == 0:
        say(
            f"warning: all rewards are equal within each prompt, so that there is nothing to prefer: {_reason(sampler, drawn)}"
        )


def _own_rewards(sampler: GroupSampler) -> tuple[np.ndarray, int]:
    """Return the rewards of the data's own answers that are text, and how many are longer than drawn ones may be."""
    answers, end, longer = [], sampler.encoder.end_ids()[0], 0
    for prompt in sampler.prompts[:_MOST]:
        text = next((prompt.columns[name] for name in _OWN if isinstance(prompt.columns.get(name), str)), "")
        ids = (*sampler.encoder.ids(text), end)
        if text and len(ids) <= sampler.options.max_new_tokens:
            answers.append(sampler.answered(prompt, ids, True))
        longer += len(ids) > sampler.options.max_new_tokens
    together = len(sampler.asked(1)) * sampler.options.samples  # as many as a step has, for which --reward-timeout is
    parts = [sampler.reward(answers[at : at + together]).total for at in range(0, len(answers), together)]
    return np.concatenate([np.zeros(0), *parts]), longer


def _reason(sampler: GroupSampler, drawn: DrawnGroups) -> str:
    """Return the likely reason why no group has different rewards."""
    answers = [answer for group in drawn.groups for answer in group.answers]
    if not any(answer.ended for answer in answers):
        return f"all {len(answers)} answers were cut by --max-new-tokens {sampler.options.max_new_tokens}; allow more"
    if all(len({answer.response for answer in group.answers}) == 1 for group in drawn.groups):
        return "the answers to each prompt are the same text"
    if len(set(drawn.rewards.ravel().tolist())) > 1:
        return "prompts differ, but not the answers to one; more --samples may help"
    sources = [source for source, _ in sampler.reward.sources]
    if not drawn.rewards.any() and all(isinstance(source, AnswerSource) for source in sources):
        return f"none of {len(answers)} answers is right; the first is {answers[0].response[:80]!r}"
    names = ", ".join(source.name for source in sources)
    return (
        f"{names} gives {drawn.rewards.flat[0]:g} to each of {len(answers)} answers; the first is {answers[0].response[:80]!r}"
    )
