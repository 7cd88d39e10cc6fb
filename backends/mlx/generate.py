"""Generation on MLX: mlx-lm's batches, and samples from the model's exact distribution."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import takewhile
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from lite_dil.backends.foreign import Misfit, foreign
from lite_dil.backends.types import Done, Generated, Sampling, never

Processor = Callable[[Any, mx.array], mx.array]
PREFILL = 2048  # prompt tokens at once, as in mlx-lm


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
    seeds: Sequence[int] | None,
    sampling: Sampling,
    stop: Callable[[], bool] = never,
    done: Done | None = None,
) -> list[Generated]:
    """Continue the prompts with an mlx-lm model; see `lite_dil.backends.protocol.Backend.generate`."""
    if batchable(model):
        return in_a_batch(model, prompts, max_new_tokens, end_ids, seeds, sampling, stop, done)
    return one_by_one(model, prompts, max_new_tokens, end_ids, processors_of(prompts, seeds, sampling), stop, done)


def batchable(model: Any) -> bool:
    """Return whether mlx-lm can continue several prompts in a batch, by building a step's graph without running it.

    Gemma 2's code cannot take a mask per row: it raises an error or, with as many rows as heads, mixes up the two.
    """
    caches, rows = make_prompt_cache(model), 13  # no model has 13 heads
    if not all(hasattr(cache, "merge") for cache in caches):
        return False
    try:
        foreign(model, mx.zeros((rows, 1), mx.int32), cache=[foreign(cache.merge, [cache] * rows) for cache in caches])
    except Misfit:
        return False
    return True


def processors_of(prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None, sampling: Sampling) -> list[Processor]:
    """Return the processors of each prompt's logits, applied before taking the largest."""
    if seeds is None or sampling.temperature == 0:
        return [_in_float32 for _ in prompts]
    return [_draws(seed, sampling) for seed in seeds]


def in_a_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
    seeds: Sequence[int] | None,
    sampling: Sampling,
    stop: Callable[[], bool] = never,
    done: Done | None = None,
) -> list[Generated]:
    """Continue the prompts in one batch, which an answer leaves when it has ended.

    While a step's tokens are read, the device computes the next one.
    """
    rows = prefilled(model, prompts)
    caches = [of[0].merge(list(of)) for of in zip(*rows, strict=True)]  # it copies them
    del rows  # which would keep the prompts' own caches until the end
    drawn = seeds is not None and sampling.temperature > 0
    keys = mx.stack([mx.random.key(seed) for seed in seeds or ()]) if drawn else None

    def next_tokens(tokens: mx.array) -> mx.array:
        nonlocal keys
        logits = foreign(model, tokens[:, None], cache=caches)[:, -1].astype(mx.float32)
        if keys is not None:
            split = mx.vmap(mx.random.split)(keys)
            keys, logits = split[:, 0], _perturbed(logits, split[:, 1], sampling)
        found = logits.argmax(-1)
        mx.async_eval(found)
        return found

    tokens: list[list[int]] = [[] for _ in prompts]
    going, ends = list(range(len(prompts))), set(end_ids)
    new = next_tokens(mx.array([prompt[-1] for prompt in prompts]))
    for number in range(max_new_tokens):
        if stop():
            break
        after = next_tokens(new) if number + 1 < max_new_tokens else None
        read = new.tolist()
        for row, token in zip(going, read, strict=True):
            tokens[row].append(token)
        left = [at for at, token in enumerate(read) if token not in ends and not (done and done(tokens[going[at]]))]
        if after is None or not left:
            break
        new = after
        if len(left) < len(going):
            going, kept = [going[at] for at in left], mx.array(left)
            new = after[kept]
            keys = None if keys is None else keys[kept]
            for cache in caches:
                cache.filter(kept)
    return [Generated.of(each, end_ids) for each in tokens]


def one_by_one(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
    processors: Sequence[Processor],
    stop: Callable[[], bool] = never,
    done: Done | None = None,
) -> list[Generated]:
    """Continue one prompt after the other, for models whose caches cannot be batched."""
    answers = []
    for prompt, cache, processor in zip(prompts, prefilled(model, prompts), processors, strict=True):
        tokens = stream(model, prompt[-1:], max_new_tokens, end_ids, processor, copy.deepcopy(cache))
        ids: list[int] = []
        for token in takewhile(lambda _: not stop(), tokens):
            ids.append(token)
            if done and done(ids):
                break
        answers.append(Generated.of(ids, end_ids))
    return answers


def prefilled(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[Any]]:
    """Return a cache of all tokens of each prompt but its last; equal prompts share one, computed once.

    Each prompt is computed by itself: in a batch it would be padded, which some models with recurrent states ignore.
    """
    caches = {prompt: _prefill(model, prompt[:-1]) for prompt in dict.fromkeys(map(tuple, prompts))}
    return [caches[tuple(prompt)] for prompt in prompts]


def _prefill(model: Any, tokens: Sequence[int]) -> list[Any]:
    cache = make_prompt_cache(model)
    for start in range(0, len(tokens), PREFILL):
        model(mx.array(tokens[start : start + PREFILL])[None], cache=cache)
        mx.eval([each.state for each in cache])  # not the logits
        mx.clear_cache()
    return cache


def stream(
    model: Any,
    prompt: Sequence[int],
    max_new_tokens: int,
    end_ids: Sequence[int],
    processor: Processor,
    cache: list[Any] | None = None,
) -> Iterator[int]:
    """Continue one prompt token by token; see `lite_dil.backends.protocol.Backend.stream`.

    Args:
        cache: the cache of the tokens before `prompt`; changed in place.
    """
    own = mx.default_stream(mx.default_device())
    steps = generate_step(
        mx.array(list(prompt)), model, max_tokens=max_new_tokens, logits_processors=[processor], prompt_cache=cache
    )
    with closing(steps):
        while True:
            # generate_step leaves its stream as the default between tokens; with two in turn it would stay so for good.
            with mx.stream(own):
                step = next(steps, None)
            if step is None:
                return
            token = int(step[0])
            yield token
            if token in end_ids:
                return


def _in_float32(_: Any, logits: mx.array) -> mx.array:
    """Cast to float32: mlx-lm would normalise in bfloat16, where different logits become equal."""
    return logits.astype(mx.float32)


def _draws(seed: int, sampling: Sampling) -> Processor:
    """Return a processor that adds Gumbel noise to one row's logits, so that their maximum is a sample from the softmax.

    The noise comes from the row's own key; MLX's random state does not change. It is -log(E), E exponential: -log1p(-u) and
    not -log(u), because a 32-bit uniform number in float32 keeps all its bits near 0 but only 24 near 1, and the rare tokens
    of a large vocabulary win with a small E.
    """
    state = mx.random.key(seed)

    def add_noise(_: Any, logits: mx.array) -> mx.array:
        nonlocal state
        state, key = mx.random.split(state)
        return _perturbed(logits, key[None], sampling)

    return add_noise


def _perturbed(logits: mx.array, keys: mx.array, sampling: Sampling) -> mx.array:
    """Add Gumbel noise to logits, (rows, vocabulary), from each row's key, (rows, 2)."""
    uniform = mx.vmap(lambda key: mx.random.uniform(shape=logits.shape[-1:], key=key))(keys)
    uniform = mx.maximum(uniform, 2.0**-33)  # 0 would beat every logit
    logits = logits.astype(mx.float32) / sampling.temperature
    if sampling.top_p < 1:
        logits = _nucleus(logits, sampling.top_p)
    return logits - mx.log(-mx.log1p(-uniform))


def _nucleus(logits: mx.array, top_p: float) -> mx.array:
    """Keep the fewest most likely tokens whose total probability reaches `top_p`; set the others to minus infinity."""
    order = mx.argsort(-logits, axis=-1)
    shares = mx.softmax(mx.take_along_axis(logits, order, -1), -1)
    kept = mx.cumsum(shares, -1) - shares < top_p  # the tokens before it do not reach top_p
    return mx.where(mx.put_along_axis(mx.zeros_like(kept), order, kept, -1), logits, -mx.inf)
