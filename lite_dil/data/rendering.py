"""What a model is fed and what it is to answer, as text: the one place that lays out prompts, answers and their ends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lite_dil.base.errors import first_line
from lite_dil.data.files import RowError
from lite_dil.data.messages import Completion, Message

# Templates that print today's date would give other tokens tomorrow, to a run that is resumed. This is Llama 3's own fallback.
FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"

Tools = list[dict[str, Any]] | None


class Rendering:
    """Lays out text and chat messages as one tokenizer's model has them.

    Training, chat, generation, drawn answers, reports and exports all go through it: a model is fed what it was trained on.

    Args:
        arguments: what the chat template is given beside messages and tools, as `enable_thinking`.

    Attributes:
        control: the texts of tokens that open or end a turn; no message may hold one.
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
        """Return what comes before an answer: text as it stands, messages up to where the assistant is to speak."""
        if isinstance(prompt, str):
            return prompt
        for message in prompt:
            self._refuse_control(message)
        return self.lay_out(prompt, tools, add_generation_prompt=True)

    def answer(self, prompt: str | list[Message], before: str, answer: Completion, tools: Tools = None) -> str:
        """Return an answer with what ends it, as the continuation of `before`, which `self.prompt(prompt, tools)` returned.

        Raises RowError with the reason where the answer or the template does not allow it.
        """
        if isinstance(prompt, str):
            assert isinstance(answer, str)  # the readers pair texts with texts
            return self._text_answer(answer)
        return self._chat_answer(prompt, before, answer, tools)

    def ends(self) -> set[str]:
        """Return the texts that end an answer: EOS, and what the chat template ends one with; a model may have learned both.

        Raises RowError where the template lays out no question and answer.
        """
        found = {self.tokenizer.eos_token}
        if self.chats:
            answer = "Yes."
            turns = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": answer}]
            # Not by `answer`: a model whose template begins its answers, with <think> say, can talk.
            text = self.lay_out(turns, None, add_generation_prompt=False)
            if (at := text.rfind(answer)) >= 0:
                end = at + len(answer)
                found.add(self._ended(text, end)[end:])
        return found

    def lay_out(self, messages: list[Message], tools: Tools, add_generation_prompt: bool) -> str:
        """Return messages as the chat template prints them. Raises RowError where it refuses them."""
        from jinja2 import TemplateError

        if not self.chats:
            raise RowError(
                "no chat template",
                "the data is chat messages but this model has no chat template; use an instruct model, or give prompts and "
                "answers as plain text",
            )
        try:
            template = self.tokenizer.get_chat_template()  # of several named ones, the default
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                chat_template=FIXED_DATE + template,
                **self.arguments,
            )
        except (TemplateError, TypeError) as error:  # TypeError: tools of a kind that the template does not expect
            raise RowError("chat template", f"the model's chat template refuses these messages: {first_line(error)}") from None

    def _text_answer(self, text: str) -> str:
        """End a plain-text answer with exactly one EOS, which it may bring along."""
        eos = self.tokenizer.eos_token
        content = text.rstrip().removesuffix(eos) if text.rstrip().endswith(eos) else text
        if eos in content:
            raise RowError("control token", f"an answer holds {eos!r} before its end; remove it")
        return content + eos

    def _chat_answer(self, messages: list[Message], prompt: str, answer: Completion, tools: Tools) -> str:
        message = answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}
        self._refuse_control(message)
        whole = self.lay_out([*messages, message], tools, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise RowError("chat template", "the chat template lays the prompt out differently once an answer follows it")
        text = whole[len(prompt) :]
        if message.get("tool_calls"):
            # How a template writes calls is its own affair; what ends a turn is seen in a plain one.
            end = self._chat_answer(messages, prompt, "x", tools).removeprefix("x")
            if end not in text:
                raise RowError("chat template", "the chat template does not end an answer of tool calls as it ends others")
            return text[: text.rfind(end) + len(end)]
        stripped = message["content"].strip()
        found = text.find(stripped)
        if found < 0:
            raise RowError("chat template", "the chat template changes the text of the answer")
        return self._ended(text, found + len(stripped))

    def _ended(self, text: str, content_end: int) -> str:
        """Cut `text` after its end-of-turn token, the first control token behind the content; add EOS where there is none."""
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
                    "control token", f"a message holds the control token {token!r}, which would end or open a turn; remove it"
                )
