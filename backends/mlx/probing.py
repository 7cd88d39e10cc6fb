"""Testing a model on a few tokens before training, which shows what no config tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from lite_dil.backends.foreign import Misfit, foreign
from lite_dil.backends.probes import compare_head, head_probe
from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch


def check_head(model: Any, logps: Callable[[Batch], np.ndarray], vocabulary: int, name: str, dtype_name: str) -> None:
    """Compare with the model's own logits, so that an unknown architecture is not trained wrongly.

    Args:
        logps: computes the log-probs of a batch's tokens from hidden states.
    """
    batch = head_probe(vocabulary)
    ids = np.concatenate([*batch.prompts, *batch.responses])
    try:
        logits = foreign(model, mx.array(ids[None, :-1]))[0].astype(mx.float32)
        here = logps(batch)
    except Misfit as error:
        raise UserError(
            f"--model {name}: mlx-lm builds this architecture in a way that lite-dil does not know: {error}; "
            "take another --backend"
        ) from None
    compare_head(name, log_probs(logits, mx.array(ids[1:])), here, dtype_name)


def log_probs(logits: mx.array, targets: mx.array) -> np.ndarray:
    """Return the log-probs of targets, (tokens,), from whole logits, (tokens, vocabulary)."""
    logps = logits - mx.logsumexp(logits, -1, keepdims=True)
    return np.array(mx.take_along_axis(logps, targets[:, None], -1)[:, 0])
