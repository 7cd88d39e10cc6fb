"""Read chat messages, completions and texts from rows of every format; each function raises RowError for anything else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lite_dil.base.errors import did_you_mean
from lite_dil.base.strict_json import parse_json
from lite_dil.data.blocks import REASONING
from lite_dil.data.files import RowError

ROLES = ("system", "user", "assistant", "tool")
# Their names in ShareGPT and similar formats.
_SPEAKERS = {
    "system": "system",
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function"), "tool"),
}
# Fields of a message that a chat template may read besides role and content.
_KEPT = ("tool_call_id", "name")

Message = dict[str, Any]
# What the assistant says: text, or a whole message if it holds more, such as reasoning or tool calls.
Completion = str | Message


def read_text(value: Any, field: str) -> str:
    """Return `value` if it is text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise RowError("wrong type", f"field {field!r} is {kind_of(value)}; expected text, or chat messages")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(
            "half a character",
            f"field {field!r} holds half of a surrogate pair (\\ud800 to \\udfff), which is not a character",
        ) from None
    return value


def read_messages(value: Any, field: str) -> list[Message]:
    """Return a list of messages, given as role and content or as from and value."""
    if not isinstance(value, list) or not value:
        kind = "empty prompt" if value == [] else "wrong type"
        raise RowError(kind, f"field {field!r} is {kind_of(value)}; expected a list of messages")
    return _joined([_message(message, f"{field}[{index}]") for index, message in enumerate(value)], field)


def _joined(messages: list[Message], field: str) -> list[Message]:
    """Make a message of harmony's analysis channel the reasoning of the assistant's next message."""
    found: list[Message] = []
    analysis = None
    for message in messages:
        channel = message.pop("channel", None)
        if analysis is not None and message["role"] != "assistant":
            break
        if analysis is not None:
            message = {"reasoning_content": analysis, **message}
        analysis = message["content"] if channel == "analysis" and message["role"] == "assistant" else None
        if analysis is None:
            found.append(message)
    if analysis is not None:
        raise RowError("analysis alone", f"field {field!r} has an analysis message without the assistant's message after it")
    return found


def read_answer(value: Any, field: str) -> Completion:
    """Return a completion: text, the assistant's message, or a list with that one message."""
    if isinstance(value, str):
        return read_text(value, field)
    if isinstance(value, list) and not value:
        raise RowError("empty response", f"field {field!r} is an empty list; expected one assistant message")
    messages = read_messages([value] if isinstance(value, dict) else value, field)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        raise RowError(
            "not one response",
            f"field {field!r} has the roles {[m['role'] for m in messages]}; expected one assistant message, with everything "
            "before it in 'prompt'",
        )
    return messages[0]["content"] if messages[0].keys() == {"role", "content"} else messages[0]


def read_tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return a row's tools, given as a list of JSON schemas or its JSON text, or None if it has none."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = parse_json(tools)
        except ValueError as error:
            raise RowError("tools", f"field 'tools' is not valid JSON ({error})") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("tools", f"field 'tools' is {kind_of(tools)}; expected a list of JSON schemas")
    return tools


def is_message(value: Any, role: str = "") -> bool:
    """Return whether a value looks like a message of a known speaker; with `role`, of that one."""
    if not isinstance(value, dict) or not {"content", "value", "tool_calls"} & value.keys():
        return False
    speaker = value.get("from") if value.get("role") is None else value["role"]
    known = _SPEAKERS.get(speaker.lower(), "") if isinstance(speaker, str) else ""
    if speaker == "function_call":
        known = "assistant"
    return known == role if role else bool(known)


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise RowError("wrong type", f"{where} is {kind_of(value)}; expected an object with 'role' and 'content'")
    if value.get("role") is None and value.get("from") is not None:  # a table has null where other rows have roles
        return _spoken(value, where)
    calls = bool(value.get("tool_calls"))
    if lacking := {"role", "content"} - value.keys() - ({"content"} if calls else set()):
        names = " and no ".join(map(repr, sorted(lacking)))
        raise RowError("message without role or content", f"{where} has no {names}; expected 'role' and 'content'")
    if value["role"] not in ROLES:
        known = _SPEAKERS.get(str(value["role"]).lower())
        hint = f" (did you mean {known!r}?)" if known else did_you_mean(str(value["role"]).lower(), ROLES)
        raise RowError("unknown role", f"{where} has role {value['role']!r}{hint}; expected one of {', '.join(ROLES)}")
    content = "" if calls and value.get("content") is None else _content(value["content"], f"{where}.content")
    return {"role": value["role"], "content": content, **_further(value, where)}


def _further(value: Mapping[str, Any], where: str) -> Message:
    """Return what a message holds besides its role and content, under its own names."""
    found = {name: value[name] for name in (*_KEPT, "channel") if value.get(name) is not None}
    for name in REASONING:
        if value.get(name) is not None:
            found[name] = read_text(value[name], f"{where}.{name}")
    if value.get("tool_calls"):
        found["tool_calls"] = _calls(value["tool_calls"], f"{where}.tool_calls")
    return found


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as objects; OpenAI's form has them as JSON text."""
    if not isinstance(value, list):
        raise RowError("tools", f"{where} is {kind_of(value)}; expected a list of tool calls")
    found = []
    for index, call in enumerate(value):
        place = f"{where}[{index}]"
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("tools", f"{place} has no function with a name; expected 'function' with 'name' and 'arguments'")
        function = {name: part for name, part in function.items() if part is not None or name == "arguments"}
        if "arguments" in function:
            function["arguments"] = _call_arguments(function["arguments"], f"{place}.arguments")
        whole = {name: part for name, part in call.items() if part is not None}
        found.append(whole | {"function": function} if "function" in call else function)
    return found


def _call_arguments(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.strip() else {}
        except ValueError as error:
            raise RowError("tools", f"{where} is not valid JSON ({error}); expected an object, or its JSON text") from None
    if value is not None and not isinstance(value, dict):
        raise RowError("tools", f"{where} is {kind_of(value)}; expected an object, or its JSON text")
    return value or {}


def _spoken(value: Mapping[str, Any], where: str) -> Message:
    """Read a ShareGPT message: from and value; 'function_call' holds the calls as JSON."""
    if "value" not in value:
        raise RowError("message without role or content", f"{where} has no 'value'; expected 'from' and 'value'")
    speaker, text = value["from"], read_text(value["value"], f"{where}.value")
    if speaker == "function_call":
        try:
            calls = parse_json(text)
        except ValueError as error:
            raise RowError("tools", f"{where}.value is not valid JSON ({error}); expected name and arguments") from None
        calls = [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]
        return {"role": "assistant", "content": "", **_further({**value, "tool_calls": calls}, where)}
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        raise RowError("unknown role", f"{where} is from {speaker!r}; expected one of {', '.join(_SPEAKERS)}")
    return {"role": _SPEAKERS[speaker], "content": text, **_further(value, where)}


def _content(value: Any, where: str) -> str:
    """Return a message's text, which may be a list of text blocks."""
    if not isinstance(value, list):
        return read_text(value, where)
    texts = []
    for index, block in enumerate(value):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind != "text":
            found = f"of type {kind!r}" if kind else kind_of(block)
            raise RowError("not text", f"{where}[{index}] is {found}; only text can be trained on")
        text = block.get("value") if block.get("text") is None else block["text"]  # LLaMA-Factory v1 calls it value
        texts.append(read_text(text, f"{where}[{index}].text"))
    return "".join(texts)


def kind_of(value: Any) -> str:
    """Return a description of a JSON value's type."""
    if value is None:
        return "null"
    if isinstance(value, (list, dict)) and not value:
        return f"an empty {'list' if isinstance(value, list) else 'object'}"
    if isinstance(value, str):  # a CSV file's texts are of a type of their own
        return "text"
    if isinstance(value, float):  # NaN of a JSON file has a type of its own too
        return "a number"
    names = {bool: "a boolean", int: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
