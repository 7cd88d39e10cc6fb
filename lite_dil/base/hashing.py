"""A name for anything, by what it holds."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable


def digest(*parts: object) -> str:
    """Return 32 hexadecimal digits that name what `parts` hold."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def tokens_digest(prompt: tuple[int, ...], responses: Iterable[tuple[int, ...]] = ()) -> bytes:
    """Return 16 bytes that name a prompt's tokens, and those of the responses to it in any order."""
    found = hashlib.blake2b(digest_size=16)
    for ids in (prompt, *sorted(responses)):
        found.update(array("i", (len(ids), *ids)).tobytes())
    return found.digest()
