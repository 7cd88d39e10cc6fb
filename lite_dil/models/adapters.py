"""LoRA adapters as plain arrays, which either backend takes: new ones, and their target layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lite_dil.base.errors import UserError
from lite_dil.base.streams import adapter_stream
from lite_dil.models.options import ALL_LINEAR, AdapterOptions
from lite_dil.models.tensors import core_name

EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # keys of config.json


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: ``W x + scale B A x`` for each named linear layer.

    `weights` maps a layer's name in the model, such as ``model.layers.0.self_attn.q_proj``, to A (rank, in) and B (out, rank),
    float32.
    """

    rank: int
    scale: float
    weights: dict[str, tuple[np.ndarray, np.ndarray]]


def layout(adapter: Adapter) -> tuple[int, float, frozenset[str]]:
    """Return what two adapters must share for one to load the other's weights: rank, scale and layers."""
    return adapter.rank, adapter.scale, frozenset(adapter.weights)


def fresh(shapes: dict[str, tuple[int, int]], rank: int, scale: float, seed: int, adapter: str = "policy") -> Adapter:
    """Return a new adapter for layers of the given (out, in) shapes: A uniform in +-1/sqrt(in), B zero, as PEFT and mlx-lm do.

    numpy draws them from the seed, the layer's name and the adapter's name, so every backend starts from the same numbers.
    """
    weights = {}
    for name, (outputs, inputs) in shapes.items():
        bound = 1 / np.sqrt(inputs)
        a = adapter_stream(seed, name, adapter).uniform(-bound, bound, (rank, inputs)).astype(np.float32)
        weights[name] = (a, np.zeros((outputs, rank), np.float32))
    return Adapter(rank, scale, weights)


def choose(
    options: AdapterOptions,
    linear: dict[str, tuple[int, int]],
    initial: Adapter | None,
    model: str,
    experts: int = 0,
    every: dict[str, tuple[int, int]] | None = None,
) -> Adapter:
    """Return the adapter that training starts from: `initial`, after a check against the model, or a new one.

    Args:
        linear: the (out, in) shapes of the decoder's linear layers that a new adapter may have, by name.
        model: the base model's name, for messages.
        experts: see `select_targets`.
        every: those that an earlier adapter may have, if they are more.
    """
    if not linear:
        raise UserError(f"--model {model}: its decoder has no linear layers that LoRA can adapt")
    if initial is not None:
        return match(initial, every or linear, options.init_adapter or "")
    assert options.lora_r and options.lora_alpha and options.target_modules  # filled in by TrainConfig.resolved
    targets = select_targets(linear, options.target_modules, experts)
    return fresh(targets, options.lora_r, options.lora_alpha / options.lora_r, options.seed)


def match(adapter: Adapter, shapes: dict[str, tuple[int, int]], folder: str) -> Adapter:
    """Return the adapter under the model's own names, which may have other prefixes.

    Raises UserError unless every layer of the adapter is a linear layer of the model with the right shape.
    """
    own = {core_name(name): name for name in shapes}
    adapter = replace(adapter, weights={own.get(core_name(name), name): pair for name, pair in adapter.weights.items()})
    for name, (a, b) in adapter.weights.items():
        if name not in shapes:
            raise UserError(f"adapter {folder}: the model has no adaptable linear layer {name}; is it for another model?")
        if (b.shape[0], a.shape[1]) != shapes[name]:
            raise UserError(
                f"adapter {folder}: {name} is for {b.shape[0]} x {a.shape[1]} weights, the model's are "
                f"{shapes[name][0]} x {shapes[name][1]}; is it for another model?"
            )
    return adapter


def experts_of(config: dict[str, Any]) -> int:
    """Return the number of experts in each mixture layer by a text model's config, 0 for a dense model."""
    return max((n for key in EXPERT_COUNTS if isinstance(n := config.get(key), int)), default=0)


def is_router(name: str, shape: tuple[int, int], experts: int) -> bool:
    """Return whether a linear layer chooses the experts of its mixture: it has an output for each."""
    return bool(experts) and shape[0] == experts and not {"gate", "router"}.isdisjoint(name.split("."))


def select_targets(shapes: dict[str, tuple[int, int]], targets: str, experts: int = 0) -> dict[str, tuple[int, int]]:
    """Return the layers that ``--target-modules`` selects: ``all-linear``, or by the last parts of their names.

    ``all-linear`` leaves out routers of experts, whose small changes send tokens elsewhere; a router can be named.

    Args:
        experts: the number of experts in each mixture layer; see `experts_of`.
    """
    if targets == ALL_LINEAR:
        return {name: shape for name, shape in shapes.items() if not is_router(name, shape, experts)}
    wanted = {name.strip() for name in targets.split(",")}
    present = {name.rpartition(".")[2] for name in shapes}
    if unknown := wanted - present:
        raise UserError(
            f"--target-modules: the model's decoder has no linear layer {', '.join(map(repr, sorted(unknown)))}; "
            f"it has {', '.join(sorted(present))} (the output head stays frozen)"
        )
    return {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] in wanted}
