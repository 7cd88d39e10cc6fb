"""The benchmark's own arithmetic; what it measures is asserted nowhere."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import benchmark_worker
import pytest
from benchmark_cases import EOS, HH, Job, lengths_of, operations, steps_of
from benchmark_models import text_of, word_tokenizer

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
JOB = Job("short", "lite-dil", "cpu", "nowhere", lengths_of("short", 2), 2)
ONE_LAYER = {
    "hidden_size": 2,
    "intermediate_size": 3,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "vocab_size": 5,
}


def test_operations_by_hand() -> None:
    # Prompt of 2, answers of 1 and 2 tokens: 3 positions are computed (2 of the prompt, 1 of the longer answer), and the last
    # 2 of them predict answers. Keys and values: 2 x (2 x 2) = 8 weights for 3 positions; query and output 8, MLP 18: 26
    # weights for 2 positions.
    forward = 2 * (3 * 8 + 2 * 26)
    lora = 2 * (3 * 2 * 4 + 2 * (2 * 4 + 3 * 5))  # rank 1: in + out a layer
    attention = 4 * 2 * (2 + 3)  # the last prompt token sees 2 keys, the answer's first token 3
    head = 2 * 2 * 5 * 3  # three answer tokens are predicted
    below = 2 * 3 * 12  # nothing is trained below the first layer's query, key and value
    step = 2 * forward - below + 3 * lora + 3 * attention + 2 * head
    assert operations(ONE_LAYER, [(2, 1, 2)], rank=1, with_reference=False) == step
    assert operations(ONE_LAYER, [(2, 1, 2)], rank=1, with_reference=True) == step + forward + attention + head


def test_everyone_sees_the_same_tokens() -> None:
    steps, warmup = steps_of(JOB, 1000)
    assert (len(steps), warmup) == (2, 1)
    tokenizer = word_tokenizer(1000)
    for example in steps[-1]:
        assert (len(example.prompt), *map(len, example.responses)) == (64, 128, 128)
        for response in example.responses:
            assert response[-1] == EOS and EOS not in response[:-1]
            text = f"{text_of(example.prompt)} {text_of(response)}"
            assert tuple(tokenizer(text).input_ids) == example.prompt + response


def test_rounds_and_warmup_repeat_the_same_steps() -> None:
    job = replace(JOB, lengths=tuple(HH[:4]), rounds=2, warmup="full")
    steps, warmup = steps_of(job, 1000)
    assert warmup == 2 and len(steps) == 6
    assert steps[:2] == steps[2:4] == steps[4:]
    assert Job.read(job.key) == job


def test_what_is_missing_is_a_row_and_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = replace(benchmark_worker.CONTESTANTS["trl"], packages=("no_such_package",))
    monkeypatch.setitem(benchmark_worker.CONTESTANTS, "trl", peer)
    assert benchmark_worker.measure(replace(JOB, contestant="trl")) == {
        "status": "not run",
        "reason": "not installed: pip install trl datasets",
    }
    assert benchmark_worker.measure(replace(JOB, contestant="unsloth"))["reason"] == "needs a GPU"


def test_help_needs_no_array_library() -> None:
    code = "import benchmark, sys; benchmark.parse([]); assert not {'torch', 'mlx', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=SCRIPTS, check=True)
