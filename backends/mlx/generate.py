"""Generation on MLX: mlx-lm's batches, and draws from exactly the model's own distribution."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import takewhile
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.models.cache import make_prompt_cache

from lite_dil.backends.mlx.foreign import Misfit, foreign
from lite_dil.backends.types import Generated, Sampling, never

Processor = Callable[[Any, mx.array], mx.array]
PREFILL = 2048  # tokens of a prompt at once, as mlx-lm itself takes them


def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
    seeds: Sequence[int] | None,
    sampling: Sampling,
    stop: Callable[[], bool] = never,
) -> list[Generated]:
    """Continue the prompts with an mlx-lm model; see `lite_dil.backends.protocol.Backend.generate`."""
    run = in_a_batch if batchable(model) else one_by_one
    return run(model, prompts, max_new_tokens, end_ids, processors_of(prompts, seeds, sampling), stop)


def batchable(model: Any) -> bool:
    """Return whether mlx-lm can continue several prompts side by side; building a step's graph, which is not run, tells.

    Gemma 2's code cannot take a mask for each row: it raises an error, or, with as many rows as heads, mixes the two up.
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
    """Return what is done to the logits of each prompt before the largest is taken."""
    if seeds is None or sampling.temperature == 0:
        return [_in_float32 for _ in prompts]
    return [_draws(seed, sampling) for seed in seeds]


def in_a_batch(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
    processors: Sequence[Processor],
    stop: Callable[[], bool] = never,
) -> list[Generated]:
    """Continue the prompts side by side."""
    rows = len(prompts)
    generator = BatchGenerator(
        model,
        max_tokens=max_new_tokens,
        stop_tokens=[[token] for token in end_ids],
        completion_batch_size=rows,
        prefill_batch_size=rows,
    )
    try:
        order = generator.insert(
            [list(prompt[-1:]) for prompt in prompts],
            caches=prefilled(model, prompts),  # whose rows it copies
            logits_processors=[[each] for each in processors],
        )
        tokens: dict[int, list[int]] = {row: [] for row in order}
        while not stop() and (responses := generator.next_generated()):
            for response in responses:
                tokens[response.uid].append(response.token)
    finally:
        generator.close()  # which gives the wired memory back
    return [Generated.of(tokens[row], end_ids) for row in order]


def one_by_one(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
    processors: Sequence[Processor],
    stop: Callable[[], bool] = never,
) -> list[Generated]:
    """Continue one prompt after the other, for models whose caches cannot be batched."""
    answers = []
    for prompt, cache, processor in zip(prompts, prefilled(model, prompts), processors, strict=True):
        tokens = stream(model, prompt[-1:], max_new_tokens, end_ids, processor, copy.deepcopy(cache))
        answers.append(Generated.of(list(takewhile(lambda _: not stop(), tokens)), end_ids))
    return answers


def prefilled(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[Any]]:
    """Return the cache of all tokens of each prompt but its last; equal prompts have the same one, computed once.

    Each prompt by itself: beside longer ones it is padded, which the code of some models with recurrent states ignores.
    """
    caches = {prompt: _prefill(model, prompt[:-1]) for prompt in dict.fromkeys(map(tuple, prompts))}
    return [caches[tuple(prompt)] for prompt in prompts]


def _prefill(model: Any, tokens: Sequence[int]) -> list[Any]:
    cache = make_prompt_cache(model)
    for start in range(0, len(tokens), PREFILL):
        model(mx.array(tokens[start : start + PREFILL])[None], cache=cache)
        mx.eval([each.state for each in cache])  # and not the logits
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
        cache: of the tokens in front of `prompt`, changed by this.
    """
    own = mx.default_stream(mx.default_device())
    steps = generate_step(
        mx.array(list(prompt)), model, max_tokens=max_new_tokens, logits_processors=[processor], prompt_cache=cache
    )
    with closing(steps):
        while True:
            # generate_step keeps its stream the default between its tokens, and two in turn would leave it behind for good.
            with mx.stream(own):
                step = next(steps, None)
            if step is None:
                return
            token = int(step[0])
            yield token
            if token in end_ids:
                return


def _in_float32(_: Any, logits: mx.array) -> mx.array:
    """In bfloat16, where mlx-lm would normalise them, logits that differ become equal."""
    return logits.astype(mx.float32)


def _draws(seed: int, sampling: Sampling) -> Processor:
    """Return a processor that adds Gumbel noise to one row's logits: their maximum is then a draw from the softmax.

    The noise comes from a key of the row's own; MLX's random state is not touched. It is -log(E), E exponential: -log1p(-u)
    and not -log(u), because a uniform number of 32 bits in float32 has them all near 0 and only 24 near 1, and it is with a
    small E that the rare tokens of a large vocabulary win.
    """
    state = mx.random.key(seed)

    def add_noise(_: Any, logits: mx.array) -> mx.array:
        nonlocal state
        state, key = mx.random.split(state)
        uniform = mx.maximum(mx.random.uniform(shape=logits.shape, key=key), 2.0**-33)  # 0 would win over every logit
        logits = logits.astype(mx.float32) / sampling.temperature
        if sampling.top_p < 1:
            logits = _nucleus(logits, sampling.top_p)
        return logits - mx.log(-mx.log1p(-uniform))

    return add_noise


def _nucleus(logits: mx.array, top_p: float) -> mx.array:
    """Keep the fewest likeliest tokens whose probability reaches `top_p`; the others become minus infinity."""
    order = mx.argsort(-logits, axis=-1)
    shares = mx.softmax(mx.take_along_axis(logits, order, -1), -1)
    kept = mx.cumsum(shares, -1) - shares < top_p  # what comes before a token does not reach it yet
    return mx.where(mx.put_along_axis(mx.zeros_like(kept), order, kept, -1), logits, -mx.inf)
