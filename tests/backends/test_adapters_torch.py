"""Named adapters of the torch backend: what its backward passes remember, and its files."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bare_model, batch, criterion, load, one_step, oracle_logps
from safetensors.torch import load_file
from test_adapters import OTHER, BradleyTerry, Imitation, equal, logps, sides, trained

from lite_dil.backends.torch import adapters as torch_adapters
from lite_dil.backends.types import POLICY, REFERENCE, Head, MicroBatch
from lite_dil.base.errors import OutOfMemory, UserError
from lite_dil.objectives.loss import TOKENS

MODES = [
    {"fused_layers": fused, "gradient_checkpointing": mode, "layout": layout}
    for fused in (True, False)
    for mode in ("off", "selective", "full")
    for layout in ("plain", "packed")
]


def gradients(backend: Any, name: str) -> dict[str, torch.Tensor]:
    return {key: weight.grad for key, weight in backend.adapters[name].weights.items()}


@pytest.mark.parametrize("options", MODES, ids=lambda o: "-".join(map(str, o.values())))
def test_a_backward_pass_outside_of_the_block_is_of_the_adapter_that_was_on(options: dict[str, Any], tiny: str) -> None:
    backend, data = trained(load("cpu", tiny, **options)), batch()
    with backend.using("rm"):
        backend.reader.logps(data, TOKENS).square().sum().backward()
    inside = {key: grad.clone() for key, grad in gradients(backend, "rm").items()}
    backend.adapters["rm"].forget_gradients()
    with backend.using("rm"):
        loss = backend.reader.logps(data, TOKENS).square().sum()
    with backend.adapter_off():
        loss.backward()
    assert all(grad is None for grad in gradients(backend, POLICY).values())
    for key, grad in gradients(backend, "rm").items():
        assert torch.equal(grad, inside[key]), key
        assert grad.abs().max() > 0
    assert backend.switch.on == POLICY


def test_a_step_gives_gradients_to_its_own_adapter_alone(tiny: str) -> None:
    backend = trained(load("cpu", tiny), Head(1))
    for name, other in (("rm", POLICY), (POLICY, "rm")):
        seen = []

        def look(*_: Any, name: str = name, other: str = other, seen: list[Any] = seen) -> None:
            seen.append(all(grad is not None for grad in gradients(backend, name).values()))
            seen.append(all(parameter.grad is None for parameter in backend.adapters[other].parameters))
            seen.append(all(p.grad is None for p in backend.base.parameters() if not p.requires_grad))

        handle = backend.adapters[name].optimizer.register_step_pre_hook(look)
        if name == "rm":
            backend.step(sides(batch()), BradleyTerry(), 1e-3, "rm")
        else:
            one_step(backend, [batch()], criterion(), 1e-3)
        handle.remove()
        assert seen == [True, True, True]
        assert all(p.grad is None for each in backend.adapters.values() for p in each.parameters)


@pytest.mark.parametrize("mode", ["off", "selective", "full"])
def test_every_adapter_has_its_own_dropout_and_the_others_stay_fused(tiny: str, mode: str) -> None:
    """An adapter with dropout goes PEFT's way, and the policy not: its log-probs and its gradients are those of before."""
    results = []
    for beside in (False, True):
        backend: Any = load("cpu", tiny, gradient_checkpointing=mode, layout="packed")
        if beside:
            backend.add_adapter("rm", 4, 8.0, dropout=0.5)
            backend.step([MicroBatch(batch(), {})], Imitation(), 1e-2, "rm")
        results.append([one_step(backend, [batch()], criterion(), 1e-2) for _ in range(2)])
    for one, other in zip(*results, strict=True):
        assert one.grad_norm == other.grad_norm
        np.testing.assert_array_equal(one.policy, other.policy)
    drawn = [backend.step([MicroBatch(batch(), {})], Imitation(), 0.0, "rm").loss for _ in range(2)]
    assert drawn[0] != drawn[1]
    with backend.using(POLICY):
        kinds = graph_kinds(backend.reader.logps(batch(), TOKENS))
    assert ("_GatedMLPBackward" in kinds) == (mode != "full")


def graph_kinds(value: torch.Tensor) -> set[str]:
    seen, todo = set(), [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo.extend(following for following, _ in node.next_functions)
    return {type(node).__name__ for node in seen}


def test_fused_layers_serve_an_adapter_of_another_rank_and_scale(tiny: str) -> None:
    backend = trained(load("cpu", tiny))
    stock = trained(load("cpu", tiny, fused_layers=False))
    with backend.using("rm"):
        kinds = graph_kinds(backend.reader.logps(batch(), TOKENS))
    assert {"_LoRABackward", "_GatedMLPBackward", "_RMSNormBackward"} <= kinds
    one, other = logps(backend, batch()), logps(stock, batch())
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-4)


def test_what_dropout_draws_is_drawn_again_for_the_adapter_that_was_on(tiny: str) -> None:
    norms = []
    for mode in ("off", "selective", "full"):
        backend: Any = load("cpu", tiny, gradient_checkpointing=mode)
        backend.add_adapter("rm", 4, 8.0, dropout=0.5)
        norms.append([backend.step([MicroBatch(batch(), {})], Imitation(), 1e-2, "rm").grad_norm for _ in range(3)])
    for found in norms[1:]:
        assert found == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize("optim", ["adamw", "paged_adamw_8bit"])
@pytest.mark.parametrize("place", ["clip", "states"])
def test_a_step_of_an_added_adapter_that_failed_left_no_trace(
    tiny: str, monkeypatch: pytest.MonkeyPatch, optim: str, place: str
) -> None:
    results, backends = [], []
    for broken in (False, True):
        backend: Any = load("cpu", tiny, optim=optim)
        backend.add_adapter("rm", 4, 8.0, dropout=0.3, head=Head(1))
        if broken:
            with monkeypatch.context() as patch:
                fail = torch.OutOfMemoryError("CUDA out of memory.")

                def raise_it(*_: Any, fail: Exception = fail) -> None:
                    raise fail

                if place == "clip":
                    patch.setattr(torch.nn.utils, "clip_grad_norm_", raise_it)
                else:
                    patch.setattr(torch_adapters, "create_states", raise_it)
                with pytest.raises(OutOfMemory) as caught:
                    backend.step(sides(batch()), BradleyTerry(), 1e-2, "rm")
            assert caught.value.__context__ is None
            assert all(p.grad is None for each in backend.adapters.values() for p in each.parameters)
            assert backend.switch.on == POLICY
        results.append([backend.step(sides(batch()), BradleyTerry(), 1e-2, "rm") for _ in range(3)])
        backends.append(backend)
    for one, other in zip(*results, strict=True):
        assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
    for one, other in zip(*(backend.adapters["rm"].parameters for backend in backends), strict=True):
        assert torch.equal(one, other)


def test_plain_peft_loads_a_saved_adapter(tiny: str, tmp_path: Path) -> None:
    from peft import PeftModel

    backend: Any = load("cpu", tiny)
    for name in ("mlp", "rm"):  # PEFT looks for names in names: one that the model's layers have too
        backend.add_adapter(name, **OTHER, head=Head(1) if name == "rm" else None)
        backend.step([MicroBatch(batch(), {})], Imitation(), 1e-2, name)
    one_step(backend, [batch()], criterion(), 1e-2)
    expected = logps(backend, batch(), (POLICY, "mlp", "rm"))
    for name, values in expected.items():
        backend.save_adapter(tmp_path / name, name)
        files = {path.name for path in (tmp_path / name).iterdir()}
        own = {"head.safetensors", "head.json"} if name == "rm" else set()
        assert files == {"adapter_config.json", "adapter_model.safetensors"} | own
        keys = load_file(tmp_path / name / "adapter_model.safetensors")
        assert "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight" in keys
        assert {value.dtype for value in keys.values()} == {torch.float32}
        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            loaded = PeftModel.from_pretrained(bare_model(tiny), str(tmp_path / name))
            np.testing.assert_allclose(oracle_logps(loaded, batch()).numpy(), values, atol=1e-4)


def test_a_state_in_one_file_as_it_was_before_is_read(tiny: str, tmp_path: Path) -> None:
    whole: Any = load("cpu", tiny, lora_dropout=0.2)
    one_step(whole, [batch()], criterion(), 1e-2)
    policy = whole.adapters[POLICY]
    state = {
        "adapter": {key: value for key, value in whole.model.named_parameters() if value.requires_grad},
        "optimizer": policy.optimizer.state_dict(),
        "scaler": policy.scaler.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": None,
    }
    torch.save(copy.deepcopy(state), tmp_path / "state.pt")
    expected = [one_step(whole, [batch()], criterion(), 1e-2) for _ in range(2)]
    resumed: Any = load("cpu", tiny, lora_dropout=0.2)
    resumed.load_state(tmp_path)
    for one in expected:
        other = one_step(resumed, [batch()], criterion(), 1e-2)
        assert (one.loss, one.grad_norm) == (other.loss, other.grad_norm)
    equal(logps(whole, batch(), (POLICY,)), logps(resumed, batch(), (POLICY,)), (POLICY,))
    resumed.add_adapter("rm", 2, 4.0)
    with pytest.raises(UserError, match=r"policy; .*policy, rm"):
        resumed.load_state(tmp_path)


def test_a_saved_adapter_of_another_shape_is_refused(tiny: str, tmp_path: Path) -> None:
    one, other = load("cpu", tiny, lora_r=4), load("cpu", tiny, lora_r=8)
    one.save_state(tmp_path)
    with pytest.raises(UserError, match="rank"):
        other.load_state(tmp_path)


def test_a_head_is_float32_whatever_the_model_computes_in(tiny: str) -> None:
    backend: Any = load("cpu", tiny, dtype="bfloat16")
    backend.add_adapter("rm", 4, 8.0, head=Head(1))
    losses = [backend.step(sides(batch()), BradleyTerry(), 1e-2, "rm").loss for _ in range(4)]
    assert losses[-1] < losses[0]
    assert {p.dtype for p in backend.adapters["rm"].parameters} == {torch.float32}
    assert backend.scores(batch(), "rm").dtype == np.float32


def test_inference_has_no_optimiser_and_frozen_adapters_stay_frozen(tiny: str, tmp_path: Path) -> None:
    backend: Any = load("cpu", tiny)
    backend.save_adapter(tmp_path)
    other: Any = load("cpu", tiny, init_adapter=str(tmp_path), reference="initial-adapter")
    other.add_adapter("rm", 2, 4.0)
    learns = {key for key, value in other.model.named_parameters() if value.requires_grad}
    assert learns == {*other.adapters[POLICY].weights, *other.adapters["rm"].weights}
    logps(other, batch(), (POLICY, REFERENCE, "rm"))
    assert all(adapter.state() is None for adapter in other.adapters.values())
    one_step(other, [batch()], criterion(), 1e-3)
    assert [adapter.state() is None for adapter in other.adapters.values()] == [False, True]
