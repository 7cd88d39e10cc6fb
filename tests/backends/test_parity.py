"""The same Hugging Face checkpoint on torch and on MLX, float32: log-probs, gradients and the first steps of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bare_model, batch, criterion, load, make_checkpoint, oracle_logps
from step_gradients import Adapter, random_adapter, relative_error, set_adapter, step_gradients
from steps import adapter, step
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig, Qwen3Config

from lite_dil.backends.probes import HeadMismatch
from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch
from lite_dil.models.logits import LogitTransform


def gradients(name: str, model: str, data: Batch, **changes: Any) -> tuple[Adapter, np.ndarray]:
    """LoRA gradients of the lsif loss at an adapter whose B is not 0, and the policy's log-probs there."""
    backend = load(name, model, max_grad_norm=1e9, **changes)
    own = adapter(backend)  # with A as training draws it: a larger one amplifies the embedded model's rounding
    set_adapter(backend, {k: v if k.endswith("lora_b") else own[k] for k, v in random_adapter(own).items()})
    return step_gradients(backend, [data], criterion(**changes))[1], backend.token_logps(data)


def assert_same_gradients(model: str, data: Batch, tolerance: float, **changes: Any) -> None:
    (in_torch, torch_logps), (in_mlx, mlx_logps) = (gradients(name, model, data, **changes) for name in ("cpu", "mlx"))
    np.testing.assert_allclose(mlx_logps, torch_logps, atol=tolerance)
    assert relative_error(in_mlx, in_torch) < 1e-3


def test_tiny_gradients(tiny: str) -> None:
    assert_same_gradients(tiny, batch(), 1e-4)


@pytest.mark.parametrize("loss", ["lsif", "ukl", "bce", "dpo"])
def test_first_steps_of_training(tiny: str, loss: str) -> None:
    results = {}
    for name in ("cpu", "mlx"):
        backend = load(name, tiny, loss=loss, weight_decay=0.1)
        results[name] = [step(backend, [batch(2, seed), batch(1, seed + 9)], 1e-3, loss=loss) for seed in range(5)]
    for one, two in zip(results["cpu"], results["mlx"], strict=True):
        assert two.loss == pytest.approx(one.loss, rel=1e-3, abs=1e-5)
        assert two.grad_norm == pytest.approx(one.grad_norm, rel=2e-3)


ROPES = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 20000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "linear": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0},
}


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_ropes(kind: str, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, rope_theta=1.0)
    config = LlamaConfig.from_pretrained(tmp_path)
    config.rope_parameters = ROPES[kind]
    config.save_pretrained(tmp_path)
    data = batch(2)
    with torch.no_grad():
        expected = oracle_logps(bare_model(str(tmp_path)), data).numpy()
    np.testing.assert_allclose(load("mlx", str(tmp_path)).token_logps(data), expected, atol=1e-4)


def test_a_rope_that_mlx_lm_would_not_read_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["rope_parameters"] = {"rope_type": "default", "base": 7}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"base.*rope_theta"):
        load("mlx", str(tmp_path))


SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
ARCHITECTURES = {
    "soft-capped (Gemma 2)": Gemma2Config(**SMALL, final_logit_softcapping=3.0, query_pre_attn_scalar=16, sliding_window=2048),
    "divided (Granite)": GraniteConfig(**{**SMALL, "logits_scaling": 4.0}),
    "multiplied (Cohere)": CohereConfig(**{**SMALL, "logit_scale": 0.25}),
    "Qwen 3": Qwen3Config(**SMALL),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_models_do_behind_their_head(kind: str, tmp_path: Path) -> None:
    """Log-probs and gradients, against the model's own logits."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[kind]
    model = AutoModelForCausalLM.from_config(architecture)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    data = batch(2)
    with torch.no_grad():
        expected = oracle_logps(bare_model(str(tmp_path)), data).numpy()
    for name in ("cpu", "mlx"):
        np.testing.assert_allclose(load(name, str(tmp_path)).token_logps(data), expected, atol=1e-4)
    assert_same_gradients(str(tmp_path), data, 1e-4)


@pytest.mark.parametrize("name", ["cpu", "mlx"])
def test_an_unknown_transform_behind_the_head_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AutoModelForCausalLM.from_config(ARCHITECTURES["divided (Granite)"]).save_pretrained(tmp_path)
    module = __import__(f"lite_dil.backends.{'mlx' if name == 'mlx' else 'torch'}.backend", fromlist=["logit_transform"])
    monkeypatch.setattr(module, "logit_transform", lambda config: LogitTransform())
    with pytest.raises(HeadMismatch):
        load(name, str(tmp_path))
