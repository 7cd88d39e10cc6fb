"""Packed attention on CUDA: FlexAttention, compiled once for each kind of layer that a model has.

The compiled code serves every row of a run, with and without gradients: the number of blocks is dynamic, and windows are data.
It is compiled when a kind of layer first occurs, which is in the comparison of layouts at start-up, forward and backward, on
a row of two blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from lite_dil.backends.limits import FLEX_BLOCK
from lite_dil.backends.torch import compiling
from lite_dil.backends.torch.row import PackedRow, Scores, Unsupported
from lite_dil.batching.layouts import Segment

Blocks = dict[str, int]
# For cards with too little shared memory for torch's own block sizes, from large to small.
FORWARD: tuple[Blocks, ...] = tuple(
    {"fwd_BLOCK_M": queries, "fwd_BLOCK_N": keys, "fwd_num_stages": 1} for queries, keys in ((64, 32), (32, 16))
)
BACKWARD: tuple[Blocks, ...] = tuple(
    {"bwd_BLOCK_M1": few, "bwd_BLOCK_N1": many, "bwd_BLOCK_M2": many, "bwd_BLOCK_N2": few, "bwd_num_stages": 1}
    for few, many in ((16, 32), (16, 16))
)
# Fields of BlockMask: partial and full blocks of keys for each block of queries, and the reverse.
BLOCK_LISTS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


class Kind(NamedTuple):
    """The properties shared by layers that use the same kernels."""

    heads: int
    key_heads: int
    width: int
    value_width: int
    scale: float
    cap: float
    dtype: torch.dtype
    device: torch.device


class Kernels(NamedTuple):
    """A compiled function of `_function`, and its block sizes, empty if they are torch's own."""

    run: Callable[..., Tensor]
    blocks: Blocks


_kernels: dict[Kind, Kernels] = {}
_numbers = count()


def attend(q: Tensor, k: Tensor, v: Tensor, row: PackedRow, scores: Scores) -> Tensor:
    """Attend over a row.

    Args:
        q: (1, heads, tokens, head width), tokens a multiple of FLEX_BLOCK; k and v may have fewer heads.

    Returns:
        (1, tokens, heads, head width of v).

    Raises:
        Unsupported: it cannot be compiled here or for this card.
    """
    tokens = q.shape[2]
    kind = Kind(q.shape[1], k.shape[1], q.shape[3], v.shape[3], scores.scale, scores.cap, q.dtype, q.device)
    run = kernels(kind).run
    blocks = max(2, tokens // FLEX_BLOCK)  # torch would compile again for a single one
    if scores.window not in row.masks:
        row.masks[scores.window] = mask(row.segments, scores.window, blocks * FLEX_BLOCK, q.device)
    return call(run, (q, k, v), row.masks[scores.window]).transpose(1, 2)[:, :tokens]


def kernels(kind: Kind) -> Kernels:
    """Return the kernels of a kind of layer, on CUDA compiled the first time. Raises Unsupported as `attend` does."""
    if kind not in _kernels:
        _kernels[kind] = compiled(kind) if kind.device.type == "cuda" else Kernels(_function(kind, {}), {})
    return _kernels[kind]


def call(run: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor], lists: list[Tensor]) -> Tensor:
    """Call a compiled function such that every call has the same properties, so that torch compiles no further variant."""
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    tokens = lists[0].shape[1]
    with torch.enable_grad():
        given = []
        for x in inputs:
            if not (needs_grad and x.requires_grad):
                x = x.detach().requires_grad_(x.is_cuda)  # on a CPU it has no backward pass
            x = torch.nn.functional.pad(x, (0, 0, 0, tokens - x.shape[2])) if x.shape[2] < tokens else x
            x = x.transpose(1, 2).contiguous().transpose(1, 2).unflatten(2, (-1, FLEX_BLOCK))
            torch._dynamo.mark_dynamic(x, 2)
            given.append(x)
        out = run(*given, *lists)
    return out if needs_grad else out.detach()


def seen(segments: tuple[Segment, ...], window: int | None, tokens: int) -> np.ndarray:
    """Return the keys that each query of a row sees, as two intervals: (4, tokens), start and end of each.

    The first is in its prompt, and empty for a prompt's own tokens; the second ends with the token itself. A padding token
    sees only itself.
    """
    place = np.arange(tokens)
    own = place.copy()
    first, end = np.zeros((2, tokens), np.int64)
    for part in segments:
        at = part.start + part.prompt
        prompt_end, own[part.start : at] = at, part.start
        for length in part.responses:
            rows = slice(at, at + length)
            own[rows], first[rows], end[rows] = at, part.start, prompt_end
            if window is not None:  # as if the response directly followed its prompt
                first[rows] = (prompt_end + np.arange(length) - window + 1).clip(part.start, prompt_end)
            at += length
    if window is not None:
        own = np.maximum(own, place - window + 1)
    return np.stack([first, end, own, place + 1])


def _pairs(intervals: np.ndarray) -> np.ndarray:
    """Return the number of pairs of a query and a visible key in each block of queries and keys, (blocks, blocks)."""
    tokens = intervals.shape[1]
    query, blocks = np.arange(tokens) // FLEX_BLOCK, tokens // FLEX_BLOCK
    # Of the keys below a bound, its block has `rest` and each earlier block all: summed from the right.
    change = np.zeros((blocks, blocks + 2), np.int64)
    for bound, sign in zip(intervals, (-1, 1, -1, 1), strict=True):
        block, rest = np.divmod(bound, FLEX_BLOCK)
        np.add.at(change, (query, block), sign * (FLEX_BLOCK - rest))
        np.add.at(change, (query, block + 1), sign * rest)
    return change[:, ::-1].cumsum(1)[:, ::-1][:, 1:-1]


def mask(segments: tuple[Segment, ...], window: int | None, tokens: int, device: torch.device) -> list[Tensor]:
    """Return a row's inputs for `_function`'s function: `seen`, then the lists in BLOCK_LISTS."""
    intervals = seen(segments, window, tokens)
    pairs = _pairs(intervals)
    full = pairs == FLEX_BLOCK**2
    partial = (pairs > 0) & ~full
    arrays = [intervals]
    for which in (partial, full, partial.T, full.T):
        arrays += [which.sum(1)[None, None], np.argsort(~which, axis=1, kind="stable")[None, None]]
    tensors = [torch.from_numpy(array.astype(np.int32)).to(device) for array in arrays]
    for tensor in tensors:
        torch._dynamo.mark_dynamic(tensor, [axis for axis, size in enumerate(tensor.shape) if axis and size > 1])
    return tensors


def _function(kind: Kind, blocks: Blocks) -> Callable[..., Tensor]:
    """Return a function of queries, keys and values, (1, heads, blocks, FLEX_BLOCK, width), and of `mask`'s tensors."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def capped(score: Tensor, *_: Any) -> Tensor:
        return kind.cap * torch.tanh(score / kind.cap)

    def packed(q: Tensor, k: Tensor, v: Tensor, intervals: Tensor, *lists: Tensor) -> Tensor:
        q, k, v = q.flatten(2, 3), k.flatten(2, 3), v.flatten(2, 3)  # always a multiple of FLEX_BLOCK
        first, end, own, _ = intervals.unbind()

        def allowed(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return ((key >= own[query]) & (key <= query)) | ((key >= first[query]) & (key < end[query]))

        size, sides = (FLEX_BLOCK, FLEX_BLOCK), (q.shape[2], q.shape[2])
        named: dict[str, Any] = dict(zip(BLOCK_LISTS, lists, strict=True))
        block_mask = BlockMask(seq_lengths=sides, BLOCK_SIZE=size, mask_mod=allowed, **named)
        change, options = capped if kind.cap else None, cast(Any, dict(blocks))
        return flex_attention(q, k, v, change, block_mask, kind.scale, enable_gqa=True, kernel_options=options)

    return packed


def compiled_function(kind: Kind, blocks: Blocks, backend: Any = "inductor") -> Callable[..., Tensor]:
    """Return a function for `call` that torch compiles on the first call."""
    function: Any = _function(kind, blocks)
    # torch keeps variants, at most 8, and dynamic sizes by code object and name, so each function here has its own.
    function.__code__ = function.__code__.replace(co_name=f"packed_{next(_numbers)}")
    # With fullgraph it raises instead of continuing without its compiler, which would need whole score matrices.
    return torch.compile(function, fullgraph=True, backend=backend)


def compiled(kind: Kind, tokens: int = 2 * FLEX_BLOCK, window: int | None = None) -> Kernels:
    """Compile forward and backward for a kind of layer, and run both on `tokens` tokens of zeros.

    Block sizes are torch's own if these fit the card's shared memory, else smaller ones, separately for forward and backward.

    Raises:
        Unsupported: with the reason.
        torch.OutOfMemoryError: there is no room for the zeros.
    """
    lists = mask((Segment(0, tokens // 2, (tokens // 4,)),), window, tokens, kind.device)
    blocks: Blocks = {}
    forward, backward = iter(FORWARD), iter(BACKWARD)
    while True:
        run = compiled_function(kind, blocks)
        shapes = ((kind.heads, kind.width), (kind.key_heads, kind.width), (kind.key_heads, kind.value_width))
        q, k, v = (
            torch.zeros(1, heads, tokens, width, dtype=kind.dtype, device=kind.device, requires_grad=True)
            for heads, width in shapes
        )
        smaller = forward
        try:
            with _quiet(), torch.enable_grad():  # the first call may be without gradients
                out = call(run, (q, k, v), lists)
                smaller = backward
                out.backward(torch.zeros_like(out))
                torch.cuda.synchronize(kind.device)
        except compiling.errors() as error:
            reason = compiling.why_not(error)
            following = next(smaller, None) if compiling.too_large(error) else None
            if following is None:
                raise Unsupported(f"FlexAttention cannot be compiled: {reason}") from None
            blocks = blocks | following
        else:
            return Kernels(run, blocks)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's warnings and tracebacks about attempts that are reported otherwise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
