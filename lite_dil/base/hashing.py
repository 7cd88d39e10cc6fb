"""Content hashes. Those that name something on disk must never change; tests/base/test_hashing.py has their values."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

_PIECE = 2**24  # bytes of a file in memory at once


def digest(*parts: object) -> str:
    """Return a hash of the repr of `parts`, 32 hexadecimal digits."""
    return blake2([repr(parts).encode()]).hex()


def tokens_digest(prompt: tuple[int, ...], responses: Iterable[tuple[int, ...]] = ()) -> bytes:
    """Return a 16-byte hash of a prompt's tokens and its responses' tokens, whatever the order of the responses."""
    return blake2(array("i", (len(ids), *ids)).tobytes() for ids in (prompt, *sorted(responses)))


def blake2(pieces: Iterable[bytes], size: int = 16) -> bytes:
    """Return the BLAKE2b hash of `size` bytes of a content given in pieces of any length."""
    found = hashlib.blake2b(digest_size=size)
    for piece in pieces:
        found.update(piece)
    return found.digest()


def blake2_and_sha256(pieces: Iterable[bytes]) -> tuple[str, str]:
    """Return a content's BLAKE2b hash of 16 bytes and its SHA-256 hash, in hexadecimal digits."""
    one, two = hashlib.blake2b(digest_size=16), hashlib.sha256()
    for piece in pieces:
        one.update(piece)
        two.update(piece)
    return one.hexdigest(), two.hexdigest()


def sha256(pieces: Iterable[bytes]) -> str:
    """Return the SHA-256 hash, 64 hexadecimal digits, of a content given in pieces of any length."""
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    return found.hexdigest()


def file_pieces(path: Path) -> Iterator[bytes]:
    """Yield a file of any size in pieces, for `blake2` or `sha256`."""
    with path.open("rb") as file:
        yield from pieces(file)


def pieces(file: BinaryIO, size: int = -1) -> Iterator[bytes]:
    """Yield what follows in an open file, at most `size` bytes of it if that is not negative, in pieces."""
    while piece := file.read(_PIECE if size < 0 else min(_PIECE, size)):
        size -= len(piece) if size > 0 else 0
        yield piece
