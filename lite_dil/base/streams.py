"""Random streams by name, so that no two uses of a seed draw the same numbers unless they are listed here as doing so.

| stream | numpy's seed | used for |
|---|---|---|
| `epoch_order` | ``[seed, epoch]`` | the order of the examples in an epoch, 0 first |
| `row_draws` | ``[seed, 1]`` | the rows that a source with a weight gives; the numbers are those of epoch 1's order |
| `adapter_stream`, adapter "policy" | ``[seed, crc32(layer)]`` | the policy's first weights |
| `adapter_stream`, another adapter | named ``adapter, its name, layer`` | another adapter's first weights |
| `dropout_key` | ``(seed, passes)`` | the key of MLX's dropout masks in a pass, 1 first |
| `named` "dropout" | named, with the adapter and the pass | the key of MLX's dropout masks, of another adapter |
| `named` "data/samples" | named | the examples that `lite-dil data` shows |
| `named` "reports/prompts" | named | the prompts that a run's report answers |

Those whose seed is spelled out keep their numbers for ever: runs that are resumed, their fingerprints and published figures
depend on them. Named streams have the seed as entropy and a digest of the name as spawn key, which numpy mixes in behind the
entropy's first four words: they equal none of the others, whatever the seed, and one another only if a digest of 128 bits
does. Elsewhere: torch's own generator starts from ``--seed`` (dropout on torch), and an answer that is drawn has a seed of its
own, a digest of the seed, its prompt and its number.
"""

from __future__ import annotations

import zlib

import numpy as np

from lite_dil.base.hashing import blake2


def epoch_order(seed: int, epoch: int) -> np.random.Generator:
    """Return the stream of an epoch's order."""
    return np.random.default_rng([seed, epoch])


def row_draws(seed: int) -> np.random.Generator:
    """Return the stream of which rows of a source are taken."""
    return np.random.default_rng([seed, 1])


def adapter_stream(seed: int, layer: str, adapter: str = "policy") -> np.random.Generator:
    """Return the stream of the first weights of `layer` in the adapter of that name."""
    if adapter == "policy":
        return np.random.default_rng([seed, zlib.crc32(layer.encode())])
    return named("adapter", seed, adapter, layer)


def dropout_key(seed: int, passes: int) -> int:
    """Return the 32-bit key of the dropout masks in pass 1, 2, ... of a run."""
    return int(np.random.SeedSequence((seed, passes)).generate_state(1)[0])


def named(name: str, seed: int, *parts: str) -> np.random.Generator:
    """Return the stream of that name, and of `parts` where there are several of its kind; list it in the table above."""
    words = np.frombuffer(blake2([repr((name, *parts)).encode()]), "<u4")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=words.tolist()))
