"""Saving and loading adapters and the state of their training.

    FOLDER/adapters/NAME/adapter_config.json, adapter_model.safetensors    PEFT's format, float32
                         head.json, head.safetensors                       if it has a head
                         optimizer.pt                                      optimiser and loss scale, after the first step
    FOLDER/random.pt                                                       the state of the random generators

Older versions, with one adapter, wrote everything to FOLDER/state.pt, which is still read.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lite_dil.backends.head_files import check_config
from lite_dil.backends.torch.adapters import Trainable
from lite_dil.backends.torch.lora import peft_name
from lite_dil.backends.torch.out_of_memory import Random
from lite_dil.backends.types import POLICY
from lite_dil.base.errors import UserError
from lite_dil.base.files import create, make_folder

ADAPTERS, ADAPTER_WEIGHTS = "adapters", "adapter_model.safetensors"
OPTIMIZER, RANDOM, OLD = "optimizer.pt", "random.pt", "state.pt"


def save_adapter(model: Any, adapter: Trainable, folder: Path) -> None:
    """Write an adapter of a PEFT model, and its head, into `folder`.

    PEFT's own `save_pretrained` writes the same two files, and beside them a model card that is not this library's.
    """
    make_folder(folder)
    weights = {key: weight.detach().contiguous() for key, weight in _by_saved_name(adapter).items()}
    save_file(weights, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = copy(model.peft_config[peft_name(adapter.name)])
    config.inference_mode = True
    config.save_pretrained(folder)
    if adapter.head is not None:
        adapter.head.save(folder)


def save(folder: Path, model: Any, adapters: Mapping[str, Trainable], random: Random) -> None:
    """Write everything needed to resume training; not adapters that were loaded from their own files."""
    for name, adapter in _own(adapters).items():
        own = folder / ADAPTERS / name
        make_folder(own)
        save_adapter(model, adapter, own)
        if (state := adapter.state()) is not None:
            _save(state, own / OPTIMIZER)
    host, device = random
    _save({"rng": host, "cuda_rng": device}, folder / RANDOM)


def load(folder: Path, adapters: Mapping[str, Trainable]) -> Random:
    """Load what `save` wrote; return the random state. Raises UserError if the adapters are different ones."""
    if (folder / OLD).is_file():
        return _load_old(folder, adapters)
    saved, adapters = {path.name for path in (folder / ADAPTERS).iterdir()}, _own(adapters)
    _check_names(folder, saved, adapters)
    for name, adapter in adapters.items():
        own = folder / ADAPTERS / name
        _load_weights(adapter, own)
        check_config(own, adapter.head)
        if adapter.head is not None:
            adapter.head.load(own)
        adapter.set_state(_load(own / OPTIMIZER) if (own / OPTIMIZER).is_file() else None)
    random = _load(folder / RANDOM)
    return random["rng"], random["cuda_rng"]


def _own(adapters: Mapping[str, Trainable]) -> Mapping[str, Trainable]:
    return {name: adapter for name, adapter in adapters.items() if not adapter.loaded}


def _load_old(folder: Path, adapters: Mapping[str, Trainable]) -> Random:
    _check_names(folder, {POLICY}, adapters)
    state, policy = _load(folder / OLD), adapters[POLICY]
    with torch.no_grad():
        for name, parameter in policy.weights.items():
            parameter.copy_(state["adapter"][name])
    policy.set_state(state)
    return state["rng"], state["cuda_rng"]


def _check_names(folder: Path, saved: set[str], adapters: Mapping[str, Trainable]) -> None:
    if saved != set(adapters):
        raise UserError(
            f"{folder} holds the adapters {', '.join(sorted(saved))}; this model has {', '.join(sorted(adapters))}"
        )


@torch.no_grad()
def _load_weights(adapter: Trainable, folder: Path) -> None:
    try:
        saved = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: cannot be read ({error})") from None
    weights = _by_saved_name(adapter)
    if {key: value.shape for key, value in saved.items()} != {key: weight.shape for key, weight in weights.items()}:
        raise UserError(f"{folder}: its adapter has another rank or is on other layers than this model's")
    for key, weight in weights.items():
        weight.copy_(saved[key])


def _by_saved_name(adapter: Trainable) -> dict[str, Any]:
    """Return an adapter's weights by their names in a file, which do not have the adapter's name."""
    ending = f".{peft_name(adapter.name)}.weight"
    return {f"{name.removesuffix(ending)}.weight": weight for name, weight in adapter.weights.items()}


def _save(state: dict[str, Any], path: Path) -> None:
    with create(path) as file:
        torch.save(state, file)


def _load(path: Path) -> dict[str, Any]:
    # To the CPU first: the optimiser moves what belongs on the device.
    return torch.load(path, map_location="cpu", weights_only=True)
