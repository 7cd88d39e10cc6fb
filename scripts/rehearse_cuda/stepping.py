"""Loading a model on the card and taking steps, with the card's work and the memory left on it."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from live_bytes import random_examples
from rehearse_cuda.failed import require
from rehearse_cuda.stand_in import Doors

from lite_dil.backends import registry
from lite_dil.backends.types import MicroBatch, StepResult
from lite_dil.batching.batch import Batch
from lite_dil.config.train_config import ResolvedConfig, TrainConfig
from lite_dil.models.shape import read_shape
from lite_dil.objectives.criterion import Criterion
from lite_dil.planning.estimate import Load
from lite_dil.training.step import micro_batches

RATE = 1e-4


def resolved(model: Path, options: Mapping[str, Any]) -> ResolvedConfig:
    """Return a checked config with these options for the card."""
    config = TrainConfig(**{"backend": "cuda", "model": str(model), "batch_size": 1, "max_length": 128, **options})
    config.check()
    return config.resolved()


def loaded(config: ResolvedConfig) -> Any:
    """Load the model for training. cuDNN has no stand-in, so SDPA, which uses it on sm_90, uses another kernel."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    backend: Any = registry.load("cuda", config, config.model, config, config)
    layer = backend.decoder.layers[0]
    fused = all("forward" in vars(module) for module in (layer.mlp, layer.input_layernorm))
    # They are used if they compute the same, which zeros always do unless a comparison is made on the card.
    require(fused or not config.fused_layers, "stock layers in place of the fused ones")
    return backend


@dataclass(frozen=True)
class Work:
    """A step's work on the card and its allocations by torch's allocator."""

    counts: dict[str, int]
    allocations: int
    allocated_bytes: int

    def __str__(self) -> str:
        named = ", ".join(f"{number} {name}" for name, number in self.counts.items())
        return f"{named}, {self.allocations} allocations of {self.allocated_bytes:,} bytes"


class Stepper:
    """Takes steps of random tokens: passes of the largest load that a config allows, including the reference's."""

    def __init__(self, config: ResolvedConfig, passes: int = 1, load: Load | None = None) -> None:
        load = load or Load.worst(config)
        examples = random_examples(load, read_shape(config.model).vocabulary)
        self.loss = Criterion(config, examples)
        self.passes: list[MicroBatch] = micro_batches([Batch.of(examples)] * passes, self.loss)
        self.doors = Doors()

    def step(self, backend: Any) -> StepResult:
        """Take a step."""
        return backend.step(self.passes, self.loss, RATE)

    def counted(self, backend: Any) -> Work:
        """Take a step; return its work."""
        torch.cuda.synchronize()
        before = self._totals()
        self.step(backend)
        torch.cuda.synchronize()
        after = self._totals()
        counts = {name: after[0][name] - before[0][name] for name in after[0]}
        return Work(counts, after[1] - before[1], after[2] - before[2])

    def _totals(self) -> tuple[dict[str, int], int, int]:
        stats = torch.cuda.memory_stats()
        return self.doors.work(), stats["allocation.all.allocated"], stats["allocated_bytes.all.allocated"]


def held() -> tuple[int, int]:
    """Return the bytes in use: of tensors on the card, and of pinned memory, after freeing its cache."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._host_emptyCache()
    return torch.cuda.memory_allocated(), Doors().pinned_used
