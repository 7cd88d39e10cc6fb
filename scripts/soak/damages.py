"""Kinds of damage to a file: what disks, power cuts and people do to it."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

Damage = Callable[[Path], object]


def damages(path: Path, other: Path, flips: int) -> Iterator[tuple[str, Damage]]:
    """Yield the kinds of damage to `path` with their names: `flips` bits over the whole file, and what else there is.

    `other` is another run's file of that name; it need not exist.
    """
    size, draw = path.stat().st_size, random.Random(path.name)
    count = min(flips, 8 * size)
    for number in range(count):
        at = size * number // count
        yield f"bit {(bit := draw.randrange(8))} of byte {at} flipped", partial(_flip, at=at, bit=bit)
    for part in (0.25, 0.5, 0.9):
        yield f"cut to {part:.0%}", partial(_cut, size=int(size * part))
    yield "without its last byte", partial(_cut, size=size - 1)
    if size > 64:
        yield "without its last 40 bytes", partial(_cut, size=size - 40)
    yield "empty", partial(_cut, size=0)
    yield "zeroed", lambda path: path.write_bytes(bytes(size))
    yield "its second half zeroed", partial(_zero, start=size // 2)
    yield "zeros behind it", lambda path: path.write_bytes(path.read_bytes() + bytes(512))
    yield "deleted", lambda path: path.unlink()
    if other.is_file() and other.read_bytes() != path.read_bytes():
        yield "another run's", lambda path: shutil.copyfile(other, path)


def _flip(path: Path, at: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def _cut(path: Path, size: int) -> None:
    os.truncate(path, size)


def _zero(path: Path, start: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:start] + bytes(len(content) - start))
