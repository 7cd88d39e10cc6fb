"""Further arguments of a chat template, such as ``enable_thinking``: read, checked, and as a template's own defaults."""

from __future__ import annotations

import json
from collections.abc import Mapping
from keyword import iskeyword
from typing import Any

from lite_dil.base.errors import UserError
from lite_dil.base.strict_json import has_constant, parse_json
from lite_dil.data.files import RowError
from lite_dil.data.messages import kind_of

FIELD = "chat_template_kwargs"
FLAG = "--chat-template-kwargs"
_EXAMPLE = '{"enable_thinking": false}'
# Arguments of transformers' apply_chat_template, and variables that it sets.
RESERVED = {
    *("self", "messages", "conversation", "conversations", "tools", "chat_template", "add_generation_prompt"),
    *(
        "continue_final_message",
        "tokenize",
        "sanitize_control_tokens",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
    ),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "bos_token", "eos_token", "unk_token", "pad_token"),
    *("strftime_now", "raise_exception"),
}


def parse_arguments(text: str | None) -> dict[str, Any]:
    """Return the arguments that the option holds as a JSON object. Raises UserError."""
    return _checked(text, FLAG, UserError) if text else {}


def canonical(text: str | None) -> str | None:
    """Return the option's value in one spelling, by which runs are compared; None for no arguments."""
    found = parse_arguments(text)
    return json.dumps(found, sort_keys=True, ensure_ascii=False) if found else None


def read_arguments(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a row's own arguments, an object or its JSON text; None if it has none. Raises RowError."""
    value = row.get(FIELD)
    if value is None or value == "":
        return None
    return _checked(value, f"field {FIELD!r}", lambda text: RowError(FIELD, text)) or None


def _checked(value: Any, where: str, error: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = parse_json(value)
            if has_constant(value):
                raise ValueError("NaN and Infinity are not JSON")
        except ValueError as problem:
            raise error(f"{where}: not valid JSON ({problem}); expected an object such as {_EXAMPLE}") from None
    if not isinstance(value, dict):
        raise error(f"{where} is {kind_of(value)}; expected a JSON object such as {_EXAMPLE}")
    if bad := [name for name in value if not name.isidentifier() or iskeyword(name) or name in ("none", "true", "false")]:
        raise error(f"{where}: {bad[0]!r} is not a name that a template can read")
    if taken := sorted(RESERVED & value.keys()):
        raise error(f"{where}: {', '.join(taken)} cannot be set; it takes the template's own variables, such as {_EXAMPLE}")
    return value


def with_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    """Return a chat template whose variables have the values that training gave them, whatever a caller sets.

    For what other programs read, an exported tokenizer or a GGUF file: they give no arguments, or their own.
    """
    lines = (
        f"{{%- set {name} = {_literal(value)} %}}\n"  # trim_blocks takes the line feed away
        for name, value in sorted(arguments.items())
    )
    return "".join(lines) + template


def _literal(value: Any) -> str:
    """Return a JSON value as a Jinja expression."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_literal(name)}: {_literal(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)
