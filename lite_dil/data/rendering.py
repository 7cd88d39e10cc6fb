"""Render prompts, responses and their ends as the text that a model reads; all other code goes through this module."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lite_dil.base.errors import first_line
from lite_dil.data.files import RowError
from lite_dil.data.messages import Completion, Message

# With a template that prints today's date, a run resumed tomorrow would see other tokens. This is Llama 3's own fallback.
FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"

Tools = list[dict[str, Any]] | None


class Rendering:
    """Renders text and chat messages for one tokenizer.

    Training, chat, generation, sampling, reports and exports all use it, so that a model reads what it was trained on.

    Args:
        arguments: further arguments of the chat template, such as `enable_thinking`.

    Attributes:
        control: the texts of tokens that open or end a turn; no message may contain one.
    """

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any] | None = None) -> None:
        self.tokenizer, self.arguments = tokenizer, dict(arguments or {})
        added = tokenizer.added_tokens_decoder.values()
        self.control = {token.content for token in added if token.special} | {tokenizer.eos_token}

    @property
    def chats(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)

    def prompt(self, prompt: str | list[Message], tools: Tools = None) -> str:
        """Return what comes before a response: text as it is, or messages up to the start of the assistant's turn."""
        if isinstance(prompt, str):
            return prompt
        for message in prompt:
            self._refuse_control(message)
        return self.lay_out(prompt, tools, add_generation_prompt=True)

    def answer(self, prompt: str | list[Message], before: str, answer: Completion, tools: Tools = None) -> str:
        """Return a response with its end, as the continuation of `before`, the result of `self.prompt(prompt, tools)`.

        Raises RowError, with the reason, if the response or the template does not allow it.
        """
        if isinstance(prompt, str):
            assert isinstance(answer, str)  # the readers pair texts with texts
            return self._text_answer(answer)
        return self._chat_answer(prompt, before, answer, tools)

    def ends(self) -> set[str]:
        """Return the texts that end a response: EOS and the chat template's end of turn; a model may have learned both.

        Raises RowError if the template cannot render a question and a response.
        """
        found = {self.tokenizer.eos_token}
        if self.chats:
            answer = "Yes."
            turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}]
            # Not through `answer`, which refuses some templates that begin a response (say with <think>).
            text = self.lay_out(turns, None, add_generation_prompt=False)
            if (at := text.rfind(answer)) >= 0:
                end = at + len(answer)
                found.add(self._ended(text, end)[end:])
        return found

    def lay_out(self, messages: list[Message], tools: Tools, add_generation_prompt: bool) -> str:
        """Return messages as the chat template renders them. Raises RowError if it refuses them."""
        from jinja2 import TemplateError

        if not self.chats:
            raise RowError(
                "no chat template",
                "the data is chat messages but this model has no chat template; use an instruct model, or give prompts and "
                "responses as plain text",
            )
        try:
            template = self.tokenizer.get_chat_template()  # the default of several named ones
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=FIXED_DATE + template,
                **self.arguments,
            )
        except (TemplateError, TypeError) as error:  # TypeError: the template does not expect such tools
            raise RowError("chat template", f"the model's chat template refuses these messages: {first_line(error)}") from None

    def _text_answer(self, text: str) -> str:
        """Return a plain-text response with exactly one EOS at its end; the text may already have it."""
        eos = self.tokenizer.eos_token
        content = text.rstrip().removesuffix(eos) if text.rstrip().endswith(eos) else text
        if eos in content:
            raise RowError("control token", f"a response contains {eos!r} before its end; remove it")
        return content + eos

    def _chat_answer(self, messages: list[Message], prompt: str, answer: Completion, tools: Tools) -> str:
        message = answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}
        self._refuse_control(message)
        whole = self.lay_out([*messages, message], tools, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise RowError("chat template", "the chat template renders the prompt differently once a response follows it")
        text = whole[len(prompt) :]
        if message.get("tool_calls"):
            # Templates write tool calls in many ways; a plain turn shows how a turn ends.
            end = self._chat_answer(messages, prompt, "x", tools).removeprefix("x")
            if end not in text:
                raise RowError("chat template", "the chat template ends tool calls differently from other responses")
            return text[: text.rfind(end) + len(end)]
        stripped = message["content"].strip()
        found = text.find(stripped)
        if found < 0:
            raise RowError("chat template", "the chat template changes the text of the response")
        return self._ended(text, found + len(stripped))

    def _ended(self, text: str, content_end: int) -> str:
        """Cut `text` after its end-of-turn token, the first control token after the content; add EOS if there is none."""
        marks = [(text.find(token, content_end), token) for token in self.control]
        found = [(at, -len(token), token) for at, token in marks if at >= 0]
        if found:
            at, _, token = min(found)
            return text[: at + len(token)]
        return text[:content_end] + self.tokenizer.eos_token

    def _refuse_control(self, message: Message) -> None:
        texts = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in message.values()]
        for token in self.control:
            if any(token in text for text in texts):
                raise RowError(
                    "control token", f"a message contains the control token {token!r}, which ends or opens a turn; remove it"
                )
