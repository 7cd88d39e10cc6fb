"""Safetensors files in numpy alone, one tensor at a time; bfloat16, which numpy lacks, is kept as its 16 bits."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.base.errors import UserError
from lite_dil.base.files import create
from lite_dil.models.header import read_header

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CODES = {name: code for code, name in FLOATS.items()}
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "BOOL": "?"} | {
    f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)
}
_PIECE = 2**22  # elements converted at a time


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its safetensors dtype code, its shape, and where its bytes are."""

    path: Path
    code: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def floating(self) -> bool:
        """Whether its type is one of FLOATS."""
        return self.code in FLOATS

    def bytes(self) -> np.ndarray:
        """Return its bytes, flat and memory-mapped."""
        if not self.nbytes:
            return np.empty(0, np.uint8)
        return np.memmap(self.path, np.uint8, "r", self.start, (self.nbytes,))

    def raw(self) -> np.ndarray:
        """Return its numbers in its shape, memory-mapped; bfloat16 as bits, uint16."""
        return self.bytes().view(_NUMPY[self.code]).reshape(self.shape)

    def float32(self) -> np.ndarray:
        """Return a copy in float32."""
        return to_float32(self.raw(), self.code)

    def pieces(self, code: str) -> Iterator[np.ndarray]:
        """Yield its bytes, converted to the type `code`, one piece at a time."""
        if code == self.code:
            yield self.bytes()
            return
        flat = self.raw().reshape(-1)
        for start in range(0, flat.size, _PIECE):
            yield from encode(to_float32(flat[start : start + _PIECE], self.code), code)


@dataclass(frozen=True)
class Planned:
    """A tensor to be written: `pieces` makes its bytes when its turn comes."""

    name: str
    code: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        """Its size in a file."""
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(_NUMPY[self.code]).itemsize


def core_name(name: str) -> str:
    """Return the name of a weight or layer without the prefixes around a language model, which differ between libraries."""
    return ".".join(part for part in name.split(".") if part not in ("model", "language_model"))


def read(path: Path) -> dict[str, Stored]:
    """Return the tensors of a file by name, in the order of their bytes; only the header is read.

    Raises UserError as `lite_dil.models.header.read_header` does.
    """
    return {name: Stored(path, *place) for name, place in read_header(path).items()}


def read_floats(path: Path) -> dict[str, Stored]:
    """Return the tensors of a file by name. Raises UserError as `read` does, or if the type of one is not in FLOATS."""
    stored = read(path)
    if odd := {tensor.code for tensor in stored.values()} - FLOATS.keys():
        raise UserError(f"{path}: its weights are {', '.join(sorted(odd))}; expected {', '.join(FLOATS.values())}")
    return stored


def read_finite(path: Path) -> dict[str, Stored]:
    """Return the tensors of a file by name, after reading them all.

    Raises UserError as `read_floats` does, or if one holds a number that is not finite.
    """
    stored = read_floats(path)
    for name, tensor in stored.items():
        if not is_finite(tensor.bytes(), tensor.code):
            raise UserError(f"{path}: {name} holds numbers that are not finite; expected finite ones")
    return stored


def load_float32(path: Path) -> dict[str, np.ndarray]:
    """Return float32 copies of a file's tensors by name. Raises UserError as `read_finite` does."""
    return {name: tensor.float32() for name, tensor in read_finite(path).items()}


def is_finite(data: np.ndarray, code: str) -> bool:
    """Return whether all numbers are finite in flat bytes of the type `code`, one of FLOATS."""
    flat = data.view(_NUMPY[code])
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        if not (piece & 0x7F80 != 0x7F80 if code == "BF16" else np.isfinite(piece)).all():
            return False
    return True


def write(path: Path, tensors: Iterable[Planned], format: str) -> None:
    """Write a safetensors file tensor by tensor; `format`, "pt" or "mlx", goes into its metadata.

    Raises UserError if a number is not finite.
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": format}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        header[tensor.name] = {"dtype": tensor.code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with create(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            start = file.tell()
            for piece in tensor.pieces():
                flat = np.ascontiguousarray(piece)
                if tensor.code in FLOATS and not is_finite(flat.reshape(-1).view(np.uint8), tensor.code):
                    raise UserError(f"{tensor.name} holds numbers that are not finite; such a model is not written")
                file.write(flat.data)
            assert file.tell() - start == tensor.nbytes, tensor.name


def to_float32(raw: np.ndarray, code: str) -> np.ndarray:
    """Return a float32 copy of the numbers that `Stored.raw` returned."""
    if code == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)


def encode(values: np.ndarray, code: str) -> Iterator[np.ndarray]:
    """Yield float32 numbers as flat bytes of the type `code`, rounded to nearest even, one piece at a time.

    Raises:
        UserError: a number is too large for the type.
    """
    flat = values.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        if code == "BF16":
            bits = piece.view(np.uint32)
            piece = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        else:
            with np.errstate(over="ignore"):
                piece = piece.astype(_NUMPY[code])
            if code == "F16" and not np.isfinite(piece).all():
                raise UserError(
                    "a weight is too large for float16, which ends at 65504; take --dtype bfloat16, or --outtype bf16 for GGUF"
                )
        yield piece.view(np.uint8)
