"""A Llama with random weights, small enough for any machine and made without a download."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lite_dil.base.files import make_folder, replace_file
from lite_dil.models.tensors import Planned, write

VOCABULARY = 256
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "dtype": "float32",
}


def shapes(config: Mapping[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """Return the shapes of a Llama's tensors by name: the embeddings, each layer, and the head."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    queries, keys = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    layers = range(config["num_hidden_layers"])
    return [
        {"model.embed_tokens.weight": (vocabulary, hidden)},
        *({f"model.layers.{i}.{name}.weight": size for name, size in layer.items()} for i in layers),
        {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)},
    ]


def weights() -> dict[str, np.ndarray]:
    """Return the model's float32 weights, large enough that a wrong mask or position shows in the log-probs."""
    draw = np.random.default_rng(0)
    return {
        name: np.ones(shape, np.float32) if len(shape) == 1 else draw.normal(0, 0.15, shape).astype(np.float32)
        for shard in shapes(CONFIG)
        for name, shape in shard.items()
    }


def make(folder: Path, changed: Mapping[str, np.ndarray] | None = None) -> str:
    """Write the model, with some weights replaced, into a new folder, and return the folder."""
    make_folder(folder)
    tensors = {**weights(), **(changed or {})}
    planned = [Planned(name, "F32", value.shape, partial(list, [value])) for name, value in tensors.items()]
    write(folder / "model.safetensors", planned, "pt")
    replace_file(folder / "config.json", json.dumps(CONFIG, indent=1))
    return str(folder)
