"""What strangers' files may hold, as hypothesis draws it: mostly right, with one thing or several out of place."""

from __future__ import annotations

import gzip
import io
import json
import re
from typing import Any

import pyarrow
import pyarrow.parquet
import zstandard
from hypothesis import strategies as st

SCRIPT = "\x1b]0;owned\x07\x1b[2J"
TEXTS = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [
            *("", " ", "Is it?", "Yes.", "No.", SCRIPT, "\r\x9b31m", "\u202e", "\ud800", "\x00", "a" * 5000, "<|im_end|>"),
            *("{{ 7 * 7 }}", "{% for x in range(9) %}", "../../../etc/passwd", "~", "file:///etc/passwd", "null", "NaN", "[]"),
            *(
                '[{"role": "user", "content": "x"}]',
                "\n\nHuman: a\n\nAssistant: b",
                "__import__('os').system('true')",
                "1e999",
            ),
        ]
    ),
)
NUMBERS = st.one_of(
    st.integers(-3, 3),
    st.sampled_from(
        [2**31, 2**63, -(2**63) - 1, 10**30, 10**308, 1e308, -1e308, 1e-320, float("nan"), float("inf"), -0.0, 0.5]
    ),
    st.integers(),
    st.floats(),
)
PLAIN = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=12
)
_ROLES = st.sampled_from(["user", "assistant", "system", "tool", "function", SCRIPT, "", "human", "gpt"])
_MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": _ROLES, "content": TEXTS | VALUES},
        optional={"tool_calls": VALUES, "reasoning_content": VALUES, "name": TEXTS, "from": _ROLES, "value": VALUES},
    ),
    max_size=4,
)
_COLUMNS = [
    "prompt",
    "chosen",
    "rejected",
    "completion",
    "label",
    "messages",
    "conversations",
    "instruction",
    "input",
    "output",
    "system",
    "tools",
    "history",
    "responses",
    "scores",
    "score_chosen",
    "score_rejected",
    "chat_template_kwargs",
    "images",
    "question",
    "text",
    "winner",
    "conversation_a",
    "conversation_b",
    "turns",
]
_ODD = st.dictionaries(st.sampled_from(_COLUMNS) | TEXTS, _MESSAGES | VALUES, max_size=6)
_RIGHT = (
    {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."},
    {"prompt": "Is it?", "completion": "Yes.", "label": True},
    {"prompt": [{"role": "user", "content": "x"}], "chosen": [{"role": "assistant", "content": "y"}], "rejected": "z"},
    {"prompt": "Is it?", "responses": ["Yes.", "No."], "scores": [1, 0]},
)
_MORE = st.dictionaries(st.sampled_from(_COLUMNS) | TEXTS, VALUES, max_size=1)


def _almost(right: dict[str, Any]) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Rows of a format, some with a column changed."""
    return st.lists(_MORE.map(lambda more: {**right, **more}), min_size=1, max_size=3)


ROWS = st.one_of(st.lists(_ODD, max_size=3), *(_almost(right) for right in _RIGHT))


def _text(value: Any) -> bytes:
    return json.dumps(value).encode()


def _csv(rows: list[dict[str, Any]]) -> bytes:
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([row.get(name, "") for name in names] for row in rows)]
    return "\n".join(",".join(f'"{cell!s}"' for cell in line) for line in lines).encode("utf-8", "surrogatepass")


def _columnar(rows: list[dict[str, Any]], parquet: bool) -> bytes:
    sink = io.BytesIO()
    try:
        table = pyarrow.Table.from_pylist(rows)
        if parquet:
            pyarrow.parquet.write_table(table, sink)
        else:
            with pyarrow.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
    except (pyarrow.ArrowException, OverflowError, UnicodeError, ValueError):  # rows that Arrow cannot hold
        return b"PAR1" if parquet else b"ARROW1"
    return sink.getvalue()


_FILES = {
    "rows.jsonl": lambda rows: b"\n".join(map(_text, rows)),
    "rows.json": lambda rows: _text(rows),
    "rows.csv": _csv,
    "rows.tsv": _csv,
    "rows.parquet": lambda rows: _columnar(rows, True),
    "rows.arrow": lambda rows: _columnar(rows, False),
    "rows.jsonl.gz": lambda rows: gzip.compress(b"\n".join(map(_text, rows)), 1),
    "rows.jsonl.zst": lambda rows: zstandard.compress(b"\n".join(map(_text, rows)), 1),
}


@st.composite
def broken(draw: st.DrawFn, content: bytes) -> bytes:
    """A file's content, often with bytes changed, cut or put in."""
    for _ in range(draw(st.sampled_from([0, 0, 1, 2]))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        piece = draw(
            st.binary(max_size=4) | st.sampled_from([b"\x00" * 9, b"\xff\xfe", b"[" * 2000, b"9" * 5000, b'"', b"\n", b"{"])
        )
        content = content[:at] + piece + content[at + draw(st.sampled_from([0, 1, 1, 9, 10**6])) :]
    return content


@st.composite
def files_of_rows(draw: st.DrawFn) -> tuple[str, bytes]:
    """The name and content of a file of rows."""
    name = draw(st.sampled_from(list(_FILES)))
    return name, draw(broken(_FILES[name](draw(ROWS))))


@st.composite
def objects(draw: st.DrawFn, right: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with some of its values, at any depth, replaced, taken out or added."""
    found = json.loads(json.dumps(right))
    for _ in range(draw(st.integers(1, 2))):
        place = found
        while inner := [value for value in place.values() if isinstance(value, dict) and value]:
            if draw(st.booleans()):
                break
            place = draw(st.sampled_from(inner))
        name = draw(st.sampled_from(list(place)) | TEXTS) if place else draw(TEXTS)
        place.pop(name, None)
        if draw(st.sampled_from([True, True, False])):
            place[name] = draw(VALUES)
    return found


# Options in YAML, and names.

YAML = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.builds(
            "{}: {}".format,
            st.sampled_from(
                ["loss", "lora_r", "seed", "data", "model", "auto", "columns", "format", "learning_rate", "chat", "x", "<<"]
            ),
            st.one_of(
                PLAIN.map(str),
                VALUES.map(json.dumps),
                st.sampled_from(
                    [
                        *(
                            "&a [*a]",
                            "*a",
                            "&b [*a, *a, *a]",
                            "!!python/object/apply:os.system [true]",
                            "!!python/name:os.system",
                            "!!int x",
                        ),
                        *(
                            "!!bool x",
                            "!!timestamp x",
                            "2024-99-99",
                            "!!binary x",
                            "[" * 99,
                            "0x",
                            "1:2:3",
                            "!!set {a}",
                            "? a",
                            "|",
                            ">",
                            "- -",
                        ),
                        *(
                            "!!float x",
                            "!!null x",
                            "!<tag:yaml.org,2002:int> ''",
                            "1_0",
                            "=",
                            "%",
                            "@",
                            "`",
                            "\x07",
                            "lsif",
                            "8",
                            "1e-5",
                        ),
                    ]
                ),
            ),
        ),
        max_size=6,
    ).map("\n".join),
)
_PIECES = st.sampled_from(
    [
        *(
            "..",
            "/",
            ".",
            "~",
            "-",
            "--",
            "a",
            "é",
            "\u202e",
            SCRIPT,
            "\n",
            "\r",
            " ",
            "%s",
            "$(true)",
            "`true`",
            ";true",
            "|",
            "*",
            "=",
            ",",
        ),
        *(
            "x" * 300,
            "\udcff",
            "rows.jsonl",
            "model",
            "safetensors",
            ".jsonl",
            ".json",
            ".gz",
            ":train",
            "owner/name",
            "C:",
            "\\",
            "'",
            '"',
        ),
    ]
)
# Not the whole disk, below "/": commands read the folders that they are given.
NAMES = (
    st.lists(_PIECES, min_size=1, max_size=5)
    .map("".join)
    .filter(lambda name: not any(part.strip().startswith("/") for part in re.split("[,:=]", name)))
)
