"""GGUF files: the same numbers and tokens as the model folder, by transformers' reader and by llama.cpp where it is."""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, bare_model, byte_level_tokenizer, examples, make_checkpoint, oracle_logps, sentencepiece_tokenizer
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lite_dil import gguf_export, gguf_vocabulary
from lite_dil.batch import Batch
from lite_dil.errors import UserError
from lite_dil.gguf_export import KINDS, TOLERANCES, convert, different_tokens, open_file, token_logps
from lite_dil.models import load_tokenizer

HAS_LLAMA_CPP = importlib.util.find_spec("llama_cpp") is not None
needs_llama_cpp = pytest.mark.skipif(not HAS_LLAMA_CPP, reason="llama-cpp-python is not installed: it needs a compiler")
READERS = ["transformers", pytest.param("llama.cpp", marks=needs_llama_cpp)]
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": {"rope_type": "default", "rope_theta": 50000.0}}),
    "llama3-rope": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama-linear": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"head_dim": 32, "sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
}
HARD = [
    "Hello world, it's Tom's; I'LL go.\n\n\n  and   then\t\ttabs \r\n windows",
    "12345 3.14 1,000,000 a1b22c333",
    "naïve café, 日本語のテキスト, русский, עברית, ไทย, 한국어",
    "😀👩‍👩‍👧‍👦 🇫🇷 ∑ ≠ ½ ﬁ",
    " leading and trailing  ",
    "for (int i=0; i<10; i++) { x[i] += \"a\\n\"; }  // done",
    "the capital of France is Paris.\n",
    "a",
    "",
]


def make(folder: Path, name: str, tokenizer: Any = None, **changes: Any) -> Path:
    """A tiny random model, with biases and norms that are not all 0 or 1."""
    config_class, model_class, options = MODELS[name]
    torch.manual_seed(0)
    config = config_class(
        vocab_size=576,  # more rows than tokens, as Qwen's
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **{"tie_word_embeddings": False} | options | changes,
    )
    model = model_class(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    model.save_pretrained(folder)
    (tokenizer or byte_level_tokenizer()).save_pretrained(folder)
    return folder


def sequences(data: Batch) -> list[tuple[list[int], list[int]]]:
    return [
        (data.prompts[prompt].tolist(), response.tolist())
        for response, prompt in zip(data.responses, data.prompt_of, strict=True)
    ]


def read_by(reader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reader == "transformers" and HAS_LLAMA_CPP:
        known = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else known(name))


def long_batch() -> Batch:
    """Prompts of 100 tokens and more, where the ropes differ, and short ones."""
    draw = np.random.default_rng(0)
    data = Batch.of(examples(2))
    prompts = [*data.prompts[:-1], draw.integers(3, 500, 150)]
    return Batch(prompts, *[getattr(data, f) for f in list(data.__dataclass_fields__)[1:]])


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", MODELS)
def test_a_file_has_the_log_probs_of_its_folder(
    name: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_by(reader, monkeypatch)
    folder = make(tmp_path / "model", name)
    convert(folder, tmp_path / "tiny.gguf", "f32", None, print)
    said: list[str] = []
    data = long_batch()
    found = token_logps(tmp_path / "tiny.gguf", sequences(data), said.append)
    with torch.no_grad():
        expected = oracle_logps(bare_model(str(folder)), data).numpy()
    assert reader in said[0]
    np.testing.assert_allclose(np.concatenate(found), expected, atol=1e-4 if reader == "transformers" else 0.02)
