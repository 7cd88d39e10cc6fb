"""Options that decide how a backend computes."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from lite_dil.base.option import FREE, option
from lite_dil.data.options import Lengths
from lite_dil.models.options import ALL_LINEAR, ModelOptions, ResolvedAdapter, Seeded


@dataclass(frozen=True, kw_only=True)
class EngineOptions(Lengths):
    """Layout, memory and optimiser of the training."""

    weight_decay: float = option("optimisation", 0.0, "AdamW's decoupled weight decay")
    max_grad_norm: float = option("optimisation", 1.0, "gradients are scaled down to this norm")
    optim: str = option(
        "optimisation",
        "auto",
        "AdamW with float32 state, or bitsandbytes' paged 8-bit one (cuda, cpu); auto is the latter with --4bit on those",
        choices=("auto", "adamw", "paged_adamw_8bit"),
    )
    layout: str = option(
        "engine",
        "auto",
        "how a pass is laid out; none changes a result. plain: each prompt before each of its answers; packed (cuda, cpu): "
        "each prompt once, pairs end to end in one row without padding; prefix (mlx): prompts in one block, answers in "
        "another. auto takes the sharing one unless the model's layers forbid it, and says which",
        choices=("auto", "plain", "packed", "prefix"),
        kind=FREE,
    )
    gradient_checkpointing: str = option(
        "engine",
        "auto",
        "what is computed again for the backward pass instead of kept. selective: the MLP's inside, a third of the "
        "activations for about a twentieth more time; full: all but each layer's input, a fifth to a quarter of the memory "
        "for a quarter to a third more time; auto is full from a billion parameters, else off",
        choices=("auto", "off", "selective", "full"),
        kind=FREE,
    )
    offload_activations: bool = option(
        "engine",
        False,
        "keep what full checkpointing stores in the computer's memory, copied while the GPU computes (cuda): saves layers x "
        "tokens x width x 2 bytes of GPU memory, costs little time on rows of thousands of tokens",
        kind=FREE,
    )
    offload_embeddings: bool = option(
        "engine",
        False,
        "keep the embedding table in the computer's memory and look tokens up there (cuda): saves vocabulary x width x 2 "
        "bytes of GPU memory; a table that is also the output head must be quantised with --head-bits for it",
        kind=FREE,
    )
    fused_layers: bool = option(
        "engine",
        True,
        "this library's own LoRA, gated MLP and norm layers (cuda, cpu), which keep less for the backward pass; layers of an "
        "unknown kind are left as they are",
        kind=FREE,
    )
    compile: bool | None = option(
        "engine",
        None,
        "compile the step of mlx: faster once a shape was seen, slow at first (default: on with Metal)",
        kind=FREE,
    )
    unsloth: bool = option(
        "engine", False, "load the model through unsloth and use its kernels (cuda, plain layout; pip install unsloth)"
    )


@dataclass(frozen=True, kw_only=True)
class LoadOptions(EngineOptions, ResolvedAdapter, ModelOptions, Lengths, Seeded):
    """All that a backend is made by."""

    @classmethod
    def of(cls, options: ModelOptions, adapter: ResolvedAdapter | None, training: EngineOptions | None) -> LoadOptions:
        """Join the three, with an adapter that does nothing for the bare base, and what inference needs for no training."""
        if adapter is None:
            adapter = ResolvedAdapter(reference="base", lora_dropout=0.0, lora_r=1, lora_alpha=2.0, target_modules=ALL_LINEAR)
        training = training or EngineOptions(layout="plain", gradient_checkpointing="off")
        groups: tuple[tuple[Any, type[Any]], ...] = (
            (options, ModelOptions),
            (adapter, ResolvedAdapter),
            (training, EngineOptions),
        )
        return cls(**{field.name: getattr(group, field.name) for group, kind in groups for field in fields(kind)})
