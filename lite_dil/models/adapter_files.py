"""An adapter from PEFT's format to mlx-lm's and back, number for number, without its model."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.base import files
from lite_dil.base.errors import UserError
from lite_dil.models import adapters, tensors
from lite_dil.models.adapters import Adapter
from lite_dil.models.tensors import Planned

FORMATS = ("peft", "mlx-lm")
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Files:
    """An adapter's numbers as they are saved: `code` is their type in safetensors' words, bfloat16 kept as its bits."""

    adapter: Adapter
    code: str
    dropout: float


def format_of(folder: Path) -> str:
    """Return the format of an adapter's folder."""
    return "peft" if adapters.is_peft(adapters.read_config(folder)) else "mlx-lm"


def read(folder: Path) -> Files:
    """Read an adapter's folder. Raises UserError as `lite_dil.models.adapters.read` does."""
    codes: set[str] = set()

    def load(path: Path) -> dict[str, np.ndarray]:
        stored = tensors.read_floats(path)
        codes.update(tensor.code for tensor in stored.values())
        # Of several types the widest holds all numbers exactly.
        return {name: t.raw() if len(codes) == 1 else t.float32() for name, t in stored.items()}

    adapter, config = adapters.read(str(folder), load), adapters.read_config(folder)
    dropout = config.get("lora_dropout") or config.get("lora_parameters", {}).get("dropout") or 0.0
    return Files(adapter, codes.pop() if len(codes) == 1 else "F32", float(dropout))


def float_adapter(files: Files, strength: float = 1.0) -> Adapter:
    """Return the adapter in float32, `strength` in its scale."""
    weights = {
        layer: (tensors.to_float32(a, files.code), tensors.to_float32(b, files.code))
        for layer, (a, b) in files.adapter.weights.items()
    }
    return Adapter(files.adapter.rank, files.adapter.scale * strength, weights)


def write_peft(folder: Path, files: Files, strength: float, model: str, targets: Sequence[str]) -> None:
    """Write PEFT's format.

    Args:
        model: the base model's name.
        targets: names by which PEFT finds exactly the adapted layers.
    """
    adapter = files.adapter
    alpha, root = _alpha(adapter.scale * strength, adapter.rank)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": adapter.rank,
        "lora_alpha": alpha,
        "lora_dropout": files.dropout,
        "target_modules": list(targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "use_rslora": root,
    }
    sides = {
        f"base_model.model.{layer}.lora_{side}.weight": array
        for layer, pair in adapter.weights.items()
        for side, array in zip("AB", pair, strict=True)
    }
    _write(folder, "adapter_model.safetensors", sides, files.code, config, "pt")


def write_mlx(folder: Path, files: Files, strength: float, model: str, layers: int) -> None:
    """Write mlx-lm's format.

    Args:
        model: the base model's name.
        layers: how many layers the model has; mlx-lm takes -1 for all.

    Raises:
        UserError: a layer lies outside of the model's blocks, where mlx-lm puts no adapter.
    """
    adapter = files.adapter
    found = {layer: _BLOCK.search(layer) for layer in adapter.weights}
    if outside := [layer for layer, match in found.items() if match is None]:
        raise UserError(f"--to mlx-lm: {outside[0]} lies outside of the model's layers, where mlx-lm puts no adapter")
    config = {
        "fine_tune_type": "lora",
        "num_layers": layers,
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": adapter.scale * strength,
            "dropout": files.dropout,
            # Where not all layers have all of them, mlx-lm adds ones that do nothing: its B starts at 0.
            "keys": sorted({match.group(2) for match in found.values() if match}),
        },
        "model": model,
    }
    sides = {
        f"{layer}.lora_{side}": array.T
        for layer, pair in adapter.weights.items()
        for side, array in zip("ab", pair, strict=True)
    }
    _write(folder, "adapters.safetensors", sides, files.code, config, "mlx")


def _write(folder: Path, file: str, sides: dict[str, np.ndarray], code: str, config: dict[str, Any], format: str) -> None:
    def pieces(array: np.ndarray) -> Callable[[], list[np.ndarray]]:
        return lambda: [np.ascontiguousarray(array)]

    planned = [Planned(name, code, array.shape, pieces(array)) for name, array in sorted(sides.items())]
    tensors.write(folder / file, planned, format)
    files.write(folder / "adapter_config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _alpha(scale: float, rank: int) -> tuple[float, bool]:
    """Return the alpha of which PEFT makes `scale` again, to the last bit, and whether it divides by the rank's root (rsLoRA).

    Not every number is another one divided by the rank; what PEFT made by the root it makes by the root again.
    """
    for root in (False, True):
        divisor = rank**0.5 if root else rank
        alpha = scale * divisor
        for value in (round(alpha), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)):
            if value / divisor == scale:
                return value, root
    return scale * rank, False
