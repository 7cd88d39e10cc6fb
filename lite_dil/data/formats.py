"""The formats of preference data, and how to detect the format of a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from lite_dil.data import format_readers as readers
from lite_dil.data.arguments import FIELD, read_arguments
from lite_dil.data.files import RowError
from lite_dil.data.format_readers import HUMAN, LISTS, QUESTIONS, SCORE_FIELDS, Draft, Raw, is_pair
from lite_dil.data.messages import kind_of, read_tools


@dataclass(frozen=True)
class Format:
    """One format: `fields` are the required fields, for messages; `fits` recognises a row."""

    title: str
    fields: tuple[str, ...]
    fits: Callable[[Raw], bool]
    read: Callable[[Raw], Draft]


def _fits_hh(row: Raw) -> bool:
    sides = (row.get("chosen"), row.get("rejected"))
    return "prompt" not in row and all(isinstance(side, str) and f"\n\n{side.lstrip()}".startswith(HUMAN) for side in sides)


def _fits_sharegpt(row: Raw) -> bool:
    return isinstance(row.get("conversations"), list)


def _fits_alpaca(row: Raw) -> bool:
    return "instruction" in row and ("output" in row or is_pair(row)) and not any(name in row for name in LISTS)


def _fits_unpaired(row: Raw) -> bool:
    return "prompt" in row and "completion" in row and "label" in row


def _fits_ranked(row: Raw) -> bool:
    return any(name in row for name in QUESTIONS) and any(isinstance(row.get(name), list) for name in LISTS)


def _fits_completion(row: Raw) -> bool:
    return "prompt" in row and "completion" in row and "label" not in row


def _fits_messages(row: Raw) -> bool:
    return isinstance(row.get("messages"), list)


FORMATS: dict[str, Format] = {
    "hh": Format("raw HH transcripts, 'Human:' and 'Assistant:'", ("chosen", "rejected"), _fits_hh, readers.of_hh),
    "sharegpt": Format("ShareGPT / LLaMA-Factory conversations", ("conversations",), _fits_sharegpt, readers.of_sharegpt),
    "alpaca": Format("Alpaca instructions", ("instruction", "output"), _fits_alpaca, readers.of_alpaca),
    "preference": Format("chosen and rejected", ("prompt", "chosen", "rejected"), is_pair, readers.of_preference),
    "unpaired": Format(
        "single responses with a label", ("prompt", "completion", "label"), _fits_unpaired, readers.of_unpaired
    ),
    "ranked": Format(
        "several responses with scores, best against worst", ("prompt", "responses"), _fits_ranked, readers.of_ranked
    ),
    "completion": Format("prompt and completion", ("prompt", "completion"), _fits_completion, readers.of_completion),
    "messages": Format("conversations, the last turn trained", ("messages",), _fits_messages, readers.of_messages),
}
# Fields that --columns can name.
ROW_FIELDS = sorted(
    {name for spec in FORMATS.values() for name in spec.fields}
    | {
        *LISTS,
        *QUESTIONS,
        *(f"{name}s" for name in (*SCORE_FIELDS, "rank")),
        "input",
        "system",
        "history",
        "tools",
        "kto_tag",
        FIELD,
    }
)


def detect(rows: Iterable[Any]) -> str:
    """Return the format of most of these rows, or "preference" if they have none: its errors are the clearest."""
    found = Counter(name for row in rows if isinstance(row, dict) and (name := format_of(row)))
    return found.most_common(1)[0][0] if found else "preference"


def format_of(row: Raw) -> str:
    """Return the format of one row, or an empty string if it has none."""
    return next((name for name, spec in FORMATS.items() if spec.fits(row)), "")


def read(row: Any, name: str) -> Draft:
    """Read a row in the format `name`. Raises RowError."""
    spec = FORMATS[name]
    if not isinstance(row, dict):
        raise RowError(
            "not an object", f"expected a JSON object with the fields {', '.join(spec.fields)}, found {kind_of(row)}"
        )
    draft = spec.read(row)
    return draft._replace(tools=draft.tools or read_tools(row), arguments=read_arguments(row))
