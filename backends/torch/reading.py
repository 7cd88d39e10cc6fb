"""Reading a loss's inputs from a model: log-probs of the response tokens, their sums, or a head's scores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lite_dil.backends.limits import FLEX_BLOCK
from lite_dil.backends.torch import packed_attention
from lite_dil.backends.torch.head import token_hits, token_logps
from lite_dil.backends.torch.row import PackedRow
from lite_dil.backends.torch.score_head import ScoreHead
from lite_dil.batching.batch import Batch
from lite_dil.batching.layouts import Layout, Packed, Plain, packed, plain
from lite_dil.models.logits import LogitTransform
from lite_dil.objectives.loss import SUMS


def ends_of(layout: Plain | Packed) -> np.ndarray:
    """Return the indices of the states of each response's last token, (responses,)."""
    return layout.own_index[layout.end_index]


class StateReader:
    """Lays out batches and reads a decoder's hidden states with the active adapter.

    Args:
        head: the output head or its replacement.
        transform: what the model applies to its logits.

    Attributes:
        layout: "plain" or "packed".
        last_layer: the number of the last layer, whose unread positions a packed row skips; -1 if layers are unknown.
    """

    def __init__(self, decoder: Any, head: Any, transform: LogitTransform, device: torch.device) -> None:
        self.decoder, self.head, self.transform, self.device = decoder, head, transform, device
        self.layout, self.last_layer = "plain", -1

    def logps(self, batch: Batch, what: str) -> Tensor:
        """Return summed log-probs, (responses,), or one per response token, (tokens,)."""
        hidden, layout = self.states(batch, lambda layout: layout.hidden_index)
        logps = token_logps(hidden, self.head, self.tensor(layout.targets), self.transform)
        if what != SUMS:
            return logps
        # A gather and a sum over rows, not index_add, fix the order of additions: equal log-probs give bitwise equal sums.
        return (logps[self.tensor(layout.token_index)] * self.tensor(layout.token_mask)).sum(-1)

    def hits(self, batch: Batch) -> Tensor:
        """Return the log-prob of each response token and whether it is the most likely one, (tokens, 2)."""
        hidden, layout = self.states(batch, lambda layout: layout.hidden_index)
        return token_hits(hidden, self.head, self.tensor(layout.targets), self.transform)

    def scores(self, batch: Batch, head: ScoreHead) -> Tensor:
        """Return a head's outputs, (responses, outputs) or (tokens, outputs)."""

        return head(self.states(batch, ends_of if head.at_end else lambda layout: layout.own_index)[0])

    def tensor(self, array: np.ndarray) -> Tensor:
        """Put an array on the device."""
        return torch.from_numpy(array).to(self.device)

    def states(self, batch: Batch, index: Callable[[Plain | Packed], np.ndarray]) -> tuple[Tensor, Layout]:
        """Return the hidden states after the last norm at `index`, (n, width), and the layout."""
        if self.layout == "plain":
            repeated = plain(batch)
            output = self.decoder(input_ids=self.tensor(repeated.input_ids), use_cache=False)
            return output.last_hidden_state.flatten(0, 1)[self.tensor(index(repeated))], repeated
        in_row = packed(batch, multiple=FLEX_BLOCK if self.device.type == "cuda" else 1)
        row = PackedRow.of(in_row, self.device, self.last_layer, index(in_row))
        ids = self.tensor(in_row.input_ids)
        with packed_attention.computing(self.decoder.config, row):
            output = self.decoder(input_ids=ids, position_ids=row.position_ids, use_cache=False)
        return output.last_hidden_state[0], in_row  # those of the row's index
