"""Attention over a packed row, for transformers' models: each prompt once, its responses after it, many pairs end to end.

On CUDA it is FlexAttention with a block mask. On a CPU it is the flash kernel, called on the pieces of a row that need no
mask (a prompt on itself, the responses on their prompt, each response on itself), which their log-sum-exps put together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lite_dil.layouts import Packed, Segment

NAME = "lite_dil_packed"
BLOCK = 128  # FlexAttention's blocks; rows on CUDA are padded to a multiple of it

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Unsupported(Exception):
    """The model's attention is of a kind that a packed row cannot have."""


@dataclass
class Row:
    """What the layers need to know of the row that is being computed.

    Attributes:
        read: (n,) the positions whose output of the last layer is read.
        hidden_index: (tokens,) which of all the row's hidden states predicts each response token.
        longest: tokens of its longest sequence.
        last_layer: the number of the model's last layer, of whose prompts only the last token is read.
    """

    segments: tuple[Segment, ...]
    read: Tensor
    hidden_index: Tensor
    position_ids: Tensor
    longest: int
    last_layer: int
    masks: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, layout: Packed, device: torch.device, last_layer: int = -1) -> Row:
        """Put a layout on the device."""
        index = torch.from_numpy(layout.hidden_index)
        longest = max(segment.prompt + max(segment.responses, default=0) for segment in layout.segments)
        positions = torch.from_numpy(layout.position_ids).to(device)
        return cls(layout.segments, torch.unique(index).to(device), index.to(device), positions, longest, last_layer)


_active: list[Row | None] = [None]  # a list, and not a context variable: CUDA's backward pass runs in another thread


def active() -> Row | None:
    """Return the row that is being computed, if any."""
    return _active[0]


@contextmanager
def computing(config: Any, row: Row | None) -> Iterator[None]:
    """Compute a row inside the block: the model of `config` attends as its segments say, and as ever after it."""
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
    """Attend over the active row, as a function of transformers' attention interface.

    Args:
        query: (1, heads, tokens, head width); key and value may have fewer heads.

    Returns:
        (1, tokens, heads, head width), and None for the weights.
    """
    row = active()
    assert row is not None and attention_mask is None
    if dropout or kwargs.get("s_aux") is not None or kwargs.get("is_causal") is False or key.shape[2] != query.shape[2]:
        raise Unsupported("its attention has more than a scale, a soft cap and a window")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = sliding_window if sliding_window is not None and sliding_window < row.longest else None
    if query.device.type == "cuda":
        return _flex(query, key, value, row, scale, softcap, window), None
    if softcap or window or value.shape[-1] != query.shape[-1]:
        return _dense(query, key, value, row, scale, softcap, window), None
    last = getattr(module, "layer_idx", None) == row.last_layer
    return _Pieces.apply(query, key, value, row.segments, scale, last), None


ALL_ATTENTION_FUNCTIONS.register(NAME, attention)


def pieces(segments: tuple[Segment, ...], last: bool) -> Iterator[tuple[slice, slice, bool, bool]]:
    """Return the attentions that a row consists of, none of which needs a mask: queries, keys, causal, continued.

    `last` leaves out all queries of a prompt but its last token. A continued piece adds to the one before it.
    """
    for segment in segments:
        start, at = segment.start, segment.start + segment.prompt
        prompt = slice(start, at)
        yield (slice(at - 1, at), prompt, False, False) if last else (prompt, prompt, True, False)
        if segment.responses:
            yield slice(at, at + sum(segment.responses)), prompt, False, False
        for length in segment.responses:
            yield slice(at, at + length), slice(at, at + length), True, True
            at += length


class _Pieces(torch.autograd.Function):
    """The flash kernel over a row's pieces. Keeps queries, keys, values, the result and its log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: tuple[Segment, ...], scale: float, last: bool) -> Tensor:
        _, heads, tokens, width = q.shape
        # Laid out as what follows wants it, so that it is not copied there.
        out = q.new_zeros(1, tokens, heads, width).transpose(1, 2)
        total = torch.zeros(1, heads, tokens, dtype=torch.float32)
        for rows, columns, causal, continued in pieces(segments, last):
            part, logs = _flash(q[:, :, rows], k[:, :, columns], v[:, :, columns], 0.0, causal, scale=scale)
            if continued:
                before = total[:, :, rows]
                both = torch.logaddexp(before, logs)
                old = out[:, :, rows].float().mul_((before - both).exp_().unsqueeze(-1))
                part, logs = old.addcmul_(part.float(), (logs - both).exp_().unsqueeze(-1)), both
            out[:, :, rows], total[:, :, rows] = part, logs
        ctx.save_for_backward(q, k, v, out, total)
        ctx.of = segments, scale, last
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, total = ctx.saved_tensors
        segments, scale, last = ctx.of
        grad = grads[0].transpose(1, 2)
        grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (q, k, v))
        for rows, columns, causal, _ in pieces(segments, last):
            # With the result and the log-sum-exp of the whole, the kernel differentiates each piece of it.
            kept = [x[:, :, rows] for x in (grad, q)] + [x[:, :, columns] for x in (k, v)] + [out[:, :, rows]]
            parts = _flash_backward(*kept, total[:, :, rows].contiguous(), 0.0, causal, scale=scale)
            grad_q[:, :, rows] += parts[0]
            grad_k[:, :, columns] += parts[1]
            grad_v[:, :, columns] += parts[2]
        return grad_q, grad_k, grad_v, None, None, None


def _allowed(row: Row, window: int | None) -> Callable[[Any, Any, Any, Any], Any]:
    """Return FlexAttention's mask function: whether token q of the row attends to token k."""
    tokens = row.position_ids.shape[1]
    segment = torch.full((tokens,), -1, dtype=torch.int32)
    response = torch.zeros(tokens, dtype=torch.int32)
    for number, part in enumerate(row.segments):
        at = part.start + part.prompt
        segment[part.start : at + sum(part.responses)] = number
        for order, length in enumerate(part.responses, 1):
            response[at : at + length] = order
            at += length
    segment, response, position = (x.to(row.position_ids.device) for x in (segment, response, row.position_ids[0]))

    def allowed(batch: Any, head: Any, q: Any, k: Any) -> Any:
        mask = (q >= k) & (segment[q] == segment[k]) & ((response[k] == 0) | (response[k] == response[q]))
        return mask if window is None else mask & (position[q] - position[k] < window)

    return allowed


def _dense(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float, softcap: float | None, window: int | None) -> Tensor:
    """Attention with a soft cap or a window, on a CPU: a prompt and its responses at a time, with a mask of that size."""
    allowed = _allowed(row, window)
    parts = []
    for segment in row.segments:
        end = segment.start + segment.prompt + sum(segment.responses)
        here = torch.arange(segment.start, end)
        if (mask := row.masks.get((segment, window))) is None:
            mask = row.masks[segment, window] = allowed(0, 0, here[:, None], here[None, :])
        own_q, own_k, own_v = (x[:, :, segment.start : end] for x in (q, k, v))
        if softcap:
            own_k, own_v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (own_k, own_v))
            scores = torch.tanh(own_q @ own_k.transpose(-1, -2) * scale / softcap) * softcap
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
            parts.append(weights @ own_v)
        else:
            parts.append(F.scaled_dot_product_attention(own_q, own_k, own_v, mask, scale=scale, enable_gqa=True))
    rest = q.shape[2] - sum(part.shape[2] for part in parts)
    parts.append(q.new_zeros(1, q.shape[1], rest, v.shape[-1]))
    return torch.cat(parts, 2).transpose(1, 2)


@cache
def _compiled() -> tuple[Any, Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention), torch.compile(create_block_mask)


def _flex(q: Tensor, k: Tensor, v: Tensor, row: Row, scale: float, softcap: float | None, window: int | None) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Uncompiled it holds whole score matrices, which is for the tests on a CPU.
    flex, make_mask = _compiled() if q.device.type == "cuda" else (flex_attention, create_block_mask)
    if window not in row.masks:
        tokens = q.shape[2]
        row.masks[window] = make_mask(_allowed(row, window), None, None, tokens, tokens, device=str(q.device))
    cap = None
    if softcap:

        def cap(score: Any, *_: Any) -> Any:
            return softcap * torch.tanh(score / softcap)

    return flex(q, k, v, score_mod=cap, block_mask=row.masks[window], scale=scale, enable_gqa=True).transpose(1, 2)


def why_not(base: Any, max_length: int) -> str:
    """Return why the model's architecture cannot be packed, or nothing where it can as far as its config tells."""
    config = base.config.get_text_config()
    if not getattr(base, "_supports_attention_backend", False):
        return f"{type(base).__name__} has an attention of its own"
    if other := set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return f"it has layers of type {', '.join(sorted(other))}"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is bidirectional"
    rope = getattr(config, "rope_parameters", None) or {}
    for part in rope.values() if all(isinstance(value, dict) for value in rope.values()) else [rope]:
        trained = part.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        if part.get("rope_type") in ("dynamic", "longrope") and max_length > (trained or config.max_position_embeddings):
            return f"its {part['rope_type']} rope depends on the length of the row beyond {trained} tokens"
    return ""
