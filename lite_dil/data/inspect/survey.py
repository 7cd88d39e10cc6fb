"""Figures of a data set, gathered in about 40 bytes per row: lengths, repeats, and marks of other models' templates."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from lite_dil.base.hashing import tokens_digest
from lite_dil.base.signs import CHOSEN, REJECTED
from lite_dil.data.encoder import Encoder, Example
from lite_dil.data.inspect.private import private_in
from lite_dil.data.reader import Row

PERCENTILES = (50, 90, 95, 99)
# Marks of turns and ends in other models' chat templates and in transcripts. In a message's text they are mostly a mistake.
_NAMES = (
    "im_start im_end im_sep endoftext endofprompt eot eot_id eom_id start_header_id end_header_id begin_of_text end_of_text "
    "system user assistant end start message channel return START_OF_TURN_TOKEN END_OF_TURN_TOKEN"
)
_MARKS = re.compile(
    rf"<\|(?:{_NAMES.replace(' ', '|')})\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:eos|bos|pad|unk)>|<(?:start|end)_of_turn>"
    r"|<\uff5c[^\n<>]{1,30}\uff5c>|\n\n(?:Human|Assistant):"
)
_KINDS_OF_MARKS = 100  # counted at most


class Repeat(NamedTuple):
    """How many rows repeat an earlier row, the first of them, and the row that it repeats."""

    rows: int
    first: int | None
    earlier: int | None

    @classmethod
    def of(cls, rows: np.ndarray, earlier: np.ndarray) -> Repeat:
        """Describe `rows`, each of which repeats the row in `earlier` at its place."""
        return cls(len(rows), int(rows[0]), int(earlier[rows[0]])) if len(rows) else cls(0, None, None)


class Survey:
    """Watches `lite_dil.data.dataset.load`: `add` takes each usable row, its tokens whole and cut to ``--max-length``."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self.prompt, self.whole, self.needed = array("i"), array("i"), array("i")
        self.answers = {CHOSEN: array("i"), REJECTED: array("i")}
        self.prompts_cut = self.answers_cut = self.examples_cut = self.computed = self.trained = 0
        self.marks: Counter[str] = Counter()
        self.first_with: dict[str, str] = {}
        # E-mail addresses and the like in responses: their number, the responses and the first row with them.
        self.private: dict[str, tuple[int, int, str]] = {}
        self.shown = array("b")  # whether a row may be shown: nothing like that is anywhere in it
        # The first example, and the first with another prompt, for a loss that compares responses to different prompts.
        self.two_prompts: list[Example] = []
        self._digests, self._preferred = bytearray(), array("b")

    def __len__(self) -> int:
        return len(self.prompt)

    def add(self, row: Row, whole: Example, cut: Example) -> None:
        """Add one row."""
        lengths = [len(response) for response in whole.responses]
        self.prompt.append(len(whole.prompt))
        self.whole.append(len(whole.prompt) + sum(lengths))
        self.needed.append(len(whole.prompt) + max(lengths))
        for sign, length in zip(whole.signs, lengths, strict=True):
            self.answers[sign].append(length)
        short = [len(response) for response in cut.responses]
        self.trained += sum(short)
        self.computed += len(cut.prompt) + sum(short)
        answers_cut = sum(less < length for less, length in zip(short, lengths, strict=True))
        prompt_cut = len(cut.prompt) < len(whole.prompt)
        self.answers_cut += answers_cut
        self.prompts_cut += prompt_cut
        self.examples_cut += bool(answers_cut or prompt_cut)
        if len(self.two_prompts) < 2 and (not self.two_prompts or self.two_prompts[0].prompt != cut.prompt):
            self.two_prompts.append(cut)
        for mark in sorted({mark for text in (() if row.ids else _texts(row)) for mark in _MARKS.findall(text)}):
            if mark in self.marks or len(self.marks) < _KINDS_OF_MARKS:
                self.marks[mark] += 1
                self.first_with.setdefault(mark, row.place)
        self._private(row)
        self._digest(whole)

    def _private(self, row: Row) -> None:
        """Count e-mail addresses and the like in the responses, and look for them in the prompt."""
        found = [private_in("\n".join(_strings(answer))) for answer in row.answers]
        for kind, number in ((kind, number) for counts in found for kind, number in counts.items()):
            total, answers, first = self.private.get(kind, (0, 0, row.place))
            self.private[kind] = (total + number, answers + 1, first)
        self.shown.append(not any(found) and not any(map(private_in, _texts(row))))

    def _digest(self, example: Example) -> None:
        """Keep a digest of the row that ignores which response is preferred, and, separately, which one is."""
        self._digests += tokens_digest(example.prompt, example.responses)
        self._preferred.append(example.signs[example.responses.index(min(example.responses))])

    def cut(self, number: int, example: Example) -> list[int]:
        """Return how many tokens were cut from the prompt and from each response of row `number`, which is now `example`."""
        if len(example.responses) > 1:
            answers = [self.answers[sign][number] for sign in example.signs]
        else:
            answers = [self.whole[number] - self.prompt[number]]
        left = [len(example.prompt), *map(len, example.responses)]
        return [before - after for before, after in zip([self.prompt[number], *answers], left, strict=True)]

    def repeats(self) -> tuple[Repeat, Repeat]:
        """Return the rows that repeat an earlier one with the same preference, and those with the opposite preference."""
        low, high = np.frombuffer(self._digests, np.uint64).reshape(-1, 2).T
        preferred = np.frombuffer(self._preferred, np.int8)
        same, alike = _first_equal(low, high, preferred), _first_equal(low, high)
        again, opposite = np.flatnonzero(same != np.arange(len(same))), np.flatnonzero(preferred != preferred[alike])
        return Repeat.of(again, same), Repeat.of(opposite, alike)

    def is_token(self, mark: str) -> bool:
        """Return whether the tokenizer reads a mark as one of its own control tokens, which it does in plain text."""
        ids = self.encoder.ids(mark)
        return len(ids) == 1 and ids[0] in self.encoder.tokenizer.added_tokens_decoder


def _first_equal(*keys: np.ndarray) -> np.ndarray:
    """Return for each row the first row with equal keys."""
    order = np.lexsort(keys)  # stable: of equal rows the first comes first
    new = np.ones(len(order), bool)
    new[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    return first


def _strings(value: Any) -> Iterator[str]:
    """Yield the texts of a response, with those of its calls."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)


def _texts(row: Row) -> Iterator[str]:
    """Yield every text that a row contains."""
    for part in (*([row.prompt] if isinstance(row.prompt, str) else row.prompt), *row.answers):
        yield part if isinstance(part, str) else part["content"]


def lengths(values: array[int] | np.ndarray) -> dict[str, float]:
    """Return percentiles (occurring lengths that p percent do not exceed), the maximum and the mean."""
    found = np.frombuffer(values, np.int32)
    named = {f"p{p}": int(np.percentile(found, p, method="inverted_cdf")) for p in PERCENTILES}
    return {**named, "max": int(found.max()), "mean": round(float(found.mean()), 2)}


def enough_for(needed: array[int], percent: int) -> int:
    """Return the smallest ``--max-length`` that cuts no more than `percent` percent of the examples."""
    ordered = np.sort(np.frombuffer(needed, np.int32))
    return int(ordered[len(ordered) - 1 - len(ordered) * percent // 100])


def length_bias(chosen: array[int], rejected: array[int]) -> dict[str, Any]:
    """Return how often the chosen response of a pair is the longer one, and whether that is beyond chance.

    Beyond chance means that its share of the pairs with unequal lengths exceeds one half by two standard errors.
    """
    difference = np.frombuffer(chosen, np.int32) - np.frombuffer(rejected, np.int32)
    longer, shorter = int((difference > 0).sum()), int((difference < 0).sum())
    unequal = max(longer + shorter, 1)
    return {
        "chosen_longer": round(longer / len(difference), 4),
        "rejected_longer": round(shorter / len(difference), 4),
        "mean_difference": round(float(difference.mean()), 2),
        "beyond_chance": longer / unequal > 0.5 + 2 * 0.5 / math.sqrt(unequal),
    }
