"""Install the fused layers and gradient checkpointing in a model."""

from __future__ import annotations

from typing import Any

import torch

from lite_dil.backends.torch import fused as torch_fused
from lite_dil.backends.torch import layers as torch_layers
from lite_dil.backends.torch.lora import Switch
from lite_dil.backends.torch.offload import ActivationOffload
from lite_dil.base.errors import UserError


def arrange(
    base: Any, decoder: Any, dtype: torch.dtype, mode: str, fused: bool, offload: bool, switch: Switch, model: str
) -> tuple[ActivationOffload | None, int]:
    """Install them; return the store of offloaded activations, if any, and the number of the last layer, -1 if unknown.

    Args:
        mode: of gradient checkpointing: "off", "selective" or "full".
        fused: whether to use the fused layers.
        offload: whether full checkpointing keeps its activations in the computer's memory.
        model: its name, for messages.

    Raises UserError if the model's layers do not allow the mode.
    """
    layers, text = torch_layers.layers_of(decoder), decoder.config
    if layers is None and mode != "off":
        raise UserError(f"--gradient-checkpointing {mode}: the layers of {model} ({type(base).__name__}) are unknown")
    if mode == "selective":
        for layer in layers or ():
            if (mlp := getattr(layer, "mlp", None)) is None:
                raise UserError(f"--gradient-checkpointing selective: a layer of {model} has no MLP; use full")
            torch_layers.checkpoint(mlp, text, switch)  # replaced by a fused one, if any, which does it better
    if fused:
        torch_fused.install(decoder, dtype, mode == "selective")
    if layers is None:
        return None, -1
    last = -1
    if hasattr(decoder, "norm"):
        torch_layers.skip_unread(decoder, layers[-1])
        last = len(layers) - 1
    store = None
    if mode == "full":
        store = ActivationOffload() if offload else None
        for layer in layers:
            torch_layers.checkpoint(layer, text, switch, store)
    return store, last
