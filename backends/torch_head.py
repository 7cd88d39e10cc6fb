"""Log-probs of chosen tokens from hidden states, in chunks, so that [tokens, vocabulary] is never held whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lite_dil.backends.head import LogitTransform, chunk_tokens

CHUNK_ELEMENTS = 2**24  # 64 MiB of float32 logits


class _TokenLogps(torch.autograd.Function):
    """Forward also computes d logp / d hidden, (tokens, hidden): backward is then a multiplication, with no second pass
    through the head and no gradient for the frozen weight."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, transform: LogitTransform
    ) -> Tensor:
        needs_grad = hidden.requires_grad
        logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        grads = torch.empty_like(hidden) if needs_grad else None
        size = chunk_tokens(len(weight), CHUNK_ELEMENTS)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            target = targets[part, None]
            logits = torch.nn.functional.linear(hidden[part], weight, bias).float()
            slope = None
            if transform.scale != 1.0:
                logits.mul_(transform.scale)
            if transform.cap:
                logits.div_(transform.cap).tanh_()
                slope = 1 - logits.square() if needs_grad else None
                logits.mul_(transform.cap)
            normaliser = logits.logsumexp(-1, keepdim=True)
            logps[part] = (logits.gather(-1, target) - normaliser)[:, 0]
            if grads is not None:
                # d logp / d logits = onehot(target) - softmax(logits)
                grad = logits.sub_(normaliser).exp_().neg_()
                grad.scatter_add_(-1, target, torch.ones_like(target, dtype=torch.float32))
                if slope is not None:
                    grad.mul_(slope)
                if transform.scale != 1.0:
                    grad.mul_(transform.scale)
                grads[part] = grad.to(weight.dtype) @ weight
        if grads is not None:
            ctx.save_for_backward(grads)
        return logps

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grads,) = ctx.saved_tensors
        return (grad_outputs[0][:, None] * grads).to(grads.dtype), None, None, None, None


def token_logps(hidden: Tensor, head: torch.nn.Module, targets: Tensor, transform: LogitTransform) -> Tensor:
    """Return log p(target | hidden state) in nats, float32.

    Args:
        hidden: (tokens, width), after the model's last norm.
        head: the frozen output layer, weight (vocabulary, width) and perhaps a bias.
        targets: (tokens,) int64.
        transform: what the model does to its logits afterwards.
    """
    return _TokenLogps.apply(hidden, head.weight, getattr(head, "bias", None), targets, transform)
