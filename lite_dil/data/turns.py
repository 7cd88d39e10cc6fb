"""Find a response in a conversation's rendering: where it parts from the prompt that generation feeds, and where it ends."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Set
from typing import Any, NamedTuple

from lite_dil.data.blocks import REASONING, enclosed, opened, pieces, tag_start
from lite_dil.data.files import RowError
from lite_dil.data.messages import Message

MARK = "\ue000"  # a private character that stands for a message's content
# Arguments that make templates close the block of reasoning which their generation prompt opens.
_NO_REASONING = ({"enable_thinking": False}, {"thinking": False})


class ResponseTurn(NamedTuple):
    """A response to be found.

    Attributes:
        messages: the prompt.
        message: the response.
        before: the prompt's text, up to where generation begins.
        lay_out: renders messages; takes `add_generation_prompt` and `arguments`, which replace those below.
        arguments: the row's own arguments of the template.
    """

    messages: list[Message]
    message: Message
    before: str
    lay_out: Callable[..., str]
    arguments: Mapping[str, Any]

    @property
    def calls(self) -> bool:
        """Whether the response calls tools; it need not say anything then."""
        return bool(self.message.get("tool_calls"))

    def whole(self, **fields: str) -> str:
        """Return the text of the whole conversation, with some fields of the response replaced."""
        return self.lay_out([*self.messages, {**self.message, **fields}], add_generation_prompt=False)


def turn_text(turn: ResponseTurn, ending: str | None, tokens: Set[str]) -> tuple[str, int | None, str]:
    """Return the text that continues `turn.before`, where its content ends (None: the text is cut already), and a note.

    Args:
        ending: what the template prints behind a response, if known.
        tokens: the texts of the tokenizer's added tokens.

    Raises RowError if the response cannot be told from what the template prints around it.
    """
    whole, content = turn.whole(), turn.message["content"].strip()
    said = pieces(content)[-1].text.strip()
    end, cut = _content_end(turn, whole, said, ending, tokens)
    if turn.calls:
        latest, at = end, whole.find(said, _common(turn.before, whole)) if said else -1
    else:
        printed = whole[:end].rstrip()
        latest = len(printed) - len(said)
        at = len(printed) - len(content) if printed.endswith(content) else latest  # else reasoning is printed otherwise
    if whole.startswith(turn.before):
        lead, start, note = "", len(turn.before), _closed_there(turn.before, whole, len(turn.before), at)
    else:
        lead, start, note = _parted(turn, whole, at)
    if start > latest:
        raise RowError("chat template", "the chat template changes the text of the response")
    if cut:
        return lead + whole[start:end], None, note
    return lead + whole[start:], len(lead) + end - start, note


def _content_end(turn: ResponseTurn, whole: str, said: str, ending: str | None, tokens: Set[str]) -> tuple[int, bool]:
    """Return where the response's content ends in `whole`, or, with True, where its end token does."""

    def fits(ending: str | None) -> bool:
        if ending is None or not whole.endswith(ending):
            return False
        return turn.calls or whole[: len(whole) - len(ending)].rstrip().endswith(said)

    if not fits(ending) and not turn.calls:
        marked = turn.whole(content=MARK)
        ending = marked.rpartition(MARK)[2] if MARK in marked else None
    if fits(ending):
        return len(whole) - len(ending or ""), False
    if not turn.calls:
        raise RowError("chat template", "the chat template changes the text of the response")
    if token := added_end(whole, tokens):
        return whole.rindex(token) + len(token), True
    raise RowError("chat template", "the chat template ends tool calls differently from other responses")


def added_end(text: str, tokens: Set[str]) -> str:
    """Return the added token that ends a text, up to white space, or nothing."""
    text = text.rstrip()
    return next((text[-n:] for n in sorted(set(map(len, tokens)), reverse=True) if text[-n:] in tokens), "")


def _parted(turn: ResponseTurn, whole: str, at: int) -> tuple[str, int, str]:
    """Return what closes a block that the generation prompt opened, where the response begins in `whole`, and a note.

    The conversation does not begin with the whole prompt: the template prints something for generation that it does not print
    in front of a given response.

    Args:
        at: where what the response says begins in `whole`; negative if it only calls tools.
    """
    before = turn.before
    start = _shared(before, whole, at if at >= 0 else len(whole))
    generation = _common(turn.lay_out(turn.messages, add_generation_prompt=False), before)
    if start < generation:
        raise RowError("chat template", "the chat template renders the prompt differently once a response follows it")
    block, rest = opened(before), whole[start:]
    if block and rest.lstrip().startswith(block.opener):
        return "", start + rest.index(block.opener) + len(block.opener), ""
    if not before[start:].strip() or (block and block.closer in rest and block.opener not in rest.partition(block.closer)[0]):
        return "", start, _closed_there(before, whole, start, at)
    if block is None:
        lead, found = _after_closed(before, whole, start, at)
        if found >= 0:
            return "", found, ""
        closing = _own_closing(turn, whole[start:])
        if closing is None:
            raise RowError(
                "chat template",
                f"the chat template prints {before[start:].strip()[:40]!r} for generation and {lead.strip()[:40]!r} in front "
                "of this response",
            )
        return closing, start, _closed_note(before[start:].strip(), closing)
    closing = _own_closing(turn, rest)
    if closing is None:
        closing = _closed_prompt(turn, block.closer) or f"{block.closer}\n\n"
    return closing, start, _closed_note(block.opener, closing)


def _after_closed(before: str, whole: str, start: int, at: int) -> tuple[str, int]:
    """Return what the conversation prints before the response, and where the response begins after a complete header.

    The prompt is complete: it opens nothing that it does not close. The place is negative if what the conversation prints
    instead is something else.
    """
    tail, rest = before[start:], whole[start:]
    block, begin = opened(before[:start]), start
    if not block or block.closer not in tail:
        block = enclosed(tail)
        begin = start + rest.index(block.opener) + len(block.opener) if block and block.opener in rest else start
        block = block if block and rest.lstrip().startswith(block.opener) else None
    if block:  # both have one here, and the prompt's is closed
        empty = re.match(rf"\s*{re.escape(block.closer)}\s*", whole[begin:])
        if empty is None:
            raise RowError(
                "reasoning after a closed block",
                f"the response has reasoning in a {block.opener!r} block, but the generation prompt closes that block; "
                "remove the reasoning, or let the template open it (--chat-template-kwargs)",
            )
        return "", begin + empty.end()
    lead = whole[start:at] if at >= start else ""
    if lead and tail.endswith(lead):
        return lead, start + len(lead)
    if lead.lstrip().startswith(header := tail.strip()):  # the same header after other white space
        begin = start + lead.index(header) + len(header)
        return lead, begin + _common(tail[len(tail.rstrip()) :], whole[begin:])
    return lead, -1 if lead.strip() else start


def _own_closing(turn: ResponseTurn, rest: str) -> str | None:
    """Return how the template itself closes what its generation prompt opened: what it prints behind empty reasoning."""
    if any(turn.message.get(name) for name in REASONING):
        return None
    try:
        filled = turn.whole(reasoning_content=MARK)
    except RowError:
        return None
    inner = filled.removeprefix(turn.before)
    if inner == filled or not inner.lstrip().startswith(MARK) or not inner.endswith(rest):
        return None
    return inner[: len(inner) - len(rest)].replace(MARK, "", 1)


def _closed_prompt(turn: ResponseTurn, closer: str) -> str:
    """Return how the template closes the block if it is told to print no reasoning, or nothing."""
    for arguments in _NO_REASONING:
        try:
            prompt = turn.lay_out(turn.messages, add_generation_prompt=True, arguments={**turn.arguments, **arguments})
        except RowError:
            continue
        start = _shared(turn.before, prompt, len(prompt))
        if not turn.before[start:].strip() and prompt[start:].lstrip().startswith(closer):
            return prompt[start:]
    return ""


def _shared(one: str, other: str, limit: int) -> int:
    """Return the length of what two texts share at their start, up to `limit`, without half a tag."""
    at = min(_common(one, other), limit)
    return min(tag_start(one, at), tag_start(other, at))


def _common(one: str, other: str) -> int:
    """Return the length of the longest common start of two texts."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _closed_there(before: str, whole: str, start: int, at: int) -> str:
    """Return the note on a block open at the end of `before` that `whole` closes at `start`, or nothing."""
    block = opened(before)
    if not block or not whole[start:].lstrip().startswith(block.closer):
        return ""
    return _closed_note(block.opener, whole[start:at] if at > start else block.closer)


def _closed_note(opener: str, closing: str) -> str:
    return (
        f"the generation prompt opens {opener!r}, which a response does not continue: it is closed at once, with {closing!r}"
    )
