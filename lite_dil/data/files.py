"""Read a file of rows: JSON Lines, JSON, CSV, Parquet or Arrow, compressed or not.

Rows are read one at a time, except from JSON arrays, which are read whole.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import itertools
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from lite_dil.base.errors import UserError, first_line
from lite_dil.base.install import install
from lite_dil.base.shell import command
from lite_dil.base.strict_json import JSONError, has_constant, parse_json
from lite_dil.data.arrow import without_added
from lite_dil.data.unpacking import LARGE, refuse_unpacked, unpacked

# A row's place in words, "prefs.jsonl line 3", and the row: a dict, or a RowError that says why it could not be read.
PlacedRow = tuple[str, Any]

LONGEST = 2**26  # bytes of a line; a book has a million
LARGEST_ARRAY = 2**30  # bytes of a JSON array, which is read whole and then takes several times that

TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
COLUMNAR = (".parquet", ".arrow")
PACKED = (".gz", ".zst")


class Cell(str):
    """The text of a CSV cell; numbers and booleans are text there."""


class Loose(dict[str, Any]):
    """A row of JSON with NaN or an infinity, which JSON has not; `columns` are those that hold one."""

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__(row)
        self.columns = {name for name, value in row.items() if has_constant(value)}


class RowError(ValueError):
    """Why a row cannot be used: `kind`, a few words shared by all such rows, and the full message."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def file_rows(path: Path) -> Iterator[PlacedRow]:
    """Read a file in the format that its content shows or, failing that, its name."""
    with _opened(path) as (raw, start):
        if path.suffix in COLUMNAR or start[:4] == b"PAR1" or start[:6] == b"ARROW1":
            yield from _columnar(path, raw, start)
            return
        name = path.name.removesuffix(".gz").removesuffix(".zst")
        with unpacked(path, raw, start, _need) as stream:
            if name.endswith((".csv", ".tsv")):
                yield from _csv(path, stream, tabs=name.endswith(".tsv"))
            else:
                yield from _json(path, stream)


def text_lines(path: Path) -> Iterator[PlacedRow]:
    """Yield the non-blank lines of a text file, each with its place."""
    with _opened(path) as (raw, start), unpacked(path, raw, start, _need) as stream:
        for number, line in _lines(path, stream, LONGEST):
            try:
                yield f"{path} line {number}", line.decode("utf-8").strip()
            except UnicodeDecodeError as error:
                yield f"{path} line {number}", _not_utf8(error)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], bytes]]:
    """Open a data file; yield it and its first bytes."""
    try:
        with path.open("rb") as raw:
            start = raw.read(200)
            raw.seek(0)
            _refuse(path, start)
            yield raw, start
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); if it is incomplete, copy or download it again") from None


def _not_utf8(error: UnicodeDecodeError) -> RowError:
    return RowError("not UTF-8", f"not UTF-8 at byte {error.start + 1} of the line; save the file as UTF-8")


def _refuse(path: Path, start: bytes) -> None:
    """Raise UserError for files that are not data: empty, Git LFS pointers, archives, web pages, UTF-16."""
    if not start:
        raise UserError(f"{path}: no rows; the file is empty")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a pointer of Git LFS, not the data; fetch it with: git lfs pull")
    if start.startswith(b"PK\x03\x04"):
        raise UserError(f"{path}: is a zip archive (or a spreadsheet); unpack it, or save it as CSV")
    if start.lstrip()[:1] == b"<":
        raise UserError(f"{path}: holds a web page, not data; download it again")
    for magic, name, tool in ((b"\xfd7zXZ\0", "xz", "xz -d"), (b"BZh", "bzip2", "bzip2 -d")):
        if start.startswith(magic):
            raise UserError(f"{path}: is compressed by {name}; unpack it: {command(*tool.split(), str(path))}")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: is UTF-16; save it as UTF-8")


def _lines(path: Path, stream: IO[bytes], longest: int) -> Iterator[tuple[int, bytes]]:
    """Yield the non-blank lines with their numbers; a line ends at a line feed, a carriage return, or both.

    Neither occurs inside a JSON string. U+2028 and the like may, and do not end a line.
    """
    number = 0
    while line := stream.readline(longest + 1):
        if len(line) > longest:
            raise _too_long(path, number + 1)
        for part in line.removesuffix(b"\n").removesuffix(b"\r").split(b"\r"):
            number += 1
            if number == 1:
                part = part.removeprefix(b"\xef\xbb\xbf")
            if part.strip():
                yield number, part


def _too_long(path: Path, number: int) -> UserError:
    return UserError(
        f"{path} line {number}: longer than {LONGEST >> 20} MB; expected one row a line (JSON Lines), a JSON array "
        "[...] or a table (.csv, .parquet)"
    )


def _json(path: Path, stream: IO[bytes]) -> Iterator[PlacedRow]:
    array = stream.peek(200).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["  # type: ignore[attr-defined]
    lines = _lines(path, stream, LARGEST_ARRAY if array else LONGEST)
    head = list(itertools.islice(lines, 2))
    start = head[0][1].lstrip() if head else b""
    if start[:1] == b"[" or len(head) == 1 or start.rstrip() in (b"{", b'{"'):
        # The whole file may be one value: an array of rows, or an object that holds one.
        whole = _whole(path, itertools.chain(head, lines))
        rows = _array(path, whole)
        if rows is not None:
            yield from ((f"{path} row {number}", _marked(row, whole)) for number, row in enumerate(rows, 1))
            return
        if len(head) > 1:
            raise UserError(
                f"{path}: a JSON object spans several lines; put each object on its own line (jq -c . FILE), or all of them "
                "in one array: [...]"
            )
    for number, line in itertools.chain(head, lines):
        yield f"{path} line {number}", _parse(line)


def _whole(path: Path, lines: Iterable[tuple[int, bytes]]) -> bytes:
    """Return a file's lines joined."""
    found, size = [], 0
    for _, line in lines:
        found.append(line)
        size += len(line)
        if size > LARGEST_ARRAY:
            raise UserError(
                f"{path}: a JSON array of more than {LARGEST_ARRAY >> 30} GB, which is read whole; write one row a line: "
                f"jq -c '.[]' FILE > rows.jsonl"
            )
    return b"\n".join(found)


def _array(path: Path, text: bytes) -> list[Any] | None:
    """Return the rows of a JSON array, or of an object that holds only a list of rows; None for anything else."""
    try:
        value = parse_json(text)
    except ValueError as error:
        if text.lstrip()[:1] == b"[":
            raise UserError(f"{path}: not a valid JSON array ({first_line(error)})") from None
        return None
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list) and part and isinstance(part[0], dict)]
        # A single row of the format "messages" holds such a list too.
        return lists[0] if len(value) == len(lists) == 1 and not {"role", "from", "content"} & lists[0][0].keys() else None
    return value if isinstance(value, list) else None


def _parse(line: bytes) -> Any:
    try:
        return _marked(parse_json(line), line)
    except UnicodeDecodeError as error:
        return _not_utf8(error)
    except json.JSONDecodeError as error:
        hint = ""
        if line.lstrip().startswith(b"{'"):
            hint = "; it looks like a printed Python dict: write rows with json.dumps"
        elif not line.lstrip().startswith(b"{") and b"," in line:
            hint = "; if the file is CSV, call it .csv"
        return RowError(
            "not JSON",
            f"not valid JSON ({error.msg} at column {error.colno}); expected one JSON object per line, or one JSON "
            f"array{hint}",
        )
    except JSONError as error:
        return RowError("not JSON", f"not usable JSON ({error})")


def _marked(row: Any, text: bytes) -> Any:
    """Return a row, as `Loose` if it holds what JSON has not; `text` holds its own."""
    may = isinstance(row, dict) and (b"NaN" in text or b"Infinity" in text)
    return loose if may and (loose := Loose(row)).columns else row


def _csv(path: Path, stream: IO[bytes], tabs: bool) -> Iterator[PlacedRow]:
    """Read a table with a header."""
    csv.field_size_limit(LONGEST)  # the default is 128 KiB, too small for long responses
    lines = _decoded(path, stream)
    header = next(lines, "")
    delimiter = "\t" if tabs else max(",;\t", key=header.count)  # many European spreadsheets write semicolons
    reader = csv.reader(itertools.chain([header], lines), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        if double := [name for name, count in Counter(names).items() if count > 1]:
            raise UserError(f"{path}: two columns are named {double[0]!r}; rename one")
        started = reader.line_num + 1
        for cells in reader:
            place, started = f"{path} line {started}", reader.line_num + 1
            if len(cells) == len(names):
                yield place, dict(zip(names, map(Cell, cells), strict=True))
            elif cells:
                yield place, RowError("wrong number of cells", f"{len(cells)} cells, but the header has {len(names)}")
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: not valid CSV ({error})") from None


def _decoded(path: Path, stream: IO[bytes]) -> Iterator[str]:
    for number, line in enumerate(iter(lambda: stream.readline(LONGEST + 1), b""), 1):
        if len(line) > LONGEST:
            raise _too_long(path, number)
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} line {number}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None


def _columnar(path: Path, raw: IO[bytes], start: bytes) -> Iterator[PlacedRow]:
    pyarrow = _need("pyarrow", path)
    number, size = 0, os.fstat(raw.fileno()).st_size
    try:
        if start[:4] == b"PAR1":
            file = importlib.import_module("pyarrow.parquet").ParquetFile(raw)
            groups = [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
            batches = file.iter_batches(1000)
        elif start[:6] == b"ARROW1":
            file, groups = pyarrow.ipc.open_file(raw), []
            batches = (file.get_batch(i) for i in range(file.num_record_batches))
        else:
            groups, batches = [], pyarrow.ipc.open_stream(raw)
        refuse_unpacked(path, sum(groups), size)
        for batch in batches:
            batch.validate(full=True)  # an offset beyond the end would read other memory
            refuse_unpacked(path, batch.nbytes, size)
            if number + batch.num_rows > max(size, LARGE):
                raise UserError(f"{path}: says that it has {number + batch.num_rows:,} rows in {size:,} bytes; it is damaged")
            for row in batch.to_pylist():
                number += 1
                yield f"{path} row {number}", without_added(row)
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: cannot be read behind row {number} ({first_line(error)})") from None


def _need(module: str, path: Path) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{path}: files of this kind need {module}: {install('data')}") from None
