"""Heads: a few numbers from hidden states, on an adapter of their own."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lite_dil.backends.mlx.lora import times
from lite_dil.backends.types import EACH, END, Head
from lite_dil.batching.layouts import Layout


class ScoreHead(nn.Module):
    """``W h`` in float32, W (outputs, width), at first 0."""

    def __init__(self, spec: Head, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = mx.zeros((spec.outputs, width))

    def __call__(self, states: mx.array) -> mx.array:
        """Return (states, outputs) float32 from (states, width)."""
        return times(states, self.weight.T)


def check_head(spec: Head | None) -> None:
    """Raise ValueError for a head that there is not."""
    if spec is not None and (spec.outputs < 1 or spec.at not in (END, EACH)):
        raise ValueError(f"{spec}: expected at least 1 output, at {END!r} or {EACH!r}")


def states_read(spec: Head, layout: Layout) -> np.ndarray:
    """Return the flat indices of the hidden states that a head reads: (responses,) or (tokens,)."""
    if spec.at == EACH:
        return layout.own_index
    return layout.own_index[layout.token_mask.sum(1).astype(np.int64).cumsum() - 1]
