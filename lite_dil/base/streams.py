"""Named random streams, so that no two uses of a seed draw the same numbers unless this table says so.

| stream | numpy's seed | used for |
|---|---|---|
| `epoch_order` | ``[seed, epoch]`` | the order of the examples in an epoch, 0 first |
| `row_draws` | ``[seed, 1]`` | the rows taken from a weighted source; the same numbers as epoch 1's order |
| `adapter_stream`, adapter "policy" | ``[seed, crc32(layer)]`` | the policy's initial weights |
| `adapter_stream`, another adapter | named ``adapter, its name, layer`` | another adapter's initial weights |
| `dropout_key` | ``(seed, passes)`` | the key of MLX's dropout masks in a pass, counted from 1 |
| `named` "dropout" | named, with the adapter and the pass | the key of MLX's dropout masks for another adapter |
| `named` "twin" | named, with the weight's name or "probe" | a small twin's weights and tokens |
| `named` "data/samples" | named | the examples that `lite-dil data` shows |
| `named` "reports/prompts" | named | the prompts that a run's report answers |
| `named` "training/reference-check" | named | the examples whose cached log-probs are computed again |

Streams with a spelled-out seed must never change: resumed runs, their fingerprints and published figures depend on them. Named
streams have the seed as entropy and a 128-bit digest of the name as spawn key, which numpy mixes in after the entropy's first
four words: they differ from all others, whatever the seed, and from one another unless the digests collide. Elsewhere: torch's
own generator starts from ``--seed`` (dropout on torch), and a sampled response has its own seed, a digest of the seed, its
prompt and its number.
"""

from __future__ import annotations

import zlib

import numpy as np

from lite_dil.base.hashing import blake2


def epoch_order(seed: int, epoch: int) -> np.random.Generator:
    """Return the stream for an epoch's order."""
    return np.random.default_rng([seed, epoch])


def row_draws(seed: int) -> np.random.Generator:
    """Return the stream that decides which rows of a source are taken."""
    return np.random.default_rng([seed, 1])


def adapter_stream(seed: int, layer: str, adapter: str = "policy") -> np.random.Generator:
    """Return the stream for the initial weights of `layer` in the adapter of that name."""
    if adapter == "policy":
        return np.random.default_rng([seed, zlib.crc32(layer.encode())])
    return named("adapter", seed, adapter, layer)


def dropout_key(seed: int, passes: int) -> int:
    """Return the 32-bit key of the dropout masks in pass 1, 2, ... of a run."""
    return int(np.random.SeedSequence((seed, passes)).generate_state(1)[0])


def named(name: str, seed: int, *parts: str) -> np.random.Generator:
    """Return the stream of that name, with `parts` if there are several of its kind; list it in the table above."""
    words = np.frombuffer(blake2([repr((name, *parts)).encode()]), "<u4")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=words.tolist()))
