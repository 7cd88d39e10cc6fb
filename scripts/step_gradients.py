"""The gradients that a backend's own `step` computes, under names that both backends share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lite_dil.backends.types import MicroBatch, StepResult
from lite_dil.batching.batch import Batch
from lite_dil.objectives.criterion import Criterion
from lite_dil.objectives.loss import Loss
from lite_dil.training.step import micro_batches

Adapter = dict[str, np.ndarray]  # layer.lora_a (in, r) and layer.lora_b (r, out)


def common_name(name: str) -> str:
    """PEFT's name of a weight, as MLX has it."""
    name = name.removeprefix("base_model.model.").replace(".default.weight", "")
    return name.replace("lora_A", "lora_a").replace("lora_B", "lora_b")


def random_adapter(shapes: Adapter, scale: float = 0.02, seed: int = 1) -> Adapter:
    """Weights drawn for every A and every B, the same for both backends."""
    draw = np.random.default_rng(seed)
    sizes = {"a": 0.1, "b": scale}
    return {k: (sizes[k[-1]] * draw.normal(size=v.shape)).astype(np.float32) for k, v in sorted(shapes.items())}


def set_parameters(parameters: dict[str, torch.nn.Parameter], values: Adapter) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(values[common_name(name)].T))


def set_adapter(backend: Any, values: Adapter) -> None:
    """Give the policy these weights."""
    if backend.name == "mlx":
        import mlx.core as mx
        from mlx.utils import tree_unflatten

        backend.model.update(tree_unflatten([(name, mx.array(value)) for name, value in values.items()]))
    else:
        set_parameters(backend.adapters["policy"].weights, values)


def step_gradients(
    backend: Any, batches: Sequence[Batch], criterion: Criterion, baseline: float = 0.0
) -> tuple[StepResult, Adapter]:
    """`work_gradients` of a criterion's step on these batches."""
    return work_gradients(backend, micro_batches(batches, criterion, None, baseline), criterion)


def work_gradients(backend: Any, work: Sequence[MicroBatch], loss: Loss) -> tuple[StepResult, Adapter]:
    """Take a step at rate 0 and return what it reports, and the gradients that reach its optimiser.

    The backend must have been loaded with a `max_grad_norm` that never acts.
    """
    taken: Adapter = {}
    if backend.name == "mlx":
        from mlx.utils import tree_flatten

        optimizer = backend.adapters["policy"].optimizer
        update = optimizer.update

        def record(model: Any, gradients: Any) -> None:
            taken.update({name: np.array(value) for name, value in tree_flatten(gradients)})
            update(model, gradients)

        optimizer.update = record
        try:
            result = backend.step(work, loss, 0.0)
        finally:
            optimizer.update = update
        return result, taken

    def hook(*_: Any) -> None:
        taken.update({common_name(name): p.grad.numpy().T.copy() for name, p in backend.adapters["policy"].weights.items()})

    handle = backend.adapters["policy"].optimizer.register_step_pre_hook(hook)
    try:
        result = backend.step(work, loss, 0.0)
    finally:
        handle.remove()
    return result, taken


def relative_error(gradients: Adapter, expected: Adapter) -> float:
    """The largest distance of a weight's gradient from what is expected, as a share of that gradient's norm."""
    assert gradients.keys() == expected.keys()
    return max(float(np.linalg.norm(gradients[k] - v) / np.linalg.norm(v)) for k, v in expected.items())
