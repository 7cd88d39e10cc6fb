"""Generate responses to many prompts, in batches of similar length that memory holds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Protocol, TypeVar

from lite_dil.backends.protocol import Backend
from lite_dil.backends.types import OWN, Done, Generated, Sampling, never
from lite_dil.base.halving import Halving, halves

# Generation keeps keys and values but no activations, so a batch can have more tokens than a training pass.
ROWS = 8


class Wanted(Protocol):
    """A response to generate: to the tokens of `prompt`, with at most `room` tokens, drawn with `seed`."""

    @property
    def prompt(self) -> tuple[int, ...]:
        """Token ids."""

    @property
    def room(self) -> int:
        """At least 1; counts the end token."""

    @property
    def seed(self) -> int:
        """A number below 2^64."""


W = TypeVar("W", bound=Wanted)


@dataclass(frozen=True)
class Request:
    """The plainest `Wanted`."""

    prompt: tuple[int, ...]
    room: int
    seed: int


def batched(wanted: Sequence[W], tokens: int, rows: int | None = None) -> list[list[W]]:
    """Group the wanted responses into batches of prompts of similar length, the longest first.

    Responses to the same prompt are adjacent, since a batch computes it once. If the batch is full, the rest go into the next:
    computing a prompt twice costs less than a batch that is not full.

    Args:
        tokens: maximum tokens of a batch, prompt and room; a single response may exceed it.
        rows: maximum responses in a batch.
    """
    batches: list[list[W]] = []
    for each in sorted(wanted, key=lambda each: (len(each.prompt), each.prompt), reverse=True):
        batch = batches[-1] if batches else []
        # A batch is padded to its longest prompt, the first, and may run until the largest room is used up.
        if batch and (rows is None or len(batch) < rows) and _tokens([*batch, each]) <= tokens:
            batch.append(each)
        else:
            batches.append([each])
    return batches


class BatchGenerator:
    """Generates batches of responses, in halves if memory does not hold a whole batch.

    Args:
        ends: the tokens that end a response.
        say: shows a line to the user.
        sampling: how the next token is drawn.
        stop: called between tokens; if it returns true, the responses end there.
        done: called with the tokens of a response so far; if it returns true, that response ends there.
    """

    def __init__(
        self,
        backend: Backend,
        ends: Sequence[int],
        say: Callable[[str], None],
        sampling: Sampling = OWN,
        stop: Callable[[], bool] = never,
        done: Done | None = None,
    ) -> None:
        self.backend, self.ends, self.sampling, self.stop, self.done = backend, ends, sampling, stop, done
        self._halving: Halving[Sequence[Wanted]] = Halving("a batch of responses", _tokens, halves, say)

    def draw(self, batch: Sequence[Wanted]) -> list[Generated]:
        """Return the wanted responses; one that fills its own room has no end token, even if the batch runs longer."""
        found = list(chain.from_iterable(self._halving.run(self._generate, batch)))
        return [_within(answer, wanted.room) for answer, wanted in zip(found, batch, strict=True)]

    def _generate(self, part: Sequence[Wanted]) -> list[Generated]:
        prompts, seeds = [each.prompt for each in part], [each.seed for each in part]
        room = max(each.room for each in part)
        return self.backend.generate(prompts, room, self.ends, seeds, self.sampling, self.stop, self.done)


def _within(answer: Generated, room: int) -> Generated:
    """Cut a response to its own room, which counts the end token."""
    return answer if len(answer.ids) < room else Generated(answer.ids[:room], None)


def _tokens(batch: Sequence[Wanted]) -> int:
    return len(batch) * (max(len(each.prompt) for each in batch) + max(each.room for each in batch))
