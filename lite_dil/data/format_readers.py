"""Turn a row of any format into a draft: its prompt, its responses, and the sign of each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from lite_dil.base.errors import nearest
from lite_dil.base.signs import CHOSEN, REJECTED
from lite_dil.data.files import Cell, RowError
from lite_dil.data.messages import Completion, Message, kind_of, read_answer, read_messages, read_text, read_tools

Raw = Mapping[str, Any]


class Draft(NamedTuple):
    """A row's content before it is checked: a prompt, its responses, the sign of each, tools and template arguments.

    `note` says what was changed in the row, in the same words for all such rows.
    """

    prompt: str | list[Message]
    answers: tuple[Completion, ...]
    signs: tuple[int, ...]
    tools: list[dict[str, Any]] | None = None
    note: str = ""
    labelled: bool = False  # the sign comes from a label
    arguments: dict[str, Any] | None = None


PAIR = (CHOSEN, REJECTED)
HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_MARK = re.compile(r"\n\n(Human|Assistant):")
# Names in use for lists of responses, the text of one, its score and its rank.
LISTS = ("responses", "completions", "answers", "candidates", "generations", "outputs")
_TEXTS = ("response", "completion", "answer", "text", "content", "output", "generation")
SCORE_FIELDS = ("score", "overall_score", "rating", "reward")
QUESTIONS = ("prompt", "instruction", "question", "query")


def is_pair(row: Raw) -> bool:
    """Return whether a row has both responses of a pair."""
    return "chosen" in row and "rejected" in row


def of_preference(row: Raw) -> Draft:
    """Read a pair in TRL's form: the prompt is a field, or the shared start of both responses. Raises RowError."""
    _need(row, ("chosen", "rejected"))
    tools, sides = read_tools(row), [row["chosen"], row["rejected"]]
    if "prompt" not in row and all(isinstance(side, str) for side in sides):
        return _split_text(*sides)
    if all(isinstance(side, list) and len(side) > 1 for side in sides):  # whole conversations, the prompt among them
        draft = _split_messages(read_messages(sides[0], "chosen"), read_messages(sides[1], "rejected"), tools)
        if "prompt" in row:
            _same_prompt(row["prompt"], draft)
        return draft
    _need(row, ("prompt",))
    prompt, *answers = _explicit(row["prompt"], {"chosen": sides[0], "rejected": sides[1]})
    draft = Draft(prompt, tuple(answers), PAIR, tools)
    return _without_prompt(draft) if isinstance(prompt, str) else draft


def _explicit(prompt: Any, answers: dict[str, Any]) -> list[Any]:
    """Return the prompt and the responses: text if all of them are text, else messages and the assistant's messages."""
    if isinstance(prompt, str) and all(isinstance(answer, str) for answer in answers.values()):
        return [read_text(prompt, "prompt"), *(read_text(answer, field) for field, answer in answers.items())]
    if isinstance(prompt, str):
        if bad := next((field for field, answer in answers.items() if not isinstance(answer, (str, list, dict))), None):
            read_text(answers[bad], bad)
        prompt = [{"role": "user", "content": prompt}]
    elif not isinstance(prompt, list):
        read_text(prompt, "prompt")
    messages = read_messages(prompt, "prompt")
    return [messages, *(read_answer(answer, field) for field, answer in answers.items())]


def _same_prompt(prompt: Any, draft: Draft) -> None:
    """Raise RowError if the field 'prompt' is not what the two conversations begin with."""
    messages = draft.prompt
    if isinstance(prompt, str):
        same = any(message["content"].strip() == prompt.strip() for message in messages if isinstance(message, dict))
    else:
        same = read_messages(prompt, "prompt") == messages
    if not same:
        raise RowError("contradictory prompt", "'chosen' and 'rejected' begin with another prompt than field 'prompt'")


def _without_prompt(draft: Draft) -> Draft:
    """Remove a text prompt from responses that repeat it; a response continues the prompt."""
    assert isinstance(draft.prompt, str)
    prompt = draft.prompt.rstrip()

    def repeated(answer: Completion) -> bool:
        """Return whether a response begins with the prompt's whole words, not only its letters."""
        rest = str(answer).removeprefix(prompt)
        return len(rest) < len(str(answer)) and (not rest or rest[0].isspace() or not prompt[-1].isalnum())

    repeats = [bool(prompt) and repeated(answer) for answer in draft.answers]
    if all(repeats):
        answers = tuple(str(answer)[len(prompt) :] for answer in draft.answers)
        return draft._replace(prompt=prompt, answers=answers, note="responses that began with the whole prompt: removed it")
    if any(repeats):
        raise RowError(
            "prompt in one response",
            f"{'chosen' if repeats[0] else 'rejected'!r} begins with the whole prompt and the other response does not; "
            "expected responses that continue the prompt without repeating it",
        )
    return draft


def _split_messages(chosen: list[Message], rejected: list[Message], tools: list[dict[str, Any]] | None = None) -> Draft:
    """Split two conversations after the last shared message; one message must remain in each."""
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == len(chosen) == len(rejected):
        raise RowError("identical responses", "'chosen' and 'rejected' are the same conversation: no preference to learn")
    if not shared:
        raise RowError("no shared prompt", "'chosen' and 'rejected' have no common first message, so there is no prompt")
    if len(chosen) != len(rejected):
        raise RowError(
            "different numbers of turns",
            f"'chosen' has {len(chosen)} messages and 'rejected' {len(rejected)}, of which the first {shared} are the same; "
            "expected conversations that differ only in the last response",
        )
    if shared < len(chosen) - 1:
        raise RowError(
            "more than the last response differs",
            f"'chosen' and 'rejected' differ from message {shared + 1} of {len(chosen)} on; expected only the last to differ",
        )
    answers = (read_answer(chosen[shared:], "chosen"), read_answer(rejected[shared:], "rejected"))
    return Draft(chosen[:shared], answers, PAIR, tools)


def _split_text(chosen: str, rejected: str) -> Draft:
    """Split two plain texts at their last shared assistant mark, or before the first word that differs."""
    read_text(chosen, "chosen"), read_text(rejected, "rejected")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (one, other) in pairs if one != other), min(len(chosen), len(rejected)))
    mark = chosen.rfind(_ASSISTANT, 0, shared)
    if mark >= 0 and mark + len(_ASSISTANT) <= shared:
        at, note = mark + len(_ASSISTANT), ""
    else:
        if _MARK.search(f"\n\n{chosen.lstrip()}"):
            raise RowError("no shared prompt", "'chosen' and 'rejected' are transcripts of different prompts")
        # Never split a word: it belongs to the responses.
        at = max(chosen.rfind(" ", 0, shared), chosen.rfind("\n", 0, shared))
        note = "prompts guessed: the shared start of both texts, up to the last whole word"
    if at <= 0 or not chosen[:at].strip():
        raise RowError("no shared prompt", "there is no 'prompt', and 'chosen' and 'rejected' share no start")
    return Draft(chosen[:at], (chosen[at:], rejected[at:]), PAIR, None, note)


def _transcript(value: Any, field: str) -> list[Message]:
    text = f"\n\n{read_text(value, field).lstrip()}"
    first, *parts = _MARK.split(text)
    if first.strip() or not parts:
        raise RowError(
            "no transcript", f"field {field!r} does not begin with 'Human:'; expected a transcript of Human: and Assistant:"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def of_hh(row: Raw) -> Draft:
    """Read a pair of raw HH transcripts. Raises RowError."""
    _need(row, ("chosen", "rejected"))
    return _split_messages(_transcript(row["chosen"], "chosen"), _transcript(row["rejected"], "rejected"))


def of_sharegpt(row: Raw) -> Draft:
    """Read a ShareGPT or LLaMA-Factory conversation: a pair next to it, or its last turn as the response. Raises RowError."""
    _need(row, ("conversations",))
    messages, tools = read_messages(row["conversations"], "conversations"), read_tools(row)
    if row.get("system"):
        messages = [{"role": "system", "content": read_text(row["system"], "system")}, *messages]
    if row.get("chosen") is not None or row.get("rejected") is not None:
        _need(row, ("chosen", "rejected"))
        return Draft(messages, (read_answer(row["chosen"], "chosen"), read_answer(row["rejected"], "rejected")), PAIR, tools)
    return _last_turn(messages, row, "conversations", tools)


def _last_turn(messages: list[Message], row: Raw, field: str, tools: list[dict[str, Any]] | None) -> Draft:
    """Take the last message as the response, chosen unless a label says otherwise."""
    if len(messages) < 2:
        raise RowError(
            "no prompt", f"field {field!r} has {len(messages)} message; expected a prompt and the assistant's response"
        )
    answer = read_answer(messages[-1:], f"{field}[{len(messages) - 1}]")
    # A label that is not boolean may mean anything, for example a topic.
    name = next((n for n in ("kto_tag", "label") if n in row and (n == "kto_tag" or isinstance(row[n], bool))), "")
    return Draft(messages[:-1], (answer,), (_label(row, name) if name else CHOSEN,), tools, labelled=bool(name))


def of_messages(row: Raw) -> Draft:
    """Read a conversation whose last turn is the response. Raises RowError."""
    _need(row, ("messages",))
    return _last_turn(read_messages(row["messages"], "messages"), row, "messages", read_tools(row))


def of_unpaired(row: Raw) -> Draft:
    """Read a single response with a label. Raises RowError."""
    _need(row, ("prompt", "completion", "label"))
    prompt, answer = _explicit(row["prompt"], {"completion": row["completion"]})
    return Draft(prompt, (answer,), (_label(row, "label"),), read_tools(row), labelled=True)


def of_completion(row: Raw) -> Draft:
    """Read a prompt and a good response. Raises RowError."""
    _need(row, ("prompt", "completion"))
    if "label" in row:
        raise RowError("mixed formats", "the row has a 'label', which other rows lack; keep one format in a file")
    prompt, answer = _explicit(row["prompt"], {"completion": row["completion"]})
    return Draft(prompt, (answer,), (CHOSEN,), read_tools(row))


def _label(row: Raw, name: str) -> int:
    value = row[name]
    if isinstance(value, (bool, int, float)) and value in (0, 1):  # a table column with nulls turns true into 1.0
        return CHOSEN if value else REJECTED
    if isinstance(value, Cell) and (word := value.strip().lower()) in ("true", "false", "1", "0"):
        return CHOSEN if word in ("true", "1") else REJECTED
    raise RowError(
        "label",
        f"field {name!r} is {kind_of(value)} ({value!r}); expected true (1) for a good response, false (0) for a bad one",
    )


def of_alpaca(row: Raw) -> Draft:
    """Read an Alpaca row: a pair, a ranked list, or one response. Raises RowError."""
    _need(row, ("instruction",))
    question = read_text(row["instruction"], "instruction")
    if row.get("input"):
        question += f"\n{read_text(row['input'], 'input')}"
    messages: list[Message] = []
    if row.get("system"):
        messages.append({"role": "system", "content": read_text(row["system"], "system")})
    for number, turn in enumerate(row.get("history") or []):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise RowError("wrong type", f"history[{number}] is {kind_of(turn)}; expected [question, response]")
        messages.append({"role": "user", "content": read_text(turn[0], f"history[{number}][0]")})
        messages.append({"role": "assistant", "content": read_text(turn[1], f"history[{number}][1]")})
    messages.append({"role": "user", "content": question})
    if is_pair(row):
        return Draft(messages, (read_answer(row["chosen"], "chosen"), read_answer(row["rejected"], "rejected")), PAIR)
    _need(row, ("output",))
    if isinstance(row["output"], list):  # ranked, the best first
        if len(row["output"]) < 2:
            raise RowError(
                "too few responses", f"field 'output' has {len(row['output'])} responses; expected at least two, best first"
            )
        best, worst = row["output"][0], row["output"][-1]
        return Draft(messages, (read_text(best, "output[0]"), read_text(worst, f"output[{len(row['output']) - 1}]")), PAIR)
    labelled = "kto_tag" in row
    return Draft(
        messages, (read_text(row["output"], "output"),), (_label(row, "kto_tag") if labelled else CHOSEN,), labelled=labelled
    )


def of_ranked(row: Raw) -> Draft:
    """Read several scored responses as a pair, the best against the worst. Raises RowError."""
    question = next((name for name in QUESTIONS if name in row), None)
    field = next((name for name in LISTS if isinstance(row.get(name), list)), None)
    if question is None or field is None:
        lacking = "prompt" if question is None else "responses"
        raise RowError(f"no field {lacking!r}", f"no field {lacking!r}; the row has {', '.join(map(str, row))}")
    scored = [(_score(row, item, field, i), i) for i, item in enumerate(row[field])]
    if len(scored) < 2:
        raise RowError(
            "too few responses", f"field {field!r} has {len(scored)} responses; expected at least two with their scores"
        )
    (best, first), (worst, last) = max(scored, key=lambda s: (s[0], -s[1])), min(scored)
    if best == worst:
        raise RowError("identical scores", f"all {len(scored)} responses have the same score: no preference to learn")
    prompt = row[question]
    if isinstance(prompt, str):
        prompt = _transcript_prompt(prompt) or [{"role": "user", "content": read_text(prompt, question)}]
    texts = tuple(read_answer(_text_of(row[field][i]), f"{field}[{i}]") for i in (first, last))
    return Draft(read_messages(prompt, question), texts, PAIR, read_tools(row))


def _transcript_prompt(text: str) -> list[Message] | None:
    """Read a prompt that is an HH transcript ending at the assistant's turn."""
    if not f"\n\n{text.lstrip()}".startswith(HUMAN) or not text.rstrip().endswith(_ASSISTANT):
        return None
    return _transcript(text, "prompt")[:-1]


def _text_of(item: Any) -> Any:
    if isinstance(item, dict) and "role" not in item:
        return next((item[name] for name in _TEXTS if name in item), item)
    return item


def _score(row: Raw, item: Any, field: str, number: int) -> float:
    """Return a response's score: its own, or from a parallel list; a rank is negated."""
    for name in (*SCORE_FIELDS, "rank"):
        if isinstance(item, dict) and name in item:
            value, where = item[name], f"{field}[{number}].{name}"
        elif isinstance(row.get(f"{name}s"), list):
            if len(row[f"{name}s"]) != len(row[field]):
                raise RowError("scores", f"{len(row[field])} responses in {field!r}, but {len(row[f'{name}s'])} in '{name}s'")
            value, where = row[f"{name}s"][number], f"{name}s[{number}]"
        else:
            continue
        try:
            if isinstance(value, bool) or not abs(score := float(value)) < float("inf"):
                raise ValueError
        except (TypeError, ValueError):
            raise RowError("scores", f"{where} is {kind_of(value)} ({value!r}); expected a number") from None
        return -score if name == "rank" else score
    raise RowError(
        "scores",
        f"{field}[{number}] has no score; expected one of {', '.join((*SCORE_FIELDS, 'rank'))} there, or a list "
        f"of them next to {field!r}",
    )


# --- helpers ---


def _need(row: Raw, fields: Iterable[str]) -> None:
    """Raise RowError if a field is missing or null."""
    for name in fields:
        if name not in row:
            near = nearest(name, set(map(str, row)) - set(fields), cutoff=0.75)
            has = f"the row has {', '.join(map(str, row)) or 'none'}"
            hint = f"is it {near!r}? Then --columns {name}={near}" if near else has + _questions_and_answers(row)
            raise RowError(f"no field {name!r}", f"no field {name!r}; {hint}")
        if row[name] is None:
            raise RowError("wrong type", f"field {name!r} is null; expected it in every row")


def _questions_and_answers(row: Raw) -> str:
    """Return a hint for rows with a question and a response under other names, the most common other format."""
    question = next((name for name in (*QUESTIONS, "input", "problem") if isinstance(row.get(name), str)), "")
    answer = next((name for name in (*_TEXTS, "solution", "reply", "target") if isinstance(row.get(name), str)), "")
    if not question or not answer or question == "prompt":
        return ""
    return f"; if these are demonstrations: --columns prompt={question},completion={answer}"
