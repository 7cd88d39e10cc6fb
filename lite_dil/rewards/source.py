"""The protocol of a reward's source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # --help imports this file, and importing numpy takes longer than all the rest
    import numpy as np

    from lite_dil.data.encoder import Example


@dataclass(frozen=True)
class Answered:
    """A response to be rewarded.

    Attributes:
        prompt: the prompt's text; a chat as the policy reads it, plain text whole, also where --max-length cuts it.
        response: the response's text, without what ends it.
        prompt_ids: the tokens of the prompt.
        response_ids: the tokens of the response, with its end token if it has one. Never the text encoded again.
        ended: whether the response has its end token; if not, it was cut at the limit of tokens.
        columns: the other columns of the prompt's row.
        place: names the prompt's row in messages.
        messages: the prompt as chat messages, whole, if it is a chat.
    """

    prompt: str
    response: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    ended: bool
    columns: Mapping[str, Any]
    place: str = ""
    messages: Sequence[Mapping[str, Any]] | None = None


def by_prompt(answers: Sequence[Answered]) -> dict[tuple[int, ...], list[int]]:
    """Return the indices of the answers to each prompt, which is computed once for all of them."""
    found: dict[tuple[int, ...], list[int]] = {}
    for index, answer in enumerate(answers):
        found.setdefault(answer.prompt_ids, []).append(index)
    return found


class Scorer(Protocol):
    """A model that scores tokens of its own: a head or a sequence classifier."""

    def scores(self, examples: Sequence[Example]) -> list[np.ndarray]:
        """Return the outputs for each example's responses, float64, (responses, outputs), the first the reward."""


class RewardSource(Protocol):
    """Something that rewards responses: a model, a Python function, a check of the answer.

    Attributes:
        name: names its metrics: rewards/NAME/mean.
    """

    @property
    def name(self) -> str:
        """See above."""

    def rewards(self, answers: Sequence[Answered]) -> np.ndarray:
        """Return the reward of each response, float64, (answers,). NaN is the caller's to refuse.

        Raises UserError with the row's place if a response cannot be rewarded.
        """
