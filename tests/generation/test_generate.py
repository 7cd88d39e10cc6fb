"""Generation: greedy and drawn, in batches, against the distribution that the model's own logits give."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bare_model, batch, criterion, load, make_checkpoint, one_step

from lite_dil.backends.types import OWN
from lite_dil.batching.batch import Batch

VOCABULARY, END, DRAWS = 24, 2, 2000
# What a checkpoint may come with; any of these would bend the distribution, and some greedy search too.
SETTINGS = {
    "do_sample": True,
    "top_k": 1,
    "top_p": 0.1,
    "min_p": 0.9,
    "temperature": 0.1,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [3, 4, 5, 6],
    "max_length": 5,
    "eos_token_id": [7, 8, 9],
}
PROMPTS = [[5], [5, 6, 7, 8], [9, 10], [3, 4, 11, 12, 13, 14, 15, 3, 3, 4, 9, 10, 23], [9, 10]]
SEEDS = [3, 2**64 - 1, 0, 17, 5]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model of a few tokens."""
    return str(make_checkpoint(tmp_path_factory.mktemp("small"), vocab=VOCABULARY))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same model with settings for generation in its folder."""
    folder = make_checkpoint(tmp_path_factory.mktemp("hostile"), vocab=VOCABULARY)
    (folder / "generation_config.json").write_text(json.dumps(SETTINGS))
    return str(folder)


def trained(name: str, model: str, **changes: Any) -> Any:
    """A backend whose adapter does something."""
    backend = load(name, model, **changes)
    one_step(backend, [batch(vocabulary=VOCABULARY)], criterion(), 0.05)
    return backend


def probabilities(model: torch.nn.Module, prompt: list[int]) -> dict[tuple[int, ...], float]:
    """Return the probability of every answer of up to two tokens, END closing one: the textbook, in float64."""
    out: dict[tuple[int, ...], float] = {}
    with torch.no_grad():
        first = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
        after = torch.tensor([[*prompt, token] for token in range(VOCABULARY)])
        second = model(after).logits[:, -1].double().softmax(-1)
    for one in range(VOCABULARY):
        if one == END:
            out[(one,)] = first[one].item()
        else:
            out |= {(one, two): (first[one] * second[one, two]).item() for two in range(VOCABULARY)}
    return out


def check_distribution(counts: dict[tuple[int, ...], int], expected: dict[tuple[int, ...], float]) -> None:
    """Pearson's chi-square, outcomes that are expected fewer than 5 times lumped into one."""
    total = sum(counts.values())
    common = [outcome for outcome, share in expected.items() if share * total >= 5]
    assert len(common) > 10
    shares = np.array([expected[outcome] for outcome in common])
    seen = np.array([counts.get(outcome, 0) for outcome in common], float)
    shares, seen = np.append(shares, 1 - shares.sum()), np.append(seen, total - seen.sum())
    chi2, freedom = ((seen - shares * total) ** 2 / (shares * total)).sum(), len(common)
    assert chi2 < freedom + 4 * np.sqrt(2 * freedom), (chi2, freedom)


def count(outcomes: list[tuple[int, ...]]) -> dict[tuple[int, ...], int]:
    return {outcome: outcomes.count(outcome) for outcome in set(outcomes)}


def test_draws_follow_the_models_own_distribution(backend_name: str, hostile: str) -> None:
    """The reference's, from inside adapter_off, with a non-trivial adapter on the model."""
    backend = trained(backend_name, hostile)
    prompt = PROMPTS[1]
    with backend.adapter_off():
        answers = backend.generate([prompt] * DRAWS, 2, [END], list(range(DRAWS)))
    seen = count([(*ids, *([] if end is None else [end])) for ids, end in answers])
    check_distribution(seen, probabilities(bare_model(hostile), prompt))


def test_outside_adapter_off_the_policy_is_drawn_from(backend_name: str, small: str) -> None:
    backend = trained(backend_name, small)
    prompt = PROMPTS[1]
    tokens = [np.array([token]) for token in range(VOCABULARY)]
    data = Batch([np.array(prompt)] * VOCABULARY, tokens, np.arange(VOCABULARY), np.ones(VOCABULARY, int))
    policy = np.exp(backend.token_logps(data).astype(np.float64))
    with backend.adapter_off():
        reference = np.exp(backend.token_logps(data).astype(np.float64))
    answers = backend.generate([prompt] * DRAWS, 1, [END], list(range(DRAWS)))
    seen = count([(*ids, *([] if end is None else [end])) for ids, end in answers])
    check_distribution(seen, {(token,): share for token, share in enumerate(policy)})
    with pytest.raises(AssertionError):  # the test can tell the two apart
        check_distribution(seen, {(token,): share for token, share in enumerate(reference)})


@pytest.mark.parametrize("seeds", [None, SEEDS])
def test_a_batch_is_its_rows_one_by_one(backend_name: str, small: str, hostile: str, seeds: list[int] | None) -> None:
    backend = trained(backend_name, small)
    answers = backend.generate(PROMPTS, 12, [END, 20], seeds)
    assert len({len(answer.ids) for answer in answers}) > 1
    for row, prompt in enumerate(PROMPTS):
        assert backend.generate([prompt], 12, [END, 20], seeds and [seeds[row]]) == [answers[row]]
    # The settings in a checkpoint's folder change nothing, nor does a second call.
    other = trained(backend_name, hostile)
    assert other.generate(PROMPTS, 12, [END, 20], seeds) == answers
    assert other.generate(PROMPTS, 12, [END, 20], seeds) == answers


def test_a_row_is_decided_by_its_seed(backend_name: str, small: str) -> None:
    backend = load(backend_name, small)
    prompt = PROMPTS[1]
    answers = backend.generate([prompt] * 6, 12, [END], [1, 2, 3, 4, 2, 2**64 - 1])
    assert answers[1] == answers[4]
    assert len({tuple(answer.ids) for answer in answers}) == 5
    # Every answer goes as far as its neighbours let it: up to its own end.
    for ids, end in answers:
        assert END not in ids
        assert len(ids) == 12 if end is None else len(ids) < 12


def test_the_end_token_counts_and_is_named(backend_name: str, small: str) -> None:
    backend = load(backend_name, small)
    (long,) = backend.generate([PROMPTS[1]], 8, [END], [4])
    at = next(i for i, token in enumerate(long.ids) if i and token not in long.ids[:i])
    mark, (before, end) = long.ids[at], backend.generate([PROMPTS[1]], at + 1, [END, long.ids[at]], [4])[0]
    assert (before, end) == (long.ids[:at], mark)
    assert backend.generate([PROMPTS[1]], at, [END, mark], [4]) == [(long.ids[:at], None)]


def test_training_goes_on_as_if_nothing_had_been_drawn(backend_name: str, small: str) -> None:
    """Bit for bit, with dropout, which has random numbers of its own."""
    results = []
    for between in (False, True):
        backend = trained(backend_name, small, lora_dropout=0.5)
        torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
        if between:
            backend.generate(PROMPTS, 4, [END], SEEDS)
            backend.generate(PROMPTS, 4, [END])
        assert (torch.get_rng_state() == torch_state).all()
        np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)
        more = [one_step(backend, [batch(vocabulary=VOCABULARY)], criterion(), 0.01) for _ in range(2)]
        results.append(more)
    for one, two in zip(*results, strict=True):
        assert one.grad_norm == two.grad_norm
        np.testing.assert_array_equal(one.policy, two.policy)


def test_mlxs_random_state_is_left_alone(small: str) -> None:
    import mlx.core as mx

    backend = load("mlx", small)
    before = np.array(mx.random.state[0])
    backend.generate(PROMPTS, 4, [END], SEEDS)
    np.testing.assert_array_equal(np.array(mx.random.state[0]), before)


@pytest.mark.parametrize("seeds", [None, SEEDS])
def test_mlx_without_batches_generates_the_same(small: str, seeds: list[int] | None) -> None:
    from lite_dil.backends.mlx import generate as mlx_generate

    backend: Any = load("mlx", small)
    processors = mlx_generate.processors_of(PROMPTS, seeds, OWN)
    one_by_one = [
        mlx_generate.one_by_one(backend.model, [prompt], 12, [END], [processor])[0]
        for prompt, processor in zip(PROMPTS, processors, strict=True)
    ]
    assert one_by_one == backend.generate(PROMPTS, 12, [END], seeds)


def test_the_checkpoints_own_settings_are_back_afterwards(hostile: str) -> None:
    backend: Any = load("cpu", hostile)
    backend.generate(PROMPTS, 4, [END])
    assert backend.base.generation_config.top_k == SETTINGS["top_k"]


def test_rare_tokens_keep_their_share() -> None:
    """2^17 tokens of 2^-27 each behind one that has nearly everything: half of their sum is reached in their middle."""
    from lite_dil.backends.torch.generate import pick

    logits = torch.zeros(1, 1 + 2**17)
    logits[0, 0] = 27 * np.log(2)
    rare = 2**-10 / (1 + 2**-10)
    for share in (0.25, 0.5, 0.75):
        number = torch.tensor([[1 - rare * (1 - share)]], dtype=torch.float64)
        assert abs(pick(logits, number, OWN).item() - share * 2**17) <= 1
    assert pick(logits, torch.zeros(1, 1, dtype=torch.float64), OWN).item() == 0


@pytest.mark.parametrize("one_by_one", [False, True])
def test_a_generation_can_be_stopped(backend_name: str, one_by_one: bool, small: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = load(backend_name, small)
    if one_by_one and backend_name == "mlx":
        from lite_dil.backends.mlx import generate as mlx_generate

        monkeypatch.setattr(mlx_generate, "batchable", lambda model: False)
    whole = backend.generate(PROMPTS[:2], 12, [END], SEEDS[:2])
    asked: list[bool] = []

    def third_time() -> bool:
        asked.append(True)
        return len(asked) >= 3

    stopped = backend.generate(PROMPTS[:2], 12, [END], SEEDS[:2], stop=third_time)
    for one, other in zip(stopped, whole, strict=True):
        assert one.ids == other.ids[: len(one.ids)]
    assert sum(len(answer.ids) for answer in stopped) <= 6 < sum(len(answer.ids) for answer in whole)
