"""What a row of any format becomes before it is checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lite_dil.base.signs import CHOSEN, REJECTED
from lite_dil.data.files import RowError
from lite_dil.data.messages import Completion, Message

Raw = Mapping[str, Any]
TIES = "ties, which are left out: no preference to learn"
PAIR = (CHOSEN, REJECTED)


class Draft(NamedTuple):
    """A row's content before it is checked: a prompt, its responses, the sign of each, tools and template arguments.

    `notes` say what was changed in the row, each in the same words for all such rows.
    """

    prompt: str | list[Message]
    answers: tuple[Completion, ...]
    signs: tuple[int, ...]
    tools: list[dict[str, Any]] | None = None
    notes: tuple[str, ...] = ()
    labelled: bool = False  # the sign comes from a label
    arguments: dict[str, Any] | None = None
    ids: tuple[tuple[int, ...], ...] = ()  # the prompt's token ids and each response's, in place of texts


def refuse_ids(draft: Draft) -> None:
    """Raise RowError if a row has token ids where texts are needed."""
    if draft.ids:
        raise RowError("token ids", "the row has token ids, which only training and held-out data may be; expected text")


class Tie(RowError):
    """A comparison that neither response won: the row is in order, and is left out and counted."""
