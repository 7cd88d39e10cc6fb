"""Prompts and responses of many chat templates: the prompt is what generation feeds, the response what the template prints."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chat_templates import KINDS, tokenizer_of
from conftest import CHATML, byte_level_tokenizer, pair_row
from tokenizers import AddedToken
from transformers.utils import chat_template_utils

from lite_dil.base.errors import UserError
from lite_dil.data.encoder import Encoder
from lite_dil.data.files import RowError
from lite_dil.data.reader import Row, read_rows
from lite_dil.generation.conversation import Conversation

USER = {"role": "user", "content": "What is tea?"}
EARLIER = [USER, {"role": "assistant", "content": "<think>hm</think>\n\nA drink."}, {"role": "user", "content": "Which?"}]
PROMPTS = {
    "one turn": [USER],
    "turns": EARLIER,
    "system": [{"role": "system", "content": "Be short."}, USER],
    "system, turns": [{"role": "system", "content": "Be short."}, *EARLIER],
}
ANSWERS = (
    "A drink.",
    "\n\nA drink",
    "  a drink \n",
    "drink\n\n",
    "<b>hot</b> drink",
    "< think>",
    "[INST] hi [/INST] ### User:\n<start_of_turn>user</s>\n<turn>",
    "é🙂 Is it?",
    "m",
)


def texts(encoder: Encoder, row: Row) -> tuple[str, list[str]]:
    """Return a row's prompt and responses as text."""
    example = encoder.encode(row)
    return encoder.tokenizer.decode(example.prompt), [encoder.tokenizer.decode(ids) for ids in example.responses]


def said(tokenizer: Any, name: str, messages: list[Any], answer: Any, **arguments: Any) -> str:
    """Return the response as the conversation's rendering has it, with its end, by nothing but the template's own marks."""
    message = answer if isinstance(answer, dict) else {"role": "assistant", "content": answer}
    whole = tokenizer.apply_chat_template([*messages, message], tokenize=False, **arguments)
    body = whole[whole.rindex(KINDS[name].header) + len(KINDS[name].header) :]
    end = KINDS[name].end
    return body[: body.rindex(end)] + end if end else body + tokenizer.eos_token


def today(name: str) -> Any:
    """Return a tokenizer whose template prints the fixed date, for transformers' own rendering."""
    tokenizer = tokenizer_of(name)
    tokenizer.chat_template = tokenizer.chat_template.replace("strftime_now('%Y-%m-%d')", "'2024-07-26'")
    return tokenizer


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_prompt_is_what_generation_feeds_and_the_response_what_the_template_prints(name: str, prompt: str) -> None:
    tokenizer, messages, encoder = today(name), PROMPTS[prompt], Encoder(tokenizer_of(name))
    if not KINDS[name].system and "system" in prompt:
        with pytest.raises(RowError, match="refuses these messages: System role not supported"):
            encoder.encode(pair_row(messages, "a", "b", ""))
        return
    fed = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    for one, other in itertools.pairwise(ANSWERS):
        if name == "gemma" and "_turn>" in one + other:
            continue  # these are its own control tokens
        example = encoder.encode(pair_row(messages, one, other, ""))
        assert list(example.prompt) == fed
        for answer, ids in zip((one, other), example.responses, strict=True):
            expected = KINDS[name].lead + said(tokenizer, name, messages, answer)
            assert tokenizer.decode(ids) == expected
            if answer[0].isalpha():  # else a token of white space may join the two, and belongs to neither
                assert [*fed, *ids] == tokenizer(tokenizer.decode(fed) + expected, add_special_tokens=False).input_ids


def pair(chosen: Any, rejected: Any, messages: list[Any] | None = None, **further: Any) -> Row:
    return Row(messages or [USER], (chosen, rejected), (1, -1), "", "pairs", **further)


def thought(content: str, reasoning: str, name: str = "reasoning_content") -> dict[str, Any]:
    return {"role": "assistant", "content": content, name: reasoning}


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("qwen3", "<think>\nA or B\n</think>\n\nB.<|im_end|>"),
        ("think always", "A or B\n</think>\n\nB.<|im_end|>"),
        ("nemotron", "A or B\n</think>\nB.<|im_end|>"),
        ("glm", "\n<think>A or B</think>\nB.<|im_end|>"),
        (
            "harmony",
            "<|channel|>analysis<|message|>A or B<|end|><|start|>assistant<|channel|>final<|message|>B.<|return|>",
        ),
        # These print no reasoning; what their generation prompts open is closed.
        ("chatml", "B.<|im_end|>"),
        ("think open", "</think>\n\nB.<|im_end|>"),
        ("r1", "</think>\n\nB.<|eos|>"),
        ("deepseek", "B.<|eos|>"),
        ("gemma4", "B.<turn|>"),
    ],
)
def test_reasoning_in_a_field_of_its_own_is_trained_where_the_template_prints_it(
    template: str, name: str, expected: str
) -> None:
    encoder, notes = Encoder(tokenizer_of(template)), Counter[str]()
    row = pair(thought("B.", "A or B", name), thought("A.", "A or B", name))
    example = encoder.encode(row, notes)
    assert encoder.tokenizer.decode(example.responses[0]) == expected
    assert ["leaves out the reasoning" in note for note in notes].count(True) == ("A or B" not in expected)


@pytest.mark.parametrize(
    ("template", "content", "expected", "note"),
    [
        # What the generation prompt opened is not opened again, whatever the white space.
        ("think open", "<think>\nA or B\n</think>\n\nB.", "A or B\n</think>\n\nB.<|im_end|>", ""),
        ("think open", "<think>A or B</think>B.", "A or B</think>B.<|im_end|>", ""),
        ("think open", "A or B\n</think>\n\nB.", "A or B\n</think>\n\nB.<|im_end|>", ""),
        ("nemotron", "<think>A or B</think>B.", "A or B</think>B.<|im_end|>", ""),
        ("nemotron", "A or B</think>B.", "A or B</think>B.<|im_end|>", ""),
        # Printed by the template in a form of its own.
        ("qwen3", "<think>A or B</think>B.", "<think>\nA or B\n</think>\n\nB.<|im_end|>", ""),
        # Left out by the template.
        ("r1", "<think>\nA or B\n</think>\n\nB.", "</think>\n\n\n\nB.<|eos|>", "leaves out the reasoning"),
        ("deepseek", "<think>A or B</think>B.", "B.<|eos|>", "leaves out the reasoning"),
        ("gemma4", "<|channel>thought\nA or B<channel|>B.", "B.<turn|>", "leaves out the reasoning"),
        # Closed at once: in the template's own form, or with a blank line.
        ("think open", "B.", "</think>\n\nB.<|im_end|>", "with '</think>\\n\\n'"),
        ("think open", "<b>B</b>", "</think>\n\n<b>B</b><|im_end|>", "with '</think>\\n\\n'"),
        ("think always", "B.", "\n</think>\n\nB.<|im_end|>", "with '\\n</think>\\n\\n'"),
        ("nemotron", "B.", "</think>B.<|im_end|>", "with '</think>'"),
        # Opened and closed by the generation prompt: it stays.
        ("gemma4", "B.", "B.<turn|>", ""),
        ("gemma4", "<think>A or B</think>B.", "<think>A or B</think>B.<turn|>", ""),  # no mark of this template's
    ],
)
def test_reasoning_in_the_content(template: str, content: str, expected: str, note: str) -> None:
    encoder, notes = Encoder(tokenizer_of(template)), Counter[str]()
    example = encoder.encode(pair(content, content.replace("B", "C")), notes)
    assert encoder.tokenizer.decode(example.responses[0]) == expected
    assert list(example.prompt) == encoder.tokenizer.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert note in "".join(notes) if note else not notes


def test_the_templates_own_way_to_close_a_block() -> None:
    """What it prints behind reasoning of a response, else in a generation prompt without reasoning."""
    tokenizer = tokenizer_of("think open")
    opened = "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}{%- if m.reasoning_content -%}"
    opened += "{{ '<think>\n' + m.reasoning_content + '\n</think>\n~' }}{%- endif -%}{{ m.content + '<|im_end|>\n' }}"
    tokenizer.chat_template = (
        opened + "{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    assert texts(Encoder(tokenizer), pair("B.", "C."))[1] == ["\n</think>\n~B.<|im_end|>", "\n</think>\n~C.<|im_end|>"]
    told = "{{ '<think>\\n\\n</think>\\n' if enable_thinking is defined and not enable_thinking else '<think>\\n' }}"
    tokenizer.chat_template = KINDS["think open"].template.replace(
        "{{ '<|im_start|>assistant\\n<think>\\n' }}", "{{ '<|im_start|>assistant\\n' }}" + told
    )
    assert texts(Encoder(tokenizer), pair("B.", "C."))[1] == ["\n</think>\nB.<|im_end|>", "\n</think>\nC.<|im_end|>"]
    # A channel's header, which only the template can close.
    tokenizer = tokenizer_of("harmony")
    header = "<|start|>assistant<|channel|>analysis<|message|>"
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ '<|start|>assistant' }}", f"{{{{ '{header}' }}}}")
    prompt, responses = texts(Encoder(tokenizer), pair("B.", thought("C.", "A or C")))
    assert prompt.endswith(header)
    final = "<|end|><|start|>assistant<|channel|>final<|message|>"
    assert responses == [f"{final}B.<|return|>", f"A or C{final}C.<|return|>"]
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "analysis<|message|>' }}{%- endif -%}", "commentary<|message|>' }}{%- endif -%}"
    )
    with pytest.raises(RowError, match=r"prints 'commentary<\|message\|>' for generation and 'final<\|message\|>' in front"):
        Encoder(tokenizer).encode(pair("B.", "C."))


def test_arguments_of_the_template_and_of_a_row() -> None:
    tokenizer, off = tokenizer_of("qwen3"), {"enable_thinking": False}
    fed = {
        thinking: tokenizer.apply_chat_template([USER], add_generation_prompt=True, tokenize=False, enable_thinking=thinking)
        for thinking in (True, False)
    }
    assert fed[False] == fed[True] + "<think>\n\n</think>\n\n"
    assert texts(Encoder(tokenizer, off), pair("B.", "C.")) == (fed[False], ["B.<|im_end|>", "C.<|im_end|>"])
    assert texts(Encoder(tokenizer), pair("B.", "C.", arguments=off))[0] == fed[False]
    assert texts(Encoder(tokenizer, off), pair("B.", "C.", arguments={"enable_thinking": True}))[0] == fed[True]
    for reasoning in ("<think>a</think>B.", "<think>\na\n</think>\n\nB.", thought("B.", "a")):
        with pytest.raises(RowError, match="the generation prompt closes that block"):
            Encoder(tokenizer, off).encode(pair(reasoning, "C."))
    # What has no effect is said.
    notes = Counter[str]()
    encoder = Encoder(byte_level_tokenizer(), off)
    encoder.encode(pair("B.", "C."), notes)
    encoder.encode(Row("text", (" b", " c"), (1, -1), "", "pairs", arguments={"a": 1}), notes)
    assert list(notes) == [
        "the chat template does not read enable_thinking",
        "a, enable_thinking not used: the prompts are plain text, without the chat template",
    ]
    # Empty blocks of two spellings are one.
    assert texts(Encoder(tokenizer_of("glm"), off), pair("B.", "C."))[1] == ["\nB.<|im_end|>", "\nC.<|im_end|>"]
    prompt, responses = texts(Encoder(tokenizer_of("deepseek"), {"thinking": True}), pair("B.", "C."))
    assert (prompt[-7:], responses[0]) == ("<think>", "</think>B.<|eos|>")
    prompt, responses = texts(Encoder(tokenizer_of("gemma4"), {"enable_thinking": True}), pair("B.", "C."))
    assert (prompt[-6:], responses[0]) == ("model\n", "B.<turn|>")


def test_an_ordinary_token_behind_the_response_is_its_end() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken("<end>", special=False), AddedToken("\n\n", special=False)])
    tokenizer.chat_template = CHATML.replace("<|im_end|>\n", "\n\n<end>\nbye<|endoftext|>")
    encoder = Encoder(tokenizer)
    assert texts(encoder, pair("A drink.\n", "a <|endo"))[1] == ["A drink.\n\n\n<end>", "a <|endo\n\n<end>"]
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<end>"])
    assert encoder.end_ids() == sorted(ends)
    for row in (pair("a <end> b", "c"), pair("a", "b", [{"role": "user", "content": "<end>"}])):
        with pytest.raises(RowError, match="control token '<end>'"):
            encoder.encode(row)
    # White space is no end and a word no mark, though they may be tokens.
    tokenizer.add_tokens([AddedToken("assistant", special=False)])
    tokenizer.chat_template = CHATML.replace("<|im_end|>\n", "\n\n")
    assert texts(Encoder(tokenizer), pair("An\n\nassistant", "B"))[1] == ["An\n\nassistant<|im_end|>", "B<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("qwen3", {"<|im_end|>"}),
        ("harmony", {"<|return|>", "<|call|>", "<|im_end|>"}),
        ("gemma4", {"<turn|>", "<|im_end|>"}),
        ("glm", {"<|im_end|>"}),
    ],
)
def test_the_ends_at_which_generation_stops(name: str, ends: set[str]) -> None:
    tokenizer = tokenizer_of(name)
    assert Encoder(tokenizer).end_ids() == sorted(tokenizer.convert_tokens_to_ids(list(ends)))


def test_what_a_template_leaves_out_of_a_response_is_refused() -> None:
    encoder = Encoder(tokenizer_of("qwen3"))
    with pytest.raises(RowError, match="leaves out a part of the response, 'Well"):
        encoder.encode(pair("Well. <think>hm</think> B.", "C."))
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = CHATML.replace("m['content']", "m['content'] | upper")
    with pytest.raises(RowError, match="changes the text of the response"):
        Encoder(tokenizer).encode(pair("Paris", "Rome"))


@pytest.mark.parametrize(
    ("template", "messages", "problem"),
    [
        (
            "gemma",
            [{"role": "assistant", "content": "Hi."}, USER],
            "refuses these messages: Conversation roles must alternate",
        ),
        ("gemma", [USER, USER], "refuses these messages: Conversation roles must alternate"),
        ("{{ 1 / 0 }}", [USER], "refuses these messages: division by zero"),
        ("{{ messages[0].content.title.x() }}", [USER], "refuses these messages"),
        ("{{ messages[3].content + 'x' }}", [USER], "refuses these messages: list object has no element 3"),
        ("{% if %}", [USER], "refuses these messages"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", [USER], "changes the text of the response"),
    ],
)
def test_templates_with_demands_say_them_once(template: str, messages: list[Any], problem: str) -> None:
    tokenizer = tokenizer_of(template) if template in KINDS else byte_level_tokenizer()
    if template not in KINDS:
        tokenizer.chat_template = template
    with pytest.raises(RowError, match=problem):
        Encoder(tokenizer).encode(pair("A.", "B.", messages))


def test_conversations_of_unusual_shape() -> None:
    """A system message alone, an assistant that begins, and one that speaks twice, where the template takes them."""
    hi = {"role": "assistant", "content": "Hi."}
    for messages in ([{"role": "system", "content": "Talk."}], [hi, USER], [USER, hi, hi, USER]):
        encoder = Encoder(tokenizer_of("chatml"))
        fed = encoder.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert texts(encoder, pair("A.", "B.", messages)) == (fed, ["A.<|im_end|>", "B.<|im_end|>"])


@pytest.mark.parametrize("start", ["\n", "  ", "\n  ", " x"])
def test_white_space_at_a_templates_start_is_kept(start: str) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = start + "{% if true %}{{ strftime_now('%A, %Y-%m-%d %H:%M') }}{% endif %}\n" + CHATML
    prompt = Encoder(tokenizer).rendering.prompt([USER])
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "strftime_now('%A, %Y-%m-%d %H:%M')", "'Friday, 2024-07-26 00:00'"
    )
    assert prompt == tokenizer.apply_chat_template([USER], add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize(
    ("name", "text", "reasoning", "content"),
    [
        (
            "harmony",
            "<|channel|>analysis<|message|>A or B<|end|><|start|>assistant<|channel|>final<|message|>B.",
            "A or B",
            "B.",
        ),
        ("harmony", "<|channel|>final<|message|>B.", "", "B."),
        ("nemotron", "A or B\n</think>\nB.", "A or B", "B."),
        ("nemotron", "</think>B.", "", "</think>B."),
    ],
)
def test_what_was_generated_becomes_the_message_that_the_template_prints_so(
    name: str, text: str, reasoning: str, content: str
) -> None:
    encoder = Encoder(tokenizer_of(name))
    prompt = encoder.prompt([USER])
    expected = {"role": "assistant", "content": content} | ({"reasoning_content": reasoning} if reasoning else {})
    ids = encoder.continuation(encoder.rendering.prompt([USER]), text)
    assert encoder.message(prompt, ids) == expected
    assert texts(encoder, pair(expected, "C."))[1][0].startswith(text)
    # A turn of a chat, in the next prompt and in the rows that are saved.
    talk = Conversation(encoder, None)
    talk.add("What is tea?", "as decoded without them", True, text)
    assert talk.turns[0].messages == [USER, expected]
    following = encoder.tokenizer.decode(talk.prompt("Which?", 9).ids)
    assert content in following
    assert not reasoning or name == "nemotron" or reasoning not in following


def test_generated_text_without_marks_of_control_is_left_as_it_is() -> None:
    for name, text in (("qwen3", "<think>\nA or B\n</think>\n\nB."), ("chatml", "B."), ("gemma", " B.\n")):
        encoder = Encoder(tokenizer_of(name))
        ids = encoder.continuation(encoder.rendering.prompt([USER]), text)
        assert encoder.rendering.read(text) is None
        assert encoder.message(encoder.prompt([USER]), ids) == {"role": "assistant", "content": text.strip()}


def test_a_header_for_generation_alone() -> None:
    """It stays, and a response that happens to begin with its letters keeps them."""
    tokenizer = tokenizer_of("harmony")
    for generation, conversation in (("BOT: (now) ", "BOT: "), ("BOT<|channel|>final<|message|>", "BOT<|message|>")):
        tokenizer.chat_template = (
            "{% for m in messages %}{{ (m.role if m.role == 'user' else '" + conversation + "') + m.content + '<|end|>' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '" + generation + "' }}{% endif %}"
        )
        prompt, responses = texts(Encoder(tokenizer), pair("(no) tea", "tea"))
        assert prompt.endswith(generation)
        assert responses == ["(no) tea<|end|>", "tea<|end|>"]


def test_older_transformers_do_not_map_the_names_of_reasoning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template_utils, "_alias_reasoning_fields", lambda chat: chat, raising=False)
    for name in ("reasoning_content", "thinking", "reasoning"):
        row = pair(thought("B.", "A or B", name), "C.")
        assert texts(Encoder(tokenizer_of("qwen3")), row)[1][0] == "<think>\nA or B\n</think>\n\nB.<|im_end|>"
        assert "<|message|>A or B<|end|>" in texts(Encoder(tokenizer_of("harmony")), row)[1][0]


@pytest.mark.parametrize("form", ["pairs", "messages", "sharegpt"])
def test_reasoning_is_read_from_every_kind_of_row(form: str, tmp_path: Path) -> None:
    one, other = thought("B.", "A or B"), thought("A.", "A, surely")
    spoken = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "B.", "reasoning": "A or B"}]
    rows = {
        "pairs": {"prompt": [USER], "chosen": [one], "rejected": other},
        "messages": {"messages": [USER, one], "chat_template_kwargs": {"a": 1}},
        "sharegpt": {"conversations": spoken},
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(rows[form]) + "\n")
    (row,) = read_rows(str(tmp_path / "rows.jsonl"))
    assert row.arguments == ({"a": 1} if form == "messages" else None)
    assert "A or B" in texts(Encoder(tokenizer_of("qwen3")), row)[1][0]
    for empty in ({**one, "content": " "}, {**one, "content": ""}):
        (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [USER, empty]}) + "\n")
        with pytest.raises(UserError, match="response is empty"):
            read_rows(str(tmp_path / "rows.jsonl"))


def test_a_header_after_other_white_space_is_the_same_header() -> None:
    """Templates written over many lines print more of it in front of a response than in front of a generated one."""
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}\n\n    {% if m.role == 'user' %}\n{{ 'USER: ' + m.content + '\\n' }}\n"
        "    {% else %}\n{{ 'BOT: ' + m.content + '<|im_end|>\\n' }}\n    {% endif %}\n{% endfor %}\n"
        "{% if add_generation_prompt %}\n{{ 'BOT:' }}{% endif %}"
    )
    prompt, responses = texts(Encoder(tokenizer), pair("A drink.", "<b>"))
    assert (prompt, responses) == ("\nUSER: What is tea?\n\nBOT:", [" A drink.<|im_end|>", " <b><|im_end|>"])
