"""Check answers against the data's own: 1 for the right one, 0 for any other."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from lite_dil.base.errors import UserError
from lite_dil.rewards.source import Answered

if TYPE_CHECKING:
    import numpy as np

# The columns that hold the right answer, the first one that a row has.
ANSWER_COLUMNS = ("answer", "solution", "ground_truth")
_NUMBER = re.compile(r"(?:(?<![\w)])[-+\u2212])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
_SAID = re.compile(r"\b(?:answer|option|choice)\b\W*(?:is\b\W*)?([A-Ja-j])\b(?!['\u2019])", re.I)
_MARKED = re.compile(r"(?<!\w)(?:\(([A-J])\)|([A-J])[.):])(?!\w)")
_ALONE = re.compile(r"\W*([A-Ja-j])\W*")


class AnswerSource:
    """Rewards a response with 1 if it gives the answer of the prompt's row, else 0.

    Args:
        kind: "exact", "number" or "choice"; what each compares is in `READERS`.
    """

    def __init__(self, kind: str) -> None:
        self.name, self._read = f"answer:{kind}", READERS[kind]

    def rewards(self, answers: Sequence[Answered]) -> np.ndarray:
        """Return 1 or 0 for each response, (answers,). Raises UserError if a row has no answer of this kind."""
        import numpy as np

        return np.array([float(self._read(each.response) == self.right(each.columns, each.place)) for each in answers])

    def right(self, columns: Mapping[str, Any], place: str) -> object:
        """Return the right answer of a row. Raises UserError if it has none of this kind."""
        found = next((columns[name] for name in ANSWER_COLUMNS if columns.get(name) is not None), None)
        if found is None:
            names = ", ".join(columns) or "none besides the prompt"
            raise UserError(
                f"{place}: {self.name} needs the right answer in a column {' or '.join(ANSWER_COLUMNS)}; the row has {names}"
            )
        right = self._read(str(found)) if isinstance(found, (str, int, float)) and not isinstance(found, bool) else None
        if right is None:
            raise UserError(f"{place}: {self.name} finds nothing to compare with in the row's answer {str(found)[:80]!r}")
        return right


def last_part(text: str) -> str | None:
    """Return the part of a response that states its answer; None if it never stopped thinking.

    That is what follows the last ``</think>``, if there is one; of it what follows the last ``####``, else the content of the
    last ``\\boxed{}``, else all.
    """
    if "<think>" in text.rpartition("</think>")[2]:
        return None
    text = text.rpartition("</think>")[2]
    if "####" in text:
        return text.rpartition("####")[2]
    return text if (boxed := _boxed(text)) is None else boxed


def _boxed(text: str) -> str | None:
    """Return the content of the last closed ``\\boxed{}``, or None."""
    starts = [found.end() for found in re.finditer(r"\\boxed\s*\{", text)]
    for start in reversed(starts):
        depth = 1
        for at in range(start, len(text)):
            depth += (text[at] == "{") - (text[at] == "}")
            if depth == 0:
                return text[start:at]
    return None


def exact(text: str) -> str | None:
    """Return the answer as text, in Unicode's composed form and without space around it; None if it is empty."""
    part = last_part(text)
    return unicodedata.normalize("NFC", part).strip() or None if part is not None else None


def number(text: str) -> Decimal | None:
    """Return the last number of the answer, exactly, or None: 1,000 is 1000, and 0.50 is 0.5."""
    found = _NUMBER.findall(last_part(text) or "")
    try:
        return Decimal(found[-1].replace(",", "").replace("\u2212", "-")) if found else None
    except InvalidOperation:  # more digits than Decimal holds
        return None


def choice(text: str) -> str | None:
    """Return the letter A to J of the answer, or None.

    A letter alone, else the last one after "answer is" and the like, else the last one marked as (B), B. or B).
    """
    part = last_part(text)
    if part is None:
        return None
    if alone := _ALONE.fullmatch(part):
        return alone[1].upper()
    if said := _SAID.findall(part):
        return str(said[-1]).upper()
    marked = ["".join(pair) for pair in _MARKED.findall(part)]
    return marked[-1] if marked else None


READERS: dict[str, Callable[[str], object]] = {"exact": exact, "number": number, "choice": choice}
