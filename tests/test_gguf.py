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
from gguf import GGUFReader
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
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
from lite_dil.gguf_export import PROBES, TOLERANCES, convert, different_tokens, open_file, token_logps
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
MORE = ["the capital of France is Paris.\n", "a", "", "A <0x41> ▁ _", "x" * 50, "\u2028\u00a0\u3000"]


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


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0"])
def test_every_kind_is_near_and_has_its_types(kind: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_by(reader, monkeypatch)
    folder = Path(make_checkpoint(tmp_path / "model"))
    convert(folder, tmp_path / "tiny.gguf", kind, None, print)
    data = long_batch()
    found = np.concatenate(token_logps(tmp_path / "tiny.gguf", sequences(data), print))
    with torch.no_grad():
        expected = oracle_logps(bare_model(str(folder)), data).numpy()
    assert 0 < np.abs(found - expected).mean() < TOLERANCES[kind]
    types = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "tiny.gguf").tensors}
    assert {types[name] for name in types if "norm" in name} == {"F32"}
    assert {types[name] for name in types if "norm" not in name} == {kind.upper()}


def with_split(name: str) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with the split of a family, trained on texts that the split matters for."""
    splits, (_, whole_words) = next(item for item in gguf_vocabulary._SPLITS.items() if item[1][0] == name)
    steps: list[Any] = []
    for split in splits:
        if split == "digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif split is not None:
            steps.append(pre_tokenizers.Split(Regex(split), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=None in splits))
    inner = Tokenizer(models.BPE(ignore_merges=whole_words))
    inner.pre_tokenizer = pre_tokenizers.Sequence(steps)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        [*PROBES, *PROBES, " ".join(WORDS)] * 3,
        trainers.BpeTrainer(
            vocab_size=560,
            special_tokens=["<|endoftext|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<|endoftext|>", eos_token="<|im_end|>")


def complete_sentencepiece() -> PreTrainedTokenizerFast:
    """The SentencePiece-style tokenizer with every way to merge, as converters of SentencePiece models write it."""
    tokenizer = sentencepiece_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    made = ["".join(merge) for merge in state["model"]["merges"]]
    state["model"]["merges"] = [
        [token[:cut], token[cut:]] for token in made for cut in range(1, len(token)) if {token[:cut], token[cut:]} <= vocab.keys()
    ]
    whole = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    whole.chat_template = tokenizer.chat_template
    return whole


def read(tokenizer: Any, rows: int = 576) -> gguf_vocabulary.Vocabulary:
    return gguf_vocabulary.read(tokenizer, rows, print)


@needs_llama_cpp
@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "sentencepiece"])
def test_llama_cpp_makes_the_same_tokens(name: str, tmp_path: Path) -> None:
    tokenizer = complete_sentencepiece() if name == "sentencepiece" else with_split(name)
    folder = make(tmp_path / "model", "llama", tokenizer)
    convert(folder, tmp_path / "tiny.gguf", "f32", None, print)
    same = load_tokenizer(str(folder))
    assert read(same).pre == ("default" if name == "sentencepiece" else name)
    assert different_tokens(tmp_path / "tiny.gguf", same, [*PROBES, *MORE]) == []
    file = open_file(tmp_path / "tiny.gguf", vocab_only=True)
    for text in PROBES:
        assert file.tokenize(text.encode(), add_bos=True) == same(text).input_ids
        assert file.detokenize(same(text, add_special_tokens=False).input_ids).decode() in (text, " " + text)
    file.close()
