"""What the torch backend does where memory runs out."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from lite_dil.base.errors import OutOfMemory, first_line

T = TypeVar("T")
Random = tuple[Tensor, Tensor | None]  # the states of the host's generator and of the GPU's


def whole(work: str, device: torch.device, run: Callable[[], T]) -> T:
    """Return what `run` returns; where memory ends in it, raise OutOfMemory with nothing of it held any more."""
    try:
        return run()
    except torch.OutOfMemoryError as error:
        detail = first_line(error)
    # Not in the except block: as this error's context, that one would keep its frames, and with them all activations.
    free(device)
    raise OutOfMemory(work, detail)


def free(device: torch.device) -> None:
    """Give back what nobody holds, garbage in cycles too."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def random_state(device: torch.device) -> Random:
    """Return the state of the generators that dropout draws from."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if device.type == "cuda" else None


def set_random_state(state: Random) -> None:
    """Go back to what `random_state` returned."""
    host, device = state
    torch.set_rng_state(host)
    if device is not None:
        torch.cuda.set_rng_state(device)
