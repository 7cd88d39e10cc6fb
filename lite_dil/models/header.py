"""The header of a safetensors file, read and checked: the one reader of what says where its tensors are."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

from lite_dil.base.errors import UserError, first_line

# Bytes of an element, by the format's names.
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}
SIZES |= {f"{kind}{8 * size}": size for kind in "IU" for size in (1, 2, 4, 8)}
_MOST = 100_000_000  # bytes of a header, the limit of the safetensors library


class Place(NamedTuple):
    """A tensor's type, its shape, and where its bytes are in the file."""

    code: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def read_header(path: Path) -> dict[str, Place]:
    """Return the place of each tensor by name, in the order of their bytes.

    Raises UserError if the file cannot be read, or if its header is not a safetensors file's: one with unknown types, sizes
    that are not those of the shapes, or tensors that overlap, leave holes or end elsewhere than the file.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, _MOST):
                raise ValueError(f"its header has {length} bytes; expected at most {min(size - 8, _MOST)}")
            header = json.loads(file.read(length), object_pairs_hook=_once)
        if not isinstance(header, dict):
            raise ValueError("its header is not a JSON object")
        header.pop("__metadata__", None)
        found = {name: _place(name, entry, 8 + length) for name, entry in header.items()}
        ordered = dict(sorted(found.items(), key=lambda item: item[1].start))
        _check_whole(ordered, 8 + length, size)
    except (OSError, ValueError, struct.error, RecursionError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({first_line(error)})") from None
    return ordered


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("its header names a tensor twice")
    return found


def _place(name: str, entry: Any, begin: int) -> Place:
    """Return a tensor's place from its entry in the header; `begin` is where the tensors' bytes begin."""
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is {entry!r}; expected dtype, shape and data_offsets")
    fields: tuple[Any, Any, Any] = (entry.get("dtype"), entry.get("shape"), entry.get("data_offsets"))
    code, shape, offsets = fields
    if not isinstance(code, str) or code not in SIZES:
        raise ValueError(f"{name}: dtype is {code!r}; expected one of {', '.join(SIZES)}")
    if not _whole_numbers(shape):
        raise ValueError(f"{name}: shape is {shape!r}; expected whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{name}: data_offsets is {offsets!r}; expected the first byte and the one behind the last")
    size = math.prod(shape) * SIZES[code]
    if offsets[1] - offsets[0] != size:
        raise ValueError(f"{name}: data_offsets is {offsets}; expected {size} bytes for {code} of shape {shape}")
    return Place(code, tuple(shape), begin + offsets[0], size)


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_whole(places: dict[str, Place], begin: int, size: int) -> None:
    """Raise ValueError unless the tensors follow each other up to the end of the file."""
    for name, place in places.items():
        if place.start != begin and place.nbytes:
            raise ValueError(f"{name}: data_offsets begin at byte {place.start} of the file; expected {begin}")
        begin += place.nbytes
    if size < begin:
        raise ValueError(f"it is truncated: it has {size} bytes; expected {begin}")
    if size > begin:
        raise ValueError(f"it has {size} bytes; expected {begin}, where its last tensor ends")
