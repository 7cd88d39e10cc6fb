"""LoRA adapters as plain arrays, read from PEFT's format or mlx-lm's, so that either backend goes on from either."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.base.errors import UserError
from lite_dil.models.options import AdapterOptions


@dataclass(frozen=True)
class Adapter:
    """``W x + scale B A x`` for each named linear layer.

    `weights` maps a layer's name in the model, as ``model.layers.0.self_attn.q_proj``, to A (rank, in) and B (out, rank),
    float32.
    """

    rank: int
    scale: float
    weights: dict[str, tuple[np.ndarray, np.ndarray]]


def fresh(shapes: dict[str, tuple[int, int]], rank: int, scale: float, seed: int, own_name: str = "") -> Adapter:
    """Return a new adapter for layers of the given (out, in) shapes: A uniform in +-1/sqrt(in), B zero, as PEFT and mlx-lm do.

    Drawn by numpy from the seed, the layer's name and its own name, so that every backend starts from the same numbers.

    Args:
        own_name: the adapter's; nothing for the policy's.
    """
    weights, own = {}, [zlib.crc32(own_name.encode())] if own_name else []
    for name, (outputs, inputs) in shapes.items():
        bound = 1 / np.sqrt(inputs)
        draw = np.random.default_rng([seed, zlib.crc32(name.encode()), *own])
        a = draw.uniform(-bound, bound, (rank, inputs)).astype(np.float32)
        weights[name] = (a, np.zeros((outputs, rank), np.float32))
    return Adapter(rank, scale, weights)


TensorLoader = Callable[[Path], dict[str, np.ndarray]]


def read(folder: str, load: TensorLoader) -> Adapter:
    """Read a LoRA adapter in PEFT's or mlx-lm's format.

    Args:
        load: the backend's reader of a safetensors file, to float32 (numpy alone knows no bfloat16).

    Raises:
        UserError: the folder holds no adapter, or one that is more than plain LoRA on linear layers.
    """
    path, where = Path(folder), f"adapter {folder}"
    config_file = path / "adapter_config.json"
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{where}: no adapter_config.json there; give a folder that holds an adapter") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: adapter_config.json cannot be read ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{where}: adapter_config.json is not a LoRA adapter's")
    try:
        peft = "peft_type" in config
        rank, scale = _peft_scale(config, where) if peft else _mlx_scale(config, where)
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: adapter_config.json is not a LoRA adapter's ({error!r})") from None
    tensors = path / ("adapter_model.safetensors" if peft else "adapters.safetensors")
    if not tensors.is_file():
        raise UserError(f"{where}: no {tensors.name} there")

    layers: dict[str, dict[str, np.ndarray]] = {}
    for key, value in load(tensors).items():
        name = key.removeprefix("base_model.model.").removesuffix(".weight") if peft else key
        layer, _, side = name.rpartition(".")
        if side.lower() not in ("lora_a", "lora_b") or value.ndim != 2:
            raise UserError(f"{where}: {key} is not the LoRA weight of a linear layer")
        layers.setdefault(layer, {})[side.lower()] = value if peft else np.ascontiguousarray(value.T)
    for layer, sides in layers.items():
        if len(sides) != 2 or sides["lora_a"].shape[0] != rank or sides["lora_b"].shape[1] != rank:
            raise UserError(f"{where}: {layer} has not both matrices of rank {rank}")
    if not layers:
        raise UserError(f"{where}: it holds no LoRA weights")
    return Adapter(rank, scale, {layer: (sides["lora_a"], sides["lora_b"]) for layer, sides in layers.items()})


# Options of PEFT that make more of an adapter than W x + scale B A x on linear layers.
_PEFT_VARIANTS = (
    "alora_invocation_tokens",
    "alpha_pattern",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "monteclora_config",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_qalora",
    "velora_config",
)


def _peft_scale(config: dict[str, Any], where: str) -> tuple[int, float]:
    refused = {name: config.get(name) for name in _PEFT_VARIANTS} | {
        "peft_type": config["peft_type"] != "LORA",
        "bias": config.get("bias", "none") != "none",
        # Others (pissa, olora, ...) rewrite the base weights, so that "adapter off" would no longer be the base model.
        "init_lora_weights": config.get("init_lora_weights") not in (None, True, False, "gaussian", "eva", "orthogonal"),
    }
    for name, bad in refused.items():
        if bad:
            raise UserError(f"{where}: {name} = {config[name]!r} is not supported; plain LoRA is")
    rank = config["r"]
    return rank, config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)


def _mlx_scale(config: dict[str, Any], where: str) -> tuple[int, float]:
    if config.get("fine_tune_type", "lora") != "lora":
        raise UserError(f"{where}: fine_tune_type = {config['fine_tune_type']!r} is not supported; lora is")
    parameters = config["lora_parameters"]
    return parameters["rank"], float(parameters["scale"])


def choose(options: AdapterOptions, linear: dict[str, tuple[int, int]], initial: Adapter | None, model: str) -> Adapter:
    """Return the adapter that training starts from: `initial`, if it fits the model, or a new one on the target layers.

    Args:
        linear: the (out, in) shapes of the decoder's linear layers, by name.
        model: the base, for messages.
    """
    if not linear:
        raise UserError(f"--model {model}: its decoder has no linear layers that LoRA could adapt")
    if initial is not None:
        match(initial, linear, options.init_adapter or "")
        return initial
    assert options.lora_r and options.lora_alpha and options.target_modules  # filled in by ResolvedConfig.resolved
    targets = select_targets(linear, options.target_modules)
    return fresh(targets, options.lora_r, options.lora_alpha / options.lora_r, options.seed)


def match(adapter: Adapter, shapes: dict[str, tuple[int, int]], folder: str) -> None:
    """Raise UserError unless every layer of the adapter is a linear layer of the model with the right shape."""
    for name, (a, b) in adapter.weights.items():
        if name not in shapes:
            raise UserError(f"adapter {folder}: the model has no adaptable linear layer {name}; is it another model's?")
        if (b.shape[0], a.shape[1]) != shapes[name]:
            raise UserError(
                f"adapter {folder}: {name} is for {b.shape[0]} x {a.shape[1]} weights, the model's are "
                f"{shapes[name][0]} x {shapes[name][1]}; is it another model's?"
            )


def select_targets(shapes: dict[str, tuple[int, int]], targets: str) -> dict[str, tuple[int, int]]:
    """Return the layers that ``--target-modules`` names: ``all-linear``, or the last parts of their names."""
    if targets == "all-linear":
        return shapes
    wanted = {name.strip() for name in targets.split(",")}
    present = {name.rpartition(".")[2] for name in shapes}
    if unknown := wanted - present:
        raise UserError(
            f"--target-modules: the model's decoder has no linear layer {', '.join(map(repr, sorted(unknown)))}; "
            f"it has {', '.join(sorted(present))} (the output head stays frozen)"
        )
    return {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] in wanted}
