"""The formats of the wild: each is told from its rows, and each gives the prompt and the answers that its owner meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lite_dil.base.errors import UserError
from lite_dil.data.reader import Reader, Row, parse_columns, read_rows


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be kind."}
HI, YO, BYE = user("hi"), assistant("yo"), user("bye")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
HH = "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: bye\n\nAssistant:"

# name of the format, form, a row, its prompt, its answers, its signs
CASES: list[tuple[str, str, dict[str, Any], Any, tuple[Any, ...], tuple[int, ...]]] = [
    # TRL: explicit and implicit prompts, plain and conversational
    ("preference", "pairs", {"prompt": "Sky:", "chosen": " blue", "rejected": " red"}, "Sky:", (" blue", " red"), (1, -1)),
    (
        "preference",
        "pairs",
        {"chosen": "The sky is blue.", "rejected": "The sky is bad."},
        "The sky is",
        (" blue.", " bad."),
        (1, -1),
    ),
    ("preference", "pairs", {"prompt": [HI], "chosen": [YO], "rejected": [assistant("no")]}, [HI], ("yo", "no"), (1, -1)),
    ("preference", "pairs", {"chosen": [HI, YO], "rejected": [HI, assistant("no")]}, [HI], ("yo", "no"), (1, -1)),
    # one side text, one side messages: there is one reading
    ("preference", "pairs", {"prompt": [HI], "chosen": "yo", "rejected": "no"}, [HI], ("yo", "no"), (1, -1)),
    ("preference", "pairs", {"prompt": "hi", "chosen": [YO], "rejected": "no"}, [HI], ("yo", "no"), (1, -1)),
    # UltraFeedback-binarized: the prompt again, inside both conversations
    (
        "preference",
        "pairs",
        {"prompt": "hi", "prompt_id": "x", "chosen": [HI, YO], "rejected": [HI, assistant("no")], "messages": [HI, YO]},
        [HI],
        ("yo", "no"),
        (1, -1),
    ),
    # both answers repeat the prompt
    (
        "preference",
        "pairs",
        {"prompt": "Sky: ", "chosen": "Sky: blue", "rejected": "Sky: red"},
        "Sky:",
        (" blue", " red"),
        (1, -1),
    ),
    # answers that begin with the prompt's letters, and do not repeat it
    (
        "preference",
        "pairs",
        {"prompt": "I", "chosen": "In my view", "rejected": "It is"},
        "I",
        ("In my view", "It is"),
        (1, -1),
    ),
    (
        "preference",
        "pairs",
        {"prompt": "Hi", "chosen": "Hi! How are you?", "rejected": "Go"},
        "Hi",
        ("Hi! How are you?", "Go"),
        (1, -1),
    ),
    # blocks of text
    (
        "preference",
        "pairs",
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "chosen": [YO], "rejected": "no"},
        [HI],
        ("yo", "no"),
        (1, -1),
    ),
    ("unpaired", "unpaired", {"prompt": "hi", "completion": " yo", "label": False}, "hi", (" yo",), (-1,)),
    ("unpaired", "unpaired", {"prompt": [HI], "completion": [YO], "label": 1}, [HI], ("yo",), (1,)),
    ("unpaired", "unpaired", {"prompt": [HI], "completion": [YO], "label": 0.0}, [HI], ("yo",), (-1,)),
    ("completion", "demonstrations", {"prompt": "hi", "completion": " yo"}, "hi", (" yo",), (1,)),
    ("messages", "demonstrations", {"messages": [SYSTEM, HI, YO]}, [SYSTEM, HI], ("yo",), (1,)),
    ("messages", "demonstrations", {"messages": [HI, YO]}, [HI], ("yo",), (1,)),
    ("messages", "demonstrations", {"messages": [HI, YO], "label": 0}, [HI], ("yo",), (1,)),  # a class, and no thumb down
    ("messages", "unpaired", {"messages": [HI, YO], "label": False}, [HI], ("yo",), (-1,)),
    # raw HH: the prompt ends at the last assistant mark that both share, and not where the letters part
    ("hh", "pairs", {"chosen": f"{HH} so long", "rejected": f"{HH} sorry"}, [HI, YO, BYE], ("so long", "sorry"), (1, -1)),
    # ShareGPT, LLaMA-Factory
    (
        "sharegpt",
        "pairs",
        {
            "conversations": [{"from": "human", "value": "hi"}],
            "chosen": {"from": "gpt", "value": "yo"},
            "rejected": {"from": "gpt", "value": "no"},
            "system": "Be kind.",
        },
        [SYSTEM, HI],
        ("yo", "no"),
        (1, -1),
    ),
    (
        "sharegpt",
        "unpaired",
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}], "kto_tag": True},
        [HI],
        ("yo",),
        (1,),
    ),
    (
        "sharegpt",
        "demonstrations",
        {
            "conversations": [
                {"from": "system", "value": "Be kind."},
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "yo"},
            ]
        },
        [SYSTEM, HI],
        ("yo",),
        (1,),
    ),
    # Alpaca
    ("alpaca", "demonstrations", {"instruction": "hi", "input": "", "output": "yo"}, [HI], ("yo",), (1,)),
    (
        "alpaca",
        "pairs",
        {"instruction": "Add", "input": "1 1", "output": ["2", "3", "4"], "system": "Be kind.", "history": [["hi", "yo"]]},
        [SYSTEM, HI, YO, user("Add\n1 1")],
        ("2", "4"),
        (1, -1),
    ),
    ("alpaca", "pairs", {"instruction": "hi", "chosen": "yo", "rejected": "no"}, [HI], ("yo", "no"), (1, -1)),
    ("alpaca", "unpaired", {"instruction": "hi", "output": "yo", "kto_tag": False}, [HI], ("yo",), (-1,)),
    # several answers with scores
    ("ranked", "pairs", {"prompt": "hi", "responses": ["a", "b", "c"], "scores": [2, 5, 1]}, [HI], ("b", "c"), (1, -1)),
    (
        "ranked",
        "pairs",
        {
            "instruction": "hi",
            "completions": [{"response": "a", "overall_score": "3.5"}, {"response": "b", "overall_score": 8}],
        },
        [HI],
        ("b", "a"),
        (1, -1),
    ),
    (
        "ranked",
        "pairs",
        {"prompt": HH, "answers": [{"answer": "a", "rank": 2.0}, {"answer": "b", "rank": 1.0}]},
        [HI, YO, BYE],
        ("b", "a"),
        (1, -1),
    ),
]


def read_one(folder: Path, *rows: Any, **settings: Any) -> tuple[Reader, list[Row]]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reader = Reader(str(path), **settings)
    return reader, list(reader)


@pytest.mark.parametrize(("name", "form", "raw", "prompt", "answers", "signs"), CASES)
def test_each_format_is_told_and_read(
    tmp_path: Path, name: str, form: str, raw: Any, prompt: Any, answers: tuple[Any, ...], signs: tuple[int, ...]
) -> None:
    reader, rows = read_one(tmp_path, raw)
    assert not reader.problems
    (row,) = rows
    assert (reader.format, row.form, row.prompt, row.answers, row.signs) == (name, form, prompt, answers, signs)
    # Behind a row that has nothing of it, and with the format named, it reads the same.
    place = f"{tmp_path / 'rows.jsonl'} line 2"
    assert read_one(tmp_path, {"a": 1}, raw, format=name)[1] == [Row(prompt, answers, signs, place, form)]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}, "no common first message"),
        ({"chosen": f"{HH} a", "rejected": "\n\nHuman: hi\n\nAssistant: d"}, "'chosen' has 4 messages and 'rejected' 2"),
        ({"chosen": f"{HH} a", "rejected": f"{HH} a "}, "'chosen' and 'rejected' are the same"),
        ({"chosen": f"{HH}", "rejected": f"{HH} a"}, "the chosen response is empty"),
        (
            {"chosen": [HI, YO, BYE, YO], "rejected": [HI, assistant("no"), BYE, assistant("ok")]},
            "differ from message 2 of 4 on",
        ),
        (
            {"prompt": "other", "chosen": [HI, YO], "rejected": [HI, assistant("no")]},
            "begin with another prompt than field 'prompt'",
        ),
        ({"chosen": "abc", "rejected": "xyz"}, "share no start"),
        ({"conversations": [{"from": "gpt", "value": "yo"}]}, "has 1 message"),
        ({"conversations": [{"from": "human", "value": "hi"}], "chosen": "yo"}, "no field 'rejected'"),
        ({"prompt": "hi", "responses": ["a", "b"], "scores": [1, 1]}, "no rows are left; all are ties"),
        ({"prompt": "hi", "responses": ["a", "b"], "scores": [1]}, "2 responses in 'responses', but 1 in 'scores'"),
        ({"prompt": "hi", "responses": ["a", "b"], "scores": [1, None]}, r"scores\[1\] is null"),
        ({"prompt": "hi", "responses": ["a", "b"]}, r"responses\[0\] has no score"),
        ({"instruction": "hi", "output": ["a"]}, "expected at least two, best first"),
        ({"instruction": "hi", "output": "a", "history": ["x"]}, r"history\[0\] is text; expected \[question, response\]"),
        ({"messages": [HI]}, "has 1 message"),
        ({"messages": [HI, YO, BYE]}, r"'messages\[2\]' has the roles \['user'\]"),
        ({"prompt": [HI], "completion": [YO], "tools": "{"}, "field 'tools' is not valid JSON"),
        ({"prompt": [HI], "completion": [YO], "tools": {"a": 1}}, "field 'tools' is an object; expected a list"),
    ],
)
def test_rows_that_their_format_does_not_allow(tmp_path: Path, raw: Any, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(UserError, match=f"rows.jsonl(?: line 1)?: .*{message}"):
        read_rows(str(path))


def test_a_plain_prompt_is_never_cut_inside_a_word(tmp_path: Path) -> None:
    reader, (row,) = read_one(tmp_path, {"chosen": "Say what is thinner", "rejected": "Say what is thicker"})
    assert (row.prompt, row.answers) == ("Say what is", (" thinner", " thicker"))
    assert list(reader.notes.values()) == [1]
    reader, (row,) = read_one(tmp_path, {"chosen": f"{HH} so long", "rejected": f"{HH} sorry"}, format="preference")
    assert (row.prompt, row.answers) == (HH, (" so long", " sorry"))


def test_tools_and_calls(tmp_path: Path) -> None:
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    said = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    tool = {"role": "tool", "content": "1", "tool_call_id": "7"}
    raw = {"prompt": [HI, calling, tool], "chosen": [calling], "rejected": [YO], "tools": json.dumps(TOOLS)}
    _, (row,) = read_one(tmp_path, raw)
    assert row == Row([HI, said, tool], (said, "yo"), (1, -1), row.place, "pairs")
    assert row.tools == TOOLS
    spoken = [{"from": "human", "value": "hi"}, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}]
    _, (row,) = read_one(
        tmp_path, {"conversations": [*spoken, {"from": "observation", "value": "1"}, {"from": "gpt", "value": "yo"}]}
    )
    assert row.prompt == [HI, said, {"role": "tool", "content": "1"}]


def test_one_format_and_one_kind_in_a_file(tmp_path: Path) -> None:
    pair = {"prompt": [HI], "chosen": [YO], "rejected": [assistant("no")]}
    labelled = {"prompt": "hi", "completion": "yo", "label": True}
    reader, rows = read_one(tmp_path, pair, labelled, {"prompt": "hi", "chosen": "yo", "rejected": "no"}, pair)
    assert len(rows) == 2
    assert [problem.kind for problem in reader.problems] == ["mixed formats"] * 2
    assert (
        "looks like single responses with a label (unpaired), but the file is read as preference" in reader.problems[0].message
    )
    # The format is that of most rows, not of the first.
    reader, rows = read_one(tmp_path, labelled, pair, pair)
    assert (reader.format, len(rows), reader.problems[0].place.endswith("line 1")) == ("preference", 2, True)


def test_one_form_in_a_file_of_one_format(tmp_path: Path) -> None:
    spoken = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    reader, rows = read_one(tmp_path, {"conversations": spoken, "kto_tag": True}, {"conversations": spoken})
    assert (len(rows), reader.form, reader.problems[0].kind) == (1, "unpaired", "mixed formats")
    assert "the row has demonstrations, but" in reader.problems[0].message


def test_columns_with_other_names(tmp_path: Path) -> None:
    columns = parse_columns("chosen=good, rejected=bad,prompt=question")
    _, (row,) = read_one(tmp_path, {"question": "hi", "good": " yo", "bad": " no", "chosen": None}, columns=columns)
    assert (row.prompt, row.answers) == ("hi", (" yo", " no"))
    named = {"prompt": "hi", "chosen": " yo", "rejected": " no", "better": " so"}
    reader, rows = read_one(tmp_path, named, columns={"chosen": "betterr"})
    assert not rows and "no column 'betterr', which --columns names (did you mean 'better'?)" in reader.problems[0].message
    with pytest.raises(UserError, match=r"unknown field 'choosen' \(did you mean 'chosen'\?\)"):
        parse_columns("choosen=good")
    with pytest.raises(UserError, match="expected FIELD=COLUMN, such as chosen=good"):
        parse_columns("chosen")
