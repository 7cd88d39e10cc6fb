"""Tools and their calls: parsed, laid out as transformers does, and never dropped without a word."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from chat_templates import KINDS, tokenizer_of
from conftest import byte_level_tokenizer, config

from lite_dil.data.dataset import load, remarks
from lite_dil.data.encoder import Encoder
from lite_dil.data.files import RowError
from lite_dil.data.messages import read_messages
from lite_dil.data.reader import Row, read_rows

USER = {"role": "user", "content": "Weather in Paris?"}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}}


def calling(arguments: Any, **further: Any) -> dict[str, Any]:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call], **further}


def responses(name: str, *answers: Any, messages: Any = None, **further: Any) -> list[str]:
    encoder = Encoder(tokenizer_of(name))
    read = [read_messages([answer], "chosen")[0] for answer in answers]
    row = Row(messages or [USER], tuple(read), (1, -1), "", "pairs", **further)
    return [encoder.tokenizer.decode(ids) for ids in encoder.encode(row).responses]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "qwen3",
            '<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call><|im_end|>',
        ),
        (
            "harmony",
            ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Paris"}<|call|>',
        ),
        ("gemma4", '<|tool_call>call:weather{"city": "Paris"}<tool_call|><turn|>'),
        # This one joins the arguments to text, so it takes JSON text; it opened a block, which is closed.
        ("r1", '</think>\n\n<|call|>weather{"city": "Paris"}<|eos|>'),
    ],
)
def test_arguments_as_text_are_those_of_an_object(template: str, expected: str) -> None:
    found = responses(template, calling('{"city": "Paris"}'), calling({"city": "Rome"}))
    assert found == [expected, expected.replace("Paris", "Rome")]


def test_a_template_that_would_print_pythons_spelling_gets_json() -> None:
    tokenizer = tokenizer_of("qwen3")
    tokenizer.chat_template = tokenizer.chat_template.replace("f.arguments | tojson", "f.arguments")
    row = Row(
        [USER], tuple(read_messages([calling({"city": each})], "x")[0] for each in ("Paris", "Rome")), (1, -1), "", "pairs"
    )
    assert '"arguments": {"city": "Paris"}' in tokenizer.decode(Encoder(tokenizer).encode(row).responses[0])


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (calling("{'city': 'Paris'}"), r"x\[0\].tool_calls\[0\].arguments is not valid JSON"),
        (calling('["Paris"]'), "arguments is a list; expected an object"),
        ({**USER, "role": "assistant", "tool_calls": "weather"}, "tool_calls is text; expected a list"),
        ({**USER, "role": "assistant", "tool_calls": [{"function": {}}]}, r"tool_calls\[0\] has no function with a name"),
        ({"role": "assistant", "content": "A.", "thinking": ["hm"]}, r"field 'x\[0\].thinking' is a list"),
    ],
)
def test_calls_that_cannot_be_read(message: dict[str, Any], problem: str) -> None:
    with pytest.raises(RowError, match=problem):
        read_messages([message], "x")


def test_reasoning_with_calls() -> None:
    found = responses("harmony", calling("{}", thinking="hm"), calling("{}", reasoning="ah"))
    assert found[0] == (
        "<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{}"
        "<|call|>"
    )
    # Gemma 4 prints an empty thought for generation: what was thought cannot follow it.
    with pytest.raises(RowError, match="the generation prompt closes that block"):
        responses("gemma4", calling("{}", thinking="hm"), calling("{}", reasoning="ah"))
    found = responses(
        "gemma4", calling("{}", thinking="hm"), calling("{}", reasoning="ah"), arguments={"enable_thinking": True}
    )
    assert found[0] == "<|channel>thought\nhm<channel|><|tool_call>call:weather{}<tool_call|><turn|>"


def test_harmonys_channels_as_messages() -> None:
    said = [
        {"role": "assistant", "channel": channel, "content": text} for channel, text in (("analysis", "hm"), ("final", "A."))
    ]
    expected = [USER, {"role": "assistant", "content": "A.", "reasoning_content": "hm"}]
    assert read_messages([USER, *said], "messages") == expected
    for messages in ([USER, said[0]], [USER, said[0], USER]):
        with pytest.raises(RowError, match="an analysis message without the assistant's message after it"):
            read_messages(messages, "messages")


def test_templates_without_tools_are_named() -> None:
    encoder, notes = Encoder(byte_level_tokenizer()), Counter[str]()
    called = [USER, *read_messages([calling("{}")], "x"), {"role": "tool", "content": "sun"}]
    encoder.encode(Row(called, ("A.", "B."), (1, -1), "", "pairs", [TOOL]), notes)
    assert set(notes) == {
        "the chat template prints the same with their tools as without them",
        "the chat template does not print the tool calls of earlier turns",
    }
    with pytest.raises(RowError, match="does not print the tool calls of the response"):
        encoder.encode(Row([USER], (called[1], "B."), (1, -1), "", "pairs", [TOOL]))
    notes.clear()
    encoder.encode(Row("Weather?", (" A.", " B."), (1, -1), "", "pairs", [TOOL]), notes)
    assert list(notes) == ["tools not used: the prompts are plain text, without the chat template"]


def test_a_folders_template_for_tools(tmp_path: Path) -> None:
    tokenizer = tokenizer_of("qwen3")
    plain = byte_level_tokenizer().chat_template
    tokenizer.chat_template = {"default": plain, "tool_use": KINDS["qwen3"].template}
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "additional_chat_templates" / "tool_use.jinja").is_file()
    tokenizer = type(tokenizer).from_pretrained(tmp_path)
    encoder = Encoder(tokenizer)
    for tools in (None, [TOOL]):
        example = encoder.encode(Row([USER], ("A.", "B."), (1, -1), "", "pairs", tools))
        assert list(example.prompt) == tokenizer.apply_chat_template(
            [USER], tools=tools, add_generation_prompt=True, return_dict=False
        )
        assert tokenizer.decode(example.responses[0]) == ("<think>\n\n</think>\n\nA.<|im_end|>" if tools else "A.<|im_end|>")
    tokenizer.chat_template = {"rag": plain}
    with pytest.raises(RowError, match="multiple chat templates with no default"):
        Encoder(tokenizer).rendering.prompt([USER])


def test_nulls_that_arrow_adds(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    clock = {"type": "function", "function": {"name": "clock", "parameters": {"properties": {"zone": {"type": "string"}}}}}
    rows = [
        {
            "tools": [tool],
            "chat_template_kwargs": kwargs,
            "prompt": [USER],
            "chosen": [calling(arguments)],
            "rejected": [{"role": "assistant", "content": "no", "tool_calls": None}],
        }
        for tool, arguments, kwargs in ((TOOL, {"city": "Paris"}, {"a": 1}), (clock, {"zone": "CET"}, {"b": 2}))
    ]
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    found = read_rows(str(file))
    assert [row.tools for row in found] == [[TOOL], [clock]]
    assert [row.arguments for row in found] == [{"a": 1}, {"b": 2}]
    data = load(str(file), "train", Encoder(tokenizer_of("qwen3")), config(data=str(file)))
    assert [line for line in remarks(data) if ": null" in line] == [
        f"{file}: 2 rows: null in the arguments of their tool calls is trained on; columnar files add it for the arguments of "
        "other calls: store arguments as JSON text there"
    ]
    # In JSON a null is the author's own.
    tool = json.loads(json.dumps(TOOL).replace('{"type": "string"}', '{"default": null}'))
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({**rows[0], "tools": [tool]}) + "\n")
    assert read_rows(str(file))[0].tools == [tool]
