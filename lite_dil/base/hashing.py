"""Content hashes. Those that name something on disk keep their bytes for ever; tests/base/test_hashing.py has their values."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

_PIECE = 2**24  # bytes of a file that are in memory at once


def digest(*parts: object) -> str:
    """Return 32 hexadecimal digits that name what `parts` hold, by their repr."""
    return blake2([repr(parts).encode()]).hex()


def tokens_digest(prompt: tuple[int, ...], responses: Iterable[tuple[int, ...]] = ()) -> bytes:
    """Return 16 bytes that name a prompt's tokens, and those of the responses to it in any order."""
    return blake2(array("i", (len(ids), *ids)).tobytes() for ids in (prompt, *sorted(responses)))


def blake2(pieces: Iterable[bytes], size: int = 16) -> bytes:
    """Return `size` bytes that name a content, given in pieces of any length (BLAKE2b)."""
    found = hashlib.blake2b(digest_size=size)
    for piece in pieces:
        found.update(piece)
    return found.digest()


def sha256(pieces: Iterable[bytes]) -> str:
    """Return 64 hexadecimal digits that name a content, given in pieces of any length (SHA-256)."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


def file_pieces(path: Path) -> Iterator[bytes]:
    """Read a file for `blake2` or `sha256`, however large it is."""
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            yield piece
