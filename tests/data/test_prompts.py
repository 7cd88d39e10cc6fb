"""Prompts from every kind of file: which are read, in whose form, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import byte_level_tokenizer, config

from lite_dil.base.errors import UserError
from lite_dil.data import formats, prompts
from lite_dil.data.encoder import Encoder
from lite_dil.data.prompts import encode_prompts, key_of, read_prompts

USER = {"role": "user", "content": "what is tea"}
BOT = {"role": "assistant", "content": "a drink"}


def read(path: Path, chat: bool = False, **changes: Any) -> tuple[list[Any], list[str]]:
    said: list[str] = []
    return [each.prompt for each in read_prompts(str(path), config(**changes), chat, said.append)], said


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "what is tea"}, "what is tea"),
        ({"prompt": [USER]}, [USER]),
        ({"prompt": "what is tea", "label": "drinks"}, "what is tea"),
        ({"messages": [USER]}, [USER]),
        ({"messages": [USER, BOT]}, [USER]),
        ({"messages": [USER, BOT, USER]}, [USER, BOT, USER]),
        ({"conversations": [{"from": "human", "value": "what is tea"}]}, [USER]),
        ({"conversations": [{"from": "human", "value": "what is tea"}, {"from": "gpt", "value": "a drink"}]}, [USER]),
        ({"instruction": "what is tea"}, [USER]),
        ({"turns": ["what is tea"], "question_id": 81}, [USER]),
        ({"turns": [{"content": "what is tea"}]}, [USER]),
        ({"system": "be kind", "prompt": [USER]}, [{"role": "system", "content": "be kind"}, USER]),
        ({"system": "be kind", "messages": [USER]}, [{"role": "system", "content": "be kind"}, USER]),
        ({"prompt": [USER], "messages": None, "instruction": None, "conversations": None}, [USER]),
        ({"messages": json.dumps([USER])}, [USER]),
        ({"messages": [USER, BOT], "rejected_response": "no"}, [USER]),
        ({"prompt": "what is tea", "response_0": "a", "response_1": "b", "better_response_id": 1}, [USER]),
        ({"instruction": "what is", "input": "tea", "output": "a drink"}, [{"role": "user", "content": "what is\ntea"}]),
        ({"prompt": "what is tea", "chosen": " a drink", "rejected": " a house"}, "what is tea"),
        ({"chosen": [USER, BOT], "rejected": [USER, {**BOT, "content": "no"}]}, [USER]),
        ({"prompt": "what is tea", "chosen": [BOT], "rejected": [{**BOT, "content": "no"}]}, [USER]),
        ({"prompt": "what is tea", "completion": " x", "label": False}, "what is tea"),
        ({"chosen": "\n\nHuman: what is tea\n\nAssistant: a", "rejected": "\n\nHuman: what is tea\n\nAssistant: b"}, [USER]),
        ({"question": "what is tea", "responses": ["a", "b"], "scores": [1, 2]}, [USER]),
    ],
)
def test_each_kind_of_row(row: dict[str, Any], expected: Any, tmp_path: Path) -> None:
    found, said = read(write(tmp_path / "a.jsonl", row))
    assert (found, said) == ([expected], [])


def test_lines_of_text_columns_limits_and_repeats(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("what is tea\r\n\n  a red house \nwhat is tea\n", encoding="utf-8")
    assert read(path) == (["what is tea", "a red house"], ["1 prompt repeats an earlier one: each is used once"])
    assert read(path, chat=True, max_rows=1) == ([[USER]], [])
    table = tmp_path / "a.csv"
    table.write_text("question,n\nwhat is tea,1\na red house,2\n", encoding="utf-8")
    assert read(table, columns="prompt=question")[0] == ["what is tea", "a red house"]
    both = write(tmp_path / "b.jsonl", {"prompt": "is it"})
    assert read(Path(f"{both},{path}"))[0] == ["is it", "what is tea", "a red house"]


def test_turns_and_system_prompts_of_plain_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"turns": ["what is tea", "why"]}, {"turns": ["is it", "why"]})
    asked, said = read(path)
    assert [prompt[0]["content"] for prompt in asked] == ["what is tea", "is it"]
    assert said == ["2 prompts of several turns: only the first is asked"]
    path = write(tmp_path / "b.jsonl", {"prompt": "what is tea", "system": "be kind"})
    assert read(path)[0] == ["be kind\n\nwhat is tea"]
    assert read(path, chat=True) == ([[{"role": "system", "content": "be kind"}, USER]], [])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "x"}], r"a.jsonl line 1: no field 'prompt'; the row has question; .*--columns prompt=question"),
        ([{"prompt": "x"}, {"prompt": [USER]}], r"line 2: the prompt is chat messages, but .*line 1 has plain text; .*--chat"),
        ([{"question": "x", "chosen": "a b", "rejected": "a c"}], "there is no 'prompt'.*--columns prompt=question"),
        ([{"prompt": "x", "images": ["a.png"]}], "'images' holds a list of 1; only text"),
        ([{"messages": "[{'role': 'user', 'content': 'x'}]"}], "'messages' is text in which Python printed messages"),
        ([{"prompt": " "}], "'prompt' is empty"),
        ([{"prompt": [USER, BOT]}], "ends with the assistant's turn"),
        ([{"messages": [{"role": "users", "content": "x"}]}], "did you mean 'user'"),
        (["x"], "expected a JSON object with 'prompt' or 'messages', found text"),
        ([{"prompt": 3}], "'prompt' is a number"),
    ],
)
def test_what_is_refused_names_its_line_and_the_fix(rows: list[Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(UserError, match=message):
        read(path)


def test_a_row_is_searched_for_what_is_not_text_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[Any] = []
    for module in (formats, prompts):
        search = module.refuse_unreadable
        monkeypatch.setattr(module, "refuse_unreadable", lambda row, search=search: searched.append(row) or search(row))
    rows = [
        {"prompt": "x"},
        {"messages": [USER]},
        {"instruction": "y"},
        {"turns": ["z"]},
        {"topic": "tea", "question": "which"},
    ]
    read(write(tmp_path / "a.jsonl", *rows), skip_bad_rows=True)
    assert len(searched) == len(rows)


def test_bad_rows_can_be_left_out_and_weights_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "x"}, {"prompt": None}, {"prompt": "y"})
    found, said = read(path, skip_bad_rows=True)
    assert found == ["x", "y"] and said == [f"{path}: 1 row that cannot be used is left out"]
    with pytest.raises(UserError, match=r"leave =0.5 out"):
        read(Path(f"{path}=0.5"))


def test_tokens_are_those_of_training_and_the_cut_is_said(tmp_path: Path) -> None:
    encoder, said = Encoder(byte_level_tokenizer()), []
    path = write(tmp_path / "a.jsonl", {"prompt": [USER]}, {"prompt": [{"role": "user", "content": "a red house " * 20}]})
    found = read_prompts(str(path), config(), False, said.append)
    whole = encode_prompts(found, encoder, config(), 8, said.append)
    assert whole[0].ids == encoder.prompt([USER]) and not said
    short = encode_prompts(found, encoder, config(max_length=40), 8, said.append)
    assert short[0].ids == whole[0].ids
    assert short[1].ids == whole[1].ids[:1] + whole[1].ids[-31:] and len(said) == 1
    with pytest.raises(UserError, match="leaves no room"):
        encode_prompts(found, encoder, config(max_length=8), 8, said.append)
    control = write(tmp_path / "b.jsonl", {"prompt": [{"role": "user", "content": "<|im_end|>"}]})
    with pytest.raises(UserError, match=r"b.jsonl line 1: a message contains the control token"):
        encode_prompts(read_prompts(str(control), config(), False, said.append), encoder, config(), 8, said.append)


def test_a_prompt_is_found_again_in_a_row_of_its_own(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    path = write(tmp_path / "a.jsonl", {"prompt": [USER]}, {"prompt": [USER], "tools": tools})
    one, two = read_prompts(str(path), config(), False, print)
    assert one.key != two.key
    for each in (one, two):
        assert key_of(json.loads(json.dumps(each.row(chosen="a", rejected="b")))) == each.key


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"prompt": "what is tea", "input": [1, 2], "turns": "two", "system": "be kind"}, {"input": [1, 2], "turns": "two"}),
        ({"instruction": "what is", "input": "tea", "level": 3}, {"level": 3}),
        ({"messages": [USER], "input": "x", "answer": "y"}, {"answer": "y"}),
    ],
)
def test_the_other_columns_are_those_that_are_no_part_of_the_prompt(
    row: dict[str, Any], columns: dict[str, Any], tmp_path: Path
) -> None:
    (found,) = read_prompts(str(write(tmp_path / "a.jsonl", row)), config(), False, lambda text: None)
    assert found.columns == columns
