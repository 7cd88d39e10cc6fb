"""The invariants that both backends hold on tiny models, each against an oracle that shares no code with it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bare_model, batch, criterion, examples, load, make_checkpoint, one_step, oracle_logps
from steps import adapter, step

from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch
from lite_dil.batching.layouts import plain, prefix


def test_logps_equal_the_models_own(backend_name: str, tiny: str, tiny_tied: str) -> None:
    for model in (tiny, tiny_tied):
        data = batch()
        with torch.no_grad():
            expected = oracle_logps(bare_model(model), data).numpy()
        np.testing.assert_allclose(load(backend_name, model).token_logps(data), expected, atol=2e-5)


def test_fresh_adapter_has_log_ratio_0_and_a_gradient(backend_name: str, tiny: str) -> None:
    backend = load(backend_name, tiny)
    result = step(backend, [batch()])
    assert (result.policy == result.reference).all()
    assert result.grad_norm > 1e-3
    assert result.loss == pytest.approx(-0.5)  # lsif at f = 0


@pytest.mark.parametrize("loss", ["lsif", "ukl", "bce", "dpo"])
def test_a_step_moves_the_adapter_and_not_the_reference(backend_name: str, tiny: str, loss: str) -> None:
    backend, data = load(backend_name, tiny, loss=loss), batch()
    with backend.adapter_off():
        before = backend.token_logps(data)
    weights = adapter(backend)
    step(backend, [data], loss=loss)
    with backend.adapter_off():
        np.testing.assert_array_equal(backend.token_logps(data), before)
    moved = adapter(backend)
    assert all((moved[name] != weights[name]).any() for name in weights if name.endswith("lora_b"))
    f = (backend.token_logps(data) - before).astype(np.float64)
    owner = np.repeat(np.arange(len(data.responses)), data.lengths.astype(int))
    sums = np.bincount(owner, f)
    assert (sums[data.chosen] / data.lengths[data.chosen]).mean() > (sums[data.rejected] / data.lengths[data.rejected]).mean()


def test_adapter_off_is_the_base_and_returns_after_an_exception(backend_name: str, tiny: str) -> None:
    backend, data = load(backend_name, tiny), batch()
    step(backend, [data])
    on = backend.token_logps(data)
    off = None
    with contextlib.suppress(KeyError), backend.adapter_off():
        off = backend.token_logps(data)
        raise KeyError
    with torch.no_grad():
        np.testing.assert_allclose(off, oracle_logps(bare_model(tiny), data).numpy(), atol=2e-5)
    np.testing.assert_array_equal(backend.token_logps(data), on)
    assert np.abs(on - off).max() > 1e-2


def test_a_step_after_adapter_off_still_trains(backend_name: str, tiny: str) -> None:
    backend = load(backend_name, tiny)
    with backend.adapter_off():
        backend.sequence_logps(batch())
    assert step(backend, [batch()]).grad_norm > 1e-3


def test_padding_pad_id_and_order_change_nothing(backend_name: str, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, data = load(backend_name, tiny, layout="plain"), batch(4)
    step(backend, [data])
    logps = backend.sequence_logps(data)
    norm = step(backend, [data], rate=0.0).grad_norm
    module = __import__(f"lite_dil.backends.{'mlx.backend' if backend_name == 'mlx' else 'torch.reading'}", fromlist=["plain"])
    for pad_id, multiple in ((7, 1), (500, 64)):
        with monkeypatch.context() as patch:
            for layout in (plain, prefix):
                patch.setattr(
                    module,
                    layout.__name__,
                    lambda data, layout=layout, p=pad_id, m=multiple, **_: layout(data, pad_id=p, multiple=m),
                    raising=False,
                )
            np.testing.assert_allclose(backend.sequence_logps(data), logps, atol=5e-5)
            assert step(backend, [data], rate=0.0).grad_norm == pytest.approx(norm, rel=1e-4)
    backwards = Batch.of(examples(4)[::-1])
    assert step(backend, [backwards], rate=0.0).grad_norm == pytest.approx(norm, rel=1e-4)
    np.testing.assert_allclose(backend.sequence_logps(backwards).reshape(4, 2)[::-1].ravel(), logps, atol=5e-5)
    one_by_one = [backend.sequence_logps(Batch.of([example])) for example in examples(4)]
    np.testing.assert_allclose(np.concatenate(one_by_one), logps, atol=5e-5)


def test_chunks_change_nothing(backend_name: str, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load(backend_name, tiny)
    results = [step(whole, [batch()]), step(whole, [batch()])]
    module = __import__(f"lite_dil.backends.{'mlx' if backend_name == 'mlx' else 'torch'}.head", fromlist=["chunk_tokens"])
    monkeypatch.setattr(module, "chunk_tokens", lambda vocabulary, elements: 5)
    chunked = load(backend_name, tiny)
    for result in results:
        again = step(chunked, [batch()])
        np.testing.assert_allclose(again.policy, result.policy, rtol=1e-5, atol=5e-5)
        assert again.grad_norm == pytest.approx(result.grad_norm, rel=1e-4)


@pytest.mark.parametrize("loss", ["lsif", "dpo"])
def test_micro_batches_equal_one_batch(backend_name: str, tiny: str, loss: str) -> None:
    data = examples(5)
    whole, split = load(backend_name, tiny, loss=loss), load(backend_name, tiny, loss=loss)
    for _ in range(3):
        one = step(whole, [Batch.of(data)], 1e-3, loss=loss)
        many = step(split, [Batch.of(data[:2]), Batch.of(data[2:4]), Batch.of(data[4:])], 1e-3, loss=loss)
        assert many.loss == pytest.approx(one.loss, abs=2e-5)
        assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)
        np.testing.assert_allclose(many.policy, one.policy, atol=2e-4)


def test_gradients_equal_autograd_through_whole_logits(backend_name: str, tiny: str) -> None:
    """The oracle merges W + scale B A by hand into the bare model and lets torch differentiate the textbook formula."""
    backend, data = load(backend_name, tiny, max_grad_norm=1e9), batch()
    step(backend, [data])  # so that B is not 0
    weights = adapter(backend)
    bare = bare_model(tiny)
    leaves = {name: torch.from_numpy(value).requires_grad_() for name, value in weights.items()}
    with torch.no_grad():
        reference = oracle_logps(bare, data)
    parameters = dict(bare.named_parameters())
    merged = {
        name.removesuffix(".lora_a") + ".weight": parameters[name.removesuffix(".lora_a") + ".weight"]
        + 2.0 * (leaves[name] @ leaves[name.replace("lora_a", "lora_b")]).T
        for name in leaves
        if name.endswith("lora_a")
    }

    class Merged(torch.nn.Module):
        def forward(self, **inputs: Any) -> Any:
            return torch.func.functional_call(bare, merged, kwargs=inputs)

    logps = oracle_logps(Merged(), data)
    owner = torch.from_numpy(np.repeat(np.arange(len(data.responses)), data.lengths.astype(int)))
    f = torch.zeros(len(data.responses)).index_add(0, owner, logps - reference) / torch.from_numpy(data.lengths)
    loss = (-f[data.chosen].exp() + (2 * f[data.rejected]).exp() / 2).mean()
    expected = torch.autograd.grad(loss, list(leaves.values()))
    norm = torch.sqrt(sum((gradient**2).sum() for gradient in expected)).item()

    result = step(backend, [data], rate=0.0)
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)
    assert result.grad_norm == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_gradient_checkpointing_changes_nothing(backend_name: str, tiny: str, dropout: float, mode: str) -> None:
    """With dropout too: what is computed again for the backward pass must drop the same."""
    results = {}
    for on in ("off", mode):
        backend = load(backend_name, tiny, gradient_checkpointing=on, lora_dropout=dropout)
        results[on] = [step(backend, [batch()]) for _ in range(3)]
    for plain_result, checkpointed in zip(results["off"], results[mode], strict=True):
        assert checkpointed.grad_norm == pytest.approx(plain_result.grad_norm, rel=1e-5)
        np.testing.assert_allclose(checkpointed.policy, plain_result.policy, atol=1e-5)


def test_dropout_acts_in_training_only_and_never_on_the_reference(backend_name: str, tiny: str) -> None:
    backend, data = load(backend_name, tiny, lora_dropout=0.5), batch()
    step(backend, [data])
    np.testing.assert_array_equal(backend.sequence_logps(data), backend.sequence_logps(data))
    first, second = step(backend, [data], rate=0.0), step(backend, [data], rate=0.0)
    np.testing.assert_array_equal(first.reference, second.reference)
    assert (first.policy != second.policy).any()


def test_weight_decay_reaches_the_optimiser(backend_name: str, tiny: str) -> None:
    weights = {}
    for decay in (0.0, 0.5):
        backend = load(backend_name, tiny, weight_decay=decay)
        step(backend, [batch()], rate=0.1)
        weights[decay] = adapter(backend)
    name = next(name for name in weights[0.0] if name.endswith("lora_a"))
    start = adapter(load(backend_name, tiny))[name]
    # One AdamW step: w - rate * decay * w - rate * update, the same update in both.
    np.testing.assert_allclose(weights[0.5][name], weights[0.0][name] - 0.1 * 0.5 * start, atol=1e-6)


def test_gradients_are_clipped_and_the_norm_is_from_before(backend_name: str, tiny: str) -> None:
    """AdamW divides by |g| + 1e-8, so a clip far below that shows in the step."""
    moved, norms = {}, {}
    for limit in (1.0, 1e-12):
        backend = load(backend_name, tiny, max_grad_norm=limit)
        norms[limit] = step(backend, [batch()], 1e-3).grad_norm
        moved[limit] = max(np.abs(value).max() for name, value in adapter(backend).items() if name.endswith("lora_b"))
    assert moved[1.0] == pytest.approx(1e-3, rel=1e-3)
    assert moved[1e-12] < 1e-6
    assert norms[1.0] == norms[1e-12]


def test_generation_is_greedy_and_stops_at_the_end_token(backend_name: str, tiny: str) -> None:
    backend = load(backend_name, tiny)
    step(backend, [batch()], rate=0.05)
    prompts = [[5, 6, 7, 8], [9, 10]]
    answers = backend.generate(prompts, 6, [2])
    for prompt, (answer, end) in zip(prompts, answers, strict=True):
        assert len(answer) < 6 if end == 2 else (len(answer), end) == (6, None)
        assert 2 not in answer
        for i, token in enumerate(answer):
            if i in (0, len(answer) - 1):
                here, tokens = [np.array([*prompt, *answer[:i]])], [np.array([t]) for t in range(512)]
                assert backend.token_logps(Batch(here, tokens, np.zeros(512, int), np.ones(512, int))).argmax() == token
    # With the first token of an answer as the end token, the answer is empty.
    first = answers[0].ids[0]
    assert backend.generate(prompts[:1], 6, [2, first]) == [([], first)]


def test_both_backends_start_from_the_same_adapter(tiny: str) -> None:
    first, second = adapter(load("cpu", tiny, seed=3)), adapter(load("mlx", tiny, seed=3))
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name])
    other = adapter(load("cpu", tiny, seed=4))
    assert any((other[name] != first[name]).any() for name in first)


def test_target_modules_are_the_ones_that_get_an_adapter(backend_name: str, tiny: str) -> None:
    names = adapter(load(backend_name, tiny, target_modules="q_proj, down_proj"))
    assert {name.split(".")[-2] for name in names} == {"q_proj", "down_proj"}
    assert len(names) == 2 * 2 * 2  # layers, modules, A and B
    with pytest.raises(UserError, match=r"'qproj'.*q_proj"):
        load(backend_name, tiny, target_modules="qproj")


def test_non_finite_gradients_leave_the_weights_alone(backend_name: str, tiny: str) -> None:
    backend = load(backend_name, tiny)
    weights = adapter(backend)
    result = one_step(backend, [batch()], criterion(), 0.1, references=[np.full(6, -np.inf, np.float32)])
    assert not np.isfinite(result.grad_norm)
    for name, value in adapter(backend).items():
        np.testing.assert_array_equal(value, weights[name])


def test_loss_scaling_changes_nothing_and_skips_overflows(tiny: str) -> None:
    """The float16 path of GPUs, whose scaler runs on a CPU too."""
    plain_backend, scaled = load("cpu", tiny), load("cpu", tiny)
    scaled.adapters["policy"].scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for _ in range(2):
        one, two = step(plain_backend, [batch()], 1e-3), step(scaled, [batch()], 1e-3)
        assert two.loss == one.loss
        assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
        assert not two.skipped
    weights = adapter(scaled)
    scaled.adapters["policy"].scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    result = one_step(scaled, [batch()], criterion(chosen_weight=1e3, rejected_weight=1e3), 1e-2)
    assert result.skipped
    assert result.grad_norm == 0
    for name, value in adapter(scaled).items():
        np.testing.assert_array_equal(value, weights[name])
    assert scaled.adapters["policy"].scaler.get_scale() == 2.0**126


def test_the_base_models_own_dropout_is_off(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | {"attention_dropout": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    result = step(load("cpu", str(tmp_path)), [batch()])
    assert (result.policy == result.reference).all()
