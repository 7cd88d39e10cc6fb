"""A Llama with random weights, small enough for any machine and made without a download."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from lite_dil.base.files import make_folder, replace_file
from lite_dil.models.tensors import Planned, write

_WIDTH, _INNER, _LAYERS, _HEADS, _KEY_HEADS, VOCABULARY = 128, 256, 2, 2, 1, 256
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": _WIDTH,
    "intermediate_size": _INNER,
    "num_hidden_layers": _LAYERS,
    "num_attention_heads": _HEADS,
    "num_key_value_heads": _KEY_HEADS,
    "head_dim": _WIDTH // _HEADS,
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


def weights() -> dict[str, np.ndarray]:
    """Return the model's float32 weights, large enough that a wrong mask or position shows in the log-probs."""
    keys = _WIDTH // _HEADS * _KEY_HEADS
    matrices = {
        "self_attn.q_proj": (_WIDTH, _WIDTH),
        "self_attn.k_proj": (keys, _WIDTH),
        "self_attn.v_proj": (keys, _WIDTH),
        "self_attn.o_proj": (_WIDTH, _WIDTH),
        "mlp.gate_proj": (_INNER, _WIDTH),
        "mlp.up_proj": (_INNER, _WIDTH),
        "mlp.down_proj": (_WIDTH, _INNER),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, _WIDTH)}
    for layer in range(_LAYERS):
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in matrices.items()}
        shapes |= {
            f"model.layers.{layer}.{name}.weight": (_WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")
        }
    shapes |= {"model.norm.weight": (_WIDTH,), "lm_head.weight": (VOCABULARY, _WIDTH)}
    draw = np.random.default_rng(0)
    return {
        name: np.ones(shape, np.float32) if len(shape) == 1 else draw.normal(0, 0.15, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def make(folder: Path, changed: Mapping[str, np.ndarray] | None = None) -> str:
    """Write the model, with some weights replaced, into a new folder, and return the folder."""
    make_folder(folder)
    tensors = {**weights(), **(changed or {})}
    planned = [Planned(name, "F32", value.shape, partial(list, [value])) for name, value in tensors.items()]
    write(folder / "model.safetensors", planned, "pt")
    replace_file(folder / "config.json", json.dumps(CONFIG, indent=1))
    return str(folder)
