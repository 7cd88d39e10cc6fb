"""One step of a backend, and the adapter that it leaves, under names that both backends share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from conftest import batch, criterion, load, one_step

from lite_dil.batching.batch import Batch


def step(backend: Any, batches: list[Batch], rate: float = 1e-2, **changes: object) -> Any:
    return one_step(backend, batches, criterion(**changes), rate)


def adapter(backend: Any) -> dict[str, np.ndarray]:
    """The policy's weights under common names: layer.a (in, r) and layer.b (r, out)."""
    if backend.name == "mlx":
        from mlx.utils import tree_flatten

        return {name: np.array(value) for name, value in tree_flatten(backend.model.trainable_parameters())}
    named = {}
    for name, value in backend.adapters["policy"].weights.items():
        name = name.removeprefix("base_model.model.").replace(".default.weight", "")
        named[name.replace("lora_A", "lora_a").replace("lora_B", "lora_b")] = value.detach().numpy().T.copy()
    return named


def saved_adapter(name: str, model: str, folder: Path) -> Any:
    """Save an adapter that does something; return the backend that has it."""
    backend = load(name, model)
    one_step(backend, [batch()], criterion(), 0.05)
    folder.mkdir()
    backend.save_adapter(folder)
    return backend
