"""Heads: a few numbers from hidden states; each belongs to an adapter."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lite_dil.backends.mlx.lora import times
from lite_dil.backends.types import EACH, Head
from lite_dil.batching.layouts import Layout


class ScoreHead(nn.Module):
    """``W h + b`` in float32, W (outputs, width) and b (outputs,), initially 0."""

    def __init__(self, spec: Head, width: int) -> None:
        super().__init__()
        self.spec, self.width = spec, width
        self.weight = mx.zeros((spec.outputs, width))
        self.bias = mx.zeros((spec.outputs,))

    def __call__(self, states: mx.array) -> mx.array:
        """Return (states, outputs) float32 from (states, width)."""
        return times(states, self.weight.T) + self.bias


def states_read(spec: Head, layout: Layout) -> np.ndarray:
    """Return the flat indices of the hidden states that a head reads: (responses,) or (tokens,)."""
    return layout.own_index if spec.at == EACH else layout.own_index[layout.end_index]
