"""Turn a row of any format into a draft: its prompt, its responses, and the sign of each."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any

from lite_dil.base.errors import nearest
from lite_dil.base.signs import CHOSEN, REJECTED
from lite_dil.data.arguments import FIELD
from lite_dil.data.columns import is_word, question_of
from lite_dil.data.draft import PAIR, TIES, Draft, Raw, Tie
from lite_dil.data.files import Cell, RowError
from lite_dil.data.messages import Completion, Message, kind_of, read_answer, read_messages, read_text, read_tools
from lite_dil.data.splitting import is_transcript, split_messages, split_text, transcript, transcript_prompt

# Names in use for lists of responses, the text of one, its score and its rank.
LISTS = ("responses", "completions", "answers", "candidates", "generations", "outputs")
TEXTS = ("response", "completion", "answer", "text", "content", "output", "generation")
SCORE_FIELDS = ("score", "overall_score", "rating", "reward")
QUESTIONS = ("prompt", "instruction", "question", "query")
ID_FIELDS = ("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")
_NOTHING: tuple[Any, ...] = (None, "", [])
_WORDS = (
    *("prompt", "chosen", "rejected", "completion", "messages", "conversations", "instruction", "system", "history", "tools"),
    FIELD,
)
_AGREED = "'chosen_ids' and 'rejected_ids' are the same tokens, as two draws may be: kept"
_REPEATED = "responses that began with the whole prompt: removed it"


def is_pair(row: Raw) -> bool:
    """Return whether a row has both responses of a pair."""
    return row.get("chosen") not in _NOTHING and row.get("rejected") not in _NOTHING


def of_preference(row: Raw) -> Draft:
    """Read a pair in TRL's form: the prompt is a field, or the shared start of both responses. Raises RowError."""
    _need(row, ("chosen", "rejected"))
    tools, sides = read_tools(row), [row["chosen"], row["rejected"]]
    prompted = row.get("prompt") not in _NOTHING
    whole = [isinstance(side, list) and len(side) > 1 for side in sides]  # conversations, the prompt among them
    if all(whole):
        draft = split_messages(read_messages(sides[0], "chosen"), read_messages(sides[1], "rejected"), tools)
        if prompted:
            _same_prompt(row["prompt"], draft)
        return draft
    prompt = row["prompt"] if prompted else _prompt_beside(row, sides, whole)
    if any(whole) and not prompted:
        sides = [side[-1:] if is_whole else side for side, is_whole in zip(sides, whole, strict=True)]
    if (
        prompt is None
        and all(isinstance(side, str) for side in sides)
        and ("prompt" not in row or all(map(is_transcript, sides)))
    ):
        return split_text(sides[0], sides[1], row)
    if prompt is None:
        _need(row, ("prompt",))
        prompt = row["prompt"]
    prompt, *answers = _explicit(prompt, {"chosen": sides[0], "rejected": sides[1]})
    draft = Draft(prompt, tuple(answers), PAIR, tools)
    return _without_prompt(draft) if isinstance(prompt, str) else draft


def _prompt_beside(row: Raw, sides: list[Any], whole: list[bool]) -> list[Any] | None:
    """Return the prompt of two responses without one: the conversation that one of them ends, or the column 'messages'."""
    if any(whole):
        return list(sides[whole.index(True)][:-1])
    turns = row.get("messages")
    if not isinstance(turns, list) or not turns:
        return None
    messages = read_messages(turns, "messages")
    if messages[-1]["role"] != "assistant":
        return turns
    chosen = read_answer(sides[0], "chosen")
    if (
        len(turns) > 1
        and (chosen if isinstance(chosen, str) else chosen["content"]).strip() == messages[-1]["content"].strip()
    ):
        return turns[:-1]
    raise RowError("contradictory prompt", "'messages' ends in another response than 'chosen'; expected the prompt there")


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
        return draft._replace(prompt=prompt, answers=answers, notes=(_REPEATED,))
    if any(repeats):
        raise RowError(
            "prompt in one response",
            f"{'chosen' if repeats[0] else 'rejected'!r} begins with the whole prompt and the other response does not; "
            "expected responses that continue the prompt without repeating it",
        )
    return draft


def of_hh(row: Raw) -> Draft:
    """Read a pair of raw HH transcripts. Raises RowError."""
    _need(row, ("chosen", "rejected"))
    return split_messages(transcript(row["chosen"], "chosen"), transcript(row["rejected"], "rejected"), read_tools(row))


def of_sharegpt(row: Raw) -> Draft:
    """Read a ShareGPT or LLaMA-Factory conversation: a pair next to it, or its last turn as the response. Raises RowError."""
    _need(row, ("conversations",))
    messages, tools = read_messages(row["conversations"], "conversations"), read_tools(row)
    if row.get("chosen") not in _NOTHING or row.get("rejected") not in _NOTHING:
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
    name = _label_of(row)
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


def _label_of(row: Raw) -> str:
    """Return the column that says whether the only response is good; empty if none does."""
    # A label that is not boolean may mean anything, for example a topic.
    return next(
        (n for n in ("kto_tag", "label") if n in row and (n == "kto_tag" or isinstance(row[n], bool) or is_word(row[n]))), ""
    )


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
    prompt = row.get("prompt")
    if (
        isinstance(prompt, str)
        and prompt.strip()
        and prompt.strip() not in question
        and row["instruction"].strip() not in prompt
    ):
        raise RowError(
            "two prompts",
            "'prompt' and 'instruction' are different texts; remove one, or --data-format preference (or completion) reads "
            "'prompt'",
        )
    tools = read_tools(row)
    messages = [*of_turns(row.get("history") or []), {"role": "user", "content": question}]
    if is_pair(row):
        return Draft(messages, (read_answer(row["chosen"], "chosen"), read_answer(row["rejected"], "rejected")), PAIR, tools)
    _need(row, ("output",))
    if isinstance(row["output"], list):  # ranked, the best first
        if len(row["output"]) < 2:
            raise RowError(
                "too few responses", f"field 'output' has {len(row['output'])} responses; expected at least two, best first"
            )
        best, worst = row["output"][0], row["output"][-1]
        return Draft(
            messages, (read_text(best, "output[0]"), read_text(worst, f"output[{len(row['output']) - 1}]")), PAIR, tools
        )
    label = _label_of(row)
    sign = _label(row, label) if label else CHOSEN
    return Draft(messages, (read_text(row["output"], "output"),), (sign,), tools, labelled=bool(label))


def of_turns(turns: Iterable[Any]) -> list[Message]:
    """Return the messages of [question, response] pairs, the column 'history'. Raises RowError."""
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise RowError("wrong type", f"history[{number}] is {kind_of(turn)}; expected [question, response]")
        messages.append({"role": "user", "content": read_text(turn[0], f"history[{number}][0]")})
        messages.append({"role": "assistant", "content": read_text(turn[1], f"history[{number}][1]")})
    return messages


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
        raise Tie("tie", TIES)
    prompt = row[question]
    if isinstance(prompt, str):
        prompt = transcript_prompt(prompt) or [{"role": "user", "content": read_text(prompt, question)}]
    texts = tuple(read_answer(text_of(row[field][i]), f"{field}[{i}]") for i in (first, last))
    return Draft(read_messages(prompt, question), texts, PAIR, read_tools(row))


def text_of(item: Any) -> Any:
    """Return the response in an entry of a list, which may be an object that holds it."""
    if isinstance(item, dict) and "role" not in item:
        return next((item[name] for name in TEXTS if name in item), item)
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


def of_ids(row: Raw) -> Draft:
    """Read a row of token ids, trained as they are: a pair, or one response with or without a label. Raises RowError."""
    pair = "chosen_ids" in row or "rejected_ids" in row
    fields = ID_FIELDS[:3] if pair else (ID_FIELDS[0], ID_FIELDS[3])
    _need(row, fields)
    for name in (*_WORDS, *(ID_FIELDS[3:] if pair else ())):
        if row.get(name) not in _NOTHING:
            raise RowError(
                "beside token ids",
                f"field {name!r} beside {fields[1]!r}: token ids are trained as they are, with nothing else; remove one of "
                "the two, or --data-format preference (or another) reads the text",
            )
    ids = tuple(_read_ids(row[name], name) for name in fields)
    if pair:
        notes = (_AGREED,) if ids[1] == ids[2] else ()
        return Draft("", ("", ""), PAIR, notes=notes, ids=ids)
    label = next((name for name in ("kto_tag", "label") if name in row), "")
    return Draft("", ("",), (_label(row, label) if label else CHOSEN,), labelled=bool(label), ids=ids)


def _read_ids(value: Any, name: str) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not value:
        found = kind_of(value) if value else "empty"
        raise RowError("token ids", f"field {name!r} is {found}; expected a list of one or more token ids")
    for number, each in enumerate(value):
        if isinstance(each, bool) or not isinstance(each, Integral) or each < 0:
            raise RowError("token ids", f"{name}[{number}] is {str(each)[:40]!r}; expected a token id, an integer from 0 on")
    return tuple(map(int, value))


# --- helpers ---


def _need(row: Raw, fields: Iterable[str]) -> None:
    """Raise RowError if a field is missing or null."""
    for name in fields:
        if name in row:
            if row[name] is None:
                raise RowError("wrong type", f"field {name!r} is null; expected it in every row")
            continue
        if empty := getattr(row, "left_out", {}).get(name):
            raise RowError("wrong type", f"field {name!r} is {empty}; expected it in every row")
        near = nearest(name, set(map(str, row)) - set(fields), cutoff=0.75)
        has = f"the row has {', '.join(map(str, row)) or 'none'}"
        hint = f"is it {near!r}? Then --columns {name}={near}" if near else has + _questions_and_answers(row)
        if name == "prompt" and (question := question_of(row)):
            hint = f"is it {question!r}? Then --columns prompt={question}"
        raise RowError(f"no field {name!r}", f"no field {name!r}; {hint}")


def _questions_and_answers(row: Raw) -> str:
    """Return a hint for rows with a question and a response under other names, the most common other format."""
    question = next((name for name in (*QUESTIONS, "input", "problem") if isinstance(row.get(name), str)), "")
    answer = next((name for name in (*TEXTS, "solution", "reply", "target") if isinstance(row.get(name), str)), "")
    if not question or not answer or question == "prompt":
        return ""
    return f"; if these are demonstrations: --columns prompt={question},completion={answer}"
