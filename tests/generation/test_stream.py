"""Answers token by token, draws with a temperature and a nucleus, and an adapter's strength."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import bare_model, batch, criterion, load, make_checkpoint, one_step
from test_generate import DRAWS, END, PROMPTS, SEEDS, VOCABULARY, trained

from lite_dil.backends.types import Sampling
from lite_dil.base.errors import UserError
from lite_dil.batching.batch import Batch

ENDS = [END, 20]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model of a few tokens."""
    return str(make_checkpoint(tmp_path_factory.mktemp("small"), vocab=VOCABULARY))


@pytest.fixture(scope="module")
def sliding(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model that looks 4 tokens back."""
    from transformers import MistralConfig, MistralForCausalLM

    folder = make_checkpoint(tmp_path_factory.mktemp("sliding"), vocab=VOCABULARY)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = MistralForCausalLM(
        MistralConfig(**shape, vocab_size=VOCABULARY, num_key_value_heads=2, sliding_window=4, eos_token_id=2, bos_token_id=0)
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return str(folder)


def tokens(answer: Any) -> list[int]:
    """What a stream yields for an answer."""
    return [*answer.ids, *([] if answer.end is None else [answer.end])]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.0), Sampling(0.7, 0.9)], ids=str)
def test_a_stream_is_what_generate_gives(backend_name: str, small: str, sampling: Sampling) -> None:
    backend = trained(backend_name, small)
    lengths = set()
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        (drawn,), (greedy,) = (backend.generate([prompt], 12, ENDS, seeds, sampling) for seeds in ([seed], None))
        assert list(backend.stream(prompt, 12, ENDS, seed, sampling)) == tokens(drawn)
        assert list(backend.stream(prompt, 12, ENDS, None, sampling)) == tokens(greedy)
        assert (drawn == greedy) == (sampling.temperature == 0)
        lengths.add(len(drawn.ids))
    assert len(lengths) > 1


def test_a_stream_on_a_sliding_window_is_what_generate_gives(sliding: str) -> None:
    backend = trained("cpu", sliding, max_length=4)
    for prompt, seed in zip(PROMPTS, SEEDS, strict=True):
        (drawn,) = backend.generate([prompt], 12, ENDS, [seed])
        assert list(backend.stream(prompt, 12, ENDS, seed)) == tokens(drawn)


def test_a_model_without_a_cache_of_keys_streams_the_same(small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state-space model returns none; its tokens are all computed again."""
    backend: Any = trained("cpu", small)
    expected = list(backend.stream(PROMPTS[1], 6, ENDS, 4))
    forward, lengths = backend.base.forward, []

    def without(input_ids: torch.Tensor, past_key_values: Any, use_cache: bool, logits_to_keep: int = 0) -> Any:
        assert past_key_values is None
        lengths.append(input_ids.shape[1])
        return forward(input_ids=input_ids, use_cache=False, logits_to_keep=logits_to_keep)

    monkeypatch.setattr(backend.base, "forward", without)
    assert list(backend.stream(PROMPTS[1], 6, ENDS, 4)) == expected
    assert lengths == list(range(4, 4 + len(expected)))


def test_streams_in_turn_do_not_disturb_each_other(backend_name: str, small: str) -> None:
    """The policy's and the reference's from one model, begun in either order and one left before its end."""
    backend = trained(backend_name, small)
    policy = list(backend.stream(PROMPTS[1], 12, [END], 4))
    with backend.adapter_off():
        reference = list(backend.stream(PROMPTS[1], 12, [END], 4))
    assert policy[0] != reference[0] or policy[1] != reference[1]
    for first in ("policy", "reference"):
        streams = {name: backend.stream(PROMPTS[1], 12, [END], 4) for name in ("policy", "reference")}
        seen: dict[str, list[int]] = {"policy": [], "reference": []}
        for _ in range(12):
            for name in sorted(streams, reverse=first == "reference"):
                if name == "reference":
                    with backend.adapter_off():
                        seen[name] += [token for token in [next(streams[name], None)] if token is not None]
                else:
                    seen[name] += [token for token in [next(streams[name], None)] if token is not None]
        assert seen == {"policy": policy, "reference": reference}
    left = backend.stream(PROMPTS[1], 12, [END], 4)
    assert [next(left), next(left)] == policy[:2]
    left.close()  # type: ignore[attr-defined]
    assert list(backend.stream(PROMPTS[1], 12, [END], 4)) == policy


def test_mlxs_default_stream_and_torchs_gradients_are_as_before(backend_name: str, small: str) -> None:
    import mlx.core as mx

    backend = load(backend_name, small)
    own = mx.default_stream(mx.default_device())
    one, two = (backend.stream(PROMPTS[1], 4, [1], seed) for seed in (4, 5))
    for stream in (one, two, one, two):
        next(stream)
        assert mx.default_stream(mx.default_device()) == own
        assert torch.is_grad_enabled()
    for stream in (one, two):
        stream.close()  # type: ignore[attr-defined]
        assert mx.default_stream(mx.default_device()) == own


def nucleus(shares: np.ndarray, top_p: float) -> np.ndarray:
    """Return the distribution that is left, by the definition: likeliest first, until the sum reaches `top_p`."""
    kept, total = np.zeros_like(shares), 0.0
    for token in sorted(range(len(shares)), key=lambda token: -shares[token]):
        kept[token] = shares[token]
        total += shares[token]
        if total >= top_p:
            break
    return kept / kept.sum()


@pytest.mark.parametrize("sampling", [Sampling(2.5), Sampling(1.0, 0.8), Sampling(3.0, 0.8), Sampling(1.0, 1e-9)], ids=str)
def test_draws_with_a_temperature_and_a_nucleus(backend_name: str, small: str, sampling: Sampling) -> None:
    backend = trained(backend_name, small)
    with torch.no_grad():
        logits = bare_model(small)(torch.tensor([PROMPTS[1]])).logits[0, -1].double().numpy()
    shares = np.exp(logits / sampling.temperature - np.logaddexp.reduce(logits / sampling.temperature))
    expected = nucleus(shares, sampling.top_p)
    with backend.adapter_off():
        answers = backend.generate([PROMPTS[1]] * DRAWS, 1, [END], list(range(DRAWS)), sampling)
    seen = np.bincount([tokens(answer)[0] for answer in answers], minlength=VOCABULARY) / DRAWS
    assert not seen[expected == 0].any()
    assert (np.abs(seen - expected) <= 4 * np.sqrt(expected * (1 - expected) / DRAWS)).all()


@pytest.mark.parametrize("changes", [(-1.0, 1.0), (float("nan"), 1.0), (1.0, 0.0), (1.0, 1.1), (1.0, float("nan"))])
def test_settings_that_are_no_distribution(changes: tuple[float, float]) -> None:
    with pytest.raises(UserError, match=r"--temperature|--top-p"):
        Sampling(*changes)


def merged_logps(backend: Any, model: str, strength: float, data: Batch) -> np.ndarray:
    """Log-probs under W + strength scale B A, merged by hand into the bare model's weights, in float64."""
    if backend.name == "mlx":
        layers = {n: m for n, m in backend.model.named_modules() if hasattr(m, "lora_a")}
        pairs = {n: (np.array(m.lora_a).T, np.array(m.lora_b).T, m.scale) for n, m in layers.items()}
    else:
        layers = {n: m for n, m in backend.base.named_modules() if hasattr(m, "lora_A")}
        pairs = {
            n: (m.lora_A["default"].weight.detach().numpy(), m.lora_B["default"].weight.detach().numpy(), backend.switch.scale)
            for n, m in layers.items()
        }
    bare = bare_model(model).double()
    modules = dict(bare.named_modules())
    with torch.no_grad():
        for name, (a, b, scale) in pairs.items():
            modules[name].weight += torch.from_numpy(strength * scale * b.astype(float) @ a.astype(float))
        out = []
        for prompt, response in zip(data.prompt_of, data.responses, strict=True):
            ids = torch.from_numpy(np.concatenate([data.prompts[prompt], response]))
            logps = bare(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
            out.append(logps[-len(response) :].numpy())
    return np.concatenate(out)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("cpu", {"layout": "plain"}),
        ("cpu", {"layout": "packed"}),
        ("cpu", {"fused_layers": False}),
        ("cpu", {"lora_dropout": 0.3}),
        ("mlx", {"layout": "plain"}),
        ("mlx", {"layout": "prefix"}),
        ("mlx", {"layout": "prefix", "compile": True}),
    ],
)
def test_a_strength_is_the_merged_weights(name: str, changes: dict[str, Any], small: str) -> None:
    backend = trained(name, small, **changes)
    data = batch(vocabulary=VOCABULARY)
    own = backend.token_logps(data)
    with backend.adapter_off():
        base = backend.token_logps(data)
    for strength in (0.5, 1.5, 0.0, 1.0):
        backend.set_strength(strength)
        got = backend.token_logps(data)
        np.testing.assert_allclose(got, merged_logps(backend, small, strength, data), atol=2e-5)
        ends = np.cumsum(data.lengths.astype(int))[:-1]
        sums = [part.sum() for part in np.split(got, ends)]
        np.testing.assert_allclose(backend.sequence_logps(data), sums, atol=1e-4)  # which may be compiled
        with backend.adapter_off():
            np.testing.assert_array_equal(backend.token_logps(data), base)
        np.testing.assert_array_equal(backend.token_logps(data), got)
        if strength == 1:
            np.testing.assert_array_equal(got, own)
        elif strength == 0:
            np.testing.assert_array_equal(got, base)
        else:
            assert np.abs(got - own).max() > 0.01


def break_adapter(backend: Any) -> None:
    """Make the adapter's weights infinite."""
    if backend.name == "mlx":
        from mlx.utils import tree_map

        backend.model.update(tree_map(lambda weight: weight * float("inf"), backend.model.trainable_parameters()))
    else:
        with torch.no_grad():
            for parameter in backend.adapters["policy"].parameters:
                parameter.fill_(float("inf"))


@pytest.mark.parametrize("changes", [("cpu", {}), ("cpu", {"fused_layers": False}), ("mlx", {})], ids=str)
def test_a_strength_of_0_lets_nothing_of_the_adapter_through(changes: tuple[str, dict[str, Any]], small: str) -> None:
    backend = trained(changes[0], small, **changes[1])
    data = batch(vocabulary=VOCABULARY)
    with backend.adapter_off():
        base = backend.token_logps(data)
    break_adapter(backend)
    backend.set_strength(0.0)
    np.testing.assert_array_equal(backend.token_logps(data), base)
    backend.set_strength(0.5)
    assert not np.isfinite(backend.token_logps(data)).all()


def test_a_strength_is_the_policys_alone(backend_name: str, small: str, tmp_path: Any) -> None:
    """Also where the reference is an adapter of its own; and at 0 the policy is the bare model, which that is not."""
    first = trained(backend_name, small)
    first.save_adapter(tmp_path / "adapter")
    backend = load(backend_name, small, init_adapter=str(tmp_path / "adapter"), reference="initial-adapter")
    data = batch(vocabulary=VOCABULARY)
    own = backend.token_logps(data)
    with first.adapter_off():
        base = first.token_logps(data)
    for strength, expected in ((0.5, None), (0.0, base), (1.0, own)):
        backend.set_strength(strength)
        if expected is not None:
            np.testing.assert_allclose(backend.token_logps(data), expected, atol=1e-6)
        with backend.adapter_off():
            np.testing.assert_allclose(backend.token_logps(data), own, atol=1e-6)


def test_nothing_is_trained_at_another_strength(backend_name: str, small: str) -> None:
    backend, other = trained(backend_name, small), trained(backend_name, small)
    backend.set_strength(0.5)
    with pytest.raises(ValueError, match="strength is 0"):
        one_step(backend, [batch(vocabulary=VOCABULARY)], criterion(), 0.01)
    backend.set_strength(1.0)
    results = [one_step(each, [batch(vocabulary=VOCABULARY)], criterion(), 0.01) for each in (backend, other)]
    assert results[0].loss == results[1].loss
    np.testing.assert_array_equal(results[0].policy, results[1].policy)


def test_a_saved_adapter_knows_no_strength(backend_name: str, small: str, tmp_path: Any) -> None:
    backend = trained(backend_name, small)
    for strength, folder in ((1.0, "whole"), (0.5, "half")):
        backend.set_strength(strength)
        backend.save_adapter(tmp_path / folder)
    for file in (tmp_path / "whole").iterdir():
        assert file.read_bytes() == (tmp_path / "half" / file.name).read_bytes()


@pytest.mark.parametrize("value", [-0.1, 1.6, float("nan"), float("inf")])
def test_strengths_that_there_are_not(backend_name: str, small: str, value: float) -> None:
    backend = load(backend_name, small)
    with pytest.raises(UserError, match="expected 0"):
        backend.set_strength(value)


def test_inference_pays_for_no_optimiser(backend_name: str, small: str) -> None:
    backend: Any = load(backend_name, small)

    def state(backend: Any) -> int:
        if backend.name != "mlx":
            return 0 if backend.adapters["policy"].state() is None else len(backend.adapters["policy"].optimizer.state)
        return len([name for name in backend.adapters["policy"].optimizer.state if name not in ("step", "learning_rate")])

    backend.token_logps(batch(vocabulary=VOCABULARY))
    backend.generate(PROMPTS, 2, [END])
    assert state(backend) == 0
    one_step(backend, [batch(vocabulary=VOCABULARY)], criterion(), 0.01)
    assert state(backend) > 0


def test_a_stream_keeps_nothing_for_a_backward_pass(small: str) -> None:
    from lite_dil.backends.torch import generate as torch_generate

    backend: Any = load("cpu", small)
    logits, _ = torch_generate._forward(backend.base, torch.tensor([PROMPTS[1]]), None)
    assert not logits.requires_grad
