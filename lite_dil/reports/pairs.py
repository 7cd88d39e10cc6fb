"""The held-out pairs of a run one by one: the file held_out_pairs.json, and the accuracy by the responses' lengths."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lite_dil.base.checked import with_digest, without_digest
from lite_dil.base.display import unheard
from lite_dil.base.errors import first_line
from lite_dil.base.files import replace_file
from lite_dil.base.shares import standard_error
from lite_dil.base.strict_json import parse_json

PAIRS = "held_out_pairs.json"
WORST = 10  # pairs whose texts are kept
_CHARACTERS = 600  # of a text
# A response's length relative to the other's: (tokens of chosen - tokens of rejected) / tokens of the longer one, up to which
# a pair belongs to a group.
_GROUPS = (
    (-1 / 3, "shorter by more than a third"),
    (-0.1, "shorter"),
    (0.1, "about as long, within a tenth"),
    (1 / 3, "longer"),
    (1.0, "longer by more than a third"),
)


@dataclass(frozen=True)
class WrongPair:
    """A pair whose chosen response did not gain more than the rejected one, with its texts cut to a bounded length.

    The log-ratios are those of the metrics, in nats per token or per response, or a reward model's scores; tokens include the
    end token.
    """

    place: str
    margin: float | None
    prompt: str
    chosen: str
    rejected: str
    chosen_log_ratio: float | None
    rejected_log_ratio: float | None
    chosen_tokens: int
    rejected_tokens: int


@dataclass(frozen=True)
class HeldOutPairs:
    """An evaluation's pairs.

    Attributes:
        step: the step of the evaluation.
        margins: by pair the reward of the chosen response less that of the rejected one, beta x nats; None if not finite.
        right: by pair whether the chosen response's log-ratio is the larger one, as the accuracy counts.
        chosen_tokens, rejected_tokens: by pair the responses' lengths.
        wrong: the worst of those that are not right, by margin.
    """

    step: int
    margins: list[float | None]
    right: list[bool]
    chosen_tokens: list[int]
    rejected_tokens: list[int]
    wrong: list[WrongPair]

    @property
    def finite(self) -> np.ndarray:
        """The margins that are finite."""
        return np.array([margin for margin in self.margins if margin is not None], np.float64)


def write_pairs(path: Path, pairs: HeldOutPairs) -> None:
    """Write held_out_pairs.json, completely or not at all."""
    replace_file(path, json.dumps(with_digest(asdict(pairs))) + "\n")


def read_pairs(path: Path, say: Callable[[str], None] = unheard) -> HeldOutPairs | None:
    """Read held_out_pairs.json; None if there is none, as in runs of before, or if it is damaged, which `say` is told."""
    if not path.exists():
        return None
    try:
        content = without_digest(parse_json(path.read_text(encoding="utf-8")))
        return HeldOutPairs(**content | {"wrong": [WrongPair(**pair) for pair in content["wrong"]]})
    except (OSError, ValueError, TypeError, KeyError) as error:
        say(f"{path} is damaged ({first_line(error)}); the held-out pairs one by one are left out")
        return None


def beginning(text: str) -> str:
    """Return a response cut at its end."""
    return text if len(text) <= _CHARACTERS else text[:_CHARACTERS].rstrip() + "\u2026"


def end(text: str) -> str:
    """Return a prompt cut at its start: a conversation's last turn is what the response answers."""
    return text if len(text) <= _CHARACTERS else "\u2026" + text[-_CHARACTERS:].lstrip()


class Share(NamedTuple):
    """The accuracy over some pairs, and their mean margin, which is not finite if a pair's is not."""

    name: str
    pairs: int
    accuracy: float
    margin: float

    @property
    def error(self) -> float:
        """The accuracy's standard error."""
        return standard_error(self.accuracy, self.pairs)


def by_length(pairs: HeldOutPairs) -> list[Share]:
    """Return the accuracy by how long the chosen response is beside the rejected one, in groups that have pairs.

    A policy that prefers long responses as such is right where the chosen response is the longer one, and wrong elsewhere.
    """
    chosen, rejected = _lengths(pairs)
    group = np.searchsorted([limit for limit, _ in _GROUPS], (chosen - rejected) / np.maximum(chosen, rejected))
    found = (_share(name, pairs, group == number) for number, (_, name) in enumerate(_GROUPS))
    return [share for share in found if share.pairs]


def by_longer(pairs: HeldOutPairs) -> tuple[Share, Share]:
    """Return the accuracy where the chosen response is the longer one, and where it is the shorter one."""
    chosen, rejected = _lengths(pairs)
    return _share("longer", pairs, chosen > rejected), _share("shorter", pairs, chosen < rejected)


def _lengths(pairs: HeldOutPairs) -> tuple[np.ndarray, np.ndarray]:
    return np.array(pairs.chosen_tokens, np.float64), np.array(pairs.rejected_tokens, np.float64)


def _share(name: str, pairs: HeldOutPairs, picked: np.ndarray) -> Share:
    number = int(picked.sum())
    if not number:
        return Share(name, 0, math.nan, math.nan)
    margins = np.array([math.nan if margin is None else margin for margin in pairs.margins])
    return Share(name, number, float(np.array(pairs.right)[picked].mean()), float(margins[picked].mean()))


def wrong_total(pairs: HeldOutPairs) -> int:
    """Return how many pairs are not right; `HeldOutPairs.wrong` has the worst of them."""
    return len(pairs.right) - sum(pairs.right)


def page_of(pairs: HeldOutPairs, of: str = "log-ratio") -> dict[str, Any]:
    """Return what a page shows of the pairs, besides their chart; `of` names what is compared, "log-ratio" or "score"."""
    shown: Sequence[WrongPair] = pairs.wrong
    return {
        "head": ["the chosen response is", "pairs", "accuracy", "mean margin"],
        "rows": [
            [share.name, f"{share.pairs:,}", f"{share.accuracy:.1%} \u00b1\u00a0{share.error:.1%}", signed(share.margin)]
            for share in by_length(pairs)
        ],
        "wrong": [_shown(pair, of) for pair in shown],
        "wrong_note": _wrong_note(wrong_total(pairs), len(shown), len(pairs.right)),
    }


def _wrong_note(wrong: int, shown: int, of: int) -> str:
    if not wrong:
        return f"None of {of:,}."
    return f"{wrong:,} of {of:,}" + (
        f"; these are the {shown} with the worst margin." if shown < wrong else ", the worst first."
    )


def _shown(pair: WrongPair, of: str) -> dict[str, Any]:
    sides = (
        ("chosen", pair.chosen_tokens, pair.chosen_log_ratio, pair.chosen),
        ("rejected", pair.rejected_tokens, pair.rejected_log_ratio, pair.rejected),
    )
    texts = [(f"{side}, {tokens:,} tokens, {of} {signed(ratio)}", text) for side, tokens, ratio, text in sides]
    return {"title": f"margin {signed(pair.margin)}, {pair.place}", "prompt": pair.prompt, "responses": texts}


def signed(value: float | None) -> str:
    """Return a figure with its sign."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:+.3g}"
