"""PEFT's LoRA on a model of transformers, and the switch between policy and reference."""

from __future__ import annotations

import warnings
from typing import Any

from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from lite_dil.backends.options import LoadOptions
from lite_dil.backends.torch import unsloth as torch_unsloth
from lite_dil.backends.torch.load import linear_layers, set_weights, target_names
from lite_dil.models import adapters

POLICY, REFERENCE = "default", "reference"


class Switch:
    """What all the adapted layers of a model share: whether it is the reference just now, and how strong the policy is.

    Args:
        own_reference: whether the reference is an adapter of its own, and not the bare base.
    """

    def __init__(self, model: Any, own_reference: bool) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self.own_reference = own_reference
        self.scale: float = self.layers[0].scaling[POLICY]
        self.reference, self.strength = False, 1.0

    def set_reference(self, on: bool) -> None:
        """Make the model the reference, or the policy again."""
        # PEFT's own disable_adapter() also rewrites requires_grad and costs 31 ms over 210 layers; this is what it flips.
        self.reference = on
        other = on and self.own_reference
        # A strength of 0 is switched off, not multiplied: 0 * inf would be NaN.
        off = not other and (on or self.strength == 0)
        for layer in self.layers:
            if self.own_reference:
                layer._active_adapter = [REFERENCE if on else POLICY]
            layer._disable_adapters = off

    def set_strength(self, value: float) -> None:
        """Multiply the policy's adapter."""
        self.strength = value
        for layer in self.layers:
            layer.scaling[POLICY] = self.scale * value
        self.set_reference(self.reference)


def add_lora(base: Any, config: LoadOptions, model: str, initial: adapters.Adapter | None, checkpointing: str) -> Any:
    """Put the policy's adapter, and the frozen initial one where it is the reference, on the base.

    Args:
        checkpointing: "off", "selective" or "full", for unsloth, whose layers do it themselves.
    """
    adapter = adapters.choose(config, linear_layers(base), initial, model)
    settings: dict[str, Any] = {
        "r": adapter.rank,
        "lora_alpha": adapter.scale * adapter.rank,
        "target_modules": target_names(base, set(adapter.weights)),
        "bias": "none",
        "task_type": "CAUSAL_LM",
    }
    base.name_or_path = model
    dropout = config.lora_dropout or 0.0
    with warnings.catch_warnings():
        # PEFT 0.21 asks transformers 5 for an attribute by its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        if config.unsloth:
            rank, alpha, targets = (settings[name] for name in ("r", "lora_alpha", "target_modules"))
            adapted = torch_unsloth.adapt(base, rank, alpha, targets, dropout, checkpointing, config.seed)
        else:
            adapted = get_peft_model(base, LoraConfig(**settings, lora_dropout=dropout))
    set_weights(adapted, POLICY, adapter)
    if config.reference == "initial-adapter":
        adapted.add_adapter(REFERENCE, LoraConfig(**settings, inference_mode=True))
        set_weights(adapted, REFERENCE, adapter)
        for name, parameter in adapted.named_parameters():
            parameter.requires_grad_(f".{POLICY}." in name)
    return adapted
