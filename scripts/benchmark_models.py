"""Models for scripts/benchmark.py: random weights of a given shape, and a tokenizer that turns numbers into token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmark_cases import EOS, read_config

from lite_dil.doctor.tiny_model import shapes

# A Llama small enough that MLX's CPU backend trains it in less than a second per step.
TINY = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
    "max_position_embeddings": 2048,
}
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}
NF4 = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
}


def make_llama(folder: Path, shape: dict[str, int], nf4: bool, device: str = "cpu") -> str:
    """Write a Llama of this shape with random weights into a folder, unless it exists, and return the folder.

    Args:
        nf4: write bitsandbytes' 4-bit form (with double quantisation) and bfloat16 for the rest, one shard per layer, so that
            little is ever in memory; else all is float32.
        device: where 4-bit weights are drawn and quantised.
    """
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
        "rope_theta": 500000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "dtype": "bfloat16" if nf4 else "float32",
        "head_dim": shape["hidden_size"] // shape["num_attention_heads"],
        **shape,
    }
    if nf4:
        config["quantization_config"] = NF4
    if (folder / "config.json").is_file() and read_config(str(folder)) == config:
        return str(folder)
    folder.mkdir(parents=True, exist_ok=True)
    word_tokenizer(shape["vocab_size"]).save_pretrained(folder)
    if nf4:
        _write_nf4(folder, shapes(config), device)
    else:
        _write_float32(folder, shapes(config))
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")  # last: now the folder is complete
    return str(folder)


def _write_float32(folder: Path, shards: list[dict[str, tuple[int, ...]]]) -> None:
    from safetensors.numpy import save_file

    draw = np.random.default_rng(0)
    tensors = {
        name: np.ones(size, np.float32) if len(size) == 1 else draw.normal(0, 0.02, size).astype(np.float32)
        for shard in shards
        for name, size in shard.items()
    }
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _write_nf4(folder: Path, shards: list[dict[str, tuple[int, ...]]], device: str) -> None:
    import torch
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import save_file

    torch.manual_seed(0)
    index: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        tensors: dict[str, Any] = {}
        for name, size in shard.items():
            weight = torch.ones(size, dtype=torch.bfloat16, device=device)
            if weight.ndim == 2:
                weight.normal_(0, 0.02)
            if weight.ndim == 2 and ".layers." in name:
                weight, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
                tensors |= {f"{name}.{part}": value.cpu() for part, value in state.as_dict(packed=True).items()}
            tensors[name] = weight.cpu()
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def word_tokenizer(vocabulary: int) -> Any:
    """Return a tokenizer in which the text "17" is token 17, so that peers that need text get the same tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    control = {0: "<unk>", EOS: "<eos>"}
    inner = Tokenizer(models.WordLevel({control.get(i, str(i)): i for i in range(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


def text_of(ids: Sequence[int]) -> str:
    """Return the text that `word_tokenizer` turns into these ids."""
    return " ".join("<eos>" if i == EOS else str(i) for i in ids)
