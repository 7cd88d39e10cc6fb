"""Estimate the memory of a training step from the config and the model's shape alone; nothing is loaded."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

import numpy as np

from lite_dil.batching.batch import Batch
from lite_dil.batching.schedule import layout_tokens, row_tokens
from lite_dil.config.train_config import ResolvedConfig
from lite_dil.models.adapter_files import read_adapter
from lite_dil.models.adapters import match, select_targets
from lite_dil.models.header import read_header
from lite_dil.models.listing import ListedModel
from lite_dil.models.shape import ModelShape
from lite_dil.objectives.reward_table import is_reward, reward_objective

AnyModel = ModelShape | ListedModel  # of a known dense family, or listed by transformers

FLOAT32 = 4  # bytes
BYTES = {"float32": FLOAT32, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Load:
    """The lengths in one forward and backward pass.

    Attributes:
        prompts: number of tokens of each prompt.
        responses: for each prompt, the number of tokens of each of its responses.
    """

    prompts: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, batch: Batch) -> Load:
        """Return the load of one batch."""
        return cls(tuple(map(len, batch.prompts)), tuple(map(tuple, batch.answer_lengths)))

    @classmethod
    def worst(cls, config: ResolvedConfig, answers: int = 2) -> Load:
        """Return the largest pass under --max-length, --row-tokens and --batch-size, of examples with `answers` responses.

        Prompts are one token long: responses cost more, and in a packed row each response has its own tokens. On drawn answers
        a prompt has --samples of them, which may be in different passes.
        """
        tokens = row_tokens(config)
        if config.online:
            assert config.samples and config.max_new_tokens  # resolved
            each = min(config.max_new_tokens, config.max_length - 1)
            drawn = min(config.batch_size * config.samples, max(1, tokens // each))
            groups = [config.samples] * (drawn // config.samples) + [drawn % config.samples] * bool(drawn % config.samples)
            return cls((1,) * len(groups), tuple((each,) * some for some in groups))
        count = min(config.batch_size, max(1, -(-tokens // (answers * config.max_length))))
        # A single example is never split, however long it is.
        length = config.max_length if count == 1 else min(config.max_length, tokens // (answers * count))
        length = max(2, length)
        return cls((1,) * count, ((length - 1,) * answers,) * count)

    def tokens(self, layout: str, multiple: int = 1) -> int:
        """Return how many tokens a layer computes, padding included; a packed row is padded to a multiple."""
        tokens = layout_tokens(self.prompts, self.responses, layout)
        return -(-tokens // multiple) * multiple if layout == "packed" else tokens

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt with one of its responses."""
        return max(prompt + max(answers) for prompt, answers in zip(self.prompts, self.responses, strict=True))

    @cached_property
    def answer_tokens(self) -> int:
        """Number of tokens whose log-probs are computed."""
        return sum(map(sum, self.responses))

    @cached_property
    def answers(self) -> int:
        """Number of responses."""
        return sum(map(len, self.responses))

    @cached_property
    def read_positions(self) -> int:
        """Number of tokens in a packed row whose last hidden states are read, those that predict a response token."""
        return sum(1 + sum(answers) - len(answers) for answers in self.responses)


@dataclass(frozen=True)
class Estimate:
    """Bytes live at the peak of a step, by purpose; `total` is their sum.

    Attributes:
        phase: the phase of the peak.
        linears: the decoder's linear layers, quantised or not.
        experts: the experts of mixtures that are no linear layers, unquantised.
        embeddings: the embedding table.
        head: the output head; 0 if it is the table.
        norms: norm weights, and anything else that is loaded and not used.
        adapter: LoRA's float32 weights, with a reward model's head.
        reference: a frozen second adapter; otherwise the reference is the same model and needs nothing.
        rewards: adapters, heads and classifiers that reward the policy's own answers.
        gradients: the adapter's gradients that exist at this moment.
        optimizer: AdamW's state.
        cache: keys and values of answers that are being drawn.
        activations: what is kept for the backward pass.
        logits: the head's chunk, tokens by vocabulary.
        temporaries: short-lived tensors, unpacked weights included.
        reserve: what a GPU's allocator loses to fragmentation.
        host_parts: with --backend cuda, bytes in the computer's own memory by purpose; not in `total`.
        phases: the total of every phase.
    """

    phase: str
    linears: int = 0
    experts: int = 0
    embeddings: int = 0
    head: int = 0
    norms: int = 0
    adapter: int = 0
    reference: int = 0
    rewards: int = 0
    gradients: int = 0
    optimizer: int = 0
    cache: int = 0
    activations: int = 0
    logits: int = 0
    temporaries: int = 0
    reserve: int = 0
    host_parts: tuple[tuple[str, int], ...] = ()
    phases: tuple[tuple[str, int], ...] = ()

    @property
    def components(self) -> dict[str, int]:
        """The bytes by name; `total` is their sum."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("phase", "host_parts", "phases")}

    @property
    def host(self) -> int:
        """Bytes in the computer's own memory; 0 if that and the GPU's are one."""
        return sum(size for _, size in self.host_parts)

    @property
    def weights(self) -> int:
        """Bytes of the frozen model."""
        return self.linears + self.experts + self.embeddings + self.head + self.norms

    @property
    def total(self) -> int:
        """Peak of live bytes: in the computer's memory with cpu; on the GPU with cuda, without its context."""
        return sum(self.components.values())


def layout_for(config: ResolvedConfig, shape: AnyModel, backend: str) -> str:
    """Return the layout that a run uses, as far as the model's config shows."""
    if config.layout != "auto":
        return config.layout
    if backend == "mlx":
        return "prefix"
    long = shape.long_rope is not None and config.max_length > shape.long_rope
    return "plain" if long or not shape.packs_rows else "packed"


def adapter_tensors(config: ResolvedConfig, shape: AnyModel) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return the shapes of A and B for every adapted layer by name, from --init-adapter's files or the options."""
    if config.init_adapter:
        initial = read_adapter(config.init_adapter, _shapes_only)
        if isinstance(shape, ListedModel):
            linears = {name: (linear.outputs, linear.inputs) for name, linear in shape.linears().items()}
            initial = match(initial, linears, config.init_adapter)  # as training does: not only those a new one may have
        return {name: (a.shape, b.shape) for name, (a, b) in initial.weights.items()}
    rank, targets = config.lora_r, config.target_modules
    assert rank and targets  # filled in by TrainConfig.resolved
    chosen = select_targets(shape.adaptable, targets, shape.experts_each)
    return {name: ((rank, into), (out, rank)) for name, (out, into) in chosen.items()}


def head_tensors(config: ResolvedConfig, shape: AnyModel) -> tuple[tuple[int, int], ...]:
    """Return the shapes of the weight and the bias of a reward model's head; nothing for a policy's training."""
    if not is_reward(config.loss):
        return ()
    outputs = reward_objective(config.loss).outputs
    return (outputs, shape.hidden), (outputs, 1)


def _shapes_only(path: Path) -> dict[str, np.ndarray]:
    """Return arrays with the shapes in a safetensors file that take no memory."""
    return {name: np.broadcast_to(np.float32(0), place.shape) for name, place in read_header(path).items()}
