"""Rewards by a reward model of our own: an adapter and a head on a base in memory, beside the policy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lite_dil.backends.protocol import Backend
from lite_dil.base.halving import Halving
from lite_dil.base.signs import CHOSEN
from lite_dil.batching.batch import Batch
from lite_dil.batching.schedule import plan_responses
from lite_dil.data.encoder import Example
from lite_dil.models.fingerprint import base_of
from lite_dil.rewards.description import Description, check_base, read_description
from lite_dil.rewards.source import Answered, by_prompt
from lite_dil.runs.folder import recorded_with

_ROW_TOKENS = 4096  # maximum tokens of a pass


class HeadReward:
    """Scores of a head; a `lite_dil.rewards.source.RewardSource`.

    Args:
        adapter: the head's adapter on the backend.
        name: names its metrics.
        say: tells the user if memory holds less than a pass.
        row_tokens: maximum tokens of a pass.
        cut: the reward of a response that was cut before its end token.
    """

    def __init__(
        self,
        backend: Backend,
        adapter: str,
        description: Description,
        name: str,
        say: Callable[[str], None],
        row_tokens: int = _ROW_TOKENS,
        cut: float = math.nan,
    ) -> None:
        self.backend, self.adapter, self.description = backend, adapter, description
        self._name, self._row_tokens, self._cut = name, row_tokens, cut
        self._halving = Halving("a pass without gradients", lambda batch: batch.tokens, Batch.split, say)

    @property
    def name(self) -> str:
        """Names its metrics."""
        return self._name

    def rewards(self, answers: Sequence[Answered]) -> np.ndarray:
        """Return the reward of each response, float64, (answers,).

        It is read from the state of the end token; a response that was cut has none, and gets `cut`. Responses to the same
        prompt share its computation.
        """
        found = np.full(len(answers), self._cut)
        ended = np.array([answer.ended for answer in answers], bool)
        whole = [answer for answer in answers if answer.ended]
        places = by_prompt(whole)
        examples = [
            Example(prompt, tuple(whole[at].response_ids for at in several), (CHOSEN,) * len(several))
            for prompt, several in places.items()
        ]
        scored = np.zeros(len(whole))
        for several, scores in zip(places.values(), self.scores(examples), strict=True):
            scored[several] = scores[:, 0]
        found[ended] = scored
        return found

    def scores(self, examples: Sequence[Example]) -> list[np.ndarray]:
        """Return the outputs for each example's responses, all of which end, float64, (responses, outputs).

        The first is the reward. That of bt-variance has the log of its noise scale as the second.
        """
        found: dict[tuple[int, int], np.ndarray] = {}
        count = sum(len(example.responses) for example in examples)
        for batch, numbers in plan_responses(examples, self.backend.layout, count, self._row_tokens):
            outputs = np.concatenate(self._halving.run(partial(self.backend.scores, adapter=self.adapter), batch))
            found.update(zip(numbers, self._anchored(outputs.astype(np.float64)), strict=True))
        return [np.stack([found[at, i] for i in range(len(example.responses))]) for at, example in enumerate(examples)]

    def _anchored(self, outputs: np.ndarray) -> np.ndarray:
        outputs[:, 0] *= self.description.scale
        outputs[:, 1:] += math.log(self.description.scale)
        return outputs


def add_files(backend: Backend, adapter: str, folder: Path) -> None:
    """Add an adapter from its files to a base in memory, unless it is there already.

    Args:
        adapter: its name on the backend, which holds a hash of the files.

    Raises UserError if the files are damaged, or of another base.
    """
    recorded_with(folder)
    try:
        with backend.using(adapter):  # an earlier training of the same policy has added it
            return
    except KeyError:
        backend.load_adapter(adapter, folder)


def open_head(
    backend: Backend,
    adapter: str,
    folder: Path,
    model: str,
    memo: Path | None,
    name: str,
    say: Callable[[str], None],
    cut: float = math.nan,
) -> HeadReward:
    """Add a reward model's adapter and head to a base in memory.

    Args:
        adapter: its name on the backend; see `add_files`.
        folder: holds its files.
        model: the folder or hub id of the base.
        memo: the folder in which hashes of large files are remembered.
        name: names its metrics.
        cut: the reward of a response that was cut before its end token.

    Raises UserError if it is damaged, is no reward model, or was trained on another base.
    """
    description = read_description(folder)
    check_base(folder, description, base_of(model, memo), model)
    add_files(backend, adapter, folder)
    return HeadReward(backend, adapter, description, name, say, cut=cut)
