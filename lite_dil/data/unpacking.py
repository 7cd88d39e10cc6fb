"""Read compressed files, which may be small and hold terabytes."""

from __future__ import annotations

import contextlib
import gzip
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from lite_dil.base.errors import UserError

# A file of this size and more may not be so many times smaller when it is packed. Rows of text are 3 to 20 times smaller.
LARGE, _TIMES = 2**28, 500
_PIECE = 2**12  # bytes of a .zst file at a time; a block of 128 KB may be packed into 4 bytes


def refuse_unpacked(path: Path, size: int, packed: int) -> None:
    """Raise UserError if `size` bytes are suspiciously many to come from `packed` bytes of a file."""
    if size > LARGE and size > _TIMES * packed:
        raise UserError(
            f"{path}: what it holds is more than {_TIMES} times as large as the file; if it is meant to be, unpack it "
            "yourself, to JSON Lines, and give that file"
        )


class _Watched(io.RawIOBase):
    """What `read` unpacks, as a stream. Raises UserError once it is suspiciously more than was read of the file.

    Args:
        read: returns unpacked bytes, at most as many as it is asked for; none at the end.
        raw: the packed file.
    """

    def __init__(self, path: Path, raw: IO[bytes], read: Callable[[int], bytes]) -> None:
        self.path, self.raw, self.read_some, self.made = path, raw, read, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = self.read_some(len(buffer))
        buffer[: len(content)] = content
        self.made += len(content)
        refuse_unpacked(self.path, self.made, self.raw.tell())
        return len(content)


class _Zstandard:
    """Unpacks a .zst file and raises EOFError if it is truncated; zstandard's own reader does not."""

    def __init__(self, zstandard: Any, raw: IO[bytes]) -> None:
        self.zstandard, self.raw = zstandard, raw
        self.frame: Any = None
        self.left = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Return at most `size` bytes; none at the end of the file."""
        while not self.left:
            packed = (self.frame.unused_data if self.frame and self.frame.eof else b"") or self.raw.read(_PIECE)
            if not packed:
                if self.frame and not self.frame.eof:
                    raise EOFError("the compressed file is truncated")
                return b""
            if self.frame is None or self.frame.eof:
                self.frame = self.zstandard.ZstdDecompressor().decompressobj()
            try:
                self.left = memoryview(self.frame.decompress(packed))
            except self.zstandard.ZstdError as error:
                raise OSError(str(error)) from None
        found, self.left = self.left[:size], self.left[size:]
        return bytes(found)


@contextlib.contextmanager
def unpacked(path: Path, raw: IO[bytes], start: bytes, need: Callable[[str, Path], Any]) -> Iterator[IO[bytes]]:
    """Open the content of a compressed file, recognised by its first bytes whatever its name; other files as they are.

    Args:
        start: the file's first bytes.
        need: imports a package, or raises UserError.
    """
    if start.startswith(b"\x1f\x8b"):
        with gzip.open(raw) as stream:
            yield io.BufferedReader(_Watched(path, raw, stream.read), 2**16)
    elif start.startswith(b"\x28\xb5\x2f\xfd"):
        yield io.BufferedReader(_Watched(path, raw, _Zstandard(need("zstandard", path), raw).read), 2**16)
    else:
        yield raw
