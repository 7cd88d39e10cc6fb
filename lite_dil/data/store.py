"""Examples on disk, in the order of the data: while a program runs, or in a file that later runs read."""

from __future__ import annotations

import json
import struct
import weakref
from array import array
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, overload

import numpy as np

from lite_dil.base.disk import writing
from lite_dil.base.files import append, appending, create, make_folder, replacing, scratch_file
from lite_dil.base.formats import KEY, STORE, check_format
from lite_dil.base.hashing import pieces, sha256, tokens_digest
from lite_dil.data.encoder import Example
from lite_dil.models.find import cache_dir

PLACE = "LITE_DIL_CACHE"  # the variable that sets another place
# A kept file: its arrays one after the other, a description in JSON that says where they are, where that begins, and a SHA-256
# hash of all this.
_AT, _HASH = struct.Struct("<Q"), 32
_ALIGNED, _PIECE = 8, 2**22
_TYPES = {
    "records": "<i4",
    "starts": "<i8",
    "first": "<i8",
    "lengths": "<i4",
    "signs": "<i1",
    "rows": "<i4",
    "names": "<u8",
    "margins": "<f8",
}
_IN_TWOS = ("lengths", "rows", "names")


class DamagedStore(Exception):
    """A file of tokens is not as it was written."""


@dataclass(frozen=True)
class ExampleStore(Sequence[Example]):
    """Examples in a file that is mapped into memory; indexing reads one. Made by `StoreWriter.store` or `opened`.

    Attributes:
        records: int32, the tokens of each example's prompt and responses, then its prompt for people as JSON.
        starts: (examples + 1,) where each example's part of `records` begins.
        first: (examples + 1,) where each example's sequences begin in the next two: its prompt, then its responses.
        lengths: (sequences, 2) the tokens of each sequence, as stored, and before ``--max-length`` cut it.
        signs: (sequences,) the sign of a response, 0 for a prompt.
        rows: (examples, 2) the number of its source, and of its row there.
        names: (examples, 2) uint64, for each example a hash of its prompt, and of its prompt with its responses in any order,
            before cutting; (0, 2) where these were not given.
        margins: (examples,) the margin of each pair.
        sources: the names of the sources.
    """

    records: np.ndarray
    starts: np.ndarray
    first: np.ndarray
    lengths: np.ndarray
    signs: np.ndarray
    rows: np.ndarray
    names: np.ndarray
    margins: np.ndarray
    sources: list[str]

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        first, end = self.first[index : index + 2].tolist()
        at, _ = self.starts[index : index + 2].tolist()
        lengths = self.lengths[first:end, 0].tolist()
        ids, parts, begin = self.records[at : at + sum(lengths)].tolist(), [], 0
        for length in lengths:
            parts.append(tuple(ids[begin : begin + length]))
            begin += length
        source, number = self.rows[index].tolist()
        signs = tuple(self.signs[first + 1 : end].tolist())
        return Example(parts[0], tuple(parts[1:]), signs, f"{self.sources[source]} {number}", float(self.margins[index]))

    def shown(self, index: int) -> Any:
        """Return an example's prompt for people, text or messages, if it was given."""
        begin = self.starts[index] + self.lengths[self.first[index] : self.first[index + 1], 0].sum()
        return json.loads(self.records[begin : self.starts[index + 1]].tobytes())

    def keep(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Write a file for `opened`, completely or not at all, with `facts`, which JSON can hold. Raises DiskFailed."""
        with writing(path, PLACE):
            make_folder(path.parent)
            with replacing(path) as part:
                with create(part) as file:
                    places = {name: _write(file, getattr(self, name)) for name in _TYPES}
                    at = file.tell()
                    about = {KEY: STORE, "arrays": places, "sources": self.sources, "facts": facts}
                    file.write(json.dumps(about).encode() + _AT.pack(at))
                with part.open("rb") as written:  # as it came out
                    digest = bytes.fromhex(sha256(pieces(written)))
                with appending(part) as end:
                    append(end, digest)


class StoreWriter:
    """Examples on their way into a temporary file. Memory holds about 80 bytes of each, so there may be more than it holds."""

    def __init__(self) -> None:
        self._what = f"the data's tokens in {cache_dir()}"
        with writing(self._what, PLACE):
            self._file = scratch_file(cache_dir())
        weakref.finalize(self, _close, self._file)
        self._sources: dict[str, int] = {}  # their numbers
        self._arrays: dict[str, array[Any]] = {
            name: array(np.dtype(kind).char) for name, kind in _TYPES.items() if name != "records"
        }
        for name in ("starts", "first"):
            self._arrays[name].append(0)

    def __len__(self) -> int:
        return len(self._arrays["starts"]) - 1

    def append(self, example: Example, whole: Example | None = None, shown: Any = None) -> None:
        """Add an example.

        Args:
            whole: the example before it was cut, if it is to have names.
            shown: its prompt for people, text or messages.
        """
        arrays, record = self._arrays, list(example.prompt)
        for response in example.responses:
            record += response
        content = np.array(record, np.int32).tobytes()
        if shown is not None:
            text = json.dumps(shown).encode()
            content += text + b" " * (-len(text) % 4)
        with writing(self._what, PLACE):
            self._file.write(content)
        arrays["starts"].append(arrays["starts"][-1] + len(content) // 4)
        arrays["first"].append(arrays["first"][-1] + 1 + len(example.responses))
        full = whole or example
        for cut, uncut in zip((example.prompt, *example.responses), (full.prompt, *full.responses), strict=True):
            arrays["lengths"].extend((len(cut), len(uncut)))
        arrays["signs"].extend((0, *example.signs))
        arrays["margins"].append(example.margin)
        source, _, number = example.place.rpartition(" ")
        arrays["rows"].extend((self._sources.setdefault(source, len(self._sources)), int(number or 0)))
        if whole:
            arrays["names"].frombytes(tokens_digest(whole.prompt)[:8] + tokens_digest(whole.prompt, whole.responses)[:8])

    def store(self) -> ExampleStore:
        """Return the examples; none can be added afterwards."""
        with writing(self._what, PLACE):
            self._file.flush()
        records = np.memmap(self._file, np.int32, "r") if self._arrays["starts"][-1] else np.zeros(0, np.int32)
        arrays = {name: np.frombuffer(values, _TYPES[name]) for name, values in self._arrays.items()}
        return ExampleStore(np.asarray(records), sources=list(self._sources), **_shaped(arrays))


def _close(file: IO[bytes]) -> None:
    with suppress(OSError):  # unwritten tokens on a full disk, which was reported before
        file.close()


def opened(path: Path) -> tuple[ExampleStore, dict[str, Any]]:
    """Return the examples and facts that `ExampleStore.keep` wrote.

    Raises:
        DamagedStore: the file is not as it was written.
        OSError: it cannot be read.
        NewerFormat: a newer version wrote it.
    """
    with path.open("rb") as file:
        size = path.stat().st_size - _HASH
        if size <= _AT.size or sha256(pieces(file, size)) != file.read().hex():
            raise DamagedStore(path)
        file.seek(size - _AT.size)
        (at,) = _AT.unpack(file.read(_AT.size))
        file.seek(at)
        about = json.loads(file.read(size - _AT.size - at))
        check_format(about, STORE, path)
        arrays = {
            name: np.asarray(np.memmap(file, np.dtype(_TYPES[name]), "r", begin, (length,)))
            for name, (begin, length) in about["arrays"].items()
        }
    return ExampleStore(sources=about["sources"], **_shaped(arrays)), about["facts"]


def _shaped(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: values.reshape(-1, 2) if name in _IN_TWOS else values for name, values in arrays.items()}


def _write(file: IO[bytes], values: np.ndarray) -> tuple[int, int]:
    """Write an array; return where it begins and its length."""
    file.write(bytes(-file.tell() % _ALIGNED))
    begin, flat = file.tell(), values.reshape(-1)
    for start in range(0, len(flat), _PIECE):
        file.write(flat[start : start + _PIECE].tobytes())
    return begin, len(flat)
