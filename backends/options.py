"""Options that decide how a backend computes."""

from __future__ import annotations

from dataclasses import dataclass

from lite_dil.base.option import FREE, option
from lite_dil.data.options import Lengths
from lite_dil.models.options import ModelOptions, ResolvedAdapter, Seeded


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
        "layout of a pass; none changes a result. plain: each prompt before each of its responses; packed (cuda, cpu): "
        "each prompt once, pairs end to end in one row without padding; prefix (mlx): prompts in one block, responses in "
        "another. auto takes the one that shares prompts unless the model's layers forbid it, and says which",
        choices=("auto", "plain", "packed", "prefix"),
        kind=FREE,
    )
    gradient_checkpointing: str = option(
        "engine",
        "auto",
        "what to recompute in the backward pass instead of keeping. selective: inside the MLP, which saves a third of the "
        "activations for about a twentieth more time; full: all but each layer's input, which leaves a fifth to a quarter of "
        "the memory for a quarter to a third more time; auto is full from a billion parameters, else off",
        choices=("auto", "off", "selective", "full"),
        kind=FREE,
    )
    offload_activations: bool = option(
        "engine",
        False,
        "store what full checkpointing keeps in the computer's memory, copied while the GPU computes (cuda): saves layers x "
        "tokens x width x 2 bytes of GPU memory, and costs little time on rows of thousands of tokens",
        kind=FREE,
    )
    offload_embeddings: bool = option(
        "engine",
        False,
        "keep the embedding table in the computer's memory and look tokens up there (cuda): saves vocabulary x width x 2 "
        "bytes of GPU memory; if the table is also the output head, it needs --head-bits",
        kind=FREE,
    )
    fused_layers: bool = option(
        "engine",
        True,
        "this library's own LoRA, gated MLP and norm layers (cuda, cpu), which keep less for the backward pass; unknown kinds "
        "of layers stay as they are",
        kind=FREE,
    )
    compile: bool | None = option(
        "engine",
        None,
        "compile the step (mlx): faster once a shape was seen, slow at first (default: on with Metal)",
        kind=FREE,
    )
    unsloth: bool = option(
        "engine", False, "load the model through unsloth and use its kernels (cuda, plain layout; an extra of this name)"
    )


@dataclass(frozen=True, kw_only=True)
class LoadOptions(EngineOptions, ResolvedAdapter, ModelOptions, Lengths, Seeded):
    """All options that load a backend for training."""
