"""Log-probs of chosen tokens from hidden states, in chunks, so that [tokens, vocabulary] is never held whole."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from lite_dil.backends.limits import MLX_CHUNK, chunk_tokens
from lite_dil.models.logits import LogitTransform


def token_logps(
    hidden: mx.array,
    project: Callable[[mx.array], mx.array],
    targets: mx.array,
    vocabulary: int,
    transform: LogitTransform,
    with_grad: bool,
) -> mx.array:
    """Return log p(target | hidden state) in nats, float32.

    Args:
        hidden: (tokens, width), after the model's last norm.
        project: the frozen output head, from (n, width) to (n, vocabulary).
        targets: (tokens,) integers.
        with_grad: compute d logp / d hidden, (tokens, width), along with the values, so that backward is a multiplication.
    """
    return _in_chunks(
        hidden, targets, vocabulary, lambda chunk, some: _chunk(chunk, project, some[:, None], transform, with_grad)
    )


def token_hits(
    hidden: mx.array,
    project: Callable[[mx.array], mx.array],
    targets: mx.array,
    vocabulary: int,
    transform: LogitTransform,
) -> mx.array:
    """Return `token_logps` and whether each target is the most likely token, 1 or 0: (tokens, 2) float32, no gradient."""

    def chunk(hidden: mx.array, targets: mx.array) -> mx.array:
        logits = _logits(hidden, project, transform)
        logps = mx.take_along_axis(logits, targets[:, None], -1)[:, 0] - mx.logsumexp(logits, -1)
        return mx.stack([logps, (logits.argmax(-1) == targets).astype(mx.float32)], -1)

    return _in_chunks(hidden, targets, vocabulary, chunk)


def _in_chunks(
    hidden: mx.array, targets: mx.array, vocabulary: int, work: Callable[[mx.array, mx.array], mx.array]
) -> mx.array:
    """Return the results of `work`, for some hidden states and targets at a time."""
    size = chunk_tokens(vocabulary, MLX_CHUNK)
    parts: list[mx.array] = []
    for start in range(0, len(targets), size):
        chunk = hidden[start : start + size]
        if parts:  # else MLX may run chunks at the same time, and hold the logits of all of them
            (chunk,) = mx.depends([chunk], [parts[-1]])
        parts.append(work(chunk, targets[start : start + size]))
    return mx.concatenate(parts)


def _logits(hidden: mx.array, project: Callable[[mx.array], mx.array], transform: LogitTransform) -> mx.array:
    """Return the logits, float32, with what the model does to them."""
    logits = project(hidden).astype(mx.float32)
    if transform.scale != 1.0:
        logits = logits * transform.scale
    if transform.cap:
        logits = transform.cap * mx.tanh(logits / transform.cap)
    return logits


def _chunk(
    hidden: mx.array, project: Callable[[mx.array], mx.array], targets: mx.array, transform: LogitTransform, with_grad: bool
) -> mx.array:
    def logits_of(hidden: mx.array) -> mx.array:
        return _logits(hidden, project, transform)

    def logps_of(logits: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        # logsumexp and softmax from one exp, which is slow in MLX on a CPU
        logits = logits - logits.max(-1, keepdims=True)
        powers = mx.exp(logits)
        total = powers.sum(-1, keepdims=True)
        return (mx.take_along_axis(logits, targets, -1) - mx.log(total))[:, 0], powers, total

    if not with_grad:
        return logps_of(logits_of(hidden))[0]

    @mx.custom_function
    def value_and_slope(hidden: mx.array) -> tuple[mx.array, mx.array]:
        values, powers, total = logps_of(logits_of(hidden))
        # d logp / d logits = onehot(target) - softmax(logits), and a token's log-prob depends on its own hidden state only.
        slope = mx.put_along_axis(powers * (-1 / total), targets, 1 - mx.exp(values[:, None]), -1)
        _, (slope,) = mx.vjp(logits_of, [hidden], [slope])
        (values,) = mx.depends([values], [slope])  # so that the next chunk waits for all of this one
        return values, slope

    @value_and_slope.vjp
    def backward(primal: mx.array, cotangents: tuple[mx.array, mx.array], outputs: tuple[mx.array, mx.array]) -> mx.array:
        return (cotangents[0][:, None] * outputs[1]).astype(outputs[1].dtype)

    return value_and_slope(hidden)[0]
