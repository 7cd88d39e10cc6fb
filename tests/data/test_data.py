"""Bad input: one message that names file, line, field, what was expected and the fix; good input in every accepted form."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard

from lite_dil.base.errors import UserError
from lite_dil.data.reader import read_rows
from lite_dil.data.sources import EMBEDDED

TEXT = {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"}
CHAT = {
    "prompt": [{"role": "user", "content": "What is 2 + 2?"}],
    "chosen": [{"role": "assistant", "content": "4"}],
    "rejected": [{"role": "assistant", "content": "5"}],
}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_text_and_chat_rows(tmp_path: Path) -> None:
    (row,) = read_rows(write(tmp_path / "a.jsonl", TEXT))
    assert (row.prompt, row.answers, row.signs, row.chat, row.form) == ("What is 2 + 2?", ("4", "5"), (1, -1), False, "pairs")
    (row,) = read_rows(write(tmp_path / "b.jsonl", {**CHAT, "extra": None}))
    assert (row.prompt, row.answers, row.signs, row.chat, row.form) == (CHAT["prompt"], ("4", "5"), (1, -1), True, "pairs")


SINGLE = {"prompt": "What is 2 + 2?", "completion": "4"}
SINGLE_CHAT = {"prompt": CHAT["prompt"], "completion": CHAT["chosen"]}


def test_answers_without_partners(tmp_path: Path) -> None:
    for text in (SINGLE, SINGLE_CHAT):
        rows = read_rows(write(tmp_path / "a.jsonl", {**text, "label": True}, {**text, "label": False}))
        assert [(row.answers, row.signs, row.form) for row in rows] == [
            (("4",), (1,), "unpaired"),
            (("4",), (-1,), "unpaired"),
        ]
        (row,) = read_rows(write(tmp_path / "b.jsonl", {**text, "other": 1}))
        assert (row.answers, row.signs, row.form) == (("4",), (1,), "demonstrations")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (({**SINGLE, "label": 2},), "line 1: field 'label' is a number (2); expected true (1) for a good response, false"),
        (({**SINGLE, "label": "true"},), "line 1: field 'label' is text ('true'); expected true"),
        (({**SINGLE, "label": True}, {**SINGLE, "label": None}), "line 2: field 'label' is null"),
        (({**SINGLE, "label": True}, SINGLE), "line 2: no field 'label'; the row has prompt, completion"),
        ((SINGLE, {**SINGLE, "label": True}), "line 2: the row has a 'label', which other rows lack"),
        ((SINGLE, TEXT), "line 2: no field 'completion'; the row has prompt, chosen, rejected"),
        ((TEXT, SINGLE), "line 2: no field 'chosen'; the row has prompt, completion"),
        (({**SINGLE, "completion": " "},), "line 1: the response is empty"),
        (({**SINGLE, "completion": 4},), "line 1: field 'completion' is a number; expected text, or chat messages"),
        ((SINGLE, SINGLE_CHAT), "line 2: the prompt is chat messages, but"),
        (({"prompt": "x", "completions": "y"},), "line 1: no field 'chosen'; the row has prompt, completions"),
    ],
)
def test_bad_rows_of_single_answers(tmp_path: Path, rows: tuple[Any, ...], message: str) -> None:
    with pytest.raises(UserError) as error:
        read_rows(write(tmp_path / "a.jsonl", *rows))
    assert message in str(error.value)


def test_every_accepted_file_form(tmp_path: Path) -> None:
    lines = "".join(json.dumps(TEXT) + "\n" for _ in range(3)).encode()
    forms = {
        "blank lines.jsonl": lines.replace(b"\n", b"\n \n"),
        "naïve (1).jsonl": lines.replace(b"\n", b"\r\n"),
        "old mac.jsonl": lines.replace(b"\n", b"\r"),
        "bom.jsonl": b"\xef\xbb\xbf" + lines,
        "array.json": json.dumps([TEXT] * 3, indent=1).encode(),
        "array.jsonl": json.dumps([TEXT] * 3).encode(),
        "object on a line.json": json.dumps({"rows": [TEXT] * 3}).encode(),
        "object.json": json.dumps({"data": [TEXT] * 3}, indent=1).encode(),
        "plain.jsonl.gz": gzip.compress(lines),
        "gzip-named.jsonl": gzip.compress(lines),
        "plain.jsonl.zst": zstandard.compress(lines),
        "separators.jsonl": lines.replace(b"What", "\u2028 \u0085 What".encode()),
    }
    for name, raw in forms.items():
        path = tmp_path / name
        path.write_bytes(raw)
        assert len(read_rows(str(path))) == 3, name


def test_embedded_splits_are_read() -> None:
    assert len(read_rows(EMBEDDED, "train")) + len(read_rows(EMBEDDED, "test")) >= 240


MESSAGE = {"role": "user", "content": "x"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ('{"prompt": "a", "chosen": "b", "rej', "line 2: not valid JSON"),
        ("{'prompt': 'a'}", "line 2: not valid JSON"),
        ("prompt,chosen,rejected", "line 2: not valid JSON"),
        ("[" * 100_000, "line 2: not usable JSON"),
        ('{"prompt": ' + "1" * 5000 + "}", "line 2: not usable JSON"),
        ("5", "line 2: expected a JSON object with the fields prompt, chosen, rejected, found a number"),
        ({**TEXT, "chosen": None}, "line 2: field 'chosen' is null"),
        ({**TEXT, "prompt": 7}, "line 2: field 'prompt' is a number"),
        ({**TEXT, "rejected": True}, "line 2: field 'rejected' is a boolean"),
        (
            {"prompt": "a", "choosen": "b", "rejected": "c"},
            "line 2: no field 'chosen'; is it 'choosen'. Then --columns chosen=choosen",
        ),
        ({"instruction": "a", "good": "b"}, "line 2: no field 'chosen'; the row has instruction, good"),
        ({**TEXT, "chosen": " \n"}, "line 2: the chosen response is empty"),
        ({**TEXT, "prompt": ""}, "line 2: field 'prompt' is empty"),
        ({**TEXT, "rejected": "4 "}, "line 2: 'chosen' and 'rejected' are the same text"),
        ({**TEXT, "rejected": "4\u200b"}, "line 2: 'chosen' and 'rejected' are the same text"),
        ({**TEXT, "chosen": "caf\u00e9", "rejected": "cafe\u0301"}, "line 2: 'chosen' and 'rejected' are the same text"),
        (
            {**TEXT, "chosen": "What is 2 + 2? 4"},
            "line 2: 'chosen' begins with the whole prompt and the other response does not",
        ),
        ({**TEXT, "chosen": "\ud800"}, "line 2: field 'chosen' holds half of a surrogate pair"),
        (CHAT, "line 2: the prompt is chat messages, but .*line 1 has plain text"),
        ({**CHAT, "prompt": CHAT["prompt"] + CHAT["chosen"]}, "line 2: the prompt ends with the assistant's turn"),
        ({**CHAT, "chosen": [{"role": "assistant"}]}, r"line 2: chosen\[0\] has no 'content'; expected"),
        ({**CHAT, "prompt": []}, "line 2: field 'prompt' is an empty list"),
        ({**CHAT, "chosen": []}, "line 2: field 'chosen' is an empty list; expected one assistant message"),
        ({**CHAT, "prompt": [{"role": "user", "content": " "}]}, "line 2: the prompt's message 1, the user's, is empty"),
        ({**CHAT, "chosen": [MESSAGE]}, r"line 2: field 'chosen' has the roles \['user'\]; expected one assistant message"),
        ({**CHAT, "prompt": [{"role": "User", "content": "x"}]}, r"line 2: .* role 'User' \(did you mean 'user'\?\)"),
        ({**CHAT, "prompt": [{"role": "gpt", "content": "x"}]}, r"line 2: .* role 'gpt' \(did you mean 'assistant'\?\)"),
        (
            {**CHAT, "prompt": [{"from": "narrator", "value": "x"}]},
            r"line 2: prompt\[0\] is from 'narrator'; expected one of system, human, user, gpt",
        ),
        ({**CHAT, "prompt": [{"role": ["user"], "content": "x"}]}, r"line 2: prompt\[0\] has role \['user'\]"),
        ({**CHAT, "prompt": [{**MESSAGE, "content": [{"type": "text"}]}]}, r"line 2: .*content\[0\].text' is null"),
        ({**CHAT, "prompt": [{**MESSAGE, "content": [{"type": "image"}]}]}, r"line 2: .*content\[0\] is of type 'image'"),
    ],
)
def test_bad_rows_name_line_field_and_reason(tmp_path: Path, bad: Any, message: str) -> None:
    # Good rows of the bad one's kind before it decide what the file is.
    good = CHAT if isinstance(bad, dict) and isinstance(bad.get("prompt"), list) and bad != CHAT else TEXT
    path = write(tmp_path / "bad.jsonl", good, bad)
    with pytest.raises(UserError, match=rf"(?s)1 of 2 rows cannot be used \(--skip-bad-rows .*bad\.jsonl {message}"):
        read_rows(path)
    assert len(read_rows(path, skip=True)) == 1


def test_all_problems_are_gathered_and_ten_are_shown(tmp_path: Path) -> None:
    path = write(tmp_path / "bad.jsonl", *[{**TEXT, "chosen": ""}] * 12, TEXT)
    with pytest.raises(UserError, match=r"(?s)12 of 13 rows.*line 1: .*line 10: .*and 2 more\n12 empty response") as caught:
        read_rows(path)
    assert "line 11" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("empty.jsonl", b"", "no rows; the file is empty"),
        ("blank.jsonl", b"\n \n", "no rows"),
        ("array.json", b"[]", "no rows"),
        ("broken.json", b'[{"prompt": ', "not a valid JSON array"),
        ("short.jsonl.gz", gzip.compress(b"x" * 1000, mtime=0)[:20], "cannot be read"),
        ("corrupt.jsonl.gz", gzip.compress(b"x" * 1000, mtime=0)[:12] + b"\xff" * 20, "cannot be read"),
        ("latin1.jsonl", '{"prompt": "é"}\n'.encode("latin-1"), "line 1: not UTF-8 at byte 13"),
        ("utf16.jsonl", json.dumps(TEXT).encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("page.jsonl", b"<html><body>404</body></html>", "holds a web page, not data"),
        ("lfs.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "pointer of Git LFS.*git lfs pull"),
        ("sheet.csv", b"PK\x03\x04...", "is a zip archive"),
        ("pretty.json", json.dumps(TEXT, indent=1).encode(), "a JSON object spans several lines"),
        ("questions.jsonl", b'{"question": "a", "answer": "b"}', "(?s)no field 'chosen'.*Expected: .*conversations"),
        ("latin1.csv", "prompt,completion\na,é\n".encode("latin-1"), "latin1.csv line 2: not UTF-8 at byte 3"),
        ("quotes.csv", b'prompt,completion\na,"b"c\n', "quotes.csv line 2: not valid CSV"),
        ("cells.csv", b"prompt,completion\na,b,c\n", "cells.csv line 2: 3 cells, but the header has 2"),
        ("bad.parquet", b"PAR1 and no more", "bad.parquet: cannot be read"),
        ("bad.arrow", b"not arrow at all", "bad.arrow: cannot be read"),
        ("bad.jsonl.zst", b"\x28\xb5\x2f\xfd" + b"x" * 40, "bad.jsonl.zst: cannot be read"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, raw: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(UserError, match=message):
        read_rows(str(tmp_path / name))


def test_sources_that_are_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="directory"):
        read_rows(str(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        read_rows(str(tmp_path / "missing.jsonl"))
    with pytest.raises(UserError, match="no such file"):
        read_rows("prefs")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'owner/name: .* pip install -e ".*\[hub\]"'):
        read_rows("owner/name")
