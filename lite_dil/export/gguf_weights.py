"""A model folder's weights and shape for a GGUF file: names, numbers and types, one tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.base.errors import UserError
from lite_dil.models.tensors import Stored, read

# model_type of config.json -> llama.cpp's architecture.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


@dataclass(frozen=True)
class Tensor:
    """A tensor of a safetensors file, not read yet."""

    stored: Stored
    heads: int | None = None  # heads of a projection whose outputs llama.cpp orders differently

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.stored.shape

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def read(self) -> np.ndarray:
        """Return its values in float32."""
        values = self.stored.float32()
        return values if self.heads is None else interleave(values, self.heads)


def tensors(folder: Path) -> dict[str, Stored]:
    """Return the tensors of a folder's model*.safetensors, by name.

    Raises:
        UserError: there are none, or they are not floating point.
    """
    found: dict[str, Stored] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        found |= read(file)
    if not found:
        raise UserError(f"{folder}: no model*.safetensors there")
    for name, tensor in found.items():
        if not tensor.floating:
            raise UserError(f"{tensor.path}: {name} is {tensor.code}; a GGUF file is made from weights of 16 or 32 bits")
    return found


def vocabulary_rows(found: Mapping[str, Stored]) -> int:
    """Return the number of rows of a model's embedding table."""
    return next(tensor.shape[0] for name, tensor in found.items() if name.endswith("embed_tokens.weight"))


def read_config(folder: Path) -> Any:
    """Return the folder's transformers config, if its model can be written here exactly.

    Raises:
        UserError: it is another kind of model.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: its config.json cannot be read ({error})") from None
    problem = ""
    if config.model_type not in ARCHITECTURES:
        problem = f"a model of type {config.model_type!r}"
    elif config.hidden_act != "silu":
        problem = f"hidden_act = {config.hidden_act!r}"
    elif config.rope_parameters["rope_type"] not in ("default", "linear", "llama3"):
        problem = f"a rope of type {config.rope_parameters['rope_type']!r}"
    elif config.rope_parameters.get("partial_rotary_factor", 1) != 1:
        problem = "a rope over part of each head"
    else:
        more = ("use_sliding_window", "mlp_bias", *(["attention_bias"] if ARCHITECTURES[config.model_type] == "llama" else []))
        problem = next((name for name in more if getattr(config, name, False)), "")
    if problem:
        raise UserError(
            f"{problem} is not supported by lite-dil's GGUF writer ({', '.join(ARCHITECTURES)}); llama.cpp's own "
            "converter may support it: get llama.cpp and give --llama-cpp DIR"
        )
    return config


def write_config(config: Any, name: str, vocabulary: int, writer: Any) -> None:
    """Add a model's shape to a gguf.GGUFWriter."""
    import gguf

    head = head_size(config)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(vocabulary)
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def head_size(config: Any) -> int:
    """Return the number of channels of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True)
class Made:
    """A tensor made from the config alone."""

    values: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.values.shape

    @property
    def count(self) -> int:
        """Number of values."""
        return self.values.size

    def read(self) -> np.ndarray:
        """Return its values in float32."""
        return self.values


def plan(config: Any, found: Mapping[str, Stored]) -> dict[str, Tensor | Made]:
    """Return the tensors of the file by their GGUF names, in the file's order.

    Raises:
        UserError: the folder has a tensor too many or too few.
    """
    import gguf

    architecture = ARCHITECTURES[config.model_type]
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    planned: dict[str, Tensor | Made] = {}
    if config.rope_parameters["rope_type"] == "llama3":
        planned["rope_freqs.weight"] = Made(rope_factors(config))
    for name, tensor in found.items():
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise UserError(f"{tensor.path}: {name} does not belong in a GGUF file of a {config.model_type} model")
        planned[target] = Tensor(tensor, _rotated_heads(config, name) if architecture == "llama" else None)
    _complete(config, planned)
    return planned


def _complete(config: Any, planned: dict[str, Any]) -> None:
    """Raise UserError if a tensor is missing: the file would load, then generate nonsense or crash the program."""
    parts = ["attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"]
    if config.model_type == "qwen3":
        parts += ["attn_q_norm", "attn_k_norm"]
    needed = {f"blk.{layer}.{part}.weight" for layer in range(config.num_hidden_layers) for part in parts}
    needed |= {"token_embd.weight", "output_norm.weight"} | (set() if config.tie_word_embeddings else {"output.weight"})
    if missing := sorted(needed - planned.keys()):
        raise UserError(f"the model folder lacks {len(missing)} tensors, among them {missing[0]} (its GGUF name)")


def _rotated_heads(config: Any, name: str) -> int | None:
    """Return the number of heads of a projection under rope; None for other tensors."""
    projection = name.split(".")[-2]
    return {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(projection)


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder a projection's outputs, (heads x channels, ...).

    Rope rotates channels i and i + half of a head together in transformers, 2i and 2i + 1 in llama.cpp.
    """
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def rope_factors(config: Any) -> np.ndarray:
    """Return Llama 3.1's divisor of each rope frequency, (channels / 2,): low ones are scaled down, high ones are kept."""
    rope = config.rope_parameters
    turns = rope["original_max_position_embeddings"] / (2 * np.pi)
    turns = turns * rope["rope_theta"] ** (-np.arange(0, head_size(config), 2) / head_size(config))  # original context length
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    fast = np.clip((turns - low) / (high - low), 0, 1)
    return (1 / ((1 - fast) / rope["factor"] + fast)).astype(np.float32)
