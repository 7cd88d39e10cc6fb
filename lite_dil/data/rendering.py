"""Render prompts, responses and their ends as the text that a model reads; all other code goes through this module."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Set
from functools import cached_property, partial
from typing import Any

from lite_dil.base.errors import UserError, first_line
from lite_dil.data.blocks import MARKS, REASONING, pieces
from lite_dil.data.files import RowError
from lite_dil.data.messages import Completion, Message
from lite_dil.data.turns import MARK, ResponseTurn, added_end, turn_text

# With a template that prints today's date, a run resumed tomorrow would see other tokens. This is Llama 3's own fallback, in
# the format that the template asks for. The line feed belongs to the tag, so that the template still starts a line.
_DATE = {"%Y": "2024", "%y": "24", "%m": "07", "%d": "26", "%b": "Jul", "%B": "July", "%A": "Friday", "%a": "Fri"}
_CLOCK = {"%H": "00", "%I": "12", "%M": "00", "%S": "00", "%p": "AM"}
_REPLACED = "".join(f"|replace('{code}', '{text}')" for code, text in (_DATE | _CLOCK).items())
FIXED_DATE = f"{{%- macro strftime_now(format) -%}}{{{{ format{_REPLACED} }}}}{{%- endmacro %}}\n"

_THOUGHT = "\ue001"  # stands for a message's reasoning, as MARK does for its content

Tools = list[dict[str, Any]] | None
Arguments = Mapping[str, Any] | None


class Rendering:
    """Renders text and chat messages for one tokenizer.

    Training, chat, generation, sampling, reports and exports all use it, so that a model reads what it was trained on.

    Args:
        arguments: further arguments of the chat template, such as `enable_thinking`; a row's own come on top of them.

    Attributes:
        notes: what the owner of the rows should know about those rendered since it was last emptied.
    """

    def __init__(self, tokenizer: Any, arguments: Arguments = None) -> None:
        self.tokenizer, self.arguments = tokenizer, dict(arguments or {})
        self.notes: set[str] = set()
        tokens = tokenizer.added_tokens_decoder.values()
        self._special = {token.content for token in tokens if token.special} | {tokenizer.eos_token}
        # White space may be a token too (Gemma's line feeds); it ends nothing.
        self._added = {token.content for token in tokens if token.content.strip()} | {tokenizer.eos_token}
        self._lengths = sorted(set(map(len, self._added)), reverse=True)
        self._endings: dict[str, str | None] = {}
        self._tools_shown = False

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    @cached_property
    def control(self) -> set[str]:
        """The texts of tokens that open or end a turn; no message may contain one."""
        turns = [{"role": "user", "content": MARK}, {"role": "assistant", "content": MARK}]
        try:
            frame = self.lay_out(turns, None, add_generation_prompt=False) if self.chats else ""
        except RowError:  # a template with demands of its own: the special tokens must do
            frame = ""
        # A word may be an added token too, and a template may print it; a mark of a turn is not a word.
        return self._special | ({token for token in self._added if token in frame and not token.strip().isalnum()} - MARKS)

    @cached_property
    def template_text(self) -> str:
        """The text of the chat template, or of all if there are several."""
        template = self.tokenizer.chat_template
        return "\n".join(template.values()) if isinstance(template, dict) else str(template)

    def prompt(self, prompt: str | list[Message], tools: Tools = None, arguments: Arguments = None) -> str:
        """Return what comes before a response: text as it is, or messages up to the start of the assistant's turn.

        Args:
            arguments: the row's own arguments of the template.
        """
        given = {**self.arguments, **(arguments or {})}
        if isinstance(prompt, str):
            if unused := [*(["tools"] if tools else []), *sorted(given)]:
                self.notes.add(f"{', '.join(unused)} not used: the prompts are plain text, without the chat template")
            return prompt
        for message in prompt:
            self._refuse_control(message)
        text = self.lay_out(prompt, tools, add_generation_prompt=True, arguments=arguments)
        if tools and not self._tools_shown:
            self._tools_shown = text != self.lay_out(prompt, None, add_generation_prompt=True, arguments=arguments)
            if not self._tools_shown:
                self.notes.add("the chat template prints the same with their tools as without them")
        if unread := [name for name in sorted(given) if not re.search(rf"\b{name}\b", self.template_text)]:
            self.notes.add(f"the chat template does not read {', '.join(unread)}")
        if any(name not in text for name in _called(prompt)):
            self.notes.add("the chat template does not print the tool calls of earlier turns")
        return text

    def answer(
        self,
        prompt: str | list[Message],
        before: str,
        answer: Completion,
        tools: Tools = None,
        arguments: Arguments = None,
    ) -> str:
        """Return a response with its end, as the continuation of `before`, the result of `self.prompt` for the same prompt.

        Raises RowError, with the reason, if the response or the template does not allow it.
        """
        if isinstance(prompt, str):
            assert isinstance(answer, str)  # the readers pair texts with texts
            return self._text_answer(answer)
        message = answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}
        self._refuse_control(message)
        turn = ResponseTurn(prompt, message, before, partial(self.lay_out, tools=tools, arguments=arguments), arguments or {})
        text, end, note = turn_text(turn, self._ending(arguments), self._added)
        if note:
            self.notes.add(note)
        self._check_shown(message, text)
        return text if end is None else self._ended(text, end)

    def ends(self) -> set[str]:
        """Return the texts that end a response: EOS and the chat template's end of turn; a model may have learned both.

        Raises RowError if the template cannot render a question and a response.
        """
        found = {self.tokenizer.eos_token}
        if self.chats:
            turns: list[Message] = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": MARK}]
            _, shown, ending = self.lay_out(turns, None, add_generation_prompt=False).rpartition(MARK)
            found |= {self._ended(ending, 0)} if shown else set()
            found |= self._end_of_calls(turns, ending) if shown else set()
        return found

    def read(self, text: str) -> Message | None:
        """Return the message of a generated response, or None if its text without control tokens is the message's.

        Where control tokens set the reasoning apart, as in harmony's channels, the text without them would run together.

        Args:
            text: the response with its control tokens, without its end.
        """
        reasoning, (lead, opening, between) = "", self._framed
        if between and between in text:
            reasoning, _, text = text.partition(between)
            reasoning = reasoning.removeprefix(opening)
        elif lead and text.startswith(lead):
            text = text.removeprefix(lead)
        elif not any(token in text for token in self._special & MARKS):
            return None
        for token in self._special - MARKS:
            text, reasoning = text.replace(token, ""), reasoning.replace(token, "")
        return {"role": "assistant", "content": text, **({"reasoning_content": reasoning} if reasoning else {})}

    @cached_property
    def _framed(self) -> tuple[str, str, str]:
        """What the template prints in front of a plain response, of reasoning, and between that and what is said."""
        asked: list[Message] = [{"role": "user", "content": "Is it?"}]
        plain, thought = {"role": "assistant", "content": MARK}, {"role": "assistant", "content": MARK, REASONING[0]: _THOUGHT}
        try:
            before = self.lay_out(asked, None, add_generation_prompt=True)
            one, other = (self.lay_out([*asked, each], None, add_generation_prompt=False) for each in (plain, thought))
        except RowError:
            return "", "", ""
        if not other.startswith(before) or _THOUGHT not in other:
            return "", "", ""
        opening, _, rest = other.removeprefix(before).partition(_THOUGHT)
        lead = one.removeprefix(before).partition(MARK)[0] if one.startswith(before) else ""
        found = lead, opening, rest.partition(MARK)[0]
        return found if any(token in part for token in self._special for part in found) else ("", "", "")

    def _end_of_calls(self, turns: list[Message], ending: str) -> set[str]:
        """Return what ends tool calls, if that is not what ends other responses, as harmony's <|call|>."""
        call = {"type": "function", "function": {"name": "is_it", "arguments": {"what": "it"}}}
        try:
            text = self.lay_out([turns[0], {**turns[1], "content": "", "tool_calls": [call]}], None, False)
        except RowError:
            return set()
        if "is_it" not in text or text.endswith(ending):
            return set()
        end = added_end(text, self._added)
        return {end} if end else set()

    def lay_out(self, messages: list[Message], tools: Tools, add_generation_prompt: bool, arguments: Arguments = None) -> str:
        """Return messages as the chat template renders them. Raises RowError if it refuses them."""
        from lite_dil.data import templates

        if not self.chats:
            raise RowError(
                "no chat template",
                "the data is chat messages but this model has no chat template; use an instruct model, or give prompts and "
                "responses as plain text",
            )

        tokenizer, given = self.tokenizer, {**self.arguments, **(arguments or {})}
        given |= {"tools": tools, "add_generation_prompt": add_generation_prompt}

        def render(messages: list[Message]) -> str:
            return _rendered(tokenizer, template, messages, given)

        try:
            template = tokenizer.get_chat_template(tools=tools)  # of several named ones, as transformers takes them
            messages = [_with_reasoning(message, template) for message in messages]
            template = FIXED_DATE + template if "strftime_now" in template else template
            calls = list(_arguments_of_calls(messages))
            try:
                text = render(messages)
            except TypeError:
                if not calls:
                    raise
                return render(_with_text_arguments(messages))  # a template that joins them to text
            if any(value and str(value) in text for value in calls):  # Python's spelling, as of a template for text
                return render(_with_text_arguments(messages))
            return text
        except templates.REFUSALS as error:
            why = first_line(error)[:500]
            raise RowError("chat template", f"the model's chat template refuses these messages: {why}") from None

    def _ending(self, arguments: Arguments) -> str | None:
        """Return what the template prints behind a plain response, or None if it does not take one by itself."""
        key = json.dumps(arguments or {}, sort_keys=True)
        if key not in self._endings:
            turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": MARK}]
            try:
                text = self.lay_out(turns, None, add_generation_prompt=False, arguments=arguments)
            except RowError:
                text = ""
            self._endings[key] = text.rpartition(MARK)[2] if MARK in text else None
        return self._endings[key]

    def _text_answer(self, text: str) -> str:
        """Return a plain-text response with exactly one EOS at its end; the text may already have it."""
        eos = self.tokenizer.eos_token
        content = text.rstrip().removesuffix(eos) if text.rstrip().endswith(eos) else text
        if eos in content:
            raise RowError("control token", f"a response contains {eos!r} before its end; remove it")
        return content + eos

    def _check_shown(self, message: Message, text: str) -> None:
        """Note reasoning that the template leaves out. Raises RowError if it leaves out what the response says or calls."""
        parts = pieces(message["content"])
        if lost := [part for part in parts[:-1] if not part.reasoning and part.text.strip() not in text]:
            raise RowError(
                "chat template", f"the chat template leaves out a part of the response, {lost[0].text.strip()[:40]!r}"
            )
        reasons = [part.text for part in parts if part.reasoning] + [message[name] for name in REASONING if name in message]
        if any(reason.strip() not in text for reason in reasons):
            self.notes.add("the chat template leaves out the reasoning of their responses: it is not trained on")
        if any(name not in text for name in _called([message])):
            raise RowError("chat template", "the chat template does not print the tool calls of the response")
        if any(None in value.values() for value in _arguments_of_calls([message])):
            self.notes.add(
                "null in the arguments of their tool calls is trained on; columnar files add it for the arguments of other "
                "calls: store arguments as JSON text there"
            )

    def _ended(self, text: str, content_end: int) -> str:
        """Cut `text` after its end of turn; add EOS if there is none.

        It is the added token, special or not, right behind the content, else the first special token after it.
        """
        rest = text[content_end:]
        behind = rest.lstrip()
        if near := next((behind[:length] for length in self._lengths if behind[:length] in self._added), ""):
            return text[:content_end] + rest[: len(rest) - len(behind)] + near
        marks = [(rest.find(token), -len(token), token) for token in self._special if token in rest]
        if marks:
            at, _, token = min(marks)
            return text[: content_end + at + len(token)]
        return text[:content_end].rstrip() + self.tokenizer.eos_token

    def _refuse_control(self, message: Message) -> None:
        found = self._control_of_answers if message["role"] == "assistant" else self._control_of_prompts
        for value in message.values():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            if match := found.search(text):
                raise RowError(
                    "control token",
                    f"a message contains the control token {match[0]!r}, which ends or opens a turn; remove it",
                )

    @cached_property
    def _control_of_prompts(self) -> re.Pattern[str]:
        return _any_of(self.control)

    @cached_property
    def _control_of_answers(self) -> re.Pattern[str]:
        return _any_of(self.control - MARKS)


def library_prompt(tokenizer: Any, messages: list[dict[str, str]], template: str | None = None, **given: Any) -> str:
    """Return a conversation up to the assistant's turn as a library's own `apply_chat_template` prints it, with today's date.

    Args:
        template: what to render; by default the tokenizer's template.
        given: variables that the library sets besides `add_generation_prompt`.

    Raises UserError if the template refuses such messages, or takes or makes too much.
    """
    from lite_dil.data import templates

    variables = {"tools": None, "add_generation_prompt": True, **given}
    try:
        return _rendered(tokenizer, template or tokenizer.get_chat_template(), messages, variables)
    except templates.REFUSALS as error:
        raise UserError(f"{_named(tokenizer)}: its chat template refuses {messages}: {first_line(error)[:500]}") from None


def _rendered(tokenizer: Any, template: str, messages: list[Message], given: Mapping[str, Any]) -> str:
    """Return messages as a tokenizer prints them. Raises UserError if its template takes or makes too much."""
    from transformers import PreTrainedTokenizerBase

    from lite_dil.data import templates
    from lite_dil.data.template_costs import TemplateCosts

    if type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:  # code of its own
        return str(tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **given))
    try:
        return templates.render(template, messages, {**tokenizer.special_tokens_map, **given})
    except TemplateCosts as error:
        raise UserError(
            f"{_named(tokenizer)}: its chat template{error}, for one conversation; correct chat_template.jinja (or "
            "tokenizer_config.json) there, or take another model"
        ) from None


def _named(tokenizer: Any) -> str:
    return str(tokenizer.name_or_path or "the model")


def _any_of(texts: Set[str]) -> re.Pattern[str]:
    """Return a pattern of any of some texts, the longest if several begin at the same place."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=lambda text: (-len(text), text)))))


def _with_reasoning(message: Message, template: str) -> Message:
    """Return a message with its reasoning under each name that the template mentions."""
    value = next((message[name] for name in REASONING if message.get(name) is not None), None)
    if value is None:
        return message
    return {**{name: value for name in REASONING if name in template}, **message}


def _arguments_of_calls(messages: Iterable[Message]) -> Iterable[dict[str, Any]]:
    for message in messages:
        for call in message.get("tool_calls") or ():
            value = call.get("function", call).get("arguments")
            if isinstance(value, dict):
                yield value


def _called(messages: Iterable[Message]) -> list[str]:
    """Return the names of the functions that messages call."""
    return [call.get("function", call)["name"] for message in messages for call in message.get("tool_calls") or ()]


def _with_text_arguments(messages: list[Message]) -> list[Message]:
    """Return messages whose tool calls have their arguments as JSON text."""

    def spelled(function: dict[str, Any]) -> dict[str, Any]:
        return {**function, "arguments": json.dumps(function.get("arguments", {}), ensure_ascii=False)}

    def call_of(call: dict[str, Any]) -> dict[str, Any]:
        return {**call, "function": spelled(call["function"])} if "function" in call else spelled(call)

    return [
        {**message, "tool_calls": [call_of(call) for call in message["tool_calls"]]} if message.get("tool_calls") else message
        for message in messages
    ]
