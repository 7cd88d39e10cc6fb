"""Write a Modelfile for Ollama: the chat template in Go's text/template, the stop tokens and the model's sampling.

Ollama does not run Jinja. Rendering conversations of marker messages shows what the model's template puts around messages;
this is written as a Go template, and accepted only if other conversations render to the same text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lite_dil.base.errors import UserError
from lite_dil.base.files import write
from lite_dil.data.files import RowError
from lite_dil.data.rendering import Rendering
from lite_dil.export.gguf_vocabulary import puts_bos

_Messages = Sequence[Mapping[str, str]]
# generation_config.json -> Ollama's parameters.
_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
# Only of the last message, which the model is to continue. A template with .Thinking and these tags as text makes Ollama take
# <think> blocks out of responses, so that earlier messages come without theirs (its thinking/template.go).
_THINKING = (
    '{{ if and $last .Thinking }}<think>{{ "\\n" }}{{ .Thinking }}{{ "\\n" }}</think>{{ end }}'
    '{{ if and $last .Thinking }}{{ "\\n\\n" }}{{ end }}'
)
_REFUSED = "the chat template cannot be written for Ollama: {}. Export with --format gguf, and write the Modelfile by hand"


@dataclass(frozen=True)
class TemplateParts:
    """The text that a chat template puts before and after the messages of a conversation.

    `first_user` comes before a user message that opens the conversation (with BOS, unless the runtime adds it, and the
    template's own system prompt), `after_system` before one that follows the system message. `system` is the text around the
    system message, None if the template has none; `in_last` the text after it if a template (Mistral's) moves it in front of
    the last user message. `thinks` is whether the template takes the reasoning out of earlier messages.
    """

    first_user: str
    user: str
    user_end: str
    assistant: str
    assistant_end: str
    generation: str
    system: tuple[str, str] | None = None
    after_system: str = ""
    in_last: str | None = None
    thinks: bool = False

    def render(self, messages: _Messages) -> str:
        """Return the prompt text of a conversation, the same that `go_template` renders in Go."""
        text = ""
        opening = messages[0]["content"] if messages[0]["role"] == "system" else None
        for i, message in enumerate(messages):
            last, content = i == len(messages) - 1, message["content"]
            if message["role"] == "system":
                text += self.system[0] + content + self.system[1] if self.system else ""
            elif message["role"] == "user":
                text += self.first_user if i == 0 else self.after_system if i == 1 and opening is not None else self.user
                text += opening + self.in_last if last and opening is not None and self.in_last is not None else ""
                text += content + self.user_end
            else:
                text += self.assistant + content + ("" if last else self.assistant_end)
            text += self.generation if last and message["role"] != "assistant" else ""
        return text

    def go_template(self) -> str:
        """Return it as a Go template. Every piece is a quoted string in an action, so that none is read as template code."""
        opened = '(eq (index $.Messages 0).Role "system")'
        before = f"{{{{ if eq $i 0 }}}}{_quoted(self.first_user)}"
        if self.system or self.in_last is not None:
            before += f"{{{{ else if and (eq $i 1) {opened} }}}}{_quoted(self.after_system)}"
        before += f"{{{{ else }}}}{_quoted(self.user)}{{{{ end }}}}"
        if self.in_last is not None:
            moved = "{{ (index $.Messages 0).Content }}" + _quoted(self.in_last)
            before += f"{{{{ if and $last {opened} }}}}{moved}{{{{ end }}}}"
        thinking = _THINKING if self.thinks else ""
        lines = [
            "range $i, $_ := .Messages }}",
            "$last := eq (len (slice $.Messages $i)) 1 }}",
            'if eq .Role "user" }}' + before + "{{ .Content }}" + _quoted(self.user_end),
            'else if eq .Role "assistant" }}' + _quoted(self.assistant) + thinking + "{{ .Content }}",
            f"if not $last }}}}{_quoted(self.assistant_end)}{{{{ end }}}}",
            "end }}",
            f'if and $last (ne .Role "assistant") }}}}{_quoted(self.generation)}{{{{ end }}}}',
            "end }}",
        ]
        if self.system:
            before, after = map(_quoted, self.system)
            lines.insert(5, 'else if eq .Role "system" }}' + before + "{{ .Content }}" + after)
        return "\n".join("{{- " + line for line in lines)


def _quoted(text: str) -> str:
    """Return an action that prints `text`, without three quotes in a row, which would end a Modelfile's string."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""


def write_modelfile(folder: Path, gguf_name: str, tokenizer: Any, defaults: Mapping[str, Any] | None) -> list[str]:
    """Write `folder`/Modelfile for the GGUF file `gguf_name` in the same folder; return what it cannot express, in sentences.

    Args:
        tokenizer: the model's fast tokenizer, with its chat template.
        defaults: the content of the model's generation_config.json, if it has one; nothing else sets sampling.

    Raises:
        UserError: the template cannot be expressed in Go; nothing is written.
    """
    if not tokenizer.chat_template:
        raise UserError("the model has no chat template, so Ollama cannot chat with it; export with --format gguf")
    if "\n" in gguf_name or "\r" in gguf_name or '"' in gguf_name:
        raise UserError(f"a Modelfile cannot name the file {gguf_name!r}: it has a quote or a line break in its name")
    layout = probe(tokenizer)
    name = model_name(gguf_name)
    lines = [
        f"# ollama create {name} -f Modelfile",
        f"# ollama run {name}",
    ]
    notes = _left_out(tokenizer, layout)
    lines += [f"# {note}" for note in notes]
    ends = dict.fromkeys(end for end in (tokenizer.eos_token, layout.assistant_end.strip()) if end)
    lines += [f"FROM ./{gguf_name}", "", f'TEMPLATE """{layout.go_template()}"""', ""]
    lines += [f'PARAMETER stop "{end}"' for end in ends if '"' not in end and end.isprintable()]
    lines += [f"PARAMETER {key} {value}" for key, value in _sampling(defaults or {}).items()]
    write(folder / "Modelfile", "\n".join(lines) + "\n")
    return notes


def _left_out(tokenizer: Any, layout: TemplateParts) -> list[str]:
    """Return what the model's chat template does, or refuses, that its Modelfile does not, or cannot refuse."""
    notes = []
    if not layout.system and layout.in_last is None:
        notes.append("The model's chat template has no system message: a given one is ignored.")
    rendering, ask = Rendering(tokenizer), [{"role": "user", "content": "Xquestionx"}]
    tool = {"name": "Xtoolx", "description": "Xuse", "parameters": {"type": "object", "properties": {}}}
    try:
        prints_tools = "Xtoolx" in rendering.lay_out(ask, [{"type": "function", "function": tool}], True)
    except RowError:
        prints_tools = False
    if prints_tools:
        notes.append("Tools are left out: Ollama prints their JSON otherwise than the model's chat template, which has them.")
    return notes


def stops_of(modelfile: Path) -> list[str]:
    """Return the texts at which Ollama ends a response."""
    return re.findall(r'^PARAMETER stop "(.*)"$', modelfile.read_text(encoding="utf-8"), re.MULTILINE)


def model_name(gguf_name: str) -> str:
    """Return a valid Ollama model name for a GGUF file."""
    return re.sub(r"[^a-z0-9._-]+", "-", gguf_name.lower().removesuffix(".gguf")).strip("-._") or "model"


def _sampling(defaults: Mapping[str, Any]) -> dict[str, float]:
    """Return the model's own sampling as Ollama parameters; without do_sample its temperature does not apply."""
    names = _SAMPLING if defaults.get("do_sample") else {}
    found = {ours: defaults.get(theirs) for theirs, ours in (names | {"repetition_penalty": "repeat_penalty"}).items()}
    return {name: value for name, value in found.items() if isinstance(value, (int, float)) and not isinstance(value, bool)}


def probe(tokenizer: Any) -> TemplateParts:
    """Return the parts of a tokenizer's chat template.

    Raises:
        UserError: it does more than put fixed text around messages.
    """
    render = renderer(tokenizer)
    user, answer, more, rules = ("Xquestionx", "Xanswerx", "Xmorex", "Xrulesx")
    asked = [{"role": "user", "content": user}]
    answered = [*asked, {"role": "assistant", "content": answer}]
    first, end = _cut(render(asked, True), user)
    _, to_answer, to_more, more_end = _cut(render([*answered, {"role": "user", "content": more}], True), user, answer, more)
    user_end = _common([_cut(render(asked, False), user)[1], to_answer, end])
    answer_end = _common([_cut(render(answered, False), user, answer)[2], to_more])
    layout = TemplateParts(
        first,
        to_more[len(answer_end) :],
        user_end,
        to_answer[len(user_end) :],
        answer_end,
        more_end[len(user_end) :],
        thinks=_takes_out_reasoning(render),
    )
    tries = [layout]
    system = {"role": "system", "content": rules}
    try:
        ruled = render([system, *asked], True)
    except UserError:  # a template that refuses system messages
        ruled = ""
    if rules in ruled:
        before, between, _ = _cut(ruled, rules, user)
        cut = between.removesuffix(layout.user)
        around_it = replace(layout, system=(before, cut), after_system=between[len(cut) :])
        tries = [around_it, replace(layout, after_system=before, in_last=between)]
    for candidate in tries:
        if all(candidate.render(talk) == render(talk, True) for talk in _conversations(bool(rules in ruled))):
            return candidate
    raise UserError(_REFUSED.format("it does more than put fixed text around each message"))


def _takes_out_reasoning(render: Callable[[_Messages, bool], str]) -> bool:
    """Return whether a template prints an earlier message without its <think> block."""
    turns = [{"role": "user", "content": "Xquestionx"}, {"role": "assistant", "content": "Xanswerx"}]
    turns.append({"role": "user", "content": "Xmorex"})
    thought = [turns[0], {"role": "assistant", "content": "<think>\nXthoughtx\n</think>\n\nXanswerx"}, turns[2]]
    try:
        return render(thought, True) == render(turns, True)
    except UserError:
        return False


def _conversations(system: bool) -> list[_Messages]:
    """Return conversations of one to three turns, without and with a system message, to compare renderings."""
    texts = ["Hello, who are you?", "A model.\nOne that answers.", "Why <b>2 + 2</b>?", "It is 4: {{ 2 + 2 }}.", "¿Qué? 你好"]
    talk = [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]
    plain = [talk[:turns] for turns in (1, 3, 5)]
    return [*plain, *([{"role": "system", "content": "Be brief.\nBe kind."}, *each] for each in plain if system)]


def renderer(tokenizer: Any) -> Callable[[_Messages, bool], str]:
    """Return a function that renders a conversation with the chat template, without the BOS token that the runtime adds."""
    rendering, bos = Rendering(tokenizer), tokenizer.bos_token if puts_bos(tokenizer) else ""

    def render(messages: _Messages, generation: bool) -> str:
        try:
            text = rendering.lay_out([dict(message) for message in messages], None, generation)
        except RowError as error:
            raise UserError(_REFUSED.format(f"it refuses a conversation ({error})")) from None
        return text.removeprefix(bos)

    return render


def _common(texts: list[str]) -> str:
    """Return the common start of all texts."""
    shortest = min(texts, key=len)
    return shortest[: next((i for i, char in enumerate(shortest) if any(text[i] != char for text in texts)), len(shortest))]


def _cut(text: str, *marks: str) -> list[str]:
    """Return the text before, between and after the marks, each of which must occur once and in this order."""
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise UserError(_REFUSED.format("it leaves out a message or repeats it"))
        parts.append(before)
    return [*parts, text]
