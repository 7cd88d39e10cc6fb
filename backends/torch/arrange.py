"""Arranging a decoder's layers for training: fused layers, gradient checkpointing, and what packed rows leave out."""

from __future__ import annotations

from typing import Any

import torch

from lite_dil.backends.torch import fused as torch_fused
from lite_dil.backends.torch import layers as torch_layers
from lite_dil.backends.torch.lora import Switch
from lite_dil.backends.torch.offload import ActivationOffload
from lite_dil.base.errors import UserError


def arrange(
    decoder: Any, model: str, mode: str, fused: torch.dtype | None, switch: Switch, offload: bool = False
) -> tuple[int, ActivationOffload | None]:
    """Install the fused layers and gradient checkpointing.

    Args:
        model: its name and class, for messages.
        mode: "off", "selective" or "full".
        fused: the type in which the decoder computes; None keeps its own layers.
        offload: keep the inputs of recomputed layers in the computer's memory.

    Returns:
        The number of the last layer, whose unread positions packed rows skip, or -1; and the store of what is offloaded.
    """
    layers = torch_layers.layers_of(decoder)
    if layers is None and mode != "off":
        raise UserError(f"--gradient-checkpointing {mode}: the layers of {model} are unknown")
    if mode == "selective":
        for layer in layers or ():
            if (mlp := getattr(layer, "mlp", None)) is None:
                name = model.partition(" (")[0]
                raise UserError(f"--gradient-checkpointing selective: a layer of {name} has no MLP; use full")
            torch_layers.checkpoint(mlp, decoder.config, switch)  # replaced by a fused one, if any, which does it better
    if fused is not None:
        torch_fused.install(decoder, fused, mode == "selective")
    if layers is None:
        return -1, None
    last = -1
    if hasattr(decoder, "norm"):
        torch_layers.skip_unread(decoder, layers[-1])
        last = len(layers) - 1
    store = ActivationOffload() if mode == "full" and offload else None
    if mode == "full":
        for layer in layers:
            torch_layers.checkpoint(layer, decoder.config, switch, store)
    return last, store
