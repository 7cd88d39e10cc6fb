"""Turn a layout into the arrays of a pass, padded so that a compiled pass sees few shapes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from lite_dil.backends.mlx.prefix import arrays
from lite_dil.backends.mlx.score_head import states_read
from lite_dil.backends.types import EACH, Head
from lite_dil.batching.batch import Batch
from lite_dil.batching.layouts import Layout, Plain, Prefix


def inputs_of(layout: Plain | Prefix, multiple: int, head: Head | None) -> dict[str, mx.array]:
    """Return the arrays of a pass for log-probs, or for a head.

    They are `ids` and `read_index`, the indices of the states to read; for log-probs also `targets`, `token_index` and
    `token_mask`. The prefix layout adds those of `prefix.arrays`.
    """
    read = None if head is None else _read_index(head, layout, multiple)
    if isinstance(layout, Prefix):
        made = arrays(layout, multiple, read)
    elif read is not None:
        made = {"ids": layout.input_ids, "read_index": read}
    else:
        made = {"ids": layout.input_ids, "read_index": filled(layout.hidden_index, multiple)}
        made |= {name: filled(getattr(layout, name), multiple) for name in ("targets", "token_index", "token_mask")}
    return {name: as_mlx(value) for name, value in made.items()}


def as_mlx(array: np.ndarray) -> mx.array:
    """Return the array in MLX, with 32-bit integers."""
    return mx.array(array.astype(np.int32) if array.dtype == np.int64 else array)


def filled(array: np.ndarray, multiple: int) -> np.ndarray:
    """Pad the last axis with zeros to a multiple of `multiple`."""
    return np.pad(array, [*[(0, 0)] * (array.ndim - 1), (0, -array.shape[-1] % multiple)])


def _read_index(head: Head, layout: Layout, multiple: int) -> np.ndarray:
    read = states_read(head, layout)
    return filled(read, multiple) if head.at == EACH else read


def sums(logps: mx.array, inputs: dict[str, mx.array]) -> mx.array:
    """Sum values of the response tokens over each response: (tokens,) to (responses,)."""
    return (logps[inputs["token_index"]] * inputs["token_mask"]).sum(-1)


def cut(values: mx.array, batch: Batch) -> np.ndarray:
    """Return the values in numpy without padding; there are never more responses than tokens."""
    return np.array(values)[: int(batch.lengths.sum())]
