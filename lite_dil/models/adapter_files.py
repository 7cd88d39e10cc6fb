"""Adapter files in PEFT's and mlx-lm's formats: read for either backend, and converted exactly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.base import files
from lite_dil.base.errors import UserError
from lite_dil.models import tensors
from lite_dil.models.adapter_config import read_config
from lite_dil.models.adapters import Adapter
from lite_dil.models.spelling import hf_layer, mlx_layer
from lite_dil.models.tensors import Planned

_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)")


TensorLoader = Callable[[Path], dict[str, np.ndarray]]


def read_adapter(folder: str, load: TensorLoader = tensors.load_float32, alone: bool = False) -> Adapter:
    """Read a LoRA adapter in PEFT's or mlx-lm's format.

    Args:
        load: reads a safetensors file; the adapter gets the numeric type that it returns.
        alone: the result of `spelling.text_only` for the base; it decides the layers' names.

    Raises:
        UserError: the folder holds no adapter, one that is not plain LoRA on linear layers, or weights that are not finite.
    """
    path, where = Path(folder), f"adapter {folder}"
    config = read_config(path)
    peft, rank = config.peft, config.rank
    file = path / ("adapter_model.safetensors" if peft else "adapters.safetensors")
    if not file.is_file():
        raise UserError(f"{where}: no {file.name} there")

    layers: dict[str, dict[str, np.ndarray]] = {}
    for key, value in load(file).items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight") if peft else key
        layer, _, side = name.rpartition(".")
        if side.lower() not in ("lora_a", "lora_b") or value.ndim != 2:
            raise UserError(f"{where}: {key} is not the LoRA weight of a linear layer")
        layers.setdefault(layer if peft else hf_layer(layer, alone), {})[side.lower()] = (
            value if peft else np.ascontiguousarray(value.T)
        )
    for layer, sides in layers.items():
        if len(sides) != 2 or sides["lora_a"].shape[0] != rank or sides["lora_b"].shape[1] != rank:
            raise UserError(f"{where}: {layer} lacks a matrix of rank {rank}; expected lora_a and lora_b")
    if not layers:
        raise UserError(f"{where}: it holds no LoRA weights")
    return Adapter(rank, config.scale, {layer: (sides["lora_a"], sides["lora_b"]) for layer, sides in layers.items()})


@dataclass(frozen=True)
class Files:
    """An adapter as it is saved: `code` is its safetensors dtype; bfloat16 is kept as raw bits."""

    adapter: Adapter
    code: str
    dropout: float


def format_of(folder: Path) -> str:
    """Return an adapter folder's format, "peft" or "mlx-lm"."""
    return "peft" if read_config(folder).peft else "mlx-lm"


def read_files(folder: Path, alone: bool = False) -> Files:
    """Read an adapter's folder. Raises UserError as `read_adapter` does."""
    codes: set[str] = set()

    def load(path: Path) -> dict[str, np.ndarray]:
        stored = tensors.read_finite(path)
        codes.update(tensor.code for tensor in stored.values())
        # float32 holds the numbers of mixed types exactly.
        return {name: t.raw() if len(codes) == 1 else t.float32() for name, t in stored.items()}

    adapter = read_adapter(str(folder), load, alone)
    return Files(adapter, codes.pop() if len(codes) == 1 else "F32", read_config(folder).dropout)


def float_adapter(files: Files, strength: float = 1.0) -> Adapter:
    """Return the adapter in float32, with its scale multiplied by `strength`."""
    weights = {
        layer: (tensors.to_float32(a, files.code), tensors.to_float32(b, files.code))
        for layer, (a, b) in files.adapter.weights.items()
    }
    return Adapter(files.adapter.rank, files.adapter.scale * strength, weights)


def write_peft(folder: Path, files: Files, strength: float, model: str, targets: dict[str, list[str]]) -> None:
    """Write PEFT's format.

    Args:
        model: the base model's name.
        targets: PEFT's options that select exactly the adapted layers.
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
        **targets,
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


def write_mlx(folder: Path, files: Files, strength: float, model: str, layers: int, alone: bool = False) -> None:
    """Write mlx-lm's format.

    Args:
        model: the base model's name.
        layers: the model's number of layers; mlx-lm takes -1 for all.
        alone: as in `read_adapter`.

    Raises:
        UserError: a layer lies outside the model's blocks, where mlx-lm puts no adapter.
    """
    adapter = files.adapter
    found = {layer: _BLOCK.search(layer) for layer in adapter.weights}
    if outside := [layer for layer, match in found.items() if match is None]:
        raise UserError(f"--to mlx-lm: {outside[0]} lies outside the model's layers, where mlx-lm puts no adapter")
    config = {
        "fine_tune_type": "lora",
        "num_layers": layers,
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": adapter.scale * strength,
            "dropout": files.dropout,
            # For layers that lack some of these, mlx-lm adds adapters that do nothing: B starts at 0.
            "keys": sorted({match.group(2) for match in found.values() if match}),
        },
        "model": model,
    }
    sides = {
        f"{mlx_layer(layer, alone)}.lora_{side}": array.T
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
    """Return the alpha from which PEFT computes exactly `scale`, and whether it divides by the root of the rank (rsLoRA).

    In floating point not every scale is some alpha divided by the rank; one that came from the root is reached by the root.
    """
    for root in (False, True):
        divisor = rank**0.5 if root else rank
        alpha = scale * divisor
        for value in (round(alpha), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)):
            if value / divisor == scale:
                return value, root
    return scale * rank, False
