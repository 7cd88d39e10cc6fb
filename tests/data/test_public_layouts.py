"""The layouts of public data sets, in every kind of file: the prompt and the responses that their authors meant."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lite_dil.base.errors import UserError
from lite_dil.data.reader import Reader, parse_columns, read_rows
from lite_dil.data.rows import Rows

WHY = {"role": "user", "content": "Why is the sky blue?"}
KIND = {"role": "system", "content": "Be kind."}
CHOSEN, REJECTED = {"role": "assistant", "content": "Rayleigh."}, {"role": "assistant", "content": "Paint."}
ASK, HUMAN = "Why is the sky blue?", {"from": "human", "value": "Why is the sky blue?"}
HH = "\n\nHuman: Why is the sky blue?\n\nAssistant:"
PAIR, TURNED = (([WHY], ("Rayleigh.", "Paint."), (1, -1)),), (([WHY], ("Paint.", "Rayleigh."), (1, -1)),)
SYSTEM_PAIR = (([KIND, WHY], ("Rayleigh.", "Paint."), (1, -1)),)
SYSTEM_GOOD = (([KIND, WHY], ("Rayleigh.",), (1,)),)
TEXT_PAIR = ((ASK, ("Rayleigh.", "Paint."), (1, -1)),)


def typed(role: str, text: str, key: str = "value") -> dict[str, Any]:
    """A message of LLaMA-Factory v1 or, with the key text, of Chatbot Arena."""
    return {"role": role, "content": [{"type": "text", key: text}], "loss_weight": 1.0}


def two(a: str, b: str, **rest: Any) -> dict[str, Any]:
    return {"prompt": ASK, a: "Rayleigh.", b: "Paint.", **rest}


NULLS = dict.fromkeys(("system", "tools", "images", "messages", "conversations", "label", "instruction", "output", "history"))
UNTIED: list[tuple[str, list[dict[str, Any]], Any]] = [
    ("UltraFeedback", [{"prompt": ASK, "prompt_id": "x", "chosen": [WHY, CHOSEN], "rejected": [WHY, REJECTED]}], PAIR),
    ("Tulu mixes", [{"id": "x", "source": "d", "chosen": [WHY, CHOSEN], "rejected": [WHY, REJECTED], "prompt": ASK}], PAIR),
    ("HH", [{"chosen": f"{HH} Rayleigh.", "rejected": f"{HH} Paint."}], PAIR),
    ("HH, a null prompt", [{"prompt": None, "chosen": f"{HH} Rayleigh.", "rejected": f"{HH} Paint."}], PAIR),
    ("HH, an empty prompt", [{"prompt": "", "chosen": f"{HH} Rayleigh.", "rejected": f"{HH} Paint."}], PAIR),
    ("null columns", [{**NULLS, "prompt": [WHY], "chosen": [CHOSEN], "rejected": [REJECTED]}], PAIR),
    ("empty columns", [{"instruction": "", "messages": [], **two("chosen", "rejected")}], TEXT_PAIR),
    ("JSON of a request", [{"prompt": json.dumps({"messages": [WHY]}), "chosen": "Rayleigh.", "rejected": "Paint."}], PAIR),
    ("a null prompt", [{"prompt": None, "chosen": [WHY, CHOSEN], "rejected": [WHY, REJECTED]}], PAIR),
    ("system", [{"system": "Be kind.", "prompt": [WHY], "chosen": [CHOSEN], "rejected": [REJECTED]}], SYSTEM_PAIR),
    ("ShareGPT", [{"system": "Be kind.", "conversations": [HUMAN], "chosen": CHOSEN, "rejected": REJECTED}], SYSTEM_PAIR),
    ("system twice", [{"system": "Be kind.", "chosen": [KIND, WHY, CHOSEN], "rejected": [KIND, WHY, REJECTED]}], SYSTEM_PAIR),
    ("OpenOrca", [{"system_prompt": "Be kind.", "prompt": [WHY], "chosen": [CHOSEN], "rejected": [REJECTED]}], SYSTEM_PAIR),
    ("system, HH", [{"system": "Be kind.", "chosen": f"{HH} Rayleigh.", "rejected": f"{HH} Paint."}], SYSTEM_PAIR),
    ("truthy-dpo", [{"system": "Be kind.", **two("chosen", "rejected")}], ((f"Be kind.\n\n{ASK}", *TEXT_PAIR[0][1:]),)),
    ("argilla", [{"instruction": ASK, "chosen_response": "Rayleigh.", "rejected_response": "Paint.", "source": "m"}], PAIR),
    ("ms-swift", [{"messages": [WHY, CHOSEN], "rejected_response": "Paint."}], PAIR),
    ("ms-swift, whole", [{"messages": [WHY, CHOSEN], "rejected_messages": [WHY, REJECTED]}], PAIR),
    ("ms-swift, answer", [{"messages": [WHY, CHOSEN], "rejected_messages": [REJECTED]}], PAIR),
    ("ShareGPT, rejected", [{"conversations": [HUMAN, {"from": "gpt", "value": "Rayleigh."}], "rejected": "Paint."}], PAIR),
    ("Alpaca, rejected", [{"instruction": ASK, "output": "Rayleigh.", "rejected": "Paint."}], PAIR),
    ("completion, rejected", [two("completion", "rejected_completion")], TEXT_PAIR),
    ("messages as prompt", [{"messages": [WHY], "chosen": "Rayleigh.", "rejected": "Paint."}], PAIR),
    (
        "LLaMA-Factory v1",
        [
            {
                "chosen_messages": [typed("user", ASK), typed("assistant", "Rayleigh.")],
                "rejected_messages": [typed("user", ASK), typed("assistant", "Paint.")],
            }
        ],
        PAIR,
    ),
    ("PKU-SafeRLHF", [two("response_0", "response_1", better_response_id=0, safer_response_id=1)], PAIR),
    ("PKU-SafeRLHF, the second", [two("response_0", "response_1", better_response_id=1, safer_response_id=0)], TURNED),
    ("HelpSteer2", [two("response_1", "response_2", preference_strength=-2)], PAIR),
    ("HelpSteer3", [{"context": [WHY], "response1": "Rayleigh.", "response2": "Paint.", "overall_preference": 1}], TURNED),
    ("SHP", [{"history": ASK, "human_ref_A": "Rayleigh.", "human_ref_B": "Paint.", "labels": 1, "score_A": 1}], PAIR),
    ("SHP, the second", [{"history": ASK, "human_ref_A": "Rayleigh.", "human_ref_B": "Paint.", "labels": 0}], TURNED),
    ("WebGPT", [two("answer_0", "answer_1", score_0=-1.0, score_1=0.5)], TURNED),
    ("Arena", [{"winner": "model_a", "conversation_a": [WHY, CHOSEN], "conversation_b": [WHY, REJECTED]}], PAIR),
    (
        "Arena, blocks",
        [
            {
                "winner": "model_b",
                "conversation_a": [typed("user", ASK, "text"), typed("assistant", "Rayleigh.", "text")],
                "conversation_b": [typed("user", ASK, "text"), typed("assistant", "Paint.", "text")],
            }
        ],
        TURNED,
    ),
    ("Arena 55k", [two("response_a", "response_b", winner_model_a=0, winner_model_b=1, winner_tie=0)], TURNED),
    ("an index", [{"prompt": ASK, "responses": ["Rayleigh.", "Paint."], "chosen": 0}], PAIR),
    ("the winner's text", [two("response_a", "response_b", chosen="Paint.")], TURNED),
    ("Nectar", [{"prompt": HH, "answers": [{"answer": "Paint.", "rank": 2.0}, {"answer": "Rayleigh.", "rank": 1.0}]}], PAIR),
    (
        "mixed speakers",
        [{"conversations": [{**HUMAN, "role": None}, {"role": "assistant", "content": "Yes.", "from": None, "value": None}]}],
        (([WHY], ("Yes.",), (1,)),),
    ),
    ("KTO", [{"prompt": [KIND, WHY], "completion": [CHOSEN], "label": 0}], (([KIND, WHY], ("Rayleigh.",), (-1,)),)),
    ("KTO, system", [{"system": "Be kind.", **two("completion", "x"), "prompt": [WHY], "label": True}], SYSTEM_GOOD),
    ("labelled Alpaca", [{"instruction": ASK, "output": "Paint.", "label": False}], (([WHY], ("Paint.",), (-1,)),)),
    ("labelled messages", [{"messages": [WHY, REJECTED], "label": False}], (([WHY], ("Paint.",), (-1,)),)),
    ("history", [{"history": [["hi", "yo"]], "prompt": [WHY], "completion": "Yes."}], (
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, WHY], ("Yes.",), (1,)),
    )),
    ("demonstrations", [{"system": "Be kind.", "messages": [WHY, CHOSEN]}], (([KIND, WHY], ("Rayleigh.",), (1,)),)),
    (
        "numbers from one",
        [two("response_1", "response_2", chosen=1), two("response_1", "response_2", chosen=2)],
        PAIR + TURNED,
    ),
    (
        "numbers from nought",
        [two("response_1", "response_2", chosen=1), two("response_1", "response_2", chosen=0)],
        TURNED + PAIR,
    ),
]  # fmt: skip


def _csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()})


def _arrow(path: Path, rows: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_table(table)


def _texts(path: Path, rows: list[dict[str, Any]]) -> None:
    """Messages and lists as JSON inside a string, as some tables are published."""
    as_text = [{k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()} for row in rows]
    pq.write_table(pa.Table.from_pylist(as_text), path)


FILES: dict[str, Callable[[Path, list[dict[str, Any]]], Any]] = {
    "a.jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n" for row in rows)),
    "a.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "a.jsonl.gz": lambda path, rows: path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode())),
    "a.csv": _csv,
    "a.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path),
    "a.arrow": _arrow,
    "texts.parquet": _texts,
}


@pytest.mark.parametrize(("rows", "expected"), [case[1:] for case in UNTIED], ids=[case[0] for case in UNTIED])
def test_a_public_layout_reads_alike_from_every_file(tmp_path: Path, rows: list[dict[str, Any]], expected: Any) -> None:
    for name, write in FILES.items():
        write(tmp_path / name, rows)
        reader = Reader(str(tmp_path / name))
        found = tuple((row.prompt, row.answers, row.signs) for row in reader)
        assert (found, reader.problems) == (expected, []), name
    arrays = [{k: np.array(v, object) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
    for given in (rows, arrays):
        assert tuple((row.prompt, row.answers, row.signs) for row in Reader("data", rows=Rows(given))) == expected


@pytest.mark.parametrize(
    "rows",
    [
        [two("response_0", "response_1", overall_preference=n) for n in (0, -1, 0)],
        [two("response_a", "response_b", winner=word) for word in ("tie (bothbad)", "model_a", "both_bad")],
        [two("response_a", "response_b", winner_model_a=n, winner_model_b=0) for n in (0, 1, 0)],
        [{"prompt": ASK, "responses": ["Rayleigh.", "Paint."], "scores": [n, 1]} for n in (1, 2, 1)],
    ],
)
def test_ties_are_left_out_and_counted(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    for name in ("a.jsonl", "a.parquet"):
        FILES[name](tmp_path / name, rows)
        reader = Reader(str(tmp_path / name))
        assert [(row.answers, row.place) for row in reader] == [
            (("Rayleigh.", "Paint."), f"{tmp_path / name} row 2".replace("a.jsonl row", "a.jsonl line"))
        ]
        assert reader.problems == [] and dict(reader.notes) == {"ties, which are left out: no preference to learn": 2}
    FILES["a.jsonl"](tmp_path / "a.jsonl", rows[:1])
    with pytest.raises(UserError, match="no rows are left; all are ties"):
        read_rows(str(tmp_path / "a.jsonl"))


def guessed(**columns: Any) -> list[dict[str, Any]]:
    """Pairs without a prompt, whose answers begin alike; a column's {} is the animal."""
    animals = ("dog", "hen", "cow", "ant")
    rows = []
    for animal in animals:
        more = {name: value.format(animal) if isinstance(value, str) else value for name, value in columns.items()}
        rows.append({**more, "chosen": f"A {animal} has legs.", "rejected": f"A {animal} has wings."})
    return rows


PRINTED = "[{'role': 'user', 'content': 'Why?'}, {'role': 'assistant', 'content': 'Paint.'}]"
REFUSED: list[tuple[list[dict[str, Any]], str, str]] = [
    *((guessed(**{name: "Legs of a {}"}), "question in another column", f"--columns prompt={name};") for name in
      ("question", "query", "input", "problem", "trajectory", "request", "user_prompt", "Question")),
    (guessed(question="?"), "question in another column", "--columns prompt=question;"),
    (guessed(context=[WHY]), "question in another column", "--columns prompt=context;"),
    (guessed(source="x", post="How many legs has a {}?"), "question in another column", "--columns prompt=post;"),
    (guessed(text="{} 有几条腿呢？"), "question in another column", "--columns prompt=text;"),
    ([{"question": "How?", "chosen": "A dog.", "rejected": "The dog."}], "question in another column", "prompt=question"),
    ([{"question": "How?", "chosen": [CHOSEN], "rejected": [REJECTED]}], "no field 'prompt'", "--columns prompt=question"),
    ([{"images": [{"path": "a.png", "bytes": None}], **two("chosen", "rejected")}], "not text", "field 'images' holds "),
    ([{"image": "a.png", **two("chosen", "rejected")}], "not text", "'image' holds text"),
    ([{"videos": ["a.mp4"], **two("completion", "other"), "label": True}], "not text", "'videos'"),
    ([{"audios": ["a.wav"], "messages": [WHY, CHOSEN]}], "not text", "'audios'"),
    ([{"image_path": "a.png", **two("chosen", "rejected"), "prompt": "<image> What?"}], "not text", "'image_path'"),
    ([{**two("chosen", "rejected"), "chosen": PRINTED}], "messages as text", "'chosen' is text in which Python printed"),
    ([{"messages": PRINTED}], "messages as text", "'messages' is text in which"),
    ([{"conversations": PRINTED.replace("}, {", "}\n {"), "label": True}], "messages as text", "'conversations'"),
    ([{"messages": [WHY, CHOSEN], "dispreferred": "Paint."}], "rejected response in another column", "rejected=dispreferred;"),
    ([{**two("completion", "bad")}], "rejected response in another column", "rejected=bad;"),
    ([{**two("completion", "worse_answer")}], "rejected response in another column", "rejected=worse_answer;"),
    ([{"messages": [WHY, CHOSEN], "chosen": "Ice.", "rejected": "Paint."}], "contradictory prompt", "'messages' ends in"),
    ([{"system": "Be rude.", "messages": [KIND, WHY, CHOSEN]}], "two system messages", "remove one"),
    ([{"instruction": "Translate.", **two("chosen", "rejected")}], "two prompts", "--data-format preference"),
    ([two("response_1", "response_2", chosen=1)], "which response is better", "never 0 or 2"),
    ([two("response_1", "response_2", chosen=n) for n in (0, 1, 2)], "which response is better", "one of them is no response"),
    ([two("response_0", "response_1", better_response_id=2)], "which response is better", "'response_0' or 'response_1'"),
    ([two("response_0", "response_1", overall_preference="a")], "scores", "expected a number"),
    ([{**two("chosen", "rejected"), "history": [["hi", "yo"]]}], "history of plain text", "--chat"),
    ([{"prompt": ASK}], "no response", "for lite-dil label, which makes pairs of them, and lite-dil generate"),
    ([{"turns": ["hi", "bye"], "question_id": 81}], "no response", "lite-dil generate"),
    ([{"messages": [WHY]}], "no response", "lite-dil generate"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "kind", "message"), REFUSED)
def test_rows_whose_meaning_is_not_plain_are_refused(
    tmp_path: Path, rows: list[dict[str, Any]], kind: str, message: str
) -> None:
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        FILES[name](tmp_path / name, rows)
        reader = Reader(str(tmp_path / name))
        assert list(reader) == [], name
        assert {problem.kind for problem in reader.problems} == {kind}, name
        assert all(message in problem.message for problem in reader.problems), reader.problems


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"source": "made by a {} team in May", "id": "{}", "category": "legs of a {} by name", "model": "the {} of models"},
        {"group": "all of these animals", "question": None, "rationale": "The {} walks on them."},
        {"chosen_model": "one of {} models", "created": "2026-01-0{}", "url": "https://example.org/{}"},
    ],
)
def test_a_guess_stands_beside_columns_that_hold_no_question(tmp_path: Path, columns: dict[str, Any]) -> None:
    FILES["a.parquet"](tmp_path / "a.parquet", guessed(**columns))
    reader = Reader(str(tmp_path / "a.parquet"))
    assert [row.prompt for row in reader] == ["A dog has", "A hen has", "A cow has", "A ant has"]
    assert sum(reader.notes.values()) == 4 and reader.unread == [name for name in columns if columns[name] is not None]


def test_no_prompt_is_guessed_where_other_rows_have_one(tmp_path: Path) -> None:
    rows = [two("chosen", "rejected"), {**guessed()[0], "prompt": None}]
    FILES["a.jsonl"](tmp_path / "a.jsonl", rows)
    reader = Reader(str(tmp_path / "a.jsonl"))
    assert [row.prompt for row in reader] == [ASK]
    assert [problem.message for problem in reader.problems] == ["no field 'prompt', or it is null; other rows have one"]
    assert [row.prompt for row in Reader("data", rows=Rows(rows[1:]))] == ["A dog has"]


def test_columns_not_read(tmp_path: Path) -> None:
    rows = [
        {"id": 1, "source": "s", "question": "q", "empty": [], **two("chosen", "rejected")},
        two("chosen", "rejected", late=1),
    ]
    reader = Reader("data", rows=Rows([rows[0]] * 150 + [rows[1]]))
    assert len(list(reader)) == 151 and reader.unread == ["id", "source", "question", "late"]
    reader = Reader("data", rows=Rows([{"q": ASK, **two("chosen", "rejected")}]), columns=parse_columns("prompt=q"))
    assert [row.prompt for row in reader] == [ASK] and reader.unread == []


def test_chat_lays_plain_text_out_as_messages() -> None:
    rows = [
        {"system": "Be kind.", "prompt": f" {ASK} ", "chosen": " Rayleigh.", "rejected": " Paint."},
        {"prompt": HH, "chosen": " Rayleigh.", "rejected": " Paint."},
        {"prompt": [WHY], "chosen": "Rayleigh.", "rejected": "Paint."},
    ]
    reader = Reader("data", rows=Rows(rows), chat=True)
    assert [row.prompt for row in reader] == [[KIND, WHY], [WHY], [WHY]]
    assert all(row.answers == ("Rayleigh.", "Paint.") for row in Reader("data", rows=Rows(rows), chat=True))


@pytest.mark.parametrize(
    "answer",
    [
        '{"a": 1}',
        '[{"role": "admin", "id": 1}]',
        "{'a': 1}",
        "[1, 2",
        "<image> of a dog",
        "\u200b",
        "\u200d",
        '"quoted"',
        "[{'x': 1}]",
    ],
)
def test_answers_that_only_look_like_something_else_are_answers(tmp_path: Path, answer: str) -> None:
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        FILES[name](tmp_path / name, [{**two("chosen", "rejected"), "chosen": answer}])
        assert [row.answers for row in read_rows(str(tmp_path / name))] == [(answer, "Paint.")], name
