"""Log-probs of chosen tokens from hidden states, in chunks, so that [tokens, vocabulary] is never held whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lite_dil.backends.limits import HEAD_TILE, TORCH_CHUNK, chunk_tokens
from lite_dil.models.logits import LogitTransform


class QuantizedHead(nn.Module):
    """A frozen output head in 8 or 4 bits (bitsandbytes' blockwise types), unpacked `HEAD_TILE` tokens at a time."""

    def __init__(self, head: Any, bits: int, dtype: torch.dtype) -> None:
        from bitsandbytes import functional

        super().__init__()
        quantize = functional.quantize_4bit if bits == 4 else functional.quantize_blockwise
        self.unpack = functional.dequantize_4bit if bits == 4 else functional.dequantize_blockwise
        settings = {"blocksize": 64, "quant_type": "nf4"} if bits == 4 else {"blocksize": 64}
        self.bias, self.dtype, self.vocabulary = head.bias, dtype, len(head.weight)
        rows = head.weight.detach().split(HEAD_TILE)
        self.packed = [quantize(part.float().contiguous(), **settings) for part in rows]

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Return the weight (vocabulary, width) piece by piece, each with the tokens it is for."""
        for number, (data, state) in enumerate(self.packed):
            start = number * HEAD_TILE
            yield slice(start, min(start + HEAD_TILE, self.vocabulary)), self.unpack(data, state).to(self.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits, as the layer that this stands for."""
        logits = torch.cat([F.linear(hidden, weight) for _, weight in self.tiles()], -1)
        return logits if self.bias is None else logits + self.bias


def vocabulary(head: Any) -> int:
    """Return how many tokens the head knows."""
    return head.vocabulary if isinstance(head, QuantizedHead) else len(head.weight)


def _tiles(head: Any) -> Iterator[tuple[slice, Tensor]]:
    """Return the weight in pieces, each with the tokens it is for: one piece where it is not quantised."""
    return head.tiles() if isinstance(head, QuantizedHead) else iter([(slice(0, len(head.weight)), head.weight)])


class _TokenLogps(torch.autograd.Function):
    """Forward also computes d logp / d hidden, (tokens, hidden): backward is then a multiplication, with no second pass
    through the head and no gradient for the frozen weight."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Any, targets: Tensor, transform: LogitTransform) -> Tensor:
        needs_grad = hidden.requires_grad
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grads = torch.empty_like(hidden) if needs_grad else None
        size = chunk_tokens(vocabulary(head), TORCH_CHUNK[hidden.device.type])
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            target = targets[part, None]
            logits = _logits(hidden[part], head)
            slope = None
            if transform.scale != 1.0:
                logits.mul_(transform.scale)
            if transform.cap:
                logits.div_(transform.cap).tanh_()
                slope = 1 - logits.square() if needs_grad else None
                logits.mul_(transform.cap)
            chosen, top = logits.gather(-1, target), logits.amax(-1, keepdim=True)
            weights = logits.sub_(top).exp_()
            mass = weights.sum(-1, keepdim=True)
            logps[part] = (chosen - top - mass.log())[:, 0]
            if grads is not None:
                # d logp / d logits = onehot(target) - softmax(logits), times what the transform adds
                own = slope.gather(-1, target) if slope is not None else 1.0
                if slope is not None:
                    weights.mul_(slope)
                grads[part] = (_rows(head, targets[part]) * own - _back(weights, head) / mass) * transform.scale
        if grads is not None:
            ctx.save_for_backward(grads)
        return logps

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grads,) = ctx.saved_tensors
        return (grad_outputs[0][:, None] * grads).to(grads.dtype), None, None, None


def _logits(hidden: Tensor, head: Any) -> Tensor:
    """Return float32 logits, (tokens, vocabulary)."""
    bias = getattr(head, "bias", None)
    logits = torch.empty(len(hidden), vocabulary(head), dtype=torch.float32, device=hidden.device)
    for rows, weight in _tiles(head):
        logits[:, rows] = F.linear(hidden, weight, None if bias is None else bias[rows])
    return logits


def _back(weights: Tensor, head: Any) -> Tensor:
    """Return ``weights @ W``, (tokens, width) float32, for weights (tokens, vocabulary)."""
    parts = ((weights[:, rows].to(weight.dtype) @ weight).float() for rows, weight in _tiles(head))
    total = next(parts)
    for part in parts:
        total += part
    return total


def _rows(head: Any, targets: Tensor) -> Tensor:
    """Return the targets' rows of the weight, (tokens, width) float32."""
    found: Any = 0.0
    for rows, weight in _tiles(head):
        here = (targets >= rows.start) & (targets < rows.stop)
        found = found + weight[(targets - rows.start).clamp(0, len(weight) - 1)].float() * here[:, None]
    return found


def token_logps(hidden: Tensor, head: Any, targets: Tensor, transform: LogitTransform) -> Tensor:
    """Return log p(target | hidden state) in nats, float32.

    Args:
        hidden: (tokens, width), after the model's last norm.
        head: the frozen output layer, weight (vocabulary, width) and perhaps a bias, or a `QuantizedHead`.
        targets: (tokens,) int64.
        transform: what the model does to its logits afterwards.
    """
    return _TokenLogps.apply(hidden, head, targets, transform)
