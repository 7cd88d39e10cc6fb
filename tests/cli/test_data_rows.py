"""What `lite-dil data`, `train` and `generate` say about rows that train something else than their author meant."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import config
from transformers import AutoTokenizer

from lite_dil.cli.main import main
from lite_dil.data.dataset import load
from lite_dil.data.encoder import Encoder
from lite_dil.data.inspect.private import private_in
from lite_dil.models.find import load_tokenizer


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.fixture
def step(tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Trains one step on a file; returns the exit code and all that is said."""

    runs = itertools.count()

    def run(*argv: str, model: str = tiny) -> tuple[int, str]:
        flags = ["--model", model, "--backend", "cpu", "--max-steps", "1", "--report-samples", "0"]
        code = main(["train", "--data", *argv, *flags, "--output-dir", str(tmp_path / f"run{next(runs)}")])
        return code, "".join(capsys.readouterr())

    return run


@pytest.fixture
def report(tiny: str, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `lite-dil data`; returns the exit code, the object and the text."""

    def run(*argv: str, model: str = tiny) -> tuple[int, dict[str, Any], str]:
        code = main(["data", *argv, "--model", model, "--json"])
        found = json.loads(capsys.readouterr().out)
        assert main(["data", *argv, "--model", model]) == code
        return code, found, capsys.readouterr().out

    return run


def test_answers_that_differ_only_behind_the_cut_are_identical(report: Any, step: Any, tiny: str, tmp_path: Path) -> None:
    # " the" is one token: both answers have 20 of them, then another word and the end. The prompt has 3.
    same = " the" * 20
    rows = [pair(" what what what", f"{same} red", f"{same} blue tea"), pair(" what", " red", " blue")]
    file = write(tmp_path / "a.jsonl", rows)
    ends = "differ from token 21 on; --max-length 26 cuts nothing of this row, and 22 just tells them apart"
    code, found, _ = report(file, "--max-length", "21")
    assert code == 2 and found["sources"][0]["kept"] == 1
    assert found["sources"][0]["left_out"][0]["reason"] == "identical responses"
    assert found["sources"][0]["left_out"][0]["stories"][0]["message"].endswith(ends)
    code, said = step(file, "--max-length", "21")
    assert code == 2 and ends in said
    code, said = step(file, "--max-length", "21", "--skip-bad-rows")
    assert code == 0 and "1 identical responses" in said
    for length, count in ((21, 1), (22, 2), (26, 2)):
        data = load(file, "train", Encoder(load_tokenizer(tiny)), config(max_length=length, skip_bad_rows=True))
        assert len(data.examples) == count
        assert all(example.responses[0] != example.responses[1] for example in data.examples)


def test_train_warns_of_prompts_that_are_mostly_cut(report: Any, step: Any, tmp_path: Path) -> None:
    rows = [pair(" what" * 9, " the" * 19, " red"), *[pair(" what", " the", " red")] * 3]
    file = write(tmp_path / "a.jsonl", rows)
    warning = (
        "1 prompt (25.0% of the rows) of which --max-length 21 leaves less than half, because the responses need the room: "
        "they are learned without their questions; --max-length 29 cuts none"
    )
    code, found, _ = report(file, "--max-length", "21")
    assert code == 0 and warning in found["warnings"]
    code, said = step(file, "--max-length", "21")
    assert code == 0 and f"warning: {warning}" in said
    assert "warning" not in step(file, "--max-length", "29")[1]


def test_a_token_beyond_the_table_is_one_message(report: Any, step: Any, tiny: str, tmp_path: Path, capsys: Any) -> None:
    model = str(tmp_path / "model")
    shutil.copytree(tiny, model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    fillers = [f"<|filler{number}|>" for number in range(512 - len(tokenizer))]
    tokenizer.add_tokens([*fillers, "<|extra|>"])  # the last is 512, and the table has rows 0 to 511
    tokenizer.save_pretrained(model)
    good = pair("what", " the", " red")
    fine = write(tmp_path / "fine.jsonl", [good] * 3)  # a model may have such tokens and never use them
    assert report(fine, model=model)[0] == 0 and step(fine, model=model)[0] == 0
    for place in ("prompt", "chosen"):
        file = write(tmp_path / f"{place}.jsonl", [good, {**good, place: "the <|extra|>"}])
        for flags in ([], ["--skip-bad-rows"]):
            code, said = step(file, *flags, model=model)
            assert code == 2 and said.count("\n") < 4
            assert "its tokenizer has token 512 ('<|extra|>'), and its embedding table only 512 rows" in said
        assert main(["data", file, "--model", model]) == 2
        assert "token 512" in capsys.readouterr().err
    asked = write(tmp_path / "asked.jsonl", [{"prompt": "the <|extra|>"}])
    assert main(["generate", asked, "--model", model, "--backend", "cpu", "--output", str(tmp_path / "o.jsonl")]) == 2
    assert "token 512" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "what is tea", "id": 1},
        {"question_id": 81, "turns": ["what is tea", "and now"], "category": "x"},
        {"messages": [{"role": "user", "content": "what is tea"}]},
        {"instruction": "what is tea"},
    ],
)
def test_prompts_alone_are_for_label_and_generate(report: Any, step: Any, tmp_path: Path, row: dict[str, Any]) -> None:
    file = write(tmp_path / "a.jsonl", [row] * 2)
    code, found, text = report(file)
    assert code == 2 and found["stops"] == [
        {
            "why": f"{file}: 2 prompts without responses",
            "mend": f"make pairs of them with lite-dil label {file}, or responses with lite-dil generate",
        }
    ]
    assert text.splitlines()[-1] == f"what to do: {found['stops'][0]['mend']}"
    code, said = step(file)
    assert code == 2 and "Prompts without responses are for lite-dil label" in said and "Expected:" not in said


SECRETS = ("jane.doe@mail.example.com", "+44 20 7946 0958", "212-555-0142", "sk-abcdefghijklmnopqrstuv12")


def test_private_strings_in_answers_are_counted_and_not_shown(report: Any, tmp_path: Path) -> None:
    mail, phone, other, key = SECRETS
    rows = [
        pair("what", f" the {mail} or {mail}", f" ask {phone}"),
        pair("is", f" {other}", f" {key}"),
        pair(f"mail {mail}", " the", " red"),  # in a prompt: not counted, and not shown
        pair("tea", " the 12 + 30 = 42", " red"),
    ]
    file = write(tmp_path / "a.jsonl", rows)
    code, found, text = report(file)
    assert code == 0
    assert found["private"] == [
        {"kind": "e-mail addresses", "number": 2, "responses": 1, "first": f"{file} line 1"},
        {"kind": "phone numbers", "number": 2, "responses": 2, "first": f"{file} line 1"},
        {"kind": "keys or passwords", "number": 1, "responses": 1, "first": f"{file} line 2"},
    ]
    assert f"2 e-mail addresses in 1 response (first {file} line 1; not shown here)" in text
    assert [sample["place"] for sample in found["samples"]] == [f"{file} line 4"]
    assert not any(secret[:8] in text + json.dumps(found) for secret in SECRETS)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to a.b+c@mail.example.co.uk.", {"e-mail addresses": 1}),
        ("(212) 555-0142 or 1-800-273-8255", {"phone numbers": 2}),
        ("06 12 34 56 78, +4915112345678", {"phone numbers": 2}),
        ("phone: 5550142", {"phone numbers": 1}),
        ("AKIAIOSFODNN7EXAMPLE", {"keys or passwords": 1}),
        ("ghp_" + "a1" * 18 + " and hf_" + "aB" * 17, {"keys or passwords": 2}),
        ("-----BEGIN RSA PRIVATE KEY-----", {"keys or passwords": 1}),
        ('api_key = "a1b2c3d4e5f6a7b8"', {"keys or passwords": 1}),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4", {"keys or passwords": 1}),
        ("postgres://me:secret@host/base", {"keys or passwords": 1}),
        ("1,000,000 - 200,000 = 800,000; 3 + 4 = 7; $48/2 = <<48/2=24>>24", {}),
        ("800-300-1000=-500, 1999-2000-2001, 2026-11-30 16:20:00, 12 34 56 78", {}),
        ("192.168.100.1000, ISBN 978-3-16-148410-0, 4111 1111 1111 1111, pi is 3.14159265358979", {}),
        ("f(x) = +3.14159265 for the cell 1234567; @property; user@host; call 911", {}),
        ("api_key = YOUR_API_KEY_HERE_PLEASE, os.environ['OPENAI_API_KEY'], token: 1234567890123456", {}),
    ],
)
def test_what_counts_as_private(text: str, expected: dict[str, int]) -> None:
    assert private_in(text) == expected


def test_columns_that_nothing_is_read_of_are_listed(report: Any, tmp_path: Path) -> None:
    file = write(
        tmp_path / "a.jsonl", [{"id": "x", "source": "y", "empty": None, "system": "z", **pair("what", " the", " red")}]
    )
    _, found, text = report(file)
    assert found["sources"][0]["unread"] == ["id", "source"]
    assert "  columns not read: id, source\n" in text


def test_chat_trains_plain_text_as_messages(report: Any, step: Any, tiny: str, tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"system": "is tea", **pair(" what", " the", " red")}, pair("tea", "the", "red")])
    code, found, text = report(file, "--chat")
    assert code == 0 and found["chat"] and "--chat" in text.splitlines()[-1]
    whole = "<|im_start|>system\nis tea<|im_end|>\n<|im_start|>user\nwhat<|im_end|>\n<|im_start|>assistant\n"
    assert [part["text"] for part in found["samples"][0]["parts"]] == [whole, "the<|im_end|>", "red<|im_end|>"]
    assert any("--chat makes user messages" in warning for warning in report(file)[1]["warnings"])
    code, said = step(file, "--chat")
    assert code == 0 and "chat messages" in said
    assert "chat: true" in (tmp_path / "run0" / "config.yaml").read_text()
