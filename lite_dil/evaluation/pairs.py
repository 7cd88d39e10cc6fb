"""What an evaluation found of each held-out pair, for the report."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lite_dil.base.disk import DiskFailed, failing
from lite_dil.batching.batch import Batch
from lite_dil.data.encoder import Encoder
from lite_dil.reports.pairs import PAIRS, WORST, HeldOutPairs, WrongPair, beginning, end, write_pairs


class _Wrong(NamedTuple):
    """A pair that is not right; it sorts by margin, those that are not finite first."""

    finite: bool
    margin: float
    number: int  # so that no two are compared further
    place: str
    tokens: tuple[np.ndarray, np.ndarray, np.ndarray]  # prompt, chosen, rejected
    ratios: tuple[float, float]


class PairFigures:
    """The pairs of one evaluation, batch by batch; only the worst keep their tokens.

    Args:
        beta: multiplies the difference of a pair's values to its margin.
    """

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = beta
        self.margins: list[float] = []
        self.right: list[bool] = []
        self.lengths: list[tuple[int, int]] = []
        self._wrong: list[_Wrong] = []

    def add(self, f: np.ndarray, batch: Batch) -> None:
        """Add a batch's pairs; `f`, (responses,) float64, are log-ratios in nats, or a reward model's scores."""
        for first, second in zip(*batch.pairs, strict=True):
            chosen, rejected = batch.responses[first], batch.responses[second]
            margin, right = self.beta * float(f[first] - f[second]), bool(f[first] > f[second])
            if not right:
                prompt = batch.prompt_of[first]
                tokens, ratios = (batch.prompts[prompt], chosen, rejected), (float(f[first]), float(f[second]))
                finite = math.isfinite(margin)
                place = batch.places[prompt]
                self._wrong.append(_Wrong(finite, margin if finite else 0.0, len(self.margins), place, tokens, ratios))
            self.margins.append(margin)
            self.right.append(right)
            self.lengths.append((len(chosen), len(rejected)))
        self._wrong = sorted(self._wrong)[:WORST]

    def at(self, step: int, encoder: Encoder) -> HeldOutPairs:
        """Return them for the report, the worst as texts without special tokens."""

        def text(ids: np.ndarray) -> str:
            return str(encoder.tokenizer.decode(ids.tolist(), skip_special_tokens=True)).strip()

        wrong = []
        for pair in self._wrong:
            prompt, chosen, rejected = map(text, pair.tokens)
            wrong.append(
                WrongPair(
                    pair.place,
                    pair.margin if pair.finite else None,
                    end(prompt),
                    beginning(chosen),
                    beginning(rejected),
                    _finite(pair.ratios[0]),
                    _finite(pair.ratios[1]),
                    len(pair.tokens[1]),
                    len(pair.tokens[2]),
                )
            )
        margins = [_finite(float(f"{margin:.6g}")) for margin in self.margins]
        chosen_tokens, rejected_tokens = ([lengths[side] for lengths in self.lengths] for side in (0, 1))
        return HeldOutPairs(step, margins, self.right, chosen_tokens, rejected_tokens, wrong)


class PairsFile:
    """Writes held_out_pairs.json after each evaluation of data with pairs; a full disk does not end the training.

    Args:
        latest: returns the pairs of the evaluation that a line of metrics is of.
    """

    def __init__(self, folder: Path, latest: Callable[[], PairFigures], encoder: Encoder, say: Callable[[str], None]) -> None:
        self.path, self.latest, self.encoder, self.say = folder / PAIRS, latest, encoder, say

    def write(self, line: dict[str, Any]) -> None:
        """Write the pairs of the evaluation with this line."""
        if not (figures := self.latest()).margins:
            return
        try:
            with failing(self.path):
                write_pairs(self.path, figures.at(line["step"], self.encoder))
        except DiskFailed as error:
            self.say(f"{error}. The run continues without its held-out pairs one by one")


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
