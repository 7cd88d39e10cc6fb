"""Random streams: those that runs depend on keep their numbers, and no two names draw the same."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from lite_dil.base import streams
from lite_dil.models.adapters import fresh

LAYER = "model.layers.0.self_attn.q_proj"


def test_streams_that_runs_depend_on() -> None:
    assert streams.epoch_order(7, 0).permutation(6).tolist() == [5, 2, 0, 4, 1, 3]
    assert streams.epoch_order(7, 4).permutation(6).tolist() == [4, 3, 5, 2, 1, 0]
    assert streams.row_draws(7).permutation(6).tolist() == [3, 0, 2, 1, 4, 5]
    assert streams.dropout_key(7, 5) == 1002604896


def test_the_policys_first_weights() -> None:
    weights = [
        [-0.2982088029384613, 0.04886319488286972, 0.05154441297054291],
        [0.07705055177211761, 0.3563327491283417, -0.5694034099578857],
    ]
    found = fresh({LAYER: (2, 3)}, rank=2, scale=1.0, seed=7).weights[LAYER]
    assert found[0].tolist() == weights and not found[1].any()
    other = fresh({LAYER: (2, 3)}, rank=2, scale=1.0, seed=7, adapter="discriminator").weights[LAYER]
    assert not np.isin(other[0], found[0]).any() and not other[1].any()


def test_named_streams_keep_their_numbers_too() -> None:
    assert streams.named("data/samples", 7).integers(0, 2**32, 2).tolist() == [3239252272, 3555096271]


def test_no_two_streams_are_the_same() -> None:
    """Seeds and epochs around those that share numpy's padded entropy: [7], [7, 0] and 7 are one to it."""
    found: dict[tuple[str, int], np.random.Generator] = {}
    for seed in (0, 7, 2**32 + 7, 2**64 - 1):
        found |= {
            ("samples", seed): streams.named("data/samples", seed),
            ("prompts", seed): streams.named("reports/prompts", seed),
            ("check", seed): streams.named("training/reference-check", seed),
            ("order", seed): streams.epoch_order(seed, 0),
            ("order 2", seed): streams.epoch_order(seed, 2),
            ("order 3", seed): streams.epoch_order(seed, 3),
            ("policy", seed): streams.adapter_stream(seed, LAYER),
            ("policy, another layer", seed): streams.adapter_stream(seed, "lm_head"),
            ("another", seed): streams.adapter_stream(seed, LAYER, "another"),
            ("another, another layer", seed): streams.adapter_stream(seed, "lm_head", "another"),
            ("a third", seed): streams.adapter_stream(seed, LAYER, "third"),
        }
    drawn = {name: stream.integers(0, 2**63, 4).tolist() for name, stream in found.items()}
    # A seed beyond 32 bits is two words: [2**32 + 7, 0] is 7, 1, 0.
    assert not [pair for pair in combinations(drawn, 2) if set(drawn[pair[0]]) & set(drawn[pair[1]])]
