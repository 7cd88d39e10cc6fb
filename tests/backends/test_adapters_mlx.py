"""Named adapters and heads on MLX: each by itself, to the bit; and a mistake of ours is no model that does not fit."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from conftest import bare_model, batch, criterion, load, oracle_logps
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama

from lite_dil.backends.mlx import prefix as mlx_prefix
from lite_dil.backends.mlx.backend import MLXBackend
from lite_dil.backends.types import EACH, END, POLICY, REFERENCE, Head, MicroBatch
from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch
from lite_dil.batching.layouts import packed, plain, prefix
from lite_dil.models import adapter_files
from lite_dil.objectives.loss import NOTHING, SCORES, SUMS, TOKENS

NAMES = (POLICY, REFERENCE, "rm", "judge")


class BradleyTerry:
    """``-log sigmoid(R_w - R_l)`` of the first score, and a pull on the others."""

    reads, reference = SCORES, NOTHING
    token_inputs: tuple[str, ...] = ()

    def __call__(self, policy: mx.array, reference: None, inputs: dict[str, Any]) -> mx.array:
        assert reference is None
        margin = policy[inputs["chosen"], 0] - policy[inputs["rejected"], 0]
        return mx.logaddexp(-margin, mx.zeros_like(margin)).sum() + 0.1 * (policy[:, 1:] - 1).square().sum()


class EachToken:
    """A weighted sum of squares over tokens, beside the reference's sums."""

    reads, reference, token_inputs = SCORES, SUMS, ("weights",)

    def __call__(self, policy: mx.array, reference: mx.array, inputs: dict[str, Any]) -> mx.array:
        return (inputs["weights"][:, None] * (policy - 1).square()).sum() + 0 * reference.sum()


RANK, TARGETS = BradleyTerry(), EachToken()


def ranked(backend: Any, data: Batch, rate: float = 1e-2, name: str = "rm") -> Any:
    chosen, rejected = data.pairs
    return backend.step([MicroBatch(data, {"chosen": chosen, "rejected": rejected})], RANK, rate, adapter=name)


def weighed(backend: Any, data: Batch, name: str, weights: np.ndarray, rate: float = 1e-2) -> Any:
    return backend.step([MicroBatch(data, {"weights": weights})], TARGETS, rate, adapter=name)


def preferred(backend: Any, data: Batch, name: str = POLICY, rate: float = 1e-2) -> Any:
    loss = criterion()
    return backend.step([MicroBatch(data, loss.inputs(data))], loss, rate, adapter=name)


def with_adapters(model: str, **changes: object) -> Any:
    """A backend with a reward model of another rank on other layers, and a judge that scores each token."""
    backend: Any = load("mlx", model, **{"lora_dropout": 0.1, **changes})
    backend.add_adapter("rm", 3, 9.0, "q_proj,down_proj", 0.1, Head(2))
    backend.add_adapter("judge", 2, 2.0, head=Head(1, EACH))
    return backend


def trained(backend: Any, steps: int = 2) -> Any:
    """None of its adapters is at its start."""
    data = batch()
    for _ in range(steps):
        preferred(backend, data)
        ranked(backend, data)
        weighed(backend, data, "judge", np.ones(int(data.lengths.sum()), np.float32))
    return backend


def logps(backend: Any, data: Batch) -> dict[str, np.ndarray]:
    found = {}
    for name in NAMES:
        with backend.using(name):
            found[name] = backend.token_logps(data)
    return found


def arrays(backend: Any, name: str) -> dict[str, np.ndarray]:
    with backend.using(name):
        return {path: np.array(value) for path, value in tree_flatten(backend.model.trainable_parameters())}


def gradients(backend: Any, name: str, take: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """What a step reports, and the gradients that reach the adapter's optimiser."""
    found: dict[str, np.ndarray] = {}
    optimizer = backend.adapters[name].optimizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "update", lambda _, of: found.update({k: np.array(v) for k, v in tree_flatten(of)}))
        return take(), found


@pytest.mark.parametrize(
    ("four", "layout", "checkpointing"),
    [
        (False, "prefix", "off"),
        (False, "prefix", "full"),
        (False, "plain", "selective"),
        (True, "plain", "full"),
        (True, "prefix", "selective"),
    ],
)
def test_one_adapter_is_trained_and_nothing_else_changes(tiny: str, four: bool, layout: str, checkpointing: str) -> None:
    backend = trained(
        with_adapters(tiny, load_in_4bit=four, layout=layout, gradient_checkpointing=checkpointing, max_grad_norm=1e9)
    )
    data, before = batch(seed=1), logps(backend, batch(seed=1))
    assert len({values.tobytes() for values in before.values()}) == len(NAMES)
    weights = np.ones(int(data.lengths.sum()), np.float32)
    steps = {
        POLICY: lambda: preferred(backend, data),
        "rm": lambda: ranked(backend, data),
        "judge": lambda: weighed(backend, data, "judge", weights),
    }
    for name, take in steps.items():
        held = {other: arrays(backend, other) for other in NAMES}
        scores = {other: backend.scores(data, other) for other in ("rm", "judge")}
        assert take().grad_norm > 1e-3
        after = logps(backend, data)
        for other in NAMES:
            assert (after[other] != before[other]).any() == (other == name)
            changed = [path for path, value in arrays(backend, other).items() if (value != held[other][path]).any()]
            assert set(changed) == (set(held[other]) if other == name else set())
            if other in scores:
                assert (backend.scores(data, other) != scores[other]).any() == (other == name)
        before = after


def test_checkpointing_changes_no_gradient_of_a_head(tiny: str) -> None:
    """Also where the step is called while the reference is on, whose layers would give gradients of 0."""
    found = {}
    for mode in ("off", "selective", "full"):
        backend = trained(with_adapters(tiny, gradient_checkpointing=mode))
        with backend.adapter_off():
            found[mode] = gradients(backend, "rm", lambda b=backend: ranked(b, batch()))
        assert backend.adapters.on == POLICY
    result, expected = found["off"]
    assert {path.split(".")[-2] for path in expected} == {"q_proj", "down_proj", "score_head"}
    assert all(np.abs(value).max() > 0 for value in expected.values())
    for again, values in found.values():
        np.testing.assert_allclose(again.policy, result.policy, atol=1e-5)
        for path, value in values.items():
            np.testing.assert_allclose(value, expected[path], atol=1e-5 * np.abs(expected[path]).max())


def test_the_policys_numbers_do_not_know_of_others(tiny: str) -> None:
    """With dropout: each adapter draws from a stream of its own, and in that from where it left it."""
    alone, beside = load("mlx", tiny, lora_dropout=0.3), with_adapters(tiny, lora_dropout=0.3)
    for _ in range(3):
        one, two = preferred(alone, batch()), preferred(beside, batch())
        assert (one.loss, one.grad_norm) == (two.loss, two.grad_norm)
        ranked(beside, batch())
    for path, value in arrays(alone, POLICY).items():
        np.testing.assert_array_equal(arrays(beside, POLICY)[path], value)
    keys = [beside.adapters[name].draw(7) for name in (POLICY, "rm", "judge") for _ in range(20)]
    assert len(set(keys)) == 60


def test_first_weights_depend_on_the_name(tiny: str) -> None:
    backend, other = load("mlx", tiny, lora_r=4), load("mlx", tiny, lora_r=4, seed=1)
    for each in (backend, other):
        for name in ("one", "two"):
            each.add_adapter(name, 4, 8.0)
    found = [arrays(each, name) for each in (backend, other) for name in (POLICY, "one", "two")]
    path = next(path for path in found[0] if path.endswith("lora_a"))
    assert len({values[path].tobytes() for values in found}) == 6
    assert all(not value.any() for values in found for path, value in values.items() if path.endswith("lora_b"))


def test_blocks_are_nested_and_end_with_an_exception(tiny: str) -> None:
    backend, data = trained(with_adapters(tiny)), batch(seed=1)
    expected = logps(backend, data)

    def is_on(name: str) -> None:
        assert backend.adapters.on == name
        np.testing.assert_array_equal(backend.token_logps(data), expected[name])

    with backend.using("rm"):
        with contextlib.suppress(ZeroDivisionError), backend.adapter_off():
            is_on(REFERENCE)
            with backend.using("judge"):
                is_on("judge")
                preferred(backend, data, rate=0.0)
                is_on("judge")
                raise ZeroDivisionError
        is_on("rm")
        with (
            pytest.raises(KeyError, match=r"'none'.*'reference', 'policy', 'rm', 'judge'"),
            backend.using("none"),
        ):
            pass
        is_on("rm")
    is_on(POLICY)


def test_what_there_is_not(tiny: str) -> None:
    backend, data = with_adapters(tiny), batch()
    for name in (*NAMES[:1], "rm"):
        with pytest.raises(ValueError, match=f"'{name}'.*taken"):
            backend.add_adapter(name, 2, 4.0)
    with pytest.raises(ValueError, match=r"'../rm'.*folder"):
        backend.add_adapter("../rm", 2, 4.0)
    for outputs, at in ((0, "end"), (1, "first")):
        with pytest.raises(ValueError, match=r"1.*'end'.*'each'"):
            Head(outputs, at)
    with pytest.raises(ValueError, match=r"'policy'.*head"):
        backend.scores(data, POLICY)
    with pytest.raises(ValueError, match=r"'policy'.*head"):
        ranked(backend, data, name=POLICY)
    with pytest.raises(ValueError, match="never trained"):
        preferred(backend, data, REFERENCE)
    with pytest.raises(KeyError):
        preferred(backend, data, "none")
    assert backend.adapters.on == POLICY


def merged(model: str, values: dict[str, np.ndarray], scale: float) -> torch.nn.Module:
    """The bare model with ``W + scale B A``."""
    bare = bare_model(model)
    with torch.no_grad():
        for path, a in values.items():
            if path.endswith("lora_a"):
                b = values[path.replace("lora_a", "lora_b")]
                weight = bare.get_parameter(path.removesuffix(".lora_a") + ".weight")
                weight += scale * torch.from_numpy((a.astype(np.float64) @ b).T).float()
    return bare


def oracle_states(model: torch.nn.Module, data: Batch) -> list[np.ndarray]:
    """The own hidden states of each response's tokens, one sequence at a time."""
    found = []
    for response, prompt in zip(data.responses, data.prompt_of, strict=True):
        ids = torch.from_numpy(np.concatenate([data.prompts[prompt], response]))[None]
        with torch.no_grad():
            found.append(model.model(input_ids=ids).last_hidden_state[0, -len(response) :].numpy())
    return found


@pytest.mark.parametrize(("layout", "pads"), [("plain", True), ("prefix", False), ("prefix", True)])
def test_scores_and_log_probs_equal_the_models_own(
    tiny: str, layout: str, pads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against transformers with the adapter merged by hand; one prompt has a single token, one a single response."""
    monkeypatch.setattr(MLXBackend, "pads_attention", pads)
    draw = np.random.default_rng(5)
    rows = [draw.integers(3, 512, n) for n in (7, 1, 4, 5, 1, 3, 9, 2)]
    data = Batch(rows[:3], rows[3:], np.array([0, 0, 1, 1, 2]), np.array([1, -1, 1, -1, 1]))
    backend = trained(with_adapters(tiny, layout=layout, lora_dropout=0.0), 3)
    for name, scale in (("rm", 3.0), ("judge", 1.0)):
        values = arrays(backend, name)
        oracle = merged(tiny, values, scale)
        states = oracle_states(oracle, data)
        read = np.concatenate([own if name == "judge" else own[-1:] for own in states])
        scores = backend.scores(data, name)
        assert scores.dtype == np.float32 and scores.shape == (len(read), 1 if name == "judge" else 2)
        expected = read @ values["score_head.weight"].T + values["score_head.bias"]
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(scores, expected, atol=2e-5)
        with backend.using(name), torch.no_grad():
            np.testing.assert_allclose(backend.token_logps(data), oracle_logps(oracle, data).numpy(), atol=5e-5)
        alone = [backend.scores(Batch([rows[0]], [rows[3]], np.array([0]), np.array([1])), name)]
        np.testing.assert_allclose(alone[0], expected[: len(alone[0])], atol=2e-5)


def test_a_head_starts_at_0(tiny: str) -> None:
    backend, data = with_adapters(tiny), batch()
    assert not backend.scores(data, "rm").any() and not backend.scores(data, "judge").any()
    result = ranked(backend, data)
    assert result.loss == pytest.approx(np.log(2) + 0.1 * 2, rel=1e-6)  # and two responses of a pair are 1 off
    assert (result.policy == 0).all() and result.policy.shape == (6, 2) and result.reference is None
    assert backend.scores(data, "rm").any()


@pytest.mark.parametrize("layout", ["plain", "prefix"])
def test_a_step_on_scores_lowers_its_loss_along_the_gradient(tiny: str, layout: str) -> None:
    backend, data = trained(with_adapters(tiny, layout=layout, max_grad_norm=1e9), 3), batch(seed=2)
    for layer in backend.adapters["rm"].layers.values():
        layer.dropout = 0.0
    result, slope = gradients(backend, "rm", lambda: ranked(backend, data))
    assert result.grad_norm == pytest.approx(np.sqrt(sum((v**2).sum() for v in slope.values())), rel=1e-5)
    here = arrays(backend, "rm")

    def at(step: float, direction: dict[str, np.ndarray]) -> float:
        moved = [(path, mx.array(value + step * direction.get(path, 0))) for path, value in here.items()]
        with backend.using("rm"):
            backend.model.update(tree_unflatten(moved))
        return float(gradients(backend, "rm", lambda: ranked(backend, data))[0].loss)

    for part in ("score_head", "lora_a", "lora_b"):
        direction = {path: value for path, value in slope.items() if part in path}
        length = np.sqrt(sum((value**2).sum() for value in direction.values()))
        step = 1e-2 / length
        difference = (at(step, direction) - at(-step, direction)) / (2 * step)
        assert difference == pytest.approx(length**2, rel=5e-3), part
    assert at(0.0, {}) == pytest.approx(result.loss, rel=1e-6)
    losses = [ranked(backend, data, 1e-2).loss for _ in range(6)]
    assert losses[-1] < losses[0] - 0.1


def test_micro_batches_of_scores_equal_one_batch(tiny: str) -> None:
    """Of unequal sizes; the token weights of one are 0, so that it must not count."""
    one, two = (trained(with_adapters(tiny, lora_dropout=0.0, max_grad_norm=1e9)) for _ in range(2))
    data = batch(4, seed=3)
    first, rest = data.halves()
    weights = np.linspace(0, 1, int(data.lengths.sum()), dtype=np.float32)
    cut = int(first.lengths.sum())
    whole, expected = gradients(one, "judge", lambda: weighed(one, data, "judge", weights))
    passes = [MicroBatch(first, {"weights": weights[:cut]}), MicroBatch(rest, {"weights": weights[cut:]})]
    split, found = gradients(two, "judge", lambda: two.step(passes, TARGETS, 0.0, adapter="judge"))
    assert split.loss == pytest.approx(whole.loss, rel=1e-5)
    np.testing.assert_allclose(split.policy, whole.policy, atol=1e-5)
    assert split.policy.shape == (int(data.lengths.sum()), 1)
    with one.adapter_off():
        np.testing.assert_array_equal(whole.reference, one.sequence_logps(data))
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, atol=1e-4 * np.abs(value).max())


def test_a_compiled_step_knows_which_adapter_is_on_and_trained(tiny: str) -> None:
    """Padded to multiples of 64; a trace that held another adapter's weights, or old ones, would show."""
    data, weights = batch(), np.ones(int(batch().lengths.sum()), np.float32)
    backends = [with_adapters(tiny, compile=on, lora_dropout=0.0) for on in (False, True)]
    found = []
    for backend in backends:
        results = []
        for _ in range(2):
            results += [preferred(backend, data), weighed(backend, data, "judge", weights)]
        with backend.using("judge"):
            on = [backend.token_logps(data), backend.sequence_logps(data)]
            ends = backend.scores(data, "judge")
            weighed(backend, data, "judge", weights)
            on += [backend.sequence_logps(data)]
        found.append((results, [*on, backend.sequence_logps(data), ends, backend.scores(data, "judge")]))
    assert {name for _, name in backends[1]._compiled} == {POLICY, REFERENCE, "judge"}
    for one, two in zip(found[0][0], found[1][0], strict=True):
        assert two.loss == pytest.approx(one.loss, rel=1e-3)
        assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-2)
        assert one.policy.shape == two.policy.shape
        np.testing.assert_allclose(two.policy, one.policy, atol=5e-3)
    for one, two in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_allclose(two, one, rtol=1e-3, atol=5e-3)
    assert np.abs(found[1][1][1] - found[1][1][2]).max() > 0.1  # the same trace after another step


def assert_same_state(one: Any, two: Any, names: tuple[str, ...]) -> None:
    for name in names:
        here, there = arrays(one, name), arrays(two, name)
        assert here.keys() == there.keys()
        for path, value in here.items():
            np.testing.assert_array_equal(there[path], value)
        states = [dict(tree_flatten(each.adapters[name].optimizer.state)) for each in (one, two)]
        assert states[0].keys() == states[1].keys()
        for path, value in states[0].items():
            np.testing.assert_array_equal(np.array(states[1][path]), np.array(value))
        assert one.adapters[name].passes == two.adapters[name].passes


def test_all_adapters_and_heads_go_on_where_they_were_saved(tiny: str, tmp_path: Path) -> None:
    one, two, data = trained(with_adapters(tiny)), with_adapters(tiny), batch(seed=4)
    one.save_state(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        "random.json",
        *(f"adapters/{name}/{file}.safetensors" for name in (POLICY, "rm", "judge") for file in ("adapters", "optimizer")),
        *(f"adapters/{name}/adapter_config.json" for name in (POLICY, "rm", "judge")),
        *(f"adapters/{name}/head.{end}" for name in ("rm", "judge") for end in ("json", "safetensors")),
    }
    two.load_state(tmp_path)
    assert_same_state(one, two, (POLICY, "rm", "judge"))
    weights = np.ones(int(data.lengths.sum()), np.float32)
    for take in (ranked, preferred, lambda backend, data: weighed(backend, data, "judge", weights)):
        np.testing.assert_array_equal(take(one, data).policy, take(two, data).policy)
    assert_same_state(one, two, (POLICY, "rm", "judge"))


def test_a_saved_adapter_is_one_of_mlx_lm(tiny: str, tmp_path: Path) -> None:

    backend = trained(with_adapters(tiny))
    for name in (POLICY, "rm"):
        backend.save_adapter(tmp_path / name, name)
    saved, values = adapter_files.read_adapter(str(tmp_path / "rm")), arrays(backend, "rm")
    assert (saved.rank, saved.scale, len(saved.weights)) == (3, 3.0, 4)
    for path, (a, b) in saved.weights.items():
        np.testing.assert_array_equal(a.T, values[f"{path}.lora_a"])
        np.testing.assert_array_equal(b.T, values[f"{path}.lora_b"])
    assert not (tmp_path / POLICY / "head.json").exists()
    for file in (tmp_path / "rm").glob("head.*"):  # with which it is no policy's
        file.unlink()
    fresh = load("mlx", tiny, init_adapter=str(tmp_path / "rm"), reference="base")
    with backend.using("rm"):
        np.testing.assert_array_equal(fresh.token_logps(batch()), backend.token_logps(batch()))


def test_a_state_of_before_is_read(tiny: str, tmp_path: Path) -> None:
    """Written as it was when there was but one adapter."""
    one, two = (load("mlx", tiny, lora_dropout=0.1) for _ in range(2))
    preferred(one, batch())
    state = {
        "adapter": one.model.trainable_parameters(),
        "optimizer": one.adapters["policy"].optimizer.state,
        "passes": mx.array(1),
    }
    mx.save_safetensors(str(tmp_path / "state.safetensors"), dict(tree_flatten(state)))
    two.load_state(tmp_path)
    assert_same_state(one, two, (POLICY,))
    assert preferred(one, batch()).loss == preferred(two, batch()).loss


def test_a_state_of_other_adapters_is_refused(tiny: str, tmp_path: Path) -> None:
    trained(with_adapters(tiny), 1).save_state(tmp_path)
    alone, other = load("mlx", tiny), load("mlx", tiny)
    with pytest.raises(UserError, match=r"rm.*; .*policy"):
        alone.load_state(tmp_path)
    other.add_adapter("rm", 4, 8.0, head=Head(2))
    other.add_adapter("judge", 2, 2.0, head=Head(1, EACH))
    before = arrays(other, "rm")
    with pytest.raises(UserError, match=r"'rm'.*rank"):
        other.load_state(tmp_path)
    np.testing.assert_array_equal(next(iter(arrays(other, "rm").values())), next(iter(before.values())))


def test_own_states_in_the_layouts() -> None:
    """The token at a place is the one whose state that is."""
    data = batch(4)
    for layout in (plain(data), plain(data, multiple=64), packed(data)):
        np.testing.assert_array_equal(layout.input_ids.ravel()[layout.own_index], layout.targets)
    for multiple in (1, 64):
        made = prefix(data, multiple=multiple, own=True)
        before = np.concatenate([made.prompt_ids[made.owner, -1:], made.response_ids[:, :-1]], 1)
        np.testing.assert_array_equal(before.ravel()[made.own_index], made.targets)
        np.testing.assert_array_equal(made.own_index, made.hidden_index + 1)
        for read in (made.own_index, made.own_index[-2:]):
            inside = mlx_prefix.arrays(made, multiple, read)
            responses = inside["ids"][0, len(inside["prompt_at"]) :]
            np.testing.assert_array_equal(responses[inside["read_index"]], made.targets[-len(read) :])
    without = prefix(data)
    assert without.own_index.size == 0 and without.response_ids.shape[1] == max(map(len, data.responses))


def as_ours(function: Any) -> FunctionType:
    """The function as if it was written in the prefix layout's file."""
    return FunctionType(function.__code__, vars(mlx_prefix))


def misses_an_attribute(self: Any, *keys: mx.array) -> Any:
    return self.no_such_thing, keys


def misuses_a_library(self: Any, *keys: mx.array) -> Any:
    return nn.Linear(2, 2)(keys[0]), keys


@pytest.mark.parametrize("pads", [False, True])
@pytest.mark.parametrize("place", ["cache", "library", "masks", "arrays"])
def test_a_mistake_of_ours_is_not_a_model_that_does_not_fit(
    tiny: str, place: str, pads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cache's is raised in what the model's own code calls, with checkpointing from inside MLX; others beside it."""
    monkeypatch.setattr(MLXBackend, "pads_attention", pads)
    kind = mlx_prefix.ResponseCache if pads else mlx_prefix.Unpadded
    expected: Any
    if place == "cache":
        monkeypatch.setattr(kind, "update_and_fetch", as_ours(misses_an_attribute))
        expected = AttributeError
    elif place == "library":
        monkeypatch.setattr(kind, "update_and_fetch", as_ours(misuses_a_library))
        expected = ValueError
    elif place == "masks":
        monkeypatch.setattr(mlx_prefix, "_causal", lambda queries, keys: None)
        expected = TypeError
    else:
        monkeypatch.setattr("lite_dil.backends.mlx.inputs.arrays", lambda *_: {}["ids"])
        expected = KeyError
    with pytest.raises(expected):
        load("mlx", tiny, gradient_checkpointing="full" if pads else "off")


def looks_into_its_cache(self: Any, inputs: mx.array, cache: Any = None, input_embeddings: Any = None) -> mx.array:
    hidden = self.embed_tokens(inputs)
    if cache is not None:
        assert not hasattr(cache[0], "bits")
        hidden = hidden + cache[0].state
    mask = llama.create_attention_mask(hidden)
    for layer in self.layers:
        hidden = layer(hidden, mask, None)
    return self.norm(hidden)


def asserts(self: Any, inputs: mx.array, cache: Any = None, input_embeddings: Any = None) -> mx.array:
    assert cache is None, "a loop with a cache of its own"
    return looks_into_its_cache(self, inputs)


def another_signature(self: Any, inputs: mx.array) -> mx.array:
    return looks_into_its_cache(self, inputs)


def returns_more(self: Any, inputs: mx.array, cache: Any = None, input_embeddings: Any = None) -> Any:
    return looks_into_its_cache(self, inputs) if cache is None else (looks_into_its_cache(self, inputs), cache)


@pytest.mark.parametrize(
    ("loop", "reason"),
    [
        (looks_into_its_cache, r"its code does not accept it \(AttributeError: .*\)"),
        (asserts, r"its code does not accept it \(AssertionError: .*\)"),
        (another_signature, r"its code does not accept it \(TypeError: .*\)"),
        (returns_more, "its decoder returns something other than hidden states"),
    ],
)
def test_a_loop_that_does_not_fit_has_the_plain_layout(
    tiny: str, loop: Any, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load("mlx", tiny).token_logps(batch())
    monkeypatch.setattr(llama.LlamaModel, "__call__", loop)
    monkeypatch.setattr(llama.Model, "__call__", lambda self, inputs: self.lm_head(self.model(inputs)))
    backend = load("mlx", tiny)
    assert backend.layout == "plain"
    assert re.fullmatch(f"plain layout: {reason}", backend.layout_reason)
    np.testing.assert_allclose(backend.token_logps(batch()), expected, atol=2e-5)


def attention_of(change: Any) -> Any:
    real = llama.Attention.__call__
    return lambda self, x, mask=None, cache=None: change(real, self, x, mask, cache)


CODE, KEYS = "its code does not accept it", "its keys and values are not (rows, heads, tokens, width)"


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        (lambda real, self, x, m, c: real(self, x, m, c) if c is None else (real(self, x, m, c), x), ("attention returns",)),
        (lambda real, self, x, m, c: (c and c.update_and_fetch(x), real(self, x, m, c))[1], (CODE, KEYS)),
        (lambda real, self, x, m, c: (c and c.update_and_fetch(x, x), real(self, x, m, c))[1], (KEYS,)),
        (lambda real, self, x, m, c: real(self, x, m, c and c.meta_state), (CODE,)),
    ],
)
def test_attention_that_does_not_fit_has_the_plain_layout(
    tiny: str, change: Any, reasons: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.Attention, "__call__", attention_of(change))
    for pads in (False, True):
        monkeypatch.setattr(MLXBackend, "pads_attention", pads)
        backend = load("mlx", tiny)
        assert backend.layout == "plain"
        assert backend.layout_reason.removeprefix("plain layout: ").startswith(reasons)


@pytest.mark.parametrize("at", [END, EACH])
def test_heads_in_bfloat16_are_float32(tiny: str, at: str) -> None:
    backend: Any = load("mlx", tiny, dtype="bfloat16")
    backend.add_adapter("rm", 2, 4.0, head=Head(1, at))
    data = batch()
    weights = np.ones(int(data.lengths.sum()) if at == EACH else len(data.responses), np.float32)
    loss = EachToken()
    loss.token_inputs = ("weights",) if at == EACH else ()  # type: ignore[assignment]
    losses = [backend.step([MicroBatch(data, {"weights": weights})], loss, 1e-2, adapter="rm").loss for _ in range(3)]
    assert losses[2] < losses[0]
    assert backend.adapters["rm"].head.weight.dtype == mx.float32
    assert backend.scores(data, "rm").dtype == np.float32


def test_generation_is_the_adapters_that_is_on(tiny: str) -> None:
    backend, prompt = trained(with_adapters(tiny), 4), [5, 6, 7, 8]
    for name, scale in zip(NAMES, (2.0, 0.0, 3.0, 1.0), strict=True):
        with backend.using(name), torch.no_grad():
            answer = backend.generate([prompt, [9, 10]], 3, [2])[0]
            logits = merged(tiny, arrays(backend, name), scale)(input_ids=torch.tensor([prompt])).logits[0, -1]
            tokens = [*answer.ids, *([] if answer.end is None else [answer.end])]
            assert logits.argmax() == tokens[0]
            assert list(backend.stream(prompt, 3, [2])) == tokens


def test_what_fills_a_compiled_pass_up_is_seen_by_no_loss(tiny: str) -> None:
    """A loss of tokens that takes no inputs of its own cannot mask it; with the reference computed, and given."""

    class Squares:
        reads, reference, token_inputs = TOKENS, TOKENS, ()

        def __call__(self, policy: Any, reference: Any, inputs: dict[str, Any]) -> Any:
            return ((policy - reference - 0.5) ** 2 * inputs["present"]).sum()

    loss, data, found = Squares(), batch(), []
    for compiled in (False, True):
        backend = load("mlx", tiny, compile=compiled)
        with backend.adapter_off():
            known = backend.token_logps(data)
        results = [backend.step([MicroBatch(data, {}, given)], loss, 0.0) for given in (None, known)]
        found += [(result.loss, result.grad_norm) for result in results]
        assert all(result.policy.shape == result.reference.shape == known.shape for result in results)
    np.testing.assert_allclose(found, [(0.25 * len(known) / data.examples, found[0][1])] * 4, rtol=1e-4)


def test_what_is_frozen_is_not_saved(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'reference' is frozen"):
        load("mlx", tiny).save_adapter(tmp_path, REFERENCE)
