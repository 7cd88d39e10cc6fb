"""A head that maps hidden states to numbers: always float32, and initially zero."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lite_dil.backends.head_files import HEAD_WEIGHTS, write_config
from lite_dil.backends.types import END, Head
from lite_dil.base.errors import UserError


class ScoreHead(nn.Module):
    """``W h + b`` for hidden states h; see `lite_dil.backends.types.Head`.

    Args:
        width: the width of a hidden state.
    """

    def __init__(self, head: Head, width: int, device: torch.device) -> None:
        super().__init__()
        self.spec, self.width = head, width
        self.weight = nn.Parameter(torch.zeros(head.outputs, width, device=device))
        self.bias = nn.Parameter(torch.zeros(head.outputs, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (n, outputs) float32 for (n, width)."""
        return F.linear(hidden.float(), self.weight, self.bias)

    @property
    def at_end(self) -> bool:
        """Whether it reads only the last token of each response."""
        return self.spec.at == END

    def save(self, folder: Path) -> None:
        """Write the weights, and a JSON file that describes them."""
        save_file({name: value.detach().contiguous() for name, value in self.named_parameters()}, folder / HEAD_WEIGHTS)
        write_config(folder, self)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Load the weights that `save` wrote. Raises UserError if they cannot be read or are of another head."""
        try:
            weights = load_file(folder / HEAD_WEIGHTS)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / HEAD_WEIGHTS} cannot be read ({error})") from None
        shapes, saved = (
            {name: tuple(value.shape) for name, value in each} for each in (self.named_parameters(), weights.items())
        )
        if saved != shapes:  # copy_ would repeat a single row
            raise UserError(f"{folder / HEAD_WEIGHTS} cannot be read: it holds {saved}; this head is {shapes}")
        for name, parameter in self.named_parameters():
            parameter.copy_(weights[name])
