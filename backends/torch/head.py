"""Log-probs of given tokens from hidden states, in chunks, so that (tokens, vocabulary) is never held whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lite_dil.backends.limits import HEAD_SUMS, HEAD_TILE, TORCH_CHUNK, chunk_tokens, slices
from lite_dil.models.logits import LogitTransform


class QuantizedHead(nn.Module):
    """A frozen output head in 8 or 4 bits (bitsandbytes' blockwise types), unpacked `HEAD_TILE` tokens at a time.

    Args:
        head: the layer to replace; its weight may be on another device, and is moved to this one tile by tile.
    """

    def __init__(self, head: Any, bits: int, dtype: torch.dtype, device: torch.device) -> None:
        from bitsandbytes import functional

        super().__init__()
        quantize = functional.quantize_4bit if bits == 4 else functional.quantize_blockwise
        self.unpack = functional.dequantize_4bit if bits == 4 else functional.dequantize_blockwise
        settings = {"blocksize": 64, "quant_type": "nf4"} if bits == 4 else {"blocksize": 64}
        self.bias, self.dtype, self.vocabulary = head.bias, dtype, len(head.weight)
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.to(device), requires_grad=False)
        rows = head.weight.detach().split(HEAD_TILE)
        self.packed = [quantize(part.to(device).float().contiguous(), **settings) for part in rows]

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the weight (vocabulary, width) piece by piece, each with its slice of tokens."""
        for number, (data, state) in enumerate(self.packed):
            start = number * HEAD_TILE
            yield slice(start, min(start + HEAD_TILE, self.vocabulary)), self.unpack(data, state).to(self.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits, as the replaced layer does."""
        logits = torch.cat([F.linear(hidden, weight) for _, weight in self.tiles()], -1)
        return logits if self.bias is None else logits + self.bias


def _tiles(head: Any) -> Iterator[tuple[slice, Tensor]]:
    """Yield the weight in pieces, each with its slice of tokens; one piece if it is not quantised."""
    return head.tiles() if isinstance(head, QuantizedHead) else iter([(slice(0, len(head.weight)), head.weight)])


def vocabulary(head: Any) -> int:
    """Return the head's vocabulary size."""
    return head.vocabulary if isinstance(head, QuantizedHead) else len(head.weight)


def _sizes(hidden: Tensor, head: Any) -> tuple[int, int]:
    """Return how many hidden states are multiplied by a piece of the weight at once, and how many per unpacking."""
    quantized = isinstance(head, QuantizedHead)
    tile = min(vocabulary(head), HEAD_TILE) if quantized else vocabulary(head)
    chunk = chunk_tokens(tile, TORCH_CHUNK[hidden.device.type])
    return chunk, max(chunk, HEAD_SUMS // hidden.shape[-1]) if quantized else chunk


class _Softmax:
    """Running log-probs of some tokens over parts of the vocabulary, as in FlashAttention's online softmax.

    Args:
        hidden: (tokens, width).
        targets: (tokens, 1).
        grads: output for d logp / d hidden, (tokens, width), or None. Holds the targets' rows of the weight until `finish`.
        hits: output for whether a target is the most likely token, (tokens,) bool, or None.
    """

    def __init__(
        self, hidden: Tensor, targets: Tensor, transform: LogitTransform, grads: Tensor | None, hits: Tensor | None = None
    ) -> None:
        self.hidden, self.targets, self.transform, self.grads, self.hits = hidden, targets, transform, grads, hits
        column = torch.zeros_like(targets, dtype=torch.float32)
        # The largest logit so far and the target's; the sum of e^(logit - top); the cap's slope at the target.
        self.top, self.chosen = torch.full_like(column, torch.finfo(torch.float32).min), column
        self.mass, self.own = torch.zeros_like(column), torch.ones_like(column)
        self.best = None if hits is None else torch.full_like(targets, -1)  # the first token with the largest logit
        # The sum of the weight's rows times e^(logit - top) and the slope.
        self.sums = None if grads is None else torch.zeros_like(hidden, dtype=torch.float32)

    def add(self, part: slice, first: int, weight: Tensor, bias: Tensor | None) -> None:
        """Add the part of the vocabulary in `weight`, which starts at token `first`, for these hidden states."""
        logits = F.linear(self.hidden[part], weight, bias).float()
        slope = None
        if self.transform.scale != 1.0:
            logits.mul_(self.transform.scale)
        if self.transform.cap:
            logits.div_(self.transform.cap).tanh_()
            slope = 1 - logits.square() if self.grads is not None else None
            logits.mul_(self.transform.cap)
        place = self.targets[part] - first
        here = (place >= 0) & (place < len(weight))
        place.clamp_(0, len(weight) - 1)
        self.chosen[part] = torch.where(here, logits.gather(-1, place), self.chosen[part])
        if self.best is None:
            top = torch.maximum(self.top[part], logits.amax(-1, keepdim=True))
        else:
            largest, at = logits.max(-1, keepdim=True)
            self.best[part] = torch.where(largest > self.top[part], at + first, self.best[part])
            top = torch.maximum(self.top[part], largest)
        shrink = (self.top[part] - top).exp_()
        self.top[part] = top
        weights = logits.sub_(top).exp_()
        self.mass[part].mul_(shrink).add_(weights.sum(-1, keepdim=True))
        if self.grads is None or self.sums is None:
            return
        self.grads[part] = torch.where(here, weight[place[:, 0]], self.grads[part])
        if slope is not None:
            self.own[part] = torch.where(here, slope.gather(-1, place), self.own[part])
            weights.mul_(slope)
        self.sums[part].mul_(shrink).add_(weights.to(weight.dtype) @ weight)

    def finish(self, part: slice, logps: Tensor) -> None:
        """Write the log-probs of these hidden states into `logps`, (tokens,), and their gradients."""
        logps[part] = (self.chosen[part] - self.top[part] - self.mass[part].log())[:, 0]
        if self.hits is not None and self.best is not None:
            self.hits[part] = (self.best[part] == self.targets[part])[:, 0]
        if self.grads is not None and self.sums is not None:
            # d logp / d logits = onehot(target) - softmax(logits), times what the transform adds
            own = self.grads[part].float().mul_(self.own[part])
            self.grads[part] = own.sub_(self.sums[part].div_(self.mass[part])).mul_(self.transform.scale)


def _read(
    hidden: Tensor,
    head: Any,
    targets: Tensor,
    transform: LogitTransform,
    grads: Tensor | None = None,
    hits: Tensor | None = None,
) -> Tensor:
    """Return the log-probs of the targets, (tokens,) float32, and fill `grads` and `hits` as `_Softmax` does."""
    logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
    bias = getattr(head, "bias", None)
    size, together = _sizes(hidden, head)
    for block in slices(len(targets), together):
        softmax = _Softmax(
            hidden[block],
            targets[block, None],
            transform,
            None if grads is None else grads[block],
            None if hits is None else hits[block],
        )
        parts = list(slices(len(softmax.hidden), size))
        for rows, weight in _tiles(head):
            for part in parts:
                softmax.add(part, rows.start, weight, None if bias is None else bias[rows])
            del weight  # else it would live until the next one is unpacked
        for part in parts:
            softmax.finish(part, logps[block])
    return logps


class _TokenLogps(torch.autograd.Function):
    """Forward also computes d logp / d hidden, (tokens, hidden): backward is then a multiplication, with no second pass
    through the head and no gradient for the frozen weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Any, targets: Tensor, transform: LogitTransform) -> Tensor:
        grads = torch.empty_like(hidden) if hidden.requires_grad else None
        logps = _read(hidden, head, targets, transform, grads)
        if grads is not None:
            ctx.save_for_backward(grads)
        return logps

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grads,) = ctx.saved_tensors
        return (grad_outputs[0][:, None] * grads).to(grads.dtype), None, None, None


def token_logps(hidden: Tensor, head: Any, targets: Tensor, transform: LogitTransform) -> Tensor:
    """Return log p(target | hidden state) in nats, (tokens,) float32.

    Args:
        hidden: (tokens, width), after the model's last norm.
        head: the frozen output layer, with weight (vocabulary, width) and optional bias, or a `QuantizedHead`.
        targets: (tokens,) int64.
        transform: what the model does to its logits afterwards.
    """
    return _TokenLogps.apply(hidden, head, targets, transform)


def token_hits(hidden: Tensor, head: Any, targets: Tensor, transform: LogitTransform) -> Tensor:
    """Return `token_logps` and whether each target is the most likely token, 1 or 0: (tokens, 2) float32, no gradient.

    Of several equal logits the first is the most likely, as `argmax` has it.
    """
    hits = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    logps = _read(hidden.detach(), head, targets, transform, hits=hits)
    return torch.stack([logps, hits.float()], -1)
