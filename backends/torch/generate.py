"""Generation on torch: the batch and its left padding, and draws from exactly the model's own distribution."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor

from lite_dil.backends.torch import out_of_memory
from lite_dil.backends.types import Generated, Sampling, never


def generate(
    base: Any,
    device: torch.device,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int],
    seeds: Sequence[int] | None,
    sampling: Sampling,
    stop: Callable[[], bool] = never,
    share: bool = True,
) -> list[Generated]:
    """Continue the prompts in one batch of a transformers model; see `lite_dil.backends.protocol.Backend.generate`.

    Args:
        share: compute a prompt that comes several times once.
    """
    place = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
    rows = torch.LongTensor([place[tuple(prompt)] for prompt in prompts])
    longest = max(map(len, place))
    ids = torch.tensor([[end_ids[0]] * (longest - len(prompt)) + list(prompt) for prompt in place], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in place], device=device)
    draws = _draws(seeds, sampling)
    with _plain_settings(base):
        cache = _prefill(base, ids, mask) if share and len(place) < len(prompts) else None
        if cache is not None:
            cache.reorder_cache(rows)
        out = base.generate(
            input_ids=ids[rows],
            attention_mask=mask[rows],
            max_new_tokens=max_new_tokens,
            do_sample=False,  # `Draws` leaves one token to choose from
            use_cache=True,  # an empty GenerationConfig need not say so
            logits_processor=None if draws is None else [draws],
            stopping_criteria=[lambda rows, _: torch.full((len(rows),), stop(), device=device)],
            eos_token_id=list(end_ids),
            pad_token_id=end_ids[0],
            **({} if cache is None else {"past_key_values": cache}),
        )
    return [Generated.of(row, end_ids) for row in out[:, longest:].tolist()]


def _prefill(base: Any, ids: Tensor, mask: Tensor) -> DynamicCache | None:
    """Return the cache of all tokens but each row's last, or None where it does not hold all of the model's state by rows."""
    if ids.shape[1] == 1 or "past_key_values" not in inspect.signature(base.forward).parameters:
        return None
    out = base.generate(
        input_ids=ids[:, :-1],
        attention_mask=mask[:, :-1],
        max_new_tokens=1,
        do_sample=False,
        use_cache=True,
        return_dict_in_generate=True,
    )
    cache = out.past_key_values
    # Classes of the model's own may hold more than what `reorder_cache` knows of.
    if type(cache) is not DynamicCache or any(type(layer).__module__ != DynamicCache.__module__ for layer in cache.layers):
        return None
    # RecurrentGemma keeps its recurrent states in its modules and leaves these layers empty.
    recurrent = all(cache.has_previous_state(i) for i, linear in enumerate(cache.is_linear) if linear)
    return cache if recurrent and all(getattr(layer, "is_initialized", True) for layer in cache.layers) else None


def stream(
    base: Any,
    device: torch.device,
    prompt: Sequence[int],
    max_new_tokens: int,
    end_ids: Sequence[int],
    seed: int | None,
    sampling: Sampling,
) -> Iterator[int]:
    """Continue one prompt with a transformers model; see `lite_dil.backends.protocol.Backend.stream`.

    One forward a token, all of it inside one `next`.
    """
    draws = _draws(None if seed is None else [seed], sampling)
    past, new, cache = list(prompt), list(prompt), None
    for _ in range(max_new_tokens):
        ids = torch.tensor([new], device=device)
        scores, cache = out_of_memory.whole("the generation of an answer", device, partial(_forward, base, ids, cache))
        token = int((scores if draws is None else draws(ids, scores)).argmax(-1))
        yield token
        if token in end_ids:
            return
        past.append(token)
        new = past if cache is None else [token]  # a model of another kind of state computes all of it again


@torch.no_grad()
def _forward(base: Any, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Return the logits behind the last of `ids`, (1, vocabulary) float32, and the cache, of the kind that the model makes."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(base.forward).parameters else {}
    out = base(input_ids=ids, past_key_values=cache, use_cache=True, **last)
    return out.logits[:, -1].float(), getattr(out, "past_key_values", None)


def _draws(seeds: Sequence[int] | None, sampling: Sampling) -> Draws | None:
    """Return what draws the tokens of each row, or None where the likeliest is taken."""
    return None if seeds is None or sampling.temperature == 0 else Draws(seeds, sampling)


class Draws(LogitsProcessor):
    """Draws each row's next token from its logits, by one number of the row's own a token.

    The numbers come from numpy: torch's random state, which dropout draws from, is not touched.
    """

    def __init__(self, seeds: Sequence[int], sampling: Sampling) -> None:
        self.rows, self.sampling = [np.random.default_rng(seed) for seed in seeds], sampling

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores`, (rows, vocabulary), as 0 for the token drawn and minus infinity for all others."""
        numbers = torch.tensor([[row.random()] for row in self.rows], dtype=torch.float64)
        token = pick(scores, numbers.to(scores.device), self.sampling)
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)


def pick(logits: Tensor, numbers: Tensor, sampling: Sampling) -> Tensor:
    """Return the token of each row, (rows, 1), at which the sum of the probabilities passes its number from [0, 1).

    In float64: float32 would make one step of several of a large vocabulary's rare tokens, all but one never drawn.
    """
    shares = (logits.double() / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        ordered, order = shares.sort(dim=-1, descending=True, stable=True)
        kept = ordered.cumsum(-1) - ordered < sampling.top_p  # what comes before a token does not reach it yet
        shares = torch.zeros_like(shares).scatter(-1, order, ordered * kept)
    sums = shares.cumsum(-1)
    return torch.searchsorted(sums, numbers * sums[:, -1:], right=True).clamp_max(logits.shape[-1] - 1)


@contextmanager
def _plain_settings(base: Any) -> Iterator[None]:
    """Keep out what the checkpoint's generation_config.json sets: a repetition penalty, say, would bend greedy search too.

    An argument of `generate` only overrules the settings that it names.
    """
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own
