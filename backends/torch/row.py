"""The packed row being computed, and the attention scores' settings: shared by the CPU's attention and CUDA's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lite_dil.batching.layouts import Packed, Segment


class Unsupported(Exception):
    """A packed row cannot be computed: the model's attention is of another kind, or the machine lacks a requirement."""


class Scores(NamedTuple):
    """How a query's product with a key is scaled, capped by ``cap * tanh(s / cap)``, and limited to a window."""

    scale: float
    cap: float
    window: int | None


@dataclass
class PackedRow:
    """What the layers need to know about the row being computed.

    Attributes:
        read: (n,) the positions whose last-layer output is read: those of `index`, each once.
        index: (n,) the positions of the hidden states that the decoder returns.
        longest: the number of tokens of its longest sequence.
        last_layer: the number of the model's last layer, in which only the last token of a prompt is read.
        masks: FlexAttention's masks, by window.
    """

    segments: tuple[Segment, ...]
    read: Tensor
    index: Tensor
    position_ids: Tensor
    longest: int
    last_layer: int
    masks: dict[int | None, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(cls, layout: Packed, device: torch.device, last_layer: int = -1, wanted: np.ndarray | None = None) -> PackedRow:
        """Put a layout on the device; `wanted` are the hidden states to read, by default those that predict."""
        index = torch.from_numpy(layout.hidden_index if wanted is None else wanted)
        longest = max(segment.prompt + max(segment.responses, default=0) for segment in layout.segments)
        positions = torch.from_numpy(layout.position_ids).to(device)
        return cls(layout.segments, torch.unique(index).to(device), index.to(device), positions, longest, last_layer)
