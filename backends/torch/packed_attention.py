"""Attention over a packed row, for transformers' models: each prompt once, then its responses, many pairs end to end.

On CUDA it is FlexAttention (`flex`). On a CPU it is a function in this file, which takes a block of queries at a time and
skips the keys that none of them can see, so that no mask is larger than such a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lite_dil.backends.limits import TORCH_QUERIES
from lite_dil.backends.torch import flex
from lite_dil.backends.torch.row import PackedRow, Scores, Unsupported
from lite_dil.batching.layouts import Segment

NAME = "lite_dil_packed"


# By the type of device: what attends over a row there. Elsewhere it is `blockwise`.
kernels: dict[str, Callable[[Tensor, Tensor, Tensor, PackedRow, Scores], Tensor]] = {"cuda": flex.attend}
windows: set[int | None] = set()  # the windows with which `attention` was called, for `probing`
_active: list[PackedRow | None] = [None]  # a list, not a context variable: CUDA's backward pass runs in another thread


def active() -> PackedRow | None:
    """Return the row being computed, if any."""
    return _active[0]


@contextmanager
def computing(config: Any, row: PackedRow | None) -> Iterator[None]:
    """Compute a row inside the block: the model of `config` attends by its segments, and normally after the block."""
    before, implementation = _active[0], config._attn_implementation
    _active[0] = row
    if row is not None:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        _active[0] = before
        config._attn_implementation = implementation


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend over the active row; a function for transformers' attention interface.

    Args:
        query: (1, heads, tokens, head width); key and value may have fewer heads.

    Returns:
        (1, tokens, heads, head width), and None for the weights.
    """
    row = active()
    assert row is not None
    if attention_mask is not None:
        raise Unsupported("it masks its attention itself")
    if dropout or kwargs.get("s_aux") is not None or kwargs.get("is_causal") is False or key.shape[2] != query.shape[2]:
        raise Unsupported("its attention uses more than a scale, a soft cap and a window")
    windows.add(sliding_window)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window if sliding_window is not None and sliding_window < row.longest else None
    scores = Scores(scale, softcap or 0.0, window)
    if (attend := kernels.get(query.device.type)) is not None:
        return attend(query, key, value, row, scores), None
    return blockwise(query, key, value, row, scores, getattr(module, "layer_idx", None) == row.last_layer), None


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)


class Unit(NamedTuple):
    """Queries of a row, and the keys before and among them: a prompt, or a response after its prompt."""

    rows: slice
    prompt: slice

    def keys(self, x: Tensor) -> Tensor:
        """Return this unit's keys or values, (heads, n, width), from the row's."""
        if self.rows.stop == self.prompt.stop:
            return x[:, self.prompt]
        return torch.cat((x[:, self.prompt], x[:, self.rows]), 1)

    def blocks(self, window: int | None) -> Iterator[tuple[slice, slice, int]]:
        """Yield blocks of queries, with the `keys` that each can see and the place of its first query among them."""
        response = self.rows.stop != self.prompt.stop
        first = (self.prompt.stop if response else self.rows.start) - self.prompt.start
        for start in range(self.rows.start, self.rows.stop, TORCH_QUERIES):
            stop = min(start + TORCH_QUERIES, self.rows.stop)
            place = first + start - self.rows.start
            low = 0 if window is None else max(0, place - window + 1)
            yield slice(start, stop), slice(low, place + stop - start), place


def units(segments: tuple[Segment, ...], last: bool) -> Iterator[Unit]:
    """Yield the units of a row; `last` leaves out all queries of a prompt but its last token."""
    for segment in segments:
        at = segment.start + segment.prompt
        prompt = slice(segment.start, at)
        yield Unit(slice(at - 1, at) if last else prompt, prompt)
        for length in segment.responses:
            yield Unit(slice(at, at + length), prompt)
            at += length


def _scores(q: Tensor, keys: Tensor, seen: slice, place: int, of: Scores) -> Tensor:
    """Return (heads, group, queries, keys) float32 scores, -inf for a hidden key.

    Args:
        q: (heads, group, queries, width), already scaled; `keys` is (heads, width, all keys of the unit), both float32.
    """
    heads, group, queries, width = q.shape
    scores = torch.bmm(q.reshape(heads, group * queries, width), keys[:, :, seen]).view(heads, group, queries, -1)
    if of.cap:
        scores.div_(of.cap).tanh_().mul_(of.cap)
    row = torch.arange(place, place + queries, device=q.device)[:, None]
    if of.window is None:  # only keys among the queries can be too late
        scores[..., -queries:].masked_fill_(row < row.T, -torch.inf)
    else:
        key = torch.arange(seen.start, seen.stop, device=q.device)
        scores.masked_fill_((key > row) | (key <= row - of.window), -torch.inf)
    return scores


class _Blocks(torch.autograd.Function):
    """Keeps queries, keys, values, the result and its log-sum-exp. Scores and softmax are float32 in every type."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...], of: Scores, last: bool) -> Tensor:
        heads, tokens = k.shape[1], q.shape[2]
        # In the memory order that the next operation needs, so that it is not copied.
        result = q.new_zeros(1, tokens, q.shape[1], v.shape[-1])
        out = result[0].unflatten(1, (heads, -1)).permute(1, 2, 0, 3)  # (key heads, group, tokens, width)
        grouped = q[0].unflatten(0, (heads, -1))
        total = torch.zeros(grouped.shape[:3], dtype=torch.float32, device=q.device)
        for unit in units(segments, last):
            keys, values = unit.keys(k[0]).float().transpose(1, 2).contiguous(), unit.keys(v[0])
            for rows, seen, place in unit.blocks(of.window):
                scores = _scores(grouped[:, :, rows].float() * of.scale, keys, seen, place, of)
                top = scores.amax(-1, keepdim=True)
                weights = scores.sub_(top).exp_()
                mass = weights.sum(-1, keepdim=True)
                mixed = torch.bmm(weights.to(v.dtype).flatten(1, 2), values[:, seen])
                out[:, :, rows] = mixed.view(*weights.shape[:3], -1) / mass
                total[:, :, rows] = (top + mass.log())[..., 0]
        ctx.save_for_backward(q, k, v, result, total)
        ctx.of = segments, of, last
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, result, total = ctx.saved_tensors
        segments, of, last = ctx.of
        heads = k.shape[1]
        out, grad = (x[0].unflatten(1, (heads, -1)).permute(1, 2, 0, 3) for x in (result, grads[0]))
        grouped = q[0].unflatten(0, (heads, -1))
        grad_q = torch.zeros_like(q)
        grad_k, grad_v = (x.new_zeros(x.shape[1:], dtype=torch.float32) for x in (k, v))
        into_q = grad_q[0].unflatten(0, (heads, -1))
        for unit in units(segments, last):
            keys, values = unit.keys(k[0]), unit.keys(v[0]).transpose(1, 2).contiguous()
            wide = keys.float().transpose(1, 2).contiguous()
            own_k, own_v = (x.new_zeros(x.shape, dtype=torch.float32) for x in (keys, values.mT))
            for rows, seen, place in unit.blocks(of.window):
                here = grouped[:, :, rows]
                scores = _scores(here.float() * of.scale, wide, seen, place, of)
                slope = 1 - (scores / of.cap).square_() if of.cap else None
                weights = scores.sub_(total[:, :, rows, None]).exp_()
                back = grad[:, :, rows]
                # d score = weight * (d weight - sum(d weight * weight)), and the sum is that of grad * out
                mean = (back.float() * out[:, :, rows].float()).sum(-1, keepdim=True)
                flat = back.flatten(1, 2)
                grad_s = torch.bmm(flat, values[:, :, seen]).float().view_as(weights).sub_(mean).mul_(weights)
                if slope is not None:
                    grad_s.mul_(slope.nan_to_num_(neginf=0.0))
                own_v[:, seen] += torch.bmm(weights.to(v.dtype).flatten(1, 2).mT, flat)
                grad_s = grad_s.mul_(of.scale).to(q.dtype).flatten(1, 2)
                into_q[:, :, rows] = torch.bmm(grad_s, keys[:, seen]).view_as(here)
                own_k[:, seen] += torch.bmm(grad_s.mT, here.flatten(1, 2))
            size = unit.prompt.stop - unit.prompt.start
            for whole, own in ((grad_k, own_k), (grad_v, own_v)):
                whole[:, unit.prompt] += own[:, :size]
                if own.shape[1] > size:
                    whole[:, unit.rows] += own[:, size:]
        return grad_q, grad_k[None].to(k.dtype), grad_v[None].to(v.dtype), None, None, None


def blockwise(q: Tensor, k: Tensor, v: Tensor, row: PackedRow, scores: Scores, last: bool = False) -> Tensor:
    """Attend over a row on the CPU, as `flex.attend` does on CUDA; `last` skips unread positions of the last layer.

    Args:
        q: (1, heads, tokens, head width); k and v may have fewer heads.

    Returns:
        (1, tokens, heads, head width).
    """
    return _Blocks.apply(q, k, v, row.segments, scores, last)


def has_window(config: Any, length: int) -> bool:
    """Return whether some attention of a text model looks back less than `length` tokens, by its config."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    return isinstance(window, int) and window < length and (not kinds or "sliding_attention" in kinds)


def why_not(base: Any, max_length: int) -> str:
    """Return why the model's architecture cannot be packed, or "" if its config shows no reason."""
    config = base.config.get_text_config()
    if not getattr(base, "_supports_attention_backend", False):
        return f"{type(base).__name__} has its own attention"
    if other := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return f"it has layers of type {', '.join(sorted(other))}"
    if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):  # that of images is not of text
        return "its attention is bidirectional"
    rope = getattr(config, "rope_parameters", None) or {}
    for part in rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]:
        trained = part.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        if part.get("rope_type") in ("dynamic", "longrope") and max_length > (trained or config.max_position_embeddings):
            return f"its {part['rope_type']} rope depends on the length of the row beyond {trained} tokens"
    return ""
