"""Tiny checkpoints made on the fly, one tokenizer of each family, and both backends."""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for tiny tensors a second thread is a loss
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import blas  # noqa: F401
import numpy as np
import pytest
import torch
import undrawn as without_curves
from cpu_time import CpuTime
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lite_dil.backends import registry
from lite_dil.backends.protocol import Backend
from lite_dil.backends.types import StepResult
from lite_dil.base.signs import CHOSEN, REJECTED
from lite_dil.batching.batch import Batch
from lite_dil.cli.main import main
from lite_dil.config.train_config import ResolvedConfig, TrainConfig
from lite_dil.data.encoder import Example
from lite_dil.data.messages import Completion, Message
from lite_dil.data.reader import Row
from lite_dil.models.find import EMBEDDED_MODEL, cache_dir, resolve_model
from lite_dil.objectives.criterion import Criterion
from lite_dil.reports import charts
from lite_dil.training.step import micro_batches

# What a shell starts in the background ignores Ctrl-C, and so would the programs under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

BACKENDS = ["cpu", "mlx"]
_imported = 0  # modules, when objects were last frozen
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
WORDS = [
    "the",
    "capital",
    "of",
    "France",
    "is",
    "Paris",
    "what",
    "how",
    "do",
    "I",
    "you",
    "make",
    "good",
    "bread",
    "and",
    "tea",
    "a",
    "red",
    "blue",
    "house",
    "small",
    "river",
]


def _corpus() -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=12)) + ".\n" for _ in range(300)]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with ChatML and no BOS, like SmolLM2's and Qwen's."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    inner.train_from_iterator(
        _corpus(), trainers.BpeTrainer(vocab_size=512, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|endoftext|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def sentencepiece_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece-style BPE with a dummy space in front of a text and a BOS token, like Llama 2's and Mistral's."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=512, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens], show_progress=False)
    inner.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # SentencePiece never merges across words
    inner.train_from_iterator(_corpus(), trainer)
    state = json.loads(inner.to_str())
    state["pre_tokenizer"] = None
    state["added_tokens"] = state["added_tokens"][:3]  # bytes are ordinary tokens
    inner = Tokenizer.from_str(json.dumps(state))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = LLAMA2
    return tokenizer


def make_checkpoint(folder: Path, tied: bool = False, rope_theta: float = 50000.0, seed: int = 0, vocab: int = 512) -> Path:
    """Save a random Llama of 2 layers with a rope that is not mlx-lm's default."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():  # larger than the default, so that logits and gradients are not all alike
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    byte_level_tokenizer().save_pretrained(folder)
    return folder


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(CpuTime())


def pytest_runtest_setup() -> None:
    """Leave what imports have made, a million objects, out of later garbage collections: half a second each."""
    global _imported
    if len(sys.modules) > _imported + 50:
        _imported = len(sys.modules)
        gc.collect()
        gc.freeze()


def make_qwen(folder: Path) -> Path:
    """Save a tiny Qwen 2: biases on queries, keys and values, and a tied head."""
    make_checkpoint(folder)
    torch.manual_seed(1)
    rope = {"rope_type": "default", "rope_theta": 50000.0}
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, rope_parameters=rope, tie_word_embeddings=True))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the tests' own, which sees the embedded model in the user's and writes nothing there."""
    real, own = cache_dir() / EMBEDDED_MODEL, tmp_path_factory.mktemp("cache")
    if real.is_dir():
        (own / EMBEDDED_MODEL).symlink_to(real)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LITE_DIL_CACHE", str(own))
        yield


@pytest.fixture(scope="session", autouse=True)
def undrawn() -> Iterator[None]:
    """Charts without curves, in every test that trains."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(charts, "svg", without_curves.svg)
        yield


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts as they are, for what is about them."""
    monkeypatch.setattr(charts, "svg", without_curves.SVG)


Make = Callable[[Path], Any]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker: str) -> Callable[[str, Make], Path]:
    """Makes a folder once for all processes of the tests, which only read it: returns the one of that name."""
    base = tmp_path_factory.getbasetemp()
    place = (base.parent if worker else base) / "shared"

    def make_once(name: str, make: Make) -> Path:
        folder = place / name
        place.mkdir(exist_ok=True)
        with (place / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (place / f"{name}.done").exists():  # and what a failed attempt left is made anew
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir()
                make(folder)
                (place / f"{name}.done").touch()
        return folder

    return make_once


@pytest.fixture(scope="session")
def worker() -> str:
    """The name of this process among those of pytest-xdist; nothing without it."""
    return os.environ.get("PYTEST_XDIST_WORKER", "")


@pytest.fixture(scope="session")
def tiny(shared: Callable[[str, Make], Path]) -> str:
    """A tiny checkpoint with an untied head."""
    return str(shared("tiny", make_checkpoint))


@pytest.fixture(scope="session")
def tiny_tied(shared: Callable[[str, Make], Path]) -> str:
    """A tiny checkpoint whose head is its embedding table."""
    return str(shared("tied", lambda folder: make_checkpoint(folder, tied=True)))


@pytest.fixture(scope="session")
def llama(shared: Callable[[str, Make], Path]) -> str:
    """A checkpoint large enough to measure its memory."""

    def make(folder: Path) -> None:
        sizes = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 2048}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096}
        torch.manual_seed(0)
        made = LlamaConfig(**sizes, **heads, bos_token_id=0, eos_token_id=2, pad_token_id=2)
        LlamaForCausalLM(made).save_pretrained(folder)

    return str(shared("small-llama", make))


@pytest.fixture(scope="session")
def checkpoints(tiny: str, tiny_tied: str, shared: Callable[[str, Make], Path]) -> dict[str, str]:
    """Checkpoints that differ in their heads, biases and tokenizers."""

    def piece(folder: Path) -> None:
        make_checkpoint(folder)
        sentencepiece_tokenizer().save_pretrained(folder)

    return {
        "untied": tiny,
        "tied": tiny_tied,
        "qwen": str(shared("qwen", make_qwen)),
        "sentencepiece": str(shared("piece", piece)),
    }


@pytest.fixture(scope="session")
def trained(shared: Callable[[str, Make], Path]) -> Callable[..., Path]:
    """Trains by the command, once for each set of flags, and returns the run's folder, which is only read."""
    data = shared("pairs", lambda folder: write_pairs(folder / "pairs.jsonl")) / "pairs.jsonl"

    def run(*flags: str) -> Path:
        argv = ["train", "--data", str(data), "--max-steps", "3", "--learning-rate", "0.02", "--dtype", "float32"]
        argv += ["--lora-r", "4", "--report-samples", "0", *flags]

        def make(folder: Path) -> None:
            assert main([*argv, "--output-dir", str(folder / "out")]) == 0

        return shared(f"run-{hashlib.sha256(json.dumps(flags).encode()).hexdigest()[:16]}", make) / "out"

    return run


@pytest.fixture(scope="session")
def embedded(own_cache: None, shared: Callable[[str, Make], Path]) -> str:
    """The folder of the embedded 135M model, which is made once for all processes where the user has none."""
    here = cache_dir() / EMBEDDED_MODEL
    if not here.exists():

        def make(folder: Path) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("LITE_DIL_CACHE", str(folder))
                resolve_model(EMBEDDED_MODEL)

        here.symlink_to(shared("embedded", make) / EMBEDDED_MODEL)
    return resolve_model(EMBEDDED_MODEL)


@pytest.fixture(params=BACKENDS)
def backend_name(request: pytest.FixtureRequest) -> str:
    return request.param


def config(**changes: object) -> ResolvedConfig:
    """A resolved float32 config."""
    made = TrainConfig(**{"dtype": "float32", **changes})
    made.check()
    return made.resolved()


def load(name: str, model: str, **changes: object) -> Backend:
    """A backend on a tiny model."""
    made = config(**changes)
    return registry.load(name, made, model, made, made)


def criterion(**changes: object) -> Criterion:
    """The objective of a config, for data of pairs."""
    return Criterion(config(**changes), examples(1))


def one_step(
    backend: Backend,
    batches: Sequence[Batch],
    criterion: Criterion,
    rate: float,
    references: Sequence[np.ndarray | None] | None = None,
    baseline: float = 0.0,
) -> StepResult:
    """An optimiser step of a criterion."""
    return backend.step(micro_batches(batches, criterion, references, baseline), criterion, rate)


def examples(pairs: int = 3, seed: int = 0, vocabulary: int = 512) -> list[Example]:
    """Random token ids of unequal lengths."""
    draw = np.random.default_rng(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(int(i) for i in draw.integers(3, vocabulary, draw.integers(low, high)))

    return [Example(ids(3, 12), (ids(2, 9), ids(1, 12)), (1, -1)) for _ in range(pairs)]


def pair_row(prompt: str | list[Message], chosen: Completion, rejected: Completion, place: str = "") -> Row:
    """A row of a pair, as a reader makes it."""
    return Row(prompt, (chosen, rejected), (CHOSEN, REJECTED), place, "pairs")


def batch(pairs: int = 3, seed: int = 0, vocabulary: int = 512) -> Batch:
    return Batch.of(examples(pairs, seed, vocabulary))


def write_pairs(path: Path, pairs: int = 12) -> Path:
    """A JSON Lines file of chat pairs over the tiny tokenizer's words."""
    draw = random.Random(1)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(pairs):
            sides = {side: " ".join(draw.choices(WORDS, k=draw.randint(2, 9))) for side in ("user", "chosen", "rejected")}
            row = {
                "prompt": [{"role": "user", "content": sides["user"]}],
                "chosen": [{"role": "assistant", "content": sides["chosen"] + " yes"}],
                "rejected": [{"role": "assistant", "content": sides["rejected"] + " no"}],
            }
            file.write(json.dumps(row) + "\n")
    return path


def bare_model(model: str) -> torch.nn.Module:
    """The checkpoint as transformers alone loads it, in float32: the oracle."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()


def oracle_logps(model: torch.nn.Module, data: Batch) -> torch.Tensor:
    """Log-probs of the response tokens by the textbook: whole logits, one sequence at a time, no padding."""
    parts = []
    for response, prompt in zip(data.responses, data.prompt_of, strict=True):
        start = len(data.prompts[prompt])
        ids = torch.from_numpy(np.concatenate([data.prompts[prompt], response]))[None]
        logps = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        parts.append(logps.gather(-1, ids[0, 1:, None])[start - 1 :, 0])
    return torch.cat(parts)
