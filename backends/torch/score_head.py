"""A head that maps hidden states to numbers: float32 whatever the model computes in, and zero at first."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from lite_dil.backends.types import END, Head
from lite_dil.base.errors import UserError
from lite_dil.base.files import write
from lite_dil.base.formats import HEAD, KEY, check_format

WEIGHTS, CONFIG = "head.safetensors", "head.json"


def has_head(folder: Path) -> bool:
    """Whether a head was saved there."""
    return (folder / CONFIG).is_file()


class ScoreHead(nn.Module):
    """``W h + b`` for hidden states h; see `lite_dil.backends.types.Head`.

    Args:
        width: of a hidden state.
    """

    def __init__(self, head: Head, width: int, device: torch.device) -> None:
        super().__init__()
        self.spec = head
        self.weight = nn.Parameter(torch.zeros(head.outputs, width, device=device))
        self.bias = nn.Parameter(torch.zeros(head.outputs, device=device))

    def forward(self, hidden: Tensor) -> Tensor:
        """Return (n, outputs) float32 for (n, width)."""
        return F.linear(hidden.float(), self.weight, self.bias)

    @property
    def at_end(self) -> bool:
        """Whether it reads the last token of each response alone."""
        return self.spec.at == END

    def save(self, folder: Path) -> None:
        """Write the weights, and a JSON file that says what they are."""
        save_file({name: value.detach().contiguous() for name, value in self.named_parameters()}, folder / WEIGHTS)
        write(folder / CONFIG, json.dumps(self._described(), indent=2) + "\n")

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Take the weights that `save` wrote. Raises UserError where they are of another kind of head."""
        try:
            described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            weights = load_file(folder / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{folder}: its head cannot be read ({error})") from None
        check_format(described, HEAD, f"the head in {folder}")
        if described != self._described():
            raise UserError(f"{folder}: its head is {described}; this one is {self._described()}")
        for name, parameter in self.named_parameters():
            parameter.copy_(weights[name])

    def _described(self) -> dict[str, object]:
        outputs, width = self.weight.shape
        return {KEY: HEAD, "outputs": outputs, "at": self.spec.at, "width": width}
