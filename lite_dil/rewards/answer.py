"""Check answers against the data's own: 1 for the right one, 0 for any other."""

from __future__ import annotations

import math
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
_NUMBER = re.compile(
    r"(?:(?<![\w)])[-+\u2212])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)(?:[eE][-+\u2212]?\d+)?"
)
# Before a word of small letters, I is the pronoun and A may be the article; after "is" it is not, as in "is A because".
_SAID = re.compile(
    r"\b(?i:answer|option|choice)\b(?:\W*(?i:is)\b\W*([A-H]|J|I(?! +[a-z]))|\W*([B-HJ]|[AI](?! +[a-z])))\b(?!['\u2019])"
)
_MARKED = re.compile(r"(?<!\w)(?:\(([A-J])\)|([A-J])[.):])(?!\w)")
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")
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

        return np.array([float(self._given(each) == self.right(each.columns, each.place)) for each in answers])

    def right(self, columns: Mapping[str, Any], place: str) -> object:
        """Return the right answer of a row. Raises UserError if it has none of this kind, or for "number" more than one."""
        found = next((columns[name] for name in ANSWER_COLUMNS if columns.get(name) is not None), None)
        if found is None:
            names = ", ".join(columns) or "none besides the prompt"
            raise UserError(
                f"{place}: {self.name} needs the right answer in a column {' or '.join(ANSWER_COLUMNS)}; the row has {names}"
            )
        right = self._of_column(found)
        if right is None:
            raise UserError(f"{place}: {self.name} finds nothing to compare with in the row's answer {str(found)[:80]!r}")
        if self._read is number and isinstance(found, str) and len(several := _numbers(found)) > 1:
            raise UserError(
                f"{place}: {self.name} finds {len(several)} numbers ({', '.join(several[:3])}) in the row's answer "
                f"{found[-80:]!r}; give it as one number, put that after ####, or use answer:exact"
            )
        return right

    def _of_column(self, found: object) -> object:
        """Return a column's value as what responses are compared with, or None."""
        if self._read is number and isinstance(found, (int, float)) and not isinstance(found, bool):
            return _decimal(found)
        return self._read(str(found)) if isinstance(found, (str, int, float)) and not isinstance(found, bool) else None

    def _given(self, answered: Answered) -> object:
        """Return the answer of a response; None if it never stopped thinking; the prompt may end in an open thought."""
        begun = "<think>" if answered.prompt.rstrip().endswith("<think>") else ""
        return None if _thinks(begun + answered.response) else self._read(answered.response)


def _decimal(value: int | float) -> Decimal | None:
    """Return a number as it is written, so that 1e-05 is 0.00001 exactly; None for NaN and the infinities."""
    if isinstance(value, int):
        return Decimal(value)
    return Decimal(float.__repr__(value)) if math.isfinite(value) else None


def _thinks(text: str) -> bool:
    """Return whether text ends inside a thought."""
    return "<think>" in text.rpartition("</think>")[2]


def last_part(text: str) -> str | None:
    """Return the part of a response that states its answer; None if it never stopped thinking.

    That is what follows the last ``</think>``, if there is one; of it what follows the last ``####``, else the content of the
    last ``\\boxed{}``, else all.
    """
    if _thinks(text):
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
    """Return the last number of the answer, exactly, or None: 1,000 is 1000, .50 is 0.5, and 1.5e-3 is 0.0015."""
    found = _numbers(text)
    try:
        return Decimal(found[-1].replace(",", "").replace("\u2212", "-")) if found else None
    except InvalidOperation:  # more digits than Decimal holds
        return None


def _numbers(text: str) -> list[str]:
    """Return all numbers of the answer, as they are written."""
    return _NUMBER.findall(last_part(text) or "")


def choice(text: str) -> str | None:
    """Return the letter A to J of the answer, or None.

    A letter alone; else the last capital one that follows "answer is" and the like; else the last one that follows "answer",
    "option" or "choice", or is marked as (B), B., B: or B). LaTeX's text commands around it do not count.
    """
    part = last_part(text)
    if part is None:
        return None
    part = _LATEX_TEXT.sub(r"\1", part)
    if alone := _ALONE.fullmatch(part):
        return alone[1].upper()
    said = list(_SAID.finditer(part))
    if stated := [one[1] for one in said if one[1]]:
        return str(stated[-1])
    found = [(one.start(one.lastindex or 0), str(one[one.lastindex or 0])) for one in [*said, *_MARKED.finditer(part)]]
    return max(found)[1] if found else None


READERS: dict[str, Callable[[str], object]] = {"exact": exact, "number": number, "choice": choice}
