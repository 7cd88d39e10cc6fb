"""How PEFT names and selects layers, where that is not as the model has them."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig

_FUSED = ("gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # PEFT's names of the parts of fused experts


def targets_of(base: Any, wanted: set[str]) -> dict[str, list[str]]:
    """Return PEFT's options that select exactly the wanted layers: `target_modules` and, where needed, `target_parameters`.

    Modules have their shortest names, the last parts if they suffice. PEFT takes layers with some names for parts of experts
    that transformers fuses, also where they are none (the dense layers of DeepSeek V3), and drops them; such a layer is
    selected by its weight.
    """
    by_weight = _taken_for_experts(base, wanted)
    by_name = wanted - by_weight
    suffixes = {name.rpartition(".")[2] for name in by_name}
    names = [name for name, _ in base.named_modules()] + getattr(base, "dropped", [])
    matched = {name for name in names if name.rpartition(".")[2] in suffixes}
    found = {"target_modules": sorted(suffixes if matched == by_name else by_name)}
    return found | ({"target_parameters": sorted(f"{name}.weight" for name in by_weight)} if by_weight else {})


def _taken_for_experts(base: Any, names: set[str]) -> set[str]:
    """Return those of the layers' names that PEFT, from 0.19 on, drops from `target_modules`."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert
    except ImportError:
        return set()
    config = LoraConfig(target_modules=[*names, *_FUSED])  # all parts of a fused weight, without which it raises an error
    convert(config, model=base, conversions=None)
    return names - set(config.target_modules or ())


def reloadable(base: Any, linear: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Return those of the layers whose adapter PEFT finds again in a saved file.

    From 0.19 on it applies transformers' changes of weights' names to adapters too, also to names that need none: it would
    look for Laguna's `shared_experts` under a name that no layer has, and warn at most.
    """
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers as convert
    except ImportError:
        return linear
    keys = {f"base_model.model.{name}.lora_A.weight": name for name in linear}
    found = convert(base, LoraConfig(target_modules=list(linear)), {key: torch.zeros(1, 1) for key in keys})
    return {name: linear[name] for key, name in keys.items() if key in found}
