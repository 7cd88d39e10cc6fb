"""Draw two different answers to choose from, ahead of time while the user reads."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from lite_dil.backends.types import Sampling
from lite_dil.base.hashing import digest
from lite_dil.base.signs import CHOSEN
from lite_dil.data.files import RowError
from lite_dil.data.messages import Message, read_text
from lite_dil.data.prompts import Prompt
from lite_dil.data.reader import Row, same_text
from lite_dil.generation.policy import Policy
from lite_dil.labelling.labels import Candidate

TRIES = 8  # pairs of draws to find two usable, different answers


@dataclass(frozen=True)
class _Draw:
    prompt: tuple[int, ...]
    room: int
    seed: int


class Offers:
    """Draws the answers to compare. Only its own thread uses the model, so that the user can read and press keys meanwhile.

    An offer depends on the seed, the prompt and the answers to avoid, not on earlier draws: after a restart it is the same.

    Args:
        origins: the origins of the two answers; "base" is the model with the adapter off.
        room: maximum tokens of an answer.
    """

    def __init__(self, tuned: Policy, sampling: Sampling, seed: int, room: int, origins: tuple[str, str]) -> None:
        self.tuned, self.seed, self.room, self.origins = tuned, seed, room, origins
        self._stopped = threading.Event()
        self._generator = tuned.generator(sampling, self._stopped.is_set)
        self._thread = ThreadPoolExecutor(1)
        self._begun: dict[tuple[str, frozenset[str]], Future[list[Candidate]]] = {}
        self._tokenizer = threading.Lock()  # two threads must not use a fast tokenizer at once

    def ahead(self, prompt: Prompt, avoid: frozenset[str] = frozenset()) -> None:
        """Start to draw for a prompt, unless started before."""
        if (prompt.key, avoid) not in self._begun:
            self._begun[prompt.key, avoid] = self._thread.submit(self._offer, prompt, avoid)

    def take(self, prompt: Prompt, avoid: frozenset[str] = frozenset()) -> list[Candidate]:
        """Return two answers that differ from each other and from `avoid`, or none if no such two were found.

        Args:
            avoid: texts, as results of `same_text`.
        """
        if (prompt.key, avoid) not in self._begun:  # the current prompt comes first
            self._begun = {key: future for key, future in self._begun.items() if not future.cancel()}
        self.ahead(prompt, avoid)
        return self._begun.pop((prompt.key, avoid)).result()

    def problem(self, prompt: Prompt, text: str, message: Message | None = None) -> str:
        """Return why an answer, a text or with that text a `message`, cannot be trained on, or an empty string."""
        if not same_text(text):
            return "the answer is empty"
        try:
            read_text(text, "answer")
            row = Row(prompt.prompt, (message or text,), (CHOSEN,), "", "demonstrations", prompt.tools, prompt.arguments)
            with self._tokenizer:
                self.tuned.encoder.encode(row)
        except RowError as error:
            return str(error)
        return ""

    def close(self) -> None:
        """Stop drawing."""
        self._stopped.set()
        self._thread.shutdown(cancel_futures=True)

    def _offer(self, prompt: Prompt, avoid: frozenset[str]) -> list[Candidate]:
        found: list[Candidate | None] = [None, None]
        for number in range(TRIES):
            for side, candidate in self._draw(prompt, [i for i in (0, 1) if found[i] is None], number).items():
                if same_text(candidate.text) not in avoid and not self.problem(prompt, candidate.text, candidate.message):
                    found[side] = candidate
            one, two = found
            if one and two:
                if same_text(one.text) != same_text(two.text):
                    return [two, one] if int(digest(self.seed, prompt.key, "order", number)[:8], 16) % 2 else [one, two]
                found = [None, None]  # draw both again: keeping one would favour its model
            if self._stopped.is_set():
                break
        return []

    def _draw(self, prompt: Prompt, sides: Sequence[int], number: int) -> dict[int, Candidate]:
        """Draw an answer for each of `sides`, in one batch if they come from the same model."""
        groups = [list(sides)] if self.origins[0] == self.origins[1] else [[side] for side in sides]
        out: dict[int, Candidate] = {}
        for group in groups:
            seeds = [int(digest(self.seed, prompt.key, side, number)[:16], 16) for side in group]
            wanted = [_Draw(prompt.ids, self.room, seed) for seed in seeds]
            if self.origins[group[0]] == "base":
                with self.tuned.backend.adapter_off():
                    answers = self._generator.draw(wanted)
            else:
                answers = self._generator.draw(wanted)
            for side, (ids, end) in zip(group, answers, strict=True):
                with self._tokenizer:
                    answer = prompt.answer(self.tuned.encoder, ids)
                text, message = (answer, None) if isinstance(answer, str) else (str(answer["content"]), answer)
                out[side] = Candidate(text, self.origins[side], end is None, message)
        return out
