"""Answers from the model for many prompts: in batches of similar length that memory holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, TypeVar

from lite_dil.backends.protocol import Backend
from lite_dil.backends.types import OWN, Generated, Sampling, never
from lite_dil.base.halving import Halving, halves

# Generation keeps keys and values and no activations, so that it can take more tokens at once than a step of training.
ROWS = 8


class Wanted(Protocol):
    """One answer that is wanted: to the tokens of `prompt`, of at most `room` tokens, drawn with `seed`."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """Token ids."""

    @property
    def room(self) -> int:
        """At least 1; the end token is counted."""

    @property
    def seed(self) -> int:
        """A number below 2^64."""


W = TypeVar("W", bound=Wanted)


@dataclass(frozen=True)
class Request:
    """An answer that is wanted, and nothing else of it; see `Wanted`."""

    prompt: tuple[int, ...]
    room: int
    seed: int


def batched(wanted: Sequence[W], tokens: int, rows: int | None = None) -> list[list[W]]:
    """Group what is wanted by prompts of similar length, the longest first, by the tokens that a batch may come to.

    Answers to the same prompt follow each other, since a batch computes it once. Where a batch is full they go on in the next:
    to compute a prompt twice costs less than a batch that is not full.

    Args:
        tokens: of a batch at most, but for one answer alone.
        rows: answers in a batch at most.
    """
    batches: list[list[W]] = []
    for each in sorted(wanted, key=lambda each: (len(each.prompt), each.prompt), reverse=True):
        batch = batches[-1] if batches else []
        # Padded to the longest prompt, which is the first, and going on until the longest room is used up.
        if batch and (rows is None or len(batch) < rows) and _tokens([*batch, each]) <= tokens:
            batch.append(each)
        else:
            batches.append([each])
    return batches


class BatchGenerator:
    """Draws batches of answers, in halves where memory does not hold a whole one.

    Args:
        ends: the tokens that end an answer.
        say: tells the user.
        sampling: how the next token is drawn.
        stop: asked between tokens; where it returns true the answers end as they are.
    """

    def __init__(
        self,
        backend: Backend,
        ends: Sequence[int],
        say: Callable[[str], None],
        sampling: Sampling = OWN,
        stop: Callable[[], bool] = never,
    ) -> None:
        self.backend, self.ends, self.sampling, self.stop = backend, ends, sampling, stop
        self._halving: Halving[Sequence[Wanted]] = Halving("a batch of answers", _tokens, halves, say)

    def draw(self, batch: Sequence[Wanted]) -> list[Generated]:
        """Return an answer to each; one that reached its own room has no end token, though the batch may go on."""
        found = list(chain.from_iterable(self._halving.run(self._generate, batch)))
        return [_within(answer, wanted.room) for answer, wanted in zip(found, batch, strict=True)]

    def _generate(self, part: Sequence[Wanted]) -> list[Generated]:
        prompts, seeds = [each.prompt for each in part], [each.seed for each in part]
        room = max(each.room for each in part)
        return self.backend.generate(prompts, room, self.ends, seeds, self.sampling, self.stop)


def _within(answer: Generated, room: int) -> Generated:
    """Cut an answer to its own room, the end token counted."""
    return answer if len(answer.ids) < room else Generated(answer.ids[:room], None)


def _tokens(batch: Sequence[Wanted]) -> int:
    return len(batch) * (max(len(each.prompt) for each in batch) + max(each.room for each in batch))
