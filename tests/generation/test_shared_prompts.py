"""Several answers to a prompt: the prompt computed once, each answer what it is alone."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bare_model, batch, criterion, load, make_checkpoint, one_step, oracle_logps
from transformers import AutoConfig, AutoModelForCausalLM

from lite_dil.backends.torch import generate as torch_generate
from lite_dil.backends.types import OWN, Generated
from lite_dil.batching.batch import Batch
from lite_dil.data.encoder import Example
from lite_dil.generation.rollouts import rollouts

VOCABULARY, ENDS, ROOM = 24, [2, 20], 12
LONG = [3, 4, 11, 12, 13, 14, 15, 3, 3, 4, 9, 10, 23]
PROMPTS = [[5], [5, 6, 7, 8], LONG, [5, 6, 7, 8], [9, 10], LONG, [5], LONG]
SEEDS = [3, 2**64 - 1, 0, 17, 5, 1, 4, 0]

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
QWEN3_NEXT = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
TORCH_MODELS: dict[str, tuple[bool, dict[str, Any]]] = {  # whether prompts are shared, and what the configuration says
    "mistral": (True, {"sliding_window": 6}),
    "gemma2": (True, {"sliding_window": 6}),
    "gpt2": (True, {"n_embd": 32, "n_layer": 2, "n_head": 4}),
    "qwen3_next": (True, QWEN3_NEXT),
    "recurrent_gemma": (False, {"lru_width": 32, "num_hidden_layers": 3}),  # its state is in its modules
    "mamba": (False, {"state_size": 8}),  # its cache has another name
    "minimax": (False, {"num_local_experts": 2}),  # its cache is of a class of its own
}
MLX_MODELS: dict[str, dict[str, Any]] = {
    "gemma2": {"rms_norm_eps": 1e-5, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "mamba": {
        "state_size": 8,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "time_step_rank": 4,
    },
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model of a few tokens."""
    return str(make_checkpoint(tmp_path_factory.mktemp("small"), vocab=VOCABULARY))


def trained(name: str, model: str) -> Any:
    """A backend whose adapter does something."""
    backend = load(name, model)
    one_step(backend, [batch(vocabulary=VOCABULARY)], criterion(), 0.05)
    return backend


@pytest.mark.parametrize("seeds", [None, SEEDS])
def test_each_answer_is_what_it_is_alone(backend_name: str, small: str, seeds: list[int] | None) -> None:
    backend = trained(backend_name, small)
    found = []
    for off in (True, False):
        with backend.adapter_off() if off else nullcontext():
            answers = backend.generate(PROMPTS, ROOM, ENDS, seeds)
            alone = [
                Generated.of(list(backend.stream(prompt, ROOM, ENDS, seeds and seeds[row])), ENDS)
                for row, prompt in enumerate(PROMPTS)
            ]
        assert answers == alone
        assert answers[2] == answers[7]  # the same prompt and seed
        assert {answer.end is None for answer in answers} == {True, False}
        found.append(answers)
    assert found[0] != found[1]


def test_a_prompt_is_computed_once(backend_name: str, small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, shapes = load(backend_name, small), list[tuple[int, ...]]()
    if backend_name == "mlx":
        kind = type(backend.model.model.embed_tokens)  # type: ignore[attr-defined]
        call = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda self, ids: shapes.append(ids.shape) or call(self, ids))
    else:
        backend.base.get_input_embeddings().register_forward_pre_hook(  # type: ignore[attr-defined]
            lambda _, ids: shapes.append(tuple(ids[0].shape))
        )
    backend.generate([LONG] * 8, 3, ENDS, range(8))
    once = [shape for shape in shapes if shape[1] > 1]
    assert once == [(1, len(LONG) - (backend_name == "mlx"))]  # MLX takes the last token with the answers' first step


def test_an_answer_that_has_ended_is_not_computed_further(
    backend_name: str, small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, rows = trained(backend_name, small), list[int]()
    lengths = sorted(len(ids) for ids, _ in backend.generate([LONG] * 8, ROOM, ENDS, range(8)))
    assert lengths[0] + 2 < lengths[-1]
    if backend_name == "mlx":
        kind = type(backend.model.model.embed_tokens)
        call = kind.__call__
        monkeypatch.setattr(kind, "__call__", lambda self, ids: rows.append(ids.shape[0]) or call(self, ids))
    else:
        backend.base.get_input_embeddings().register_forward_pre_hook(lambda _, ids: rows.append(len(ids[0])))
    backend.generate([LONG] * 8, ROOM, ENDS, range(8))
    steps = rows[1 + (backend_name == "mlx") :]  # after the prompt's, and before it 13 rows that test whether MLX has batches
    assert len(steps) > 3 and steps == sorted(steps, reverse=True) and steps[-1] < 8


@pytest.mark.parametrize("name", TORCH_MODELS)
def test_transformers_models_of_any_state(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention in windows, recurrent states, and state that cannot be shared, where prompts are computed row by row."""
    shared, sizes = TORCH_MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SIZES | sizes)).float().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    prompts, seeds = ([LONG] * 4 if name == "recurrent_gemma" else PROMPTS), SEEDS  # which padding changes

    def answer(prompts: list[list[int]], seeds: list[int]) -> list[Generated]:
        return torch_generate.generate(model, torch.device("cpu"), prompts, ROOM, ENDS, seeds, OWN)

    reordered: list[Any] = []
    reorder = torch_generate.DynamicCache.reorder_cache
    monkeypatch.setattr(
        torch_generate.DynamicCache, "reorder_cache", lambda cache, rows: reordered.append(rows) or reorder(cache, rows)
    )
    answers = answer(prompts, seeds[: len(prompts)])
    assert bool(reordered) == shared
    assert answers == [answer([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=False)]


@pytest.mark.parametrize("name", MLX_MODELS)
def test_mlx_models_that_cannot_be_batched_or_padded(name: str) -> None:
    """Gemma 2, whose code takes a row's mask for a head's, and Mamba, whose code ignores padding."""
    import mlx.core as mx
    from mlx.utils import tree_map

    from lite_dil.backends.mlx import generate as mlx_generate

    module = importlib.import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict({"model_type": name, **SIZES, **MLX_MODELS[name]}))
    keys = iter(mx.random.split(mx.random.key(0), 100))
    model.update(tree_map(lambda p: 0.2 * mx.random.normal(p.shape, key=next(keys)) if p.ndim > 1 else p, model.parameters()))
    for rows in (2, len(PROMPTS)):  # Gemma 2 has as many heads of keys, and fewer
        prompts, seeds = PROMPTS[-rows:], SEEDS[-rows:]
        answers = mlx_generate.generate(model, prompts, ROOM, ENDS, seeds, OWN)
        assert answers == [
            Generated.of(list(mlx_generate.stream(model, prompt, ROOM, ENDS, processor)), ENDS)
            for prompt, processor in zip(prompts, mlx_generate.processors_of(prompts, seeds, OWN), strict=True)
        ]


def test_rollouts_are_draws_with_their_log_probs(backend_name: str, small: str) -> None:
    """The ids of `generate` for the same seeds, and log-probs of a pass as training's; by the adapter that is on."""
    backend, said = trained(backend_name, small), list[str]()
    prompts, seeds = [LONG, [5, 6, 7, 8], [9, 10]], [[1, 2, 1], [], [2**64 - 1, 3]]

    def check(on: bool) -> None:
        found = rollouts(backend, prompts, seeds, ROOM, ENDS, said.append, row_tokens=8)  # several batches and passes
        assert [len(several) for several in found] == [3, 0, 2]
        for prompt, own, several in zip(prompts, seeds, found, strict=True):
            for seed, one in zip(own, several, strict=True):
                ((ids, end),) = backend.generate([prompt], ROOM, ENDS, [seed])
                assert (one.ids, one.ended) == ((*ids, *([] if end is None else [end])), end is not None)
        examples = [
            Example(tuple(prompt), tuple(one.ids for one in several), (1,) * len(several))
            for prompt, several in zip(prompts, found, strict=True)
            if several
        ]
        data = Batch.of(examples)
        logps = np.concatenate([one.logps for several in found for one in several])
        np.testing.assert_allclose(logps, backend.token_logps(data), atol=2e-5)
        assert logps.dtype == np.float32
        with backend.adapter_off():
            reference = np.concatenate([one.reference_logps for several in found for one in several])
            np.testing.assert_allclose(reference, backend.token_logps(data), atol=2e-5)
        if not on:
            assert np.array_equal(logps, reference)  # to the bit: from passes of the same shape
            np.testing.assert_allclose(logps, oracle_logps(bare_model(small), data).detach(), atol=2e-5)

    for on in (True, False):
        with nullcontext() if on else backend.adapter_off():
            check(on)
    assert not said
