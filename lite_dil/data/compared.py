"""Two responses and a column that says which is better: PKU-SafeRLHF, HelpSteer, SHP, Chatbot Arena and the like."""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

from lite_dil.base.strict_json import parse_json
from lite_dil.data.columns import NULL, about_of
from lite_dil.data.draft import PAIR, TIES, Draft, Raw, Tie
from lite_dil.data.files import Cell, RowError
from lite_dil.data.messages import is_message, kind_of, read_answer, read_messages, read_text, read_tools
from lite_dil.data.splitting import split_messages, transcript_prompt

_STEMS = ("response", "answer", "completion", "output", "generation", "conversation", "assistant", "human_ref")
_ENDS = (("0", "1"), ("1", "2"), ("a", "b"), ("A", "B"))
# The columns of two responses: response_0 and response_1, response1 and response2, response_a and response_b, ...
_SIDES = tuple((f"{stem}{joint}{a}", f"{stem}{joint}{b}") for stem in _STEMS for joint in ("_", "") for a, b in _ENDS)
SIDES_OF = {first: (first, second) for first, second in _SIDES}
_LISTS = ("responses", "completions", "answers", "candidates", "generations", "outputs")
_QUESTIONS = ("prompt", "instruction", "question", "query", "context", "history", "input")
# Columns with the number or the name of the better response.
BETTER = (
    *("better_response_id", "better_response", "better_id", "best_response_id", "preferred_response_id", "preferred_response"),
    *(
        "chosen_response_id",
        "chosen_response_index",
        "chosen_id",
        "chosen_index",
        "chosen_idx",
        "chosen",
        "preferred",
        "winner",
    ),
    *("choice", "preference"),
)
# Columns with a number below 0 where the first response is better, and above where the second is (HelpSteer).
_SIGNED = ("overall_preference", "preference_strength")
_SCORES = ("score", "overall_score", "rating", "reward")
_TIES = {"tie", "tie (bothbad)", "bothbad", "both_bad", "both bad", "both", "neither", "none", "draw", "equal", "same"}


class _Sides(NamedTuple):
    """The names of two responses, what each is called in a verdict, and their content."""

    names: tuple[str, str]
    ends: tuple[str, str]
    values: tuple[Any, Any]


def fits(row: Raw) -> bool:
    """Return whether a row has two responses and a column that says which is better."""
    if not any(name in SIDES_OF or name in _LISTS for name in row):
        return False
    sides = _sides(row)
    return sides is not None and any(name in row for name in _QUESTIONS + sides.names[:1]) and _verdict_in(row, sides) != ""


def of_compared(row: Raw) -> Draft:
    """Read two responses as a pair. Raises RowError, and its kind Tie if neither is better."""
    sides = _sides(row)
    if sides is None:
        raise RowError("no field 'response_0'", f"no field 'response_0'; the row has {', '.join(map(str, row))}")
    name = _verdict_in(row, sides)
    if not name:
        names = " and ".join(map(repr, sides.names))
        raise RowError("no field 'better_response_id'", f"{names} without a column that says which is better; {_expected()}")
    winner = _winner(row, name, sides)
    if not winner:
        raise Tie("tie", TIES)
    first, second = sides.names if winner < 0 else sides.names[::-1]
    one, other = sides.values if winner < 0 else sides.values[::-1]
    if isinstance(one, list) and len(one) > 1 and all(map(is_message, one)):
        return split_messages(read_messages(one, first), read_messages(other, second), read_tools(row))
    asked = next((field for field in _QUESTIONS if row.get(field) not in (None, "", [])), None)
    if asked is None:
        raise RowError("no field 'prompt'", f"no field 'prompt'; the row has {', '.join(map(str, row))}")
    prompt = _only(row[asked])
    if isinstance(prompt, str):
        prompt = transcript_prompt(prompt) or [{"role": "user", "content": read_text(prompt, asked)}]
    answers = (read_answer(_only(one), first), read_answer(_only(other), second))
    return Draft(read_messages(prompt, asked), answers, PAIR, read_tools(row))


def _expected() -> str:
    return f"expected one of {', '.join((*BETTER[:1], *_SIGNED, 'winner', 'chosen'))}, or scores"


def _sides(row: Raw) -> _Sides | None:
    for name in row:
        if (pair := SIDES_OF.get(name)) and pair[1] in row:
            ends = tuple(side[-1].lower() for side in pair)
            return _Sides(pair, (ends[0], ends[1]), (row[pair[0]], row[pair[1]]))
    for name in _LISTS:
        if isinstance(several := row.get(name), list) and len(several) == 2:
            values = [v.get("text", v) if isinstance(v, dict) and "role" not in v else v for v in several]
            return _Sides((f"{name}[0]", f"{name}[1]"), ("0", "1"), (values[0], values[1]))
    return None


def _verdict_in(row: Raw, sides: _Sides) -> str:
    """Return the column that says which response is better; empty if there is none."""
    listed = sides.names[0].endswith("]")
    for name in (*_SIGNED, *BETTER):
        if name in row and not (name == "chosen" and "rejected" in row):
            return name
    for name in ("winner_model_a", "labels", *(() if listed else (f"{score}_{sides.names[0][-1]}" for score in _SCORES))):
        if name in row and (name != "labels" or sides.names[0].startswith("human_ref")):
            return name
    return ""


def _winner(row: Raw, name: str, sides: _Sides) -> float:
    """Return a number below 0 if the first response is better, above 0 if the second is, 0 for a tie. Raises RowError."""
    value = row[name]
    if name in _SIGNED:
        return _number(value, name)
    if name == "winner_model_a":  # lmsys: winner_model_a, winner_model_b, winner_tie
        return _number(row.get("winner_model_b"), "winner_model_b") - _number(value, name)
    if name == "labels":  # SHP: 1 if the first is better, else 0
        return 0.5 - _number(value, name)
    if name[:-2] in _SCORES:
        other = name[:-1] + sides.names[1][-1]
        return _number(row.get(other), other) - _number(value, name)
    if isinstance(value, str):
        word = value.strip().lower()
        if word in _TIES:
            return 0
        for side, sign in ((0, -1), (1, 1)):
            end = sides.ends[side]
            called = {
                f"{stem}{joint}{end}" for stem in ("model", "response", "assistant", "answer") for joint in ("_", " ", "")
            }
            if (
                word in called | {sides.names[side].lower()}
                or (word == end and not end.isdigit())
                or value == sides.values[side]
            ):
                return sign
    return _numbered(row, name, value, sides)


def _numbered(row: Raw, name: str, value: Any, sides: _Sides) -> float:
    """Return the winner that a number names: the number in a response's name, or its place."""
    if isinstance(value, bool):
        raise _unclear(name, value, sides)
    number = _number(value, name) if isinstance(value, (int, float, Cell)) else None
    # response_0 and response_1 are numbered; of others the file shows whether 1 is the first or the second.
    start = 0 if sides.ends == ("0", "1") and not sides.names[0].endswith("]") else about_of(row).counts_from
    if number is not None and start is None and about_of(row).numbers_clash:
        raise RowError(
            "which response is better",
            f"field {name!r} holds 0, and 2 in other rows: one of them is no response; write the responses' names there",
        )
    if number is not None and start is None and number == 1:
        raise RowError(
            "which response is better",
            f"field {name!r} is 1 here and never 0 or 2 in the first rows, so it may name {sides.names[0]!r} or "
            f"{sides.names[1]!r}; rename the responses to response_0 and response_1, or write their names there",
        )
    places = (0, 1) if start == 0 or (start is None and number == 0) else (1, 2)
    if number not in places:
        raise _unclear(name, value, sides)
    return -1 if number == places[0] else 1


def _unclear(name: str, value: Any, sides: _Sides) -> RowError:
    names = " or ".join(map(repr, sides.names))
    return RowError("which response is better", f"field {name!r} is {kind_of(value)} ({value!r}); expected {names}, or tie")


def _number(value: Any, name: str) -> float:
    try:
        if isinstance(value, bool) or not abs(number := float(value)) < float("inf"):
            raise ValueError
    except (TypeError, ValueError):
        what = NULL if value is None else f"{kind_of(value)} ({value!r})"
        raise RowError("scores", f"field {name!r} is {what}; expected a number") from None
    return number


def _only(value: Any) -> Any:
    """Return the only turn of a list of turns as texts, also as JSON (lmsys-arena); anything else unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        with suppress(ValueError):
            parsed = parse_json(value)
            value = parsed if isinstance(parsed, list) and parsed and all(isinstance(p, str) for p in parsed) else value
    if isinstance(value, list) and value and all(isinstance(turn, str) for turn in value):
        if len(value) > 1:
            raise RowError(
                "more than the last response differs",
                f"{len(value)} turns, in each of which the responses differ; expected one, or the shared turns in 'prompt'",
            )
        return value[0]
    return value
