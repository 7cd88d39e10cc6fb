"""Files of rows that would stall, fill the memory or mean two things: one message with file and line."""

from __future__ import annotations

import gzip
import io
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from lite_dil.base.errors import UserError
from lite_dil.base.strict_json import parse_json
from lite_dil.data import files, unpacking
from lite_dil.data.reader import Reader, read_rows

PAIR = {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."}
ROW = json.dumps(PAIR)


def with_column(text: str) -> str:
    return ROW[:-1] + ', "more": ' + text + "}"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (with_column("[" * 500 + "]" * 500), "more than 100 levels of lists and objects"),
        (with_column("[" * 99_999 + "]" * 99_999), "more than 100 levels of lists and objects"),
        (with_column('{"a": ' * 101 + "1" + "}" * 101), "more than 100 levels of lists and objects"),
        (with_column("9" * 5000), "4300 digits"),
        (with_column('{"a": 1, "a": 2}'), "the key 'a' is given twice in one object"),
        (ROW[:-1] + ', "chosen": "other"}', "the key 'chosen' is given twice in one object"),
        (ROW.replace('"rejected": "', '"rejected": "\\ud800'), "field 'rejected' holds half of a surrogate pair"),
        (ROW[:-1] + ', "system": NaN}', "field 'system' holds NaN or Infinity, which is not JSON"),
        (ROW[:-1] + ', "tools": [{"most": Infinity}]}', "field 'tools' holds NaN or Infinity"),
        (ROW[:-1] + ', "tools": "[[[[' + "[" * 9999 + '"}', "field 'tools' is not valid JSON"),
        ('{"prompt": "a", "completion": "b", "label": NaN}', "field 'label' holds NaN or Infinity"),
    ],
)
def test_a_row_that_is_no_plain_json_is_named(line: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"\n{line}\n", encoding="utf-8")
    with pytest.raises(UserError, match=f"{path} line 2: .*") as raised:
        read_rows(str(path))
    assert problem in str(raised.value) and len(str(raised.value)) < 1000


def test_nan_in_a_column_that_is_not_read_is_said(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([ROW, with_column("NaN"), with_column('{"a": [-Infinity]}')]), encoding="utf-8")
    reader = Reader(str(path))
    assert len(list(reader)) == 3 and not reader.problems
    assert reader.notes == {"NaN or Infinity in columns that are not read": 2}


def test_depth_is_counted_as_a_reader_follows_it() -> None:
    """By hand: 100 levels are read, 101 are not; many lists beside each other are not deep."""
    assert parse_json("[" * 100 + "]" * 100)
    with pytest.raises(ValueError, match="levels"):
        parse_json("[" * 101 + "]" * 101)
    assert len(parse_json("[" + "[1]," * 1000 + "[]]")) == 1001


def zeros(opened: Callable[[Any], Any], content: bytes, times: int) -> bytes:
    file = io.BytesIO()
    with opened(file) as stream:
        for _ in range(times):
            stream.write(content)
    return file.getvalue()


def gz(file: Any) -> Any:
    return gzip.GzipFile(fileobj=file, mode="wb")


def zst(file: Any) -> Any:
    return zstandard.ZstdCompressor().stream_writer(file, closefd=False)


@pytest.mark.parametrize(
    "content", [bytes(2**20), b'"' + b"a" * (2**20 - 3) + b'"\n', (b" " * 65535 + b"\n") * 16], ids=["line", "rows", "blank"]
)
@pytest.mark.parametrize("packed", [gz, zst], ids=["gz", "zst"])
def test_a_small_file_that_unpacks_to_gigabytes(
    packed: Callable[[Any], Any], content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unpacking, "LARGE", 2**20)
    monkeypatch.setattr(files, "LONGEST", 2**20)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(zeros(packed, content, 6))
    tracemalloc.start()
    try:
        with pytest.raises(
            UserError, match=f"{path}( line 1)?: (what it holds is more than 500 times as large|longer than 1 MB)"
        ):
            for _ in files.file_rows(path):
                pass
        assert tracemalloc.get_traced_memory()[1] < 2**24  # bytes
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.txt"])
def test_a_line_without_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST", 1000)
    path = tmp_path / name
    path.write_bytes(b"prompt,completion\n" + b"a" * 1001)
    with pytest.raises(UserError, match=f"{path} line 2: longer than"):
        list(files.text_lines(path) if name.endswith("txt") else files.file_rows(path))
    path.write_bytes(b'prompt,completion\na,"' + b"a\n" * 1001)  # a quote without end
    with pytest.raises(UserError, match=r"field larger than field limit \(1000\)"):
        list(files.file_rows(path.rename(tmp_path / "quotes.csv")))


def test_an_array_may_be_one_line_and_has_a_bound_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST", 100)
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([PAIR] * 9), encoding="utf-8")
    assert len(read_rows(str(path))) == 9
    monkeypatch.setattr(files, "LARGEST_ARRAY", 300)
    path.write_text(json.dumps([PAIR] * 9, indent=1), encoding="utf-8")
    with pytest.raises(UserError, match=r"which is read whole; write one row a line: jq -c '\.\[\]' FILE > rows.jsonl"):
        read_rows(str(path))


@pytest.mark.parametrize(("name", "start"), [("xz -d", b"\xfd7zXZ\0"), ("bzip2 -d", b"BZh9")])
def test_other_compressed_files_say_how_to_unpack_them(name: str, start: bytes, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.xz"
    path.write_bytes(start + bytes(100))
    with pytest.raises(UserError, match=f"unpack it: {name} {path}"):
        read_rows(str(path))


def arrow(table: pyarrow.Table) -> bytes:
    sink = io.BytesIO()
    with pyarrow.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def parquet(table: pyarrow.Table) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


@pytest.mark.parametrize("written", [arrow, parquet])
def test_rows_without_bytes(written: Callable[[Any], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LARGE", 10_000)
    path = tmp_path / "rows.parquet"
    path.write_bytes(written(pyarrow.table({"prompt": pyarrow.nulls(10**6)})))
    with pytest.raises(UserError, match=r"says that it has .* rows in [\d,]+ bytes"):
        list(files.file_rows(path))


def test_offsets_beyond_the_end_are_not_followed(tmp_path: Path) -> None:
    content = arrow(pyarrow.table({"prompt": ["abcdefgh", "ijklmnop"]}))
    offsets = (0).to_bytes(4, "little") + (8).to_bytes(4, "little") + (16).to_bytes(4, "little")
    assert content.count(offsets) == 1
    path = tmp_path / "rows.arrow"
    path.write_bytes(content.replace(offsets, offsets[:4] + (2**30).to_bytes(4, "little") * 2))
    with pytest.raises(UserError, match="cannot be read behind row 0"):
        list(files.file_rows(path))
