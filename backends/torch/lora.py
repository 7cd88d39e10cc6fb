"""PEFT's LoRA on a transformers model, and the switch between adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from lite_dil.backends.torch import unsloth as torch_unsloth
from lite_dil.backends.torch.load import set_weights
from lite_dil.backends.torch.peft_names import targets_of
from lite_dil.backends.types import POLICY, REFERENCE
from lite_dil.models import adapters

PEFT_POLICY, PEFT_REFERENCE = "default", "reference"


def peft_name(name: str) -> str:
    """Return an adapter's name inside PEFT.

    Names get a prefix: PEFT searches for them in the names of weights, where one like "mlp" would match much else.
    """
    return {POLICY: PEFT_POLICY, REFERENCE: PEFT_REFERENCE}.get(name, f"added_{name}")


class Switch:
    """Selects the active adapter of all adapted layers of a model, and the policy's strength.

    Attributes:
        names: each adapter's name inside PEFT, by its own name; None is the bare base.
        on: the name of the active adapter.
    """

    def __init__(self) -> None:
        self.layers: list[LoraLayer] = []
        self.names: dict[str, str | None] = {POLICY: None, REFERENCE: None}
        self.on, self.strength, self.scale = POLICY, 1.0, 1.0

    def add(self, model: Any, name: str) -> None:
        """Register an adapter that is on the model; the active one stays active."""
        self.layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        self.names[name] = peft_name(name)
        if name == POLICY:
            self.scale = self.layers[0].scaling[PEFT_POLICY]
        self._set(self.on)

    def using(self, name: str) -> AbstractContextManager[None]:
        """Activate adapter `name` inside the block, and the previous one after it. Raises KeyError for an unknown name."""
        if name not in self.names:
            raise KeyError(name)
        return self._using(name)

    @contextmanager
    def _using(self, name: str) -> Iterator[None]:
        before = self.on
        if name != before:
            self._set(name)
        try:
            yield
        finally:
            if self.on != before:
                self._set(before)

    def set_strength(self, value: float) -> None:
        """Set the factor on the policy's adapter."""
        self.strength = value
        for layer in self.layers:
            if PEFT_POLICY in layer.scaling:
                layer.scaling[PEFT_POLICY] = self.scale * value
        self._set(self.on)

    def training_mode(self, model: Any, everything: bool) -> None:
        """Switch the adapters' dropout on.

        The base stays in inference mode unless `everything` is asked for: some models add noise in training (Phi-3.5-MoE to
        its routers), with which the log-ratio of a fresh adapter would not be 0.
        """
        model.train(everything)
        for layer in () if everything else self.layers:
            layer.lora_dropout.train()

    def _set(self, name: str) -> None:
        # PEFT's own disable_adapter() also rewrites requires_grad and costs 31 ms over 210 layers; this sets only the switch.
        self.on = name
        inside = self.names[name]
        # A strength of 0 is switched off, not multiplied: 0 * inf would be NaN.
        off = inside is None or (inside == PEFT_POLICY and self.strength == 0)
        for layer in self.layers:
            if inside is not None:
                layer._active_adapter = [inside]
            layer._disable_adapters = off


def add_lora(model: Any, name: str, adapter: adapters.Adapter, dropout: float) -> PeftModel:
    """Add an adapter to the base, next to any that are there."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    settings = {**_settings(adapter), "target_modules": sorted(adapter.weights), "lora_dropout": dropout}
    config = LoraConfig(**settings, inference_mode=name == REFERENCE)
    with warnings.catch_warnings(), _of_no_known_type(base.config):
        # PEFT 0.21 uses an attribute's old name in transformers 5.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        if isinstance(model, PeftModel):
            model.add_adapter(peft_name(name), config)
        else:
            model = get_peft_model(model, config, adapter_name=peft_name(name))
    for option, value in targets_of(base, set(adapter.weights)).items():  # what is saved
        setattr(config, option, value)
    set_weights(model, peft_name(name), adapter)
    return model


@contextmanager
def _of_no_known_type(config: Any) -> Iterator[None]:
    """Hide a model's type from PEFT inside the block, which by some types changes or refuses the given layers.

    See `targets_of`; and it refuses every `out_proj` of a model with Mamba layers, of its attention too.
    """
    config.model_type = "any"
    try:
        yield
    finally:
        del config.model_type


def add_unsloth_lora(base: Any, adapter: adapters.Adapter, dropout: float, checkpointing: str, seed: int) -> Any:
    """Add the policy's adapter to a base loaded by unsloth, whose layers do their own gradient checkpointing.

    Args:
        checkpointing: "off" or "full".
    """
    targets = targets_of(base, set(adapter.weights))["target_modules"]
    model = torch_unsloth.adapt(base, adapter.rank, _settings(adapter)["lora_alpha"], targets, dropout, checkpointing, seed)
    set_weights(model, PEFT_POLICY, adapter)
    return model


def _settings(adapter: adapters.Adapter) -> dict[str, Any]:
    return {"r": adapter.rank, "lora_alpha": adapter.scale * adapter.rank, "bias": "none", "task_type": "CAUSAL_LM"}
