"""Checkpoints for the rehearsal: a tiny Llama, and an 8B one that takes no disk space."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from benchmark_models import LLAMA_8B

TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}


def tiny(folder: Path) -> Path:
    """Write a Llama with two layers, head width 64 and room for long rows; its weights are zeros."""
    return _write(folder, TINY)


def llama_8b(folder: Path) -> Path:
    """Write a checkpoint of Llama 3.1's 8B shape: a safetensors header, then 16 GB as a hole in the file."""
    return _write(folder, LLAMA_8B)


def _write(folder: Path, sizes: dict[str, int]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "dtype": "bfloat16",
        **sizes,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in _tensors(config).items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


def _tensors(config: dict[str, Any]) -> dict[str, list[int]]:
    """Return the shapes of a Llama's weights by name."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    table = [config["vocab_size"], hidden]
    found = {"model.embed_tokens.weight": table, "model.norm.weight": [hidden], "lm_head.weight": table}
    for number in range(config["num_hidden_layers"]):
        parts = {
            "input_layernorm": [hidden],
            "post_attention_layernorm": [hidden],
            "self_attn.q_proj": [hidden, hidden],
            "self_attn.k_proj": [keys, hidden],
            "self_attn.v_proj": [keys, hidden],
            "self_attn.o_proj": [hidden, hidden],
            "mlp.gate_proj": [inner, hidden],
            "mlp.up_proj": [inner, hidden],
            "mlp.down_proj": [hidden, inner],
        }
        found |= {f"model.layers.{number}.{name}.weight": shape for name, shape in parts.items()}
    return found


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of single bytes with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: i for i, token in enumerate([*special, *letters])}, []))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    inner.add_special_tokens(special)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=special[0], eos_token=special[2], pad_token=special[2])
    made.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    made.save_pretrained(folder)
